"""`python -m benchmarks.client`: our client against AsyncOpenAI and against a bare aiohttp loop, on a local stub.

Each run is a process of its own. The sides take turns, so that a change in the machine's load affects all of them.
"""

import asyncio
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.http_server import MODEL, running
from benchmarks.measure import Measured, flags, measured, question, show

# The sides import what they need themselves, so that each process holds only what its side needs.


def main() -> None:
    options = flags(__doc__, requests=4000, in_flight="64,512", runs=3, delay_ms=50.0, clients=",".join(CLIENTS))
    with running("benchmarks.stub", "--delay-ms", options.delay_ms) as url:
        for in_flight in map(int, options.in_flight.split(",")):
            figures = compare(url, options.clients.split(","), options.requests, in_flight, options.runs)
            print(f"{in_flight} in flight, {options.requests} requests, answers after {options.delay_ms:g} ms")
            print(describe(figures, in_flight / options.delay_ms * 1000))


def compare(url: str, names: list[str], requests: int, in_flight: int, runs: int) -> dict[str, dict[str, float]]:
    """The medians of each client's figures."""
    taken: dict[str, list[Measured]] = {name: [] for name in names}
    for _ in range(runs):
        for name in names:
            taken[name].append(measured(CLIENTS[name], url, requests, in_flight))
    return {
        name: {
            "per_s": median(requests / run.value for run in calls),
            "whole_s": median(run.seconds for run in calls),
            "cpu_ms": median(1000 * run.cpu_s / requests for run in calls),
            "peak_mib": median(run.peak_mib for run in calls),
        }
        for name, calls in taken.items()
    }


def describe(figures: dict[str, dict[str, float]], most: float) -> str:
    """The table; `most` is how many requests per second the stub can answer."""
    head = (
        "client",
        "req/s",
        "of the stub's most",
        "of bare",
        "of openai",
        "whole s",
        "CPU ms per request",
        "peak MiB",
    )
    rows: list[tuple[str, ...]] = [head]
    for name, row in figures.items():
        ratios = [
            f"{row['per_s'] / figures[other]['per_s']:.2f}" if other in figures else "-" for other in ("bare", "openai")
        ]
        used = f"{row['whole_s']:.1f}", f"{row['cpu_ms']:.2f}", f"{row['peak_mib']:.0f}"
        rows.append((name, f"{row['per_s']:.0f}", f"{row['per_s'] / most:.2f}", *ratios, *used))
    return show(rows)


def body(number: int) -> dict[str, Any]:
    """The chat request, as `generate` makes it."""
    messages = [{"role": "user", "content": question(number)}]
    sampling = {"temperature": 0.8, "top_p": 0.9, "max_tokens": 500, "seed": number}
    return {"model": MODEL, "messages": messages, **sampling}


def ours(url: str, requests: int, in_flight: int) -> float:
    """`generate` with everything on: ids, journals, fsync, limits and budget. Returns the seconds of asking."""
    from benchmarks.runs import recipe_for, run_quietly
    from pipeline.rundir import RunDir

    limits = {"requests_per_minute": 10_000_000, "tokens_per_minute": 10_000_000_000}
    settings = {"concurrency": in_flight, **limits}
    teacher, budget = {"price": {"input": 0.1, "output": 0.4}}, {"usd": 10_000, "tokens": 10**12}
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_for(Path(folder), url, requests, teacher, generate=settings, budget=budget)
        summary = run_quietly(recipe, RunDir(Path(folder) / "run"))
        assert summary.answered == requests, summary
        return summary.wall_s


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

    async def main() -> float:
        return await _openai(url, requests, in_flight, http_client=DefaultAioHttpClient())

    return asyncio.run(main())


async def _openai(url: str, requests: int, in_flight: int, **client: Any) -> float:
    """AsyncOpenAI as it is commonly used: one client, a semaphore, a gather."""
    from openai import AsyncOpenAI

    async with AsyncOpenAI(api_key="none", base_url=url, timeout=300, max_retries=2, **client) as openai:
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
    "openai": openai_default,
    "openai+aiohttp": openai_aiohttp,
    "bare": bare,
}


if __name__ == "__main__":
    main()
