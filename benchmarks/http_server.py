"""A lean HTTP/1.1 server for local stubs: one asyncio.Protocol on uvloop, so that the client is what is measured.

Reads requests with a Content-Length (all that our clients send), keeps connections alive, and gives each body to the
function of its path, which replies at once or later. Knows /v1/models itself. Loopback only.
"""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import uvloop

MODEL = "stub"  # as the servers name it
TEXT_CHARS = 400  # of an answer

Reply = Callable[[bytes], None]
Routes = Mapping[str, Callable[[bytes, Reply], None]]

MODELS = json.dumps({"object": "list", "data": [{"id": MODEL, "object": "model"}]}).encode()


class _Connection(asyncio.Protocol):
    def __init__(self, routes: Routes) -> None:
        self._routes, self._buffer = routes, bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._buffer[:end])
            at = head.lower().find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self._buffer) < end + 4 + length:
                return
            body = bytes(self._buffer[end + 4 : end + 4 + length])
            del self._buffer[: end + 4 + length]
            path = head.split(b" ", 2)[1].decode()
            if path in self._routes:
                self._routes[path](body, self._reply)
            else:
                self._reply(b'{"error":{"message":"Not Found"}}', b"404 Not Found")

    def _reply(self, body: bytes, status: bytes = b"200 OK") -> None:
        if self._transport is not None:
            head = b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            self._transport.write(head % (status, len(body)) + body)


def serve(routes: Routes) -> None:
    """Serves until SIGTERM on a free port of 127.0.0.1, and prints that port."""

    routes = {"/v1/models": lambda _, reply: reply(MODELS), **routes}

    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Connection(routes), "127.0.0.1", 0, backlog=4096)
        print(server.sockets[0].getsockname()[1], flush=True)
        stopped = asyncio.Event()
        loop.add_signal_handler(signal.SIGTERM, stopped.set)
        await stopped.wait()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


@contextmanager
def running(module: str, *arguments: object) -> Iterator[str]:
    """Starts `python -m <module>` as a server of its own process; yields its base URL."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    finally:
        process.terminate()
        process.wait(10)


def chat_reply(prompt_tokens: int, completion_tokens: int) -> bytes:
    """A chat completion as OpenAI and vLLM shape it; its text is always the same."""
    message = {"role": "assistant", "content": "x" * TEXT_CHARS}
    choices = [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    usage["total_tokens"] = prompt_tokens + completion_tokens
    head = {"id": "chatcmpl-stub", "object": "chat.completion", "created": 0, "model": MODEL}
    return json.dumps({**head, "choices": choices, "usage": usage}).encode()
