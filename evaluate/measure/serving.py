"""What needs a server: a model's speed and its answers to the probes, through the project's own client.

Starts the vLLM server that the project serves with. Keeps the client's files and the server's log under
evaluation/served-<model>/ in the run directory. Every model gets the same settings, prompts and machine. Answers end
where the model ends them, so their lengths differ: the figure is tokens per second.

    alone       one streamed request after the other: time to the first token, and tokens per second
    saturated   many at once, several times over, each time with other prompts first
"""

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Literal

import msgspec

from evaluate.measure.results import FOLDER, Burst, Lone, ProbeResult, SpeedResult, answer_row
from evaluate.models import Subject, engine_folder, name_machine
from generate.budget import shared_budget
from generate.context import asked_rows
from generate.dialect import Dialect
from generate.event_loop import run_loop
from generate.jobs import build_jobs
from generate.reply import EMPTY
from generate.run import generate
from generate.streaming import stream, streaming_session
from generate.summary import Summary
from pipeline.errors import DistillError
from pipeline.generate_config import GenerateConfig
from pipeline.prompts_config import PromptsConfig
from pipeline.recipe import Recipe
from pipeline.records import Completion, Failure, Kept, Prompt, asked_fields, read_jsonl
from pipeline.rundir import SERVED, RunDir, write_jsonl
from pipeline.section import BudgetConfig
from pipeline.students import TEACHER
from pipeline.teacher_config import TeacherConfig
from serve.command import serve_settings
from serve.server import Server, free_port, serving

GONE_S = 5.0  # a server of ours that takes no requests for so long has ended: nobody starts it again
EXIT_S = 5.0  # for a server that stopped answering to exit
CLOCK_SET_S = 0.1  # that the machine's clock gained or lost in a burst: somebody has set it
WARM_UP_REQUESTS = 8
WARM_UP_TOKENS = 8
QUESTIONS = "questions.jsonl"  # in a folder: what is asked


@contextmanager
def serve_subject(recipe: Recipe, run: RunDir, subject: Subject) -> Iterator[tuple[Server, Path]]:
    """A server of the model, and the empty folder for its files. Raises DistillError if it does not start, or exits."""
    folder = run.path / FOLDER / f"{SERVED}{subject.key}"
    shutil.rmtree(folder, ignore_errors=True)  # a stopped timing starts again
    folder.mkdir(parents=True)
    model, log = str(engine_folder(subject, run)), folder / "server.log"
    config = serve_settings(recipe, teacher=subject.key == TEACHER)
    with serving(model, port=free_port(), config=config, log=log, served_name=subject.key) as server:
        try:
            yield server, folder
        except DistillError as error:
            if server.wait(EXIT_S) is not None:
                raise server.failure(f"while the {subject.label} was measured") from error
            raise


def answer_probes(recipe: Recipe, folder: Path, prompts: Sequence[Prompt], asked: Sequence[Prompt]) -> ProbeResult:
    """The recipe's teacher, which may be a server of ours, answers the prompts with the recipe's own sampling.

    `asked` are the same prompts as this model is asked them (evaluate.models.as_asked).
    """
    ask_prompts(recipe, folder, asked)
    answers = _answers_in(folder, recipe, prompts)
    if not answers:
        raise DistillError(f"{recipe.teacher.model}: no probe was answered; see {folder}")
    return ProbeResult(answers=answers, failed=len(prompts) - len(answers))


def answer_questions(
    recipe: Recipe, folder: Path, prompts: Sequence[Prompt], asked: Sequence[Prompt], timed: Sequence[Prompt]
) -> ProbeResult:
    """As `answer_probes`, but with temperature 0; before that, `timed` are timed: answers as long as they come."""
    sampling = recipe.sampling.model_copy(update={"temperature": 0.0, "top_p": 1.0})
    greedy = recipe.model_copy(update={"sampling": sampling})
    bursts: list[Burst] = []
    if timed:
        ask_prompts(greedy, folder / "warm-up", timed[:WARM_UP_REQUESTS])
        config = greedy.generate.model_copy(update={"concurrency": recipe.evaluate.speed_concurrency})
        bursts = _bursts(greedy.model_copy(update={"generate": config}), folder, timed, WARM_UP_REQUESTS)
    result = answer_probes(greedy, folder / "answers", prompts, asked)
    return msgspec.structs.replace(result, bursts=bursts)


