"""Rows of kept.jsonl and dropped.jsonl: read, and made of a completion's line. Writes nothing."""

from collections.abc import Iterator
from typing import Any

import msgspec

from pipeline.errors import DataError
from pipeline.records import Dropped, Kept, read_jsonl
from pipeline.rundir import RunDir

_encoder = msgspec.json.Encoder()


def completion_part(line: bytes) -> bytes:
    """A kept row's line without its `scores`: the completion, its last brace left open."""
    return line[: line.rindex(b',"scores":{')]


def kept_tail(scores: dict[str, Any]) -> bytes:
    """What makes a completion, its last brace left open, a kept row."""
    return b',"scores":' + _encoder.encode(scores) + b"}\n"


def dropped_tail(reasons: dict[str, str]) -> bytes:
    """What makes a completion, its last brace left open, a dropped row: its `rule` is the first of the reasons."""
    return b"," + _encoder.encode({"rule": next(iter(reasons)), "detail": reasons})[1:] + b"\n"


def filtered_rows(run: RunDir) -> Iterator[Kept | Dropped]:
    """Every answer of a filtered run. Raises DataError where it is not filtered, or at a bad line."""
    yield from read_jsonl(run.kept, Kept)
    yield from read_jsonl(run.dropped, Dropped)


def check_filtered(run: RunDir, why: str) -> None:
    """Raises DataError, with the reason why it matters, where the run is not filtered yet."""
    for path in (run.kept, run.dropped):
        if not path.exists():
            raise DataError(f"{path}: no such file; {why}: run the filters first")
