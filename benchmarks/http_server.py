"""A lean HTTP/1.1 server for local stubs: one asyncio.Protocol on uvloop, so that the client is what is measured.

Reads requests with a Content-Length (all that our clients send), keeps connections alive, and answers through a
function from path and body to a reply, now or later. Loopback only.
"""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import uvloop

JSON, TEXT = b"application/json", b"text/plain; version=0.0.4"

Reply = Callable[[int, bytes, bytes], None]  # status, body, content type
Handle = Callable[[str, bytes, Reply], None]

_REASONS = {200: b"OK", 404: b"Not Found", 429: b"Too Many Requests"}


class _Connection(asyncio.Protocol):
    def __init__(self, handle: Handle) -> None:
        self._handle, self._buffer = handle, bytearray()
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
            self._handle(head.split(b" ", 2)[1].decode(), body, self._reply)

    def _reply(self, status: int, body: bytes, content_type: bytes) -> None:
        if self._transport is None:
            return
        self._transport.write(
            b"HTTP/1.1 %d %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s"
            % (status, _REASONS.get(status, b"Error"), content_type, len(body), body)
        )


def serve(handle: Handle) -> None:
    """Serves until SIGTERM on a free port of 127.0.0.1, and prints that port."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Connection(handle), "127.0.0.1", 0, backlog=4096)
        print(server.sockets[0].getsockname()[1], flush=True)
        stopped = asyncio.Event()
        loop.add_signal_handler(signal.SIGTERM, stopped.set)
        await stopped.wait()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


@contextmanager
def running(module: str, *arguments: str) -> Iterator[str]:
    """Starts `python -m <module>` as a server of its own process; yields its base URL."""
    process = subprocess.Popen([sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    finally:
        process.terminate()
        process.wait(10)