def measure_speed(recipe: Recipe, server: Server, folder: Path, prompts: Sequence[Prompt]) -> SpeedResult:
    """Warms the server up, and times it. Raises DistillError if a lone request fails, or all requests of a burst do."""
    wanted, start = recipe.evaluate, WARM_UP_REQUESTS
    ask_prompts(with_server(recipe, server, max_tokens=WARM_UP_TOKENS), folder / "warm-up", prompts[:start])
    alone = _time_alone(
        with_server(recipe, server, max_tokens=wanted.speed_max_tokens), _cycle(prompts, start, wanted.speed_alone)
    )
    start += wanted.speed_alone
    own = with_server(recipe, server, max_tokens=wanted.speed_max_tokens, concurrency=wanted.speed_concurrency)
    bursts = _bursts(own, folder, prompts, start)
    if not all(burst.completion_tokens for burst in bursts):
        raise DistillError(f"{server.served_name}: no request was answered; see {folder}")
    command = server.command
    return SpeedResult(
        device=command.device,
        dtype=command.dtype,
        bursts=bursts,
        alone=alone,
        peak_rss_bytes=server.peak_rss() if command.device == "cpu" else None,
    )


def _bursts(recipe: Recipe, folder: Path, prompts: Sequence[Prompt], start: int) -> list[Burst]:
    """`speed_requests` requests at once, `speed_repeats` times, each time with other prompts first."""
    wanted, bursts = recipe.evaluate, []
    for number in range(wanted.speed_repeats):
        questions = _cycle(prompts, start + number * wanted.speed_requests, wanted.speed_requests)
        own, ahead = folder / f"timed-{number + 1}", _clock_ahead()
        done = ask_prompts(recipe, own, questions)
        replies = _replies_in(RunDir(own))
        tokens = sum(one.usage.completion_tokens or 0 for one in replies if one.usage)
        seconds = _seconds_of(replies)
        if not seconds or abs(_clock_ahead() - ahead) > CLOCK_SET_S:
            seconds = done.wall_s
        bursts.append(Burst(done.requests, done.requests - len(replies), tokens, seconds, name_machine()))
    return bursts


def _replies_in(run: RunDir) -> list[Completion | Failure]:
    """What the model wrote to each request: also nothing, or a thought that was cut off, which takes its time, too."""
    silent = (failure for failure in read_jsonl(run.failures, Failure) if failure.error in EMPTY)
    return [*read_jsonl(run.completions, Completion), *silent]


def _clock_ahead() -> float:
    """How far the machine's clock, which can be set, is ahead of one that cannot."""
    return time.time() - time.monotonic()


def _seconds_of(replies: Sequence[Completion | Failure]) -> float:
    """From the first request to the last reply, without the client's own start and end; 0 without a reply."""
    ends = [datetime.fromisoformat(reply.created).timestamp() for reply in replies]
    starts = [end - reply.latency_s for end, reply in zip(ends, replies, strict=True)]
    return max(ends, default=0.0) - min(starts, default=0.0)


def speed_prompts(recipe: Recipe, run: RunDir, rows: Sequence[Kept], taken: Sequence[Prompt] = ()) -> list[Prompt]:
    """Different prompts for a timing, as many as it can use: those of the test rows first, then the run's others.

    Those that are `taken` come last: what a server has read once it need not read again, and is faster.
    """
    wanted = recipe.evaluate
    count = WARM_UP_REQUESTS + wanted.speed_alone + wanted.speed_requests * wanted.speed_repeats
    of_rows = (Prompt(id=row.prompt_id, **asked_fields(row)) for row in rows)
    others = read_jsonl(run.prompts, Prompt) if run.prompts.is_file() else ()
    seen, found = {prompt.id for prompt in taken}, dict[str, Prompt]()
    for prompt in chain(of_rows, others):
        if len(found) == count:
            break
        if prompt.id not in seen:
            found.setdefault(prompt.id, prompt)
    return [*found.values(), *taken][:count]


