"""Behaviours of a server that streams its answers, for `misbehaving_server`: what a chat may meet."""

import asyncio
import json
import threading

from aiohttp import web

from tests.servers.misbehaving_server import Asked, Behaviour

COUNTED = {"prompt_tokens": 1000, "completion_tokens": 7}


def streaming(
    *pieces: object, every_s: float = 0, reasoning: str = "", error: str = "", usage: object = COUNTED
) -> Behaviour:
    """Streams the pieces as vLLM does; after them, an `error` in place of the end."""

    async def behave(request: web.Request, asked: Asked) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        async def send(event: object) -> None:
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")

        deltas = [{"reasoning": reasoning}] * bool(reasoning) + [{"content": piece} for piece in pieces]
        for delta in deltas:
            await send({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
            await asyncio.sleep(every_s)
        if error:
            await send({"error": {"message": error, "code": 500}})
            return response
        await send({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        if usage:
            await send({"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response

    return behave


def endless(left: threading.Event) -> Behaviour:
    """Streams words until the client goes away, and says so by `left`."""

    async def behave(request: web.Request, asked: Asked) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            while True:
                await response.write(b'data: {"choices": [{"delta": {"content": "%s"}}]}\n\n' % (b"more " * 20))
                await asyncio.sleep(0.02)
        except (ConnectionResetError, asyncio.CancelledError):
            left.set()
            raise

    return behave
