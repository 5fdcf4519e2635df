"""One request, streamed: what is said as it comes, when its first token came, when its last, and how many there were.

For the chat (`chat`) and for measuring (`evaluate` and the benchmarks): the client proper does not stream, since nobody
waits for a first token when thousands of answers are in flight. No retries: what goes wrong is an error.
"""

import json
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any, NamedTuple

import aiohttp
import msgspec
from aiohttp.http_exceptions import LineTooLong

from generate.client import headers_of, read_exception, words_of
from generate.endpoint import TIMEOUT_WORKING_S
from generate.reply import Fault, broken_off, decode, joined_text, read_choices, read_error, read_usage, thinking_text
from pipeline.address import proxy_of
from pipeline.errors import DistillError
from pipeline.records import Usage
from pipeline.teacher_config import TeacherConfig


class _Piece(msgspec.Struct):
    """A piece of what the model says, or all of it."""

    content: str | list[Any] | None = None
    reasoning: Any = None
    reasoning_content: Any = None
    tool_calls: Any = None


class _Choice(msgspec.Struct):
    delta: _Piece | None = None
    message: _Piece | None = None  # of an answer that came whole
    finish_reason: Any = None
    error: Any = None


class Event(msgspec.Struct):
    """What comes of an answer at once, as chat completions have it."""

    choices: list[_Choice] | None = None
    usage: Any = None
    error: Any = None

    @property
    def choice(self) -> _Choice:
        return self.choices[0] if self.choices else _Choice()


_decoder = msgspec.json.Decoder(Event)


class Refused(DistillError):
    """An endpoint gives no answer, or breaks one off; the fault says why."""

    def __init__(self, url: str, fault: Fault) -> None:
        super().__init__(f"{url}{f' answers {fault.status}' if fault.status else ''}: {fault.message}")
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


async def events(session: aiohttp.ClientSession, teacher: TeacherConfig, request: bytes) -> AsyncGenerator[Event]:
    """Sends the body of a chat request, and yields the events of its answer as they come; a whole answer is one event.

    Raises Refused where no answer comes, or it is broken off; DistillError for several choices (`n`).
    """
    url, words, asked = f"{teacher.url}/chat/completions", words_of(teacher), json.loads(request)
    if asked.get("n", 1) > 1:
        raise DistillError(f"a streamed request asks for one answer, this one for n={asked['n']}: leave out `n`")
    body = {**asked, "stream": True, "stream_options": {"include_usage": True}}
    try:
        async with session.post(url, json=body, params=teacher.query) as response:
            if response.status != 200:
                raise Refused(url, read_error(response.status, await response.read(), response.headers, words))
            if response.content_type in ("application/json", "text/html"):  # it does not stream, or is no endpoint
                whole = await response.read()
                if isinstance(reply := read_choices(whole, words), Fault):
                    raise Refused(url, reply)
                yield _event(url, whole, words)
                return
            ended = False
            async for line in response.content:
                data = line.removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
                if data.startswith(b"{"):
                    event = _event(url, data, words)
                    ended |= event.choice.finish_reason is not None
                    yield event
                ended |= data == b"[DONE]"
            if not ended:
                raise Refused(url, Fault("connection_lost", "the answer was cut off"))
    except (aiohttp.ClientError, LineTooLong, TimeoutError, OSError, ValueError) as error:
        raise Refused(url, read_exception(error, session.timeout.total or 0, words)) from None


def _event(url: str, data: bytes, words: Callable[[str], str]) -> Event:
    """Reads one event. Raises Refused if it cannot be read, or says that the answer is broken off."""
    event = decode(_decoder, data, words)
    if isinstance(event, Fault):
        raise Refused(url, event)
    if fault := broken_off(event.choice.finish_reason, event.error or event.choice.error, words):
        raise Refused(url, fault)
    return event


class Heard:
    """What has come of a streamed answer so far."""

    def __init__(self) -> None:
        self.text, self.thought, self.pieces, self.first = "", "", 0, 0.0
        self.finish_reason, self.usage = "unknown", Usage()

    def add(self, event: Event) -> str:
        """Takes an event in, and returns the text that it adds."""
        choice = event.choice
        piece = choice.delta or choice.message or _Piece()
        if event.usage:
            self.usage = read_usage(event.usage)
        self.finish_reason = str(choice.finish_reason or self.finish_reason)
        thought = str(piece.reasoning or piece.reasoning_content or "") or thinking_text(piece.content)
        text = joined_text(piece.content)
        if text or thought or piece.tool_calls:
            self.first = self.first or time.perf_counter()
            self.pieces += 1
        self.thought += thought
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