def with_server(
    recipe: Recipe, server: Server, *, max_tokens: int | None = None, concurrency: Literal["auto"] | int = "auto"
) -> Recipe:
    """The recipe with a server of ours in the teacher's place, and nothing to pay."""
    sampling = {} if max_tokens is None else {"max_tokens": max_tokens}
    return recipe.model_copy(
        update={
            "teacher": TeacherConfig(model=server.served_name, base_url=server.base_url, api_key_env="VLLM_API_KEY"),
            "sampling": recipe.sampling.model_copy(update=sampling),
            "generate": GenerateConfig(concurrency=concurrency, give_up_s=GONE_S),
            "budget": BudgetConfig(),
        }
    )


def ask_prompts(recipe: Recipe, folder: Path, prompts: Sequence[Prompt]) -> Summary:
    """Sends the prompts through `generate`. What the folder has an answer to is not asked again; what failed is."""
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / QUESTIONS, prompts)
    return generate(_asking(recipe, folder), RunDir(folder, internal=True), quiet=True, retry_failures=True)


def with_rest_of_budget(recipe: Recipe, folder: Path, name: str) -> Recipe:
    """The recipe with what its budget leaves after all that the teacher was asked in the folder, but for `name`."""
    journals = folder.rglob(RunDir(folder).completions.name)
    others = [RunDir(path.parent) for path in journals if folder / name not in path.parents]
    return recipe.model_copy(update={"budget": shared_budget(recipe.budget, others)})


def _asking(recipe: Recipe, folder: Path) -> Recipe:
    prompting = PromptsConfig(file=folder / QUESTIONS)
    return recipe.model_copy(update={"teacher": recipe.teacher.told_nothing(), "prompts": prompting})


def _answers_in(folder: Path, recipe: Recipe, prompts: Sequence[Prompt]) -> list[Kept]:
    """What was answered to the prompts, in their order, once each.

    For `generate` an empty answer is a failure; here it is what the model said, with the failure's type in place of
    a finish_reason. Requests that failed for any other reason have none. What a model thought is apart from its text,
    as it is for the teacher's answers (pipeline.reasoning).
    """
    run, asking, model = RunDir(folder), _asking(recipe, folder), recipe.teacher.model
    by_id, found = {prompt.id: prompt for prompt in prompts}, dict[str, Kept]()
    for request, failure in asked_rows(asking, run.failures, Failure):
        if failure.error in EMPTY:
            found[request.prompt_id] = answer_row(model, by_id[request.prompt_id], "", failure.error)
    for request, row in asked_rows(asking, run.completions, Completion):
        prompt = by_id[request.prompt_id]
        found[prompt.id] = answer_row(model, prompt, row.text, row.finish_reason, row.reasoning, row.tool_calls)
    return [found[id_] for id_ in by_id if id_ in found]


def _cycle(prompts: Sequence[Prompt], start: int, count: int) -> list[Prompt]:
    """`count` prompts from number `start` on; after the last comes the first."""
    return [prompts[(start + number) % len(prompts)] for number in range(count)]


def _time_alone(recipe: Recipe, prompts: Sequence[Prompt]) -> list[Lone]:
    dialect, found = Dialect(), list[Lone]()

    async def one_by_one() -> None:
        async with streaming_session(recipe.teacher, recipe.generate.request_timeout_s) as session:
            for job in build_jobs(prompts, recipe):
                said = await stream(session, recipe.teacher, dialect.body(job))
                found.append(Lone(said.first - said.begin, said.end - said.begin, said.tokens))

    run_loop(one_by_one())
    return found
