"""Rows of kept.jsonl and dropped.jsonl: read, and made of a completion's line. Writes nothing."""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import msgspec

from pipeline.errors import DataError
from pipeline.records import Dropped, Kept, read_jsonl
from pipeline.rundir import RunDir

Buffer = bytes | memoryview
_encoder = msgspec.json.Encoder()
_UNSCORED = b',"scores":{}}\n'


def completion_part(line: bytes) -> bytes:
    """A kept row's line without its `scores`: the completion, its last brace left open."""
    return line[: line.rindex(b',"scores":{')]


def kept_line(opened: bytes, scores: dict[str, Any]) -> bytes:
    """The completion, its last brace left open, as a kept row."""
    return opened + b',"scores":' + _encoder.encode(scores) + b"}\n"


def kept_lines(opened: Iterable[Buffer]) -> bytes:
    """Completions, their last braces left open, as kept rows that nothing has scored."""
    return _UNSCORED.join([*opened, b""])


def dropped_line(opened: Buffer, reasons: dict[str, str]) -> bytes:
    """The completion, its last brace left open, as a dropped row: its `rule` is the first of the reasons."""
    return b"".join((opened, _why(reasons)))


def dropped_lines(opened: Iterable[Buffer], reasons: Iterable[dict[str, str]]) -> bytes:
    """The same of many."""
    return b"".join(chain.from_iterable(zip(opened, map(_why, reasons), strict=True)))


def _why(reasons: dict[str, str]) -> bytes:
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
