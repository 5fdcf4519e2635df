"""A real HTTP server on the loopback that answers as a script says: well, badly, or never.

A script is a function from what was asked to a behaviour. It runs in a thread of its own, so that a test can call
`generate` as a user does.
"""

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from pipeline.recipe import Recipe
from pipeline.records import Completion, Failure, read_jsonl
from pipeline.rundir import RunDir

MODEL = "stub"


@dataclass(frozen=True)
class Asked:
    """One request as it came in."""

    body: dict[str, Any]
    attempt: int  # of this very body, from 1
    headers: dict[str, str]

    @property
    def text(self) -> str:
        """The user's words."""
        return str(self.body["messages"][-1]["content"])


Behaviour = Callable[[web.Request, Asked], Awaitable[web.StreamResponse]]
Script = Callable[[Asked], Behaviour]


def reply(
    text: str | None = None, *, finish_reason: str | None = "stop", usage: bool = True, n: int = 1
) -> dict[str, Any]:
    """A chat completion. With several choices each but the first adds its number to the text."""
    texts = [text if number == 0 or text is None else f"{text} #{number}" for number in range(n)]
    return chat_completion([choice(one, finish_reason) for one in texts], usage=usage)


def choice(text: str | None, finish_reason: str | None = "stop", **message: Any) -> dict[str, Any]:
    """One choice of a chat completion."""
    return {"message": {"role": "assistant", "content": text, **message}, "finish_reason": finish_reason}


def chat_completion(choices: list[dict[str, Any]], *, usage: bool = True) -> dict[str, Any]:
    """A chat completion: 7 tokens for the prompt, and 5 for each choice."""
    numbered = [{"index": index, **one} for index, one in enumerate(choices)]
    body: dict[str, Any] = {"id": "x", "object": "chat.completion", "model": "stub-2026", "choices": numbered}
    tokens = 5 * len(choices)
    used = {"prompt_tokens": 7, "completion_tokens": tokens, "total_tokens": 7 + tokens}
    return {**body, "usage": used} if usage else body


def answer(text: str | None = None, delay_s: float = 0, **kwargs: Any) -> Behaviour:
    """A good answer: the text, or the question back; as many choices as `n` asks for."""

    async def behave(request: web.Request, asked: Asked) -> web.StreamResponse:
        await asyncio.sleep(delay_s)
        said = f"answer to {asked.text}" if text is None else text
        return web.json_response(reply(said, **{"n": asked.body.get("n", 1), **kwargs}))

    return behave


def held_until(told: threading.Event) -> Behaviour:
    """A good answer, once the test says so."""

    async def behave(request: web.Request, asked: Asked) -> web.StreamResponse:
        while not told.is_set():  # noqa: ASYNC110, another thread's
            await asyncio.sleep(0.01)
        return await answer()(request, asked)

    return behave


def choices(*given: dict[str, Any]) -> Behaviour:
    """These very choices, whatever was asked for."""
    return raw(json.dumps(chat_completion(list(given))).encode())


def cut_thought(delay_s: float = 0) -> Behaviour:
    """A model that was cut off while it was thinking, in each of as many choices as `n` asks for."""

    async def behave(request: web.Request, asked: Asked) -> web.StreamResponse:
        await asyncio.sleep(delay_s)
        cut = choice("", "length", reasoning="Let me think")
        return await choices(*[cut] * asked.body.get("n", 1))(request, asked)

    return behave


def raw(body: bytes, status: int = 200, content_type: str = "application/json", **headers: str) -> Behaviour:
    """These very bytes."""

    async def behave(request: web.Request, asked: Asked) -> web.StreamResponse:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.Response(body=body, status=status, headers={"Content-Type": content_type, **sent})

    return behave


def error(
    status: int, message: str = "no", code: str | None = None, param: str | None = None, **headers: str
) -> Behaviour:
    """An error in the shape that OpenAI gives it."""
    said = {"message": message, "type": code, "code": code, "param": param}
    return raw(json.dumps({"error": said}).encode(), status, **headers)


def html(status: int = 200) -> Behaviour:
    """A proxy's page in place of JSON."""
    return raw(b"<html><body>Bad gateway</body></html>", status, "text/html")


def reset() -> Behaviour:
    """The connection closes before a byte of the answer."""

    async def behave(request: web.Request, asked: Asked) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    return behave


