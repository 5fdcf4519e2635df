"""`make bench-endpoint`: how an endpoint does at rising concurrency: tokens a second, time to first token, latency.

Asks the recipe's own prompts with its own sampling, streamed (that is how a first token is seen). At each level every
slot asks again and again; once each has had an answer, `--seconds` are measured: the tokens that come in meanwhile, and
the latencies of the requests that begin meanwhile, to their end. Writes a table to stdout, and
runs/bench/endpoint.{json,svg}.
"""

import asyncio
import itertools
import sys
import time
from collections.abc import Iterator
from math import inf
from pathlib import Path
from statistics import median, quantiles

import aiohttp
import msgspec

from benchmarks.plot import line_chart
from benchmarks.table import show
from generate.client import Client, check_teacher, no_endpoint
from generate.dialect import Dialect
from generate.endpoint import TIMEOUT_WORKING_S
from generate.jobs import Job, build_jobs
from generate.online import run_loop
from generate.prompts import iter_prompts
from generate.streaming import Streamed, stream, streaming_session
from pipeline.cli import parse_stage, run_stage, stage_parser
from pipeline.errors import DistillError, UsageError
from pipeline.recipe import Recipe

FOLDER = Path("runs") / "bench"


class Level(msgspec.Struct):
    """One concurrency's figures; seconds."""

    concurrency: int
    answers: int
    answers_per_s: float
    tokens_per_s: float
    first_token: tuple[float, float, float]  # p50, p95, p99
    latency: tuple[float, float, float]


def main() -> None:
    parser = stage_parser("benchmarks.endpoint", "Sweeps concurrency against the recipe's endpoint.")
    parser.add_argument("--levels", default="1,4,16,64,256")
    parser.add_argument("--seconds", type=float, default=20.0, help="each level is measured")
    recipe, _, options = parse_stage(parser)
    levels = [_level(text) for text in options.levels.split(",")]
    check_teacher(recipe.teacher)
    found: list[Level] = []
    run_loop(sweep(recipe, levels, options.seconds, found))
    print(describe(found))
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "endpoint.json").write_bytes(msgspec.json.format(msgspec.json.encode(found)))
    series = {
        "tokens a second": [level.tokens_per_s for level in found],
        "latency p50, s": [level.latency[0] for level in found],
        "first token p50, s": [level.first_token[0] for level in found],
    }
    (FOLDER / "endpoint.svg").write_text(
        line_chart(f"{recipe.teacher.model} at {recipe.teacher.url}", [level.concurrency for level in found], series)
    )
    print(f"{FOLDER / 'endpoint.svg'} shows it")


async def sweep(recipe: Recipe, levels: list[int], seconds: float, found: list[Level]) -> None:
    """Measures one level after the other, until the endpoint refuses one. Raises DistillError if that is the first."""
    dialect = Dialect()
    bodies = itertools.cycle([dialect.body(job) for job in itertools.islice(_jobs(recipe), 2000)])
    async with Client(recipe.teacher, recipe.teacher.url) as client:
        if why := await client.check_reachable():
            raise no_endpoint(recipe.teacher, client.url, why)
    timeout_s = recipe.generate.request_timeout_s or TIMEOUT_WORKING_S
    async with streaming_session(recipe.teacher, timeout_s) as session:
        for concurrency in levels:
            try:
                found.append(await measure(session, recipe, bodies, concurrency, seconds))
            except (DistillError, aiohttp.ClientError, TimeoutError) as error:
                why = f"{concurrency} in flight: {str(error) or type(error).__name__}"
                if not found:
                    raise DistillError(why) from None
                print(f"{why}; what was measured before stands", file=sys.stderr)
                return
            print(f"{concurrency} in flight: {found[-1].tokens_per_s:.1f} tok/s", file=sys.stderr)


async def measure(
    session: aiohttp.ClientSession, recipe: Recipe, bodies: Iterator[bytes], concurrency: int, seconds: float
) -> Level:
    """One level. Raises DistillError where the endpoint refuses a request."""
    asked: list[Streamed] = []
    started = inf  # when every slot has had its first answer
    cold = concurrency

    async def work() -> None:
        nonlocal started, cold
        asked.append(await stream(session, recipe.teacher, next(bodies)))
        cold -= 1
        if not cold:
            started = time.perf_counter()
        while time.perf_counter() < started + seconds:
            asked.append(await stream(session, recipe.teacher, next(bodies)))

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return level_of(asked, concurrency, started, started + seconds)


def level_of(asked: list[Streamed], concurrency: int, begin: float, end: float) -> Level:
    """The figures of the time from `begin` to `end`, in which at least one request must begin."""
    began = [one for one in asked if begin <= one.begin < end]
    ended = sum(begin <= one.end < end for one in asked)
    return Level(
        concurrency=concurrency,
        answers=ended,
        answers_per_s=ended / (end - begin),
        tokens_per_s=sum(tokens_within(one, begin, end) for one in asked) / (end - begin),
        first_token=percentiles([one.first - one.begin for one in began]),
        latency=percentiles([one.end - one.begin for one in began]),
    )


def tokens_within(one: Streamed, begin: float, end: float) -> float:
    """The tokens of an answer that came in from `begin` to `end`, as if evenly from its first to its last."""
    if one.end <= one.first:  # all at once
        return one.tokens if begin <= one.end < end else 0
    return one.tokens * max(0.0, min(one.end, end) - max(one.first, begin)) / (one.end - one.first)


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """The 50th, 95th and 99th; of a single value, itself."""
    if len(values) < 2:
        return (values[0],) * 3
    cuts = quantiles(values, n=100, method="inclusive")
    return median(values), cuts[94], cuts[98]


def rows(found: list[Level]) -> list[tuple[str, ...]]:
    """The table's rows, its head included."""
    head = (
        "in flight",
        "answers",
        "answers/s",
        "tok/s",
        "first token p50 · p95 · p99, s",
        "latency p50 · p95 · p99, s",
    )
    return [
        head,
        *(
            (
                str(level.concurrency),
                str(level.answers),
                f"{level.answers_per_s:.2f}",
                f"{level.tokens_per_s:.1f}",
                " · ".join(f"{value:.2f}" for value in level.first_token),
                " · ".join(f"{value:.2f}" for value in level.latency),
            )
            for level in found
        ),
    ]


def describe(found: list[Level]) -> str:
    """The table, and where throughput stops rising."""
    best = max(found, key=lambda level: level.tokens_per_s)
    enough = next(level for level in found if level.tokens_per_s >= 0.97 * best.tokens_per_s)
    return f"{show(rows(found))}\n{enough.concurrency} in flight is enough: {enough.tokens_per_s:.1f} tok/s"


def _jobs(recipe: Recipe) -> Iterator[Job]:
    return build_jobs(iter_prompts(recipe), recipe)


def _level(text: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise UsageError(f"--levels must be whole numbers from 1, got {text!r}")
    return int(text)


if __name__ == "__main__":
    run_stage(main)
