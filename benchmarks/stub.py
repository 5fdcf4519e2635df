"""`python -m benchmarks.stub`: an endpoint that answers every chat request after a fixed time, with `usage`.

Prints the port that it listens on. Answers from one prepared body unless `--vary`: the engine costs nothing here.
"""

import argparse
import asyncio
import json
import random
from hashlib import blake2b

from benchmarks.http_server import JSON, Reply, serve

TEXT_CHARS = 400


def chat_reply(text: str, prompt_tokens: int, completion_tokens: int) -> bytes:
    """A chat completion as OpenAI and vLLM shape it."""
    message = {"role": "assistant", "content": text}
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    return json.dumps(
        {
            "id": "chatcmpl-stub",
            "object": "chat.completion",
            "created": 0,
            "model": "stub",
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
            "usage": usage,
        }
    ).encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--delay-ms", type=float, default=50.0, help="until each answer")
    parser.add_argument("--jitter-ms", type=float, default=0.0, help="up to so much more, at random")
    parser.add_argument("--stuck", help="a request that holds this text is never answered")
    parser.add_argument("--prompt-tokens", type=int, default=40)
    parser.add_argument("--completion-tokens", type=int, default=100)
    parser.add_argument("--vary", action="store_true", help="tokens from 1 to those numbers, by the request's bytes")
    options = parser.parse_args()
    body = chat_reply("x" * TEXT_CHARS, options.prompt_tokens, options.completion_tokens)
    stuck = options.stuck.encode() if options.stuck else None
    billed = {"answers": 0, "prompt_tokens": 0, "completion_tokens": 0}

    def answer(request: bytes) -> bytes:
        prompt_tokens, completion_tokens = options.prompt_tokens, options.completion_tokens
        if options.vary:
            drawn = int.from_bytes(blake2b(request, digest_size=8).digest())
            prompt_tokens = 1 + drawn % prompt_tokens
            completion_tokens = 1 + (drawn >> 32) % completion_tokens
        billed["answers"] += 1
        billed["prompt_tokens"] += prompt_tokens
        billed["completion_tokens"] += completion_tokens
        return chat_reply("x" * TEXT_CHARS, prompt_tokens, completion_tokens) if options.vary else body

    def handle(path: str, request: bytes, reply: Reply) -> None:
        if path == "/v1/models":
            reply(200, b'{"object":"list","data":[{"id":"stub","object":"model"}]}', JSON)
        elif path == "/billed":
            reply(200, json.dumps(billed).encode(), JSON)
        elif path != "/v1/chat/completions":
            reply(404, b'{"error":{"message":"Not Found"}}', JSON)
        elif stuck and stuck in request:
            return
        else:
            said, delay = answer(request), options.delay_ms + random.uniform(0, options.jitter_ms)
            if delay <= 0:
                reply(200, said, JSON)
            else:
                asyncio.get_running_loop().call_later(delay / 1000, reply, 200, said, JSON)

    serve(handle)


if __name__ == "__main__":
    main()
