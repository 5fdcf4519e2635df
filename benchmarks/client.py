"""`python -m benchmarks.client`: our client against AsyncOpenAI and against a bare aiohttp loop, on a local stub.

Each run is a process of its own, which imports only what its side needs. The sides take turns, so that a change in the
machine's load affects all of them.
"""

import asyncio
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any, Literal

from benchmarks.http_server import MODEL, running
from benchmarks.measure import Measured, flags, measured, one_of, question, several, show, whole


def main() -> None:
    kinds = {"in_flight": several(whole), "clients": several(one_of(*CLIENTS))}
    sides = "ours,openai,openai+aiohttp,bare"
    options = flags(__doc__, kinds, requests=4000, in_flight="64,512", runs=3, delay_ms=50.0, clients=sides)
    with running("benchmarks.stub", "--delay-ms", options.delay_ms) as url:
        for in_flight in options.in_flight:
            figures = compare(url, options.clients, options.requests, in_flight, options.runs)
            print(f"{in_flight} in flight, {options.requests} requests, answers after {options.delay_ms:g} ms")
            print(describe(figures, options.requests, in_flight / options.delay_ms * 1000))


def compare(url: str, names: list[str], requests: int, in_flight: int, runs: int) -> dict[str, Measured]:
    """The medians of each client's figures; the value is the seconds of the requests."""
    taken: dict[str, list[Measured]] = {name: [] for name in names}
    for _ in range(runs):
        for name in names:
            taken[name].append(measured(CLIENTS[name], url, requests, in_flight))
    return {name: Measured(*map(median, zip(*calls, strict=True))) for name, calls in taken.items()}


def describe(figures: dict[str, Measured], requests: int, most: float) -> str:
    """The table; `most` is how many requests per second the stub can answer."""
    head = ("client", "req/s", "of the stub's most", "of bare", "of openai", "whole s", "CPU ms/request", "peak MiB")
    rows: list[tuple[str, ...]] = [head]
    for name, (sent_s, whole_s, cpu_s, peak_mib) in figures.items():
        others = (figures.get(other) for other in ("bare", "openai"))
        ratios = (f"{other.value / sent_s:.2f}" if other else "-" for other in others)
        used = f"{whole_s:.1f}", f"{1000 * cpu_s / requests:.2f}", f"{peak_mib:.0f}"
        rows.append((name, f"{requests / sent_s:.0f}", f"{requests / sent_s / most:.2f}", *ratios, *used))
    return show(rows)


def body(number: int) -> dict[str, Any]:
    """The chat request, as `generate` makes it."""
    messages = [{"role": "user", "content": question(number)}]
    sampling = {"temperature": 0.8, "top_p": 0.9, "max_tokens": 500, "seed": number}
    return {"model": MODEL, "messages": messages, **sampling}


def ours(url: str, requests: int, in_flight: int | Literal["auto"]) -> float:
    """`generate` with everything on: ids, journals, fsync, limits and budget. Returns the seconds of the requests."""
    from benchmarks.runs import fresh, run_quietly

    limits = {"requests_per_minute": 10_000_000, "tokens_per_minute": 10_000_000_000}
    settings = {"concurrency": in_flight, **limits}
    teacher, budget = {"price": {"input": 0.1, "output": 0.4}}, {"usd": 10_000, "tokens": 10**12}
    with fresh(url, requests, teacher, generate=settings, budget=budget) as (recipe, run):
        summary = run_quietly(recipe, run)
        assert summary.answered == requests, summary
        return summary.wall_s


def ours_auto(url: str, requests: int, _in_flight: int) -> float:
    """The same, and it finds by itself how many to have in flight; the stub shows no queue."""
    return ours(url, requests, "auto")


def bare(url: str, requests: int, in_flight: int) -> float:
    """aiohttp and uvloop, bodies built before: the most that this machine can send and read."""
    import aiohttp
    import uvloop

    left = iter([json.dumps(body(number)).encode() for number in range(requests)])

    async def main() -> float:
        connector, headers = aiohttp.TCPConnector(limit=0), {"Content-Type": "application/json"}
        jar = aiohttp.DummyCookieJar()
        async with aiohttp.ClientSession(connector=connector, headers=headers, cookie_jar=jar) as session:

            async def work() -> None:
                for data in left:
                    async with session.post(f"{url}/chat/completions", data=data) as response:
                        await response.read()

            started = time.perf_counter()
            await asyncio.gather(*(work() for _ in range(in_flight)))
            return time.perf_counter() - started

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


def openai_default(url: str, requests: int, in_flight: int) -> float:
    """AsyncOpenAI with its default transport."""
    return asyncio.run(_openai(url, requests, in_flight))


def openai_aiohttp(url: str, requests: int, in_flight: int) -> float:
    """AsyncOpenAI on its aiohttp transport."""
    from openai import DefaultAioHttpClient

    return asyncio.run(_openai(url, requests, in_flight, DefaultAioHttpClient))


async def _openai(url: str, requests: int, in_flight: int, transport: Callable[[], Any] | None = None) -> float:
    """AsyncOpenAI as it is commonly used: one client, a semaphore, a gather."""
    from openai import AsyncOpenAI

    http = transport() if transport else None
    async with AsyncOpenAI(api_key="none", base_url=url, timeout=300, max_retries=2, http_client=http) as openai:
        semaphore = asyncio.Semaphore(in_flight)

        async def answer(number: int) -> str:
            async with semaphore:
                reply = await openai.chat.completions.create(**body(number))
                return reply.choices[0].message.content or ""

        started = time.perf_counter()
        texts = await asyncio.gather(*(answer(number) for number in range(requests)))
        assert all(texts)
        return time.perf_counter() - started


CLIENTS: dict[str, Callable[[str, int, int], float]] = {
    "ours": ours,
    "auto": ours_auto,
    "openai": openai_default,
    "openai+aiohttp": openai_aiohttp,
    "bare": bare,
}


if __name__ == "__main__":
    from pipeline.cli import run_stage  # here: each side's process would hold it, too

    run_stage(main)
