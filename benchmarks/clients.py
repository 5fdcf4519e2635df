"""`python -m benchmarks.clients NAME URL REQUESTS IN_FLIGHT`: one client's run in a process of its own, for `client`.

Prints a JSON line: seconds for the asking, seconds for all of it, CPU seconds and peak memory of this process.
"""

import asyncio
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODEL = "stub"


def prompt(number: int) -> str:
    """What is asked: about as long as a real prompt."""
    return f"Write a short story for a small child, 60 to 100 words. About: rabbit number {number}. It ends well."


def body(number: int) -> dict[str, Any]:
    """The chat request."""
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": prompt(number)}],
        "temperature": 0.8,
        "top_p": 0.9,
        "max_tokens": 500,
        "seed": number,
    }


def write_questions(path: Path, requests: int) -> Path:
    """So many different prompts, as a file that a recipe names."""
    path.write_text("".join(json.dumps({"prompt": prompt(number)}) + "\n" for number in range(requests)))
    return path


def numbered_prompts(count: int) -> dict[str, Any]:
    """So many different prompts, as a recipe's section."""
    slots = {"n": [str(number) for number in range(count)]}
    return {"count": count, "template": prompt(0) + " Number {n}.", "slots": slots}


def ours(url: str, requests: int, in_flight: int) -> float:
    """`generate` with everything on: ids, journals, fsync, limits and budget armed. Returns the seconds of asking."""
    from generate.run import generate
    from pipeline.recipe import Recipe
    from pipeline.rundir import RunDir

    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(
            name="bench",
            teacher={"model": MODEL, "base_url": url, "price": {"input": 0.1, "output": 0.4}},
            prompts={"file": write_questions(Path(folder) / "questions.jsonl", requests)},
            sampling={"max_tokens": 500},
            generate={
                "concurrency": in_flight,
                "requests_per_minute": 10_000_000,
                "tokens_per_minute": 10_000_000_000,
            },
            budget={"usd": 10_000, "tokens": 10**12},
        )
        summary = generate(recipe, RunDir(Path(folder) / "run"), quiet=True)
        assert summary.answered == requests, summary
        return summary.wall_s


def bare(url: str, requests: int, in_flight: int) -> float:
    """aiohttp and uvloop, bodies built before: what this machine can send and read at all."""
    import aiohttp
    import uvloop

    bodies = [json.dumps(body(number)).encode() for number in range(requests)]

    async def main() -> float:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(
            connector=connector, headers={"Content-Type": "application/json"}, cookie_jar=aiohttp.DummyCookieJar()
        ) as session:
            left = iter(bodies)

            async def work() -> None:
                for data in left:
                    async with session.post(f"{url}/chat/completions", data=data) as response:
                        await response.read()

            started = time.perf_counter()
            await asyncio.gather(*(work() for _ in range(in_flight)))
            return time.perf_counter() - started

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


def _openai(url: str, requests: int, in_flight: int, **client: Any) -> float:
    """AsyncOpenAI as it is commonly used: one client, a semaphore, a gather."""
    from openai import AsyncOpenAI

    async def main() -> float:
        async with AsyncOpenAI(api_key="none", base_url=url, timeout=300, max_retries=2, **client) as openai:
            semaphore = asyncio.Semaphore(in_flight)

            async def ask(number: int) -> str:
                async with semaphore:
                    answer = await openai.chat.completions.create(**body(number))
                    return answer.choices[0].message.content or ""

            started = time.perf_counter()
            texts = await asyncio.gather(*(ask(number) for number in range(requests)))
            assert all(texts)
            return time.perf_counter() - started

    return asyncio.run(main())


def openai_default(url: str, requests: int, in_flight: int) -> float:
    """AsyncOpenAI with its default transport."""
    return _openai(url, requests, in_flight)


def openai_aiohttp(url: str, requests: int, in_flight: int) -> float:
    """AsyncOpenAI on its aiohttp transport, its limit of connections lifted."""
    from openai import DefaultAioHttpClient

    async def client() -> Any:
        return DefaultAioHttpClient()

    return _openai(url, requests, in_flight, http_client=asyncio.run(client()))


CLIENTS: dict[str, Callable[[str, int, int], float]] = {
    "ours": ours,
    "openai": openai_default,
    "openai+aiohttp": openai_aiohttp,
    "bare": bare,
}


def main() -> None:
    name, url, requests, in_flight = sys.argv[1:]
    started = time.perf_counter()
    asking = CLIENTS[name](url, int(requests), int(in_flight))
    whole = time.perf_counter() - started
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(
        json.dumps(
            {
                "asking_s": asking,
                "whole_s": whole,
                "cpu_s": used.ru_utime + used.ru_stime,
                "peak_mib": used.ru_maxrss / 1024,
            }
        )
    )


if __name__ == "__main__":
    main()
