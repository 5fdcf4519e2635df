"""Lines of kept.jsonl and dropped.jsonl, made of a completion's line: new fields stand at its end. Pure."""

from typing import Any

import msgspec

_encoder = msgspec.json.Encoder()


def completion_part(line: bytes) -> bytes:
    """A kept row's line without its `scores`: the completion, its last brace left open."""
    return line[: line.rindex(b',"scores":{')]


def kept_line(opened: bytes, scores: dict[str, Any]) -> bytes:
    """The completion, its last brace left open, as a kept row."""
    return opened + b',"scores":' + _encoder.encode(scores) + b"}\n"


def dropped_line(opened: bytes, reasons: dict[str, str]) -> bytes:
    """The completion, its last brace left open, as a dropped row: its `rule` is the first of the reasons."""
    return opened + b"," + _encoder.encode({"rule": next(iter(reasons)), "detail": reasons})[1:] + b"\n"
