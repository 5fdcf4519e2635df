"""The likeliest tokens at each token of an answer, packed as a line of logprobs.jsonl. Pure.

vLLM names tokens by their ids (`token_id:42`) if it is asked to. Other servers give strings, and the bytes, since a
string may be no whole character.
"""

import struct
from typing import Any

import msgspec

from pipeline.records import TokenLogprobs

BY_ID = "token_id:"
NONE = -1  # fills a row
LOWEST = -65504.0  # of a float16


class Likely(msgspec.Struct):
    """One token, in the shape of the OpenAI chat format."""

    token: str
    logprob: float
    bytes: list[int] | None = None


class _Chosen(Likely):
    top_logprobs: list[Likely] = []


class _Said(msgspec.Struct):
    content: list[_Chosen]


def pack(id_: str, said: Any, top: int) -> TokenLogprobs | None:
    """What a choice's `logprobs` say, `top` tokens per token of the answer; None if they are not there or no such."""
    try:
        content = msgspec.convert(said, _Said).content
    except msgspec.ValidationError:
        return None
    if not content:
        return None
    names: dict[bytes, int] = {}

    def place(likely: Likely) -> int:
        if likely.token.startswith(BY_ID) and (digits := likely.token.removeprefix(BY_ID)).isdecimal():
            return int(digits)
        name = bytes(likely.bytes) if likely.bytes else likely.token.encode()
        return names.setdefault(name, len(names))

    likeliest: list[int] = []
    logprobs: list[float] = []
    for chosen in content:
        ranked = sorted(chosen.top_logprobs, key=lambda likely: -likely.logprob)[:top]
        blank = top - len(ranked)
        likeliest += [*map(place, ranked), *[NONE] * blank]
        logprobs += [*(max(likely.logprob, LOWEST) for likely in ranked), *[LOWEST] * blank]
    return TokenLogprobs(
        id=id_,
        top=top,
        chosen=struct.pack(f"<{len(content)}i", *map(place, content)),
        likeliest=struct.pack(f"<{len(likeliest)}i", *likeliest),
        logprobs=struct.pack(f"<{len(logprobs)}e", *logprobs),
        names=list(names),
    )