def cut() -> Behaviour:
    """The connection closes in the middle of the body."""

    async def behave(request: web.Request, asked: Asked) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b'{"choices": [{"message": {"content": "half of')
        assert request.transport is not None
        request.transport.close()
        return response

    return behave


def drip(every_s: float) -> Behaviour:
    """A byte now and then, for ever: no read of it ever times out."""

    async def behave(request: web.Request, asked: Asked) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        while True:
            await response.write(b" ")
            await asyncio.sleep(every_s)

    return behave


@dataclass
class MisbehavingServer:
    """What a running server has seen."""

    url: str
    asked: list[Asked] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    attempts: Counter[str] = field(default_factory=Counter)
    die: Callable[[], None] = lambda: None  # stops it at once; from then on nothing listens at its URL


@contextmanager
def misbehaving(
    script: Script | None = None,
    models: list[str] | None = None,
    metrics: Callable[[int], tuple[int, int]] | None = None,
    engines: int = 1,
    host: str = "127.0.0.1",
    port: int = 0,
    key: str | None = None,
) -> Iterator[MisbehavingServer]:
    """Serves by the script (good answers without one) until the block ends.

    `metrics` makes running and waiting of the requests that it has at once, as vLLM's /metrics says them, of each of
    its `engines`. `key`: what it wants to tell its models.
    """
    server = MisbehavingServer("")
    ready, loop = threading.Event(), asyncio.new_event_loop()

    died = threading.Event()

    def die() -> None:
        if not died.is_set():
            died.set()
            loop.call_soon_threadsafe(loop.stop)

    server.die = die

    async def chat(request: web.Request) -> web.StreamResponse:
        sent = await request.text()
        server.attempts[sent] += 1
        asked = Asked(json.loads(sent), server.attempts[sent], dict(request.headers))
        server.asked.append(asked)
        server.at_once += 1
        server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            return await (script(asked) if script else answer())(request, asked)
        finally:
            server.at_once -= 1

    async def listing(request: web.Request) -> web.Response:
        if key is not None and request.headers.get("Authorization") != f"Bearer {key}":
            raise web.HTTPUnauthorized
        return web.json_response({"data": [{"id": name} for name in (models or [MODEL])]})

    async def load(request: web.Request) -> web.Response:
        if metrics is None:
            raise web.HTTPNotFound
        running, waiting = metrics(server.at_once)
        values = {"running": running, "waiting": waiting}
        lines = [
            f'vllm:num_requests_{name}{{engine="{engine}"}} {value}\n'
            for name, value in values.items()
            for engine in range(engines)
        ]
        return web.Response(text="".join(lines))

    async def start() -> web.AppRunner:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", chat)
        app.router.add_get("/v1/models", listing)
        app.router.add_get("/metrics", load)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, host, port, backlog=2048).start()
        server.url = f"http://{host}:{runner.addresses[0][1]}/v1"
        return runner

    def serve() -> None:
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(start())
        ready.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        server.die()
        thread.join(10)


def recipe_for(server: MisbehavingServer | str, count: int = 10, **sections: Any) -> Recipe:
    """A recipe with the prompts `say 0`, `say 1`, … for a server, or for a URL."""
    url = server if isinstance(server, str) else server.url
    given: dict[str, Any] = {
        "name": "t",
        "teacher": {"model": MODEL, "base_url": url},
        "prompts": {"count": count, "template": "say {n}", "slots": {"n": [str(n) for n in range(count)]}},
        "generate": {"concurrency": 8, "max_attempts": 3, "request_timeout_s": 5},
        **sections,
    }
    return Recipe(**given)


def completions(run: RunDir) -> list[Completion]:
    """What the run has been answered."""
    return list(read_jsonl(run.completions, Completion))


def whole(run: RunDir, count: int) -> bool:
    """Whether so many requests have one answer each, and every line is one."""
    ids = [record.id for record in completions(run)]
    return len(ids) == len(set(ids)) == count


def failures(run: RunDir) -> list[Failure]:
    """What has failed for good."""
    return list(read_jsonl(run.failures, Failure))


def one_bad(bad: Behaviour, times: int = 99) -> Script:
    """`say 3` misbehaves, the first so many times; the others are answered."""
    return lambda asked: bad if asked.text == "say 3" and asked.attempt <= times else answer()
