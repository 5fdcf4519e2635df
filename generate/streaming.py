"""One request, streamed: when its first token came, when its last, and how many there were.

For measuring alone (`evaluate` and the benchmarks): the client proper does not stream, since nobody waits for a first
token when thousands of answers are in flight. No retries: what goes wrong is an error.
"""

import json
import time
from typing import NamedTuple

import aiohttp

from generate.client import headers_of
from pipeline.address import proxy_of
from pipeline.errors import DistillError
from pipeline.recipe import TeacherConfig

SAID = ("content", "reasoning", "reasoning_content", "tool_calls")  # where a piece of what the model says may be


class Streamed(NamedTuple):
    """One request: its moments in seconds, and the tokens of its answer."""

    begin: float
    first: float  # token
    end: float
    tokens: int


def streaming_session(teacher: TeacherConfig, timeout_s: float) -> aiohttp.ClientSession:
    """A session for `stream`, without aiohttp's limit of 100 connections; use as an async context manager."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        headers=headers_of(teacher),
        timeout=aiohttp.ClientTimeout(total=timeout_s),
        proxy=proxy_of(teacher.url),
    )


async def stream(session: aiohttp.ClientSession, teacher: TeacherConfig, request: bytes) -> Streamed:
    """Sends the body of a chat request, and reads its answer as it comes.

    Tokens are as the server counts them, else the pieces that came; thoughts are tokens, too. Where it does not
    stream, the first token comes with the last. Raises DistillError where it refuses, and for several choices (`n`).
    """
    url, asked = f"{teacher.url}/chat/completions", json.loads(request)
    if asked.get("n", 1) > 1:
        raise DistillError(f"a streamed request asks for one answer, this one for n={asked['n']}: leave out `n`")
    body = {**asked, "stream": True, "stream_options": {"include_usage": True}}
    begin, first, tokens = time.perf_counter(), 0.0, 0
    async with session.post(url, json=body, params=teacher.query) as response:
        if response.status != 200:
            raise DistillError(f"{url} answers {response.status}: {' '.join((await response.text()).split())[:300]}")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            delta = event["choices"][0].get("delta", {}) if event.get("choices") else {}
            if any(delta.get(part) for part in SAID):
                first = first or time.perf_counter()
                tokens += 1
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
    end = time.perf_counter()
    return Streamed(begin, first or end, end, tokens)
