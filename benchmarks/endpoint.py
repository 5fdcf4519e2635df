"""`make bench-endpoint`: an endpoint at rising concurrency: tokens per second, time to first token, latency.

Sends the recipe's own prompts with its own sampling, streamed, so that the first token is seen. At each level every
slot sends one request after the other. Once each slot has had an answer, `--seconds` are measured: the tokens that come
in during them, and the latencies of the requests that begin in them, to their end. Writes a table to stdout, and
runs/bench/endpoint.{json,svg}.
"""

import asyncio
import itertools
import sys
import time
from collections.abc import Iterator
from math import inf
from pathlib import Path

import aiohttp
import msgspec
import numpy as np

from benchmarks.measure import positive, several, show, whole
from benchmarks.runs import bodies
from evaluate.document import exactly, number
from evaluate.report.charts import dot_panel
from evaluate.report.html import draw_svg
from generate.client import Client, check_teacher, no_endpoint
from generate.event_loop import run_loop
from generate.streaming import Streamed, stream, streaming_session
from pipeline.cli import parse_stage, run_stage, stage_parser
from pipeline.errors import DistillError
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
    parser = stage_parser("benchmarks.endpoint", "Measures the recipe's endpoint at rising concurrency.")
    parser.add_argument("--levels", type=several(whole), default="1,4,16,64,256")
    parser.add_argument("--seconds", type=positive, default=20.0, help="each level is measured")
    recipe, _, options = parse_stage(parser)
    check_teacher(recipe.teacher)
    found: list[Level] = []
    try:
        run_loop(sweep(recipe, options.levels, options.seconds, found))
    finally:
        if found:  # also after Ctrl-C: they are paid for
            write(recipe, found)


def write(recipe: Recipe, found: list[Level]) -> None:
    print(describe(found))
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "endpoint.json").write_bytes(msgspec.json.format(msgspec.json.encode(found)))
    (FOLDER / "endpoint.svg").write_text(chart(f"{recipe.teacher.model} at {recipe.teacher.url}", found))
    print(f"The chart is in {FOLDER / 'endpoint.svg'}")


async def sweep(recipe: Recipe, levels: list[int], seconds: float, found: list[Level]) -> None:
    """Measures one level after the other, until the endpoint refuses one. Raises DistillError if that is the first."""
    requests = itertools.cycle(bodies(recipe, most=2000))
    async with Client(recipe.teacher, recipe.teacher.url) as client:
        if why := await client.check_reachable():
            raise no_endpoint(recipe.teacher, client.url, why)
    async with streaming_session(recipe.teacher, recipe.generate.request_timeout_s) as session:
        for concurrency in levels:
            try:
                found.append(await measure(session, recipe, requests, concurrency, seconds))
            except DistillError as error:
                why = f"{concurrency} in flight: {error}"
                if not found:
                    raise DistillError(why) from None
                print(f"{why}; the levels measured before are kept", file=sys.stderr)
                return
            print(f"{concurrency} in flight: {found[-1].tokens_per_s:.1f} tok/s", file=sys.stderr)


async def measure(
    session: aiohttp.ClientSession, recipe: Recipe, requests: Iterator[bytes], concurrency: int, seconds: float
) -> Level:
    """One level. Raises DistillError if the endpoint refuses a request."""
    sent: list[Streamed] = []
    started = inf  # when every slot has had its first answer
    cold = concurrency

    async def work() -> None:
        nonlocal started, cold
        sent.append(await stream(session, recipe.teacher, next(requests)))
        cold -= 1
        if not cold:
            started = time.perf_counter()
        while time.perf_counter() < started + seconds:
            sent.append(await stream(session, recipe.teacher, next(requests)))

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return level_of(sent, concurrency, started, started + seconds)


def level_of(sent: list[Streamed], concurrency: int, begin: float, end: float) -> Level:
    """The figures of the time from `begin` to `end`; at least one request must begin in it."""
    began = [one for one in sent if begin <= one.begin < end]
    ended = sum(begin <= one.end < end for one in sent)
    return Level(
        concurrency=concurrency,
        answers=ended,
        answers_per_s=ended / (end - begin),
        tokens_per_s=sum(tokens_within(one, begin, end) for one in sent) / (end - begin),
        first_token=percentiles([one.first - one.begin for one in began]),
        latency=percentiles([one.end - one.begin for one in began]),
    )


def tokens_within(one: Streamed, begin: float, end: float) -> float:
    """The tokens of an answer that came in from `begin` to `end`, if they came evenly from its first to its last."""
    if one.end <= one.first:  # all at once
        return one.tokens if begin <= one.end < end else 0
    return one.tokens * max(0.0, min(one.end, end) - max(one.first, begin)) / (one.end - one.first)


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """The 50th, 95th and 99th."""
    p50, p95, p99 = np.percentile(values, (50, 95, 99)).tolist()
    return p50, p95, p99


def describe(found: list[Level]) -> str:
    """The table, and the concurrency from which throughput no longer rises."""
    seconds = "p50 · p95 · p99, s"
    head = ("in flight", "answers", "answers/s", "tok/s", f"first token {seconds}", f"latency {seconds}")
    rows: list[tuple[str, ...]] = [head]
    for level in found:
        times = (" · ".join(f"{value:.2f}" for value in values) for values in (level.first_token, level.latency))
        rates = f"{level.answers_per_s:.2f}", f"{level.tokens_per_s:.1f}"
        rows.append((str(level.concurrency), str(level.answers), *rates, *times))
    most = max(level.tokens_per_s for level in found)
    enough = next(level for level in found if level.tokens_per_s >= 0.97 * most)
    return f"{show(rows)}\n{enough.concurrency} in flight is enough: {enough.tokens_per_s:.1f} tok/s"


def chart(title: str, found: list[Level]) -> str:
    """Throughput and medians per level, as an SVG."""
    panels = []
    for name, hint, values in (
        ("Tokens per second", "", [level.tokens_per_s for level in found]),
        ("Latency", "median, seconds", [level.latency[0] for level in found]),
        ("First token", "median, seconds", [level.first_token[0] for level in found]),
    ):
        dots = zip(found, values, strict=True)
        figures = [(f"{at.concurrency} in flight", exactly(value), "arm", number(value)) for at, value in dots]
        panels.append(dot_panel(name, hint, figures))
    return draw_svg(title, panels)


if __name__ == "__main__":
    run_stage(main)
