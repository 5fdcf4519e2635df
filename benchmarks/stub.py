"""`python -m benchmarks.stub`: an endpoint that answers every chat request after `--delay-ms`, with `usage`.

Prints the port that it listens on. `--jitter-ms`: up to so much later, at random. Answers are prepared bodies, unless
`--vary`: then their tokens are from 1 to the given numbers, by a hash of the request. /billed says how many answers and
tokens there were.
"""

import asyncio
import json
import random
from functools import cache
from hashlib import blake2b

from benchmarks.http_server import Reply, chat_reply, serve
from benchmarks.measure import flags


def main() -> None:
    kinds, tokens = {"delay_ms": float}, {"prompt_tokens": 40, "completion_tokens": 100}
    options = flags(__doc__, kinds, delay_ms=50.0, jitter_ms=0.0, **tokens, vary=False)
    prepared = cache(chat_reply)
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
        return (chat_reply if options.vary else prepared)(prompt_tokens, completion_tokens)

    def chat(request: bytes, reply: Reply) -> None:
        body, delay_ms = answer(request), options.delay_ms + random.uniform(0, options.jitter_ms)
        if delay_ms <= 0:
            reply(body)
        else:
            asyncio.get_running_loop().call_later(delay_ms / 1000, reply, body)

    serve({"/v1/chat/completions": chat, "/billed": lambda _, reply: reply(json.dumps(billed).encode())})


if __name__ == "__main__":
    main()
