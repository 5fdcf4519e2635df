"""One request, streamed: what is said as it comes, when its first token came, when its last, and how many there were.

For the chat (`chat`) and for measuring (`evaluate` and the benchmarks): the client proper does not stream, since nobody
waits for a first token when thousands of answers are in flight. No retries: what goes wrong is an error.
"""

import json
import time
from collections.abc import AsyncGenerator
from typing import NamedTuple

import aiohttp

from generate.client import headers_of, words_of
from generate.endpoint import TIMEOUT_WORKING_S
from generate.reply import Fault, joined_text, read_choices, read_error, read_usage
from pipeline.address import proxy_of
from pipeline.errors import DistillError
from pipeline.recipe import TeacherConfig
from pipeline.records import Json, Usage

SAID = ("content", "reasoning", "reasoning_content", "tool_calls")  # where a piece of what the model says may be


class Refused(DistillError):
    """An endpoint gives no answer; the fault says why."""

    def __init__(self, url: str, fault: Fault) -> None:
        super().__init__(f"{url} answers {fault.status}: {fault.message}")
        self.fault = fault


class Streamed(NamedTuple):
    """One request: its moments in seconds, and the tokens of its answer."""

    begin: float
    first: float  # token
    end: float
    tokens: int


def streaming_session(teacher: TeacherConfig, timeout_s: float | None) -> aiohttp.ClientSession:
    """A session for `stream`, without aiohttp's limit of 100 connections; use as an async context manager.

    `timeout_s`: the recipe's `generate.request_timeout_s`; None: TIMEOUT_WORKING_S.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        headers=headers_of(teacher),
        timeout=aiohttp.ClientTimeout(total=timeout_s or TIMEOUT_WORKING_S),
        proxy=proxy_of(teacher.url),
    )


async def events(session: aiohttp.ClientSession, teacher: TeacherConfig, request: bytes) -> AsyncGenerator[Json]:
    """Sends the body of a chat request, and yields the events of its answer as they come; a whole answer is one event.

    Raises Refused where the endpoint refuses, or breaks off with an error; DistillError for several choices (`n`).
    """
    url, words, asked = f"{teacher.url}/chat/completions", words_of(teacher), json.loads(request)
    if asked.get("n", 1) > 1:
        raise DistillError(f"a streamed request asks for one answer, this one for n={asked['n']}: leave out `n`")
    body = {**asked, "stream": True, "stream_options": {"include_usage": True}}
    async with session.post(url, json=body, params=teacher.query) as response:
        if response.status != 200:
            raise Refused(url, read_error(response.status, await response.read(), response.headers, words))
        if response.content_type in ("application/json", "text/html"):  # it does not stream, or is no endpoint
            whole = await response.read()
            if isinstance(reply := read_choices(whole, words), Fault):
                raise Refused(url, reply)
            yield json.loads(whole)
            return
        async for line in response.content:
            if line.startswith((b"data: {", b"data:{")):
                try:
                    event: Json = json.loads(line[5:])
                except ValueError as error:
                    raise Refused(url, Fault("not_json", f"an event is not JSON: {error}", 200)) from None
                if event.get("error"):
                    raise Refused(url, Fault("error_in_answer", words(str(event["error"])), 200))
                yield event


class Heard:
    """What has come of a streamed answer so far."""

    def __init__(self) -> None:
        self.text, self.thought, self.pieces, self.first = "", "", 0, 0.0
        self.finish_reason, self.usage = "unknown", Usage()

    def add(self, event: Json) -> str:
        """Takes an event in, and returns the text that it adds."""
        if event.get("usage"):
            self.usage = read_usage(event["usage"])
        choice = event["choices"][0] if event.get("choices") else {}
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        piece = choice.get("delta") or choice.get("message") or {}
        if any(piece.get(name) for name in SAID):
            self.first = self.first or time.perf_counter()
            self.pieces += 1
        self.thought += str(piece.get("reasoning") or piece.get("reasoning_content") or "")
        text = joined_text(piece.get("content"))
        self.text += text
        return text

    @property
    def tokens(self) -> int:
        """As the server counts them, else the pieces that came; thoughts are tokens, too."""
        return self.usage.completion_tokens or self.pieces


async def stream(session: aiohttp.ClientSession, teacher: TeacherConfig, request: bytes) -> Streamed:
    """Sends the body of a chat request, and reads its answer as it comes.

    Where it does not stream, the first token comes with the last. Raises Refused, as `events` does.
    """
    begin, heard = time.perf_counter(), Heard()
    async for event in events(session, teacher, request):
        heard.add(event)
    end = time.perf_counter()
    return Streamed(begin, heard.first or end, end, heard.tokens)
