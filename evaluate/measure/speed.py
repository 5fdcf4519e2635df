"""How fast a served model answers: alone and saturated, through the project's own client.

Every model gets the same settings, prompts and machine. Answers end where the model ends them, so the lengths differ:
the figure is tokens a second, and the mean length stands beside it.

    alone       one streamed request after the other: time to the first token, and tokens a second
    saturated   many at once, several times over, each time with other prompts first
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import aiohttp

from evaluate.measure.asking import ask, asking
from evaluate.measure.results import Burst, Lone
from generate.dialect import Dialect
from generate.endpoint import TIMEOUT_WORKING_S
from generate.jobs import build_jobs
from generate.online import run_loop
from generate.streaming import stream, streaming_session
from pipeline.errors import DistillError
from pipeline.recipe import Recipe
from pipeline.records import Kept, Prompt, read_jsonl
from pipeline.rundir import RunDir
from serve.server import Server

WARM_UP_REQUESTS = 8
WARM_UP_TOKENS = 8


def speed_prompts(recipe: Recipe, run: RunDir, rows: Sequence[Kept]) -> list[Prompt]:
    """Different prompts for the timing, as many as it can use: the held-out ones first, then the run's others."""
    wanted = recipe.evaluate
    count = WARM_UP_REQUESTS + wanted.speed_alone + wanted.speed_requests * wanted.speed_repeats
    return list(islice(_different(rows, run), count))


def _different(rows: Sequence[Kept], run: RunDir) -> Iterator[Prompt]:
    seen: set[str] = set()
    for row in rows:
        if row.prompt_id not in seen:
            seen.add(row.prompt_id)
            yield Prompt(id=row.prompt_id, messages=row.messages, slots=row.slots)
    for prompt in read_jsonl(run.prompts, Prompt) if run.prompts.is_file() else ():
        if prompt.id not in seen:
            seen.add(prompt.id)
            yield prompt


def time_server(
    recipe: Recipe, server: Server, folder: Path, prompts: Sequence[Prompt]
) -> tuple[list[Burst], list[Lone]]:
    """Warms the server up, and times it. Raises DistillError where a lone request fails, or all of a burst do."""
    wanted = recipe.evaluate
    start = WARM_UP_REQUESTS
    ask(asking(recipe, server, max_tokens=WARM_UP_TOKENS), folder / "warm-up", prompts[:start])
    limit = wanted.speed_max_tokens
    alone = _alone(asking(recipe, server, max_tokens=limit), _from(prompts, start, wanted.speed_alone))
    start += wanted.speed_alone
    bursts = []
    for number in range(wanted.speed_repeats):
        one = asking(recipe, server, max_tokens=limit, concurrency=wanted.speed_concurrency)
        questions = _from(prompts, start + number * wanted.speed_requests, len(prompts))
        done = ask(one, folder / f"timed-{number + 1}", questions, wanted.speed_requests)
        if not done.completion_tokens:
            raise DistillError(f"{server.served_name}: no request was answered; see {folder}")
        bursts.append(Burst(done.requests, done.failed, done.completion_tokens, done.wall_s))
    return bursts, alone


def _from(prompts: Sequence[Prompt], start: int, count: int) -> list[Prompt]:
    """`count` prompts from number `start` on, round and round."""
    return [prompts[(start + number) % len(prompts)] for number in range(count)]


def _alone(recipe: Recipe, prompts: Sequence[Prompt]) -> list[Lone]:
    dialect, found = Dialect(), list[Lone]()

    async def one_by_one() -> None:
        timeout_s = recipe.generate.request_timeout_s or TIMEOUT_WORKING_S
        async with streaming_session(recipe.teacher, timeout_s) as session:
            for job in build_jobs(prompts, recipe):
                said = await stream(session, recipe.teacher, dialect.body(job))
                found.append(Lone(said.first - said.begin, said.end - said.begin, said.tokens))

    try:
        run_loop(one_by_one())
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise DistillError(f"{recipe.teacher.url}: {str(error) or type(error).__name__}") from None
    return found
