"""Rows of kept.jsonl and dropped.jsonl, read and made of a completion's line; how the stage's files appear together."""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from os.path import samestat
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from pipeline.errors import DataError, DistillError
from pipeline.records import Completion, Dropped, Kept, Reason, read_jsonl
from pipeline.rundir import RunDir, sync_path


class _Row(Completion, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A completion and nothing else: another field means a file of another version, or one that is filtered already."""


decode_completion = msgspec.json.Decoder(_Row).decode
decode_kept = msgspec.json.Decoder(Kept).decode
_encode = msgspec.json.Encoder().encode


def kept_line(line: bytes, scores: dict[str, Any]) -> bytes:
    """A line of kept.jsonl: the completion's line as it stands, its scores added at the end."""
    return line.rstrip()[:-1] + b',"scores":' + _encode(scores) + b"}\n"


def dropped_line(line: bytes, reasons: list[Reason]) -> bytes:
    """A line of dropped.jsonl: the completion's line as it stands, the first rule and every reason at the end."""
    return line.rstrip()[:-1] + b"," + _encode({"rule": reasons[0].rule, "detail": reasons})[1:] + b"\n"


def as_kept(row: Completion, scores: dict[str, Any]) -> Kept:
    """The answer with these scores, whatever it was."""
    return Kept(**_completion(row), scores=scores)


def as_dropped(row: Completion, reason: Reason) -> Dropped:
    """The answer, dropped for this reason alone."""
    return Dropped(**_completion(row), rule=reason.rule, detail=[reason])


def _completion(row: Completion) -> dict[str, Any]:
    return {name: getattr(row, name) for name in Completion.__struct_fields__}


def filtered_rows(run: RunDir) -> Iterator[Kept | Dropped]:
    """Every answer of a filtered run.

    Raises DataError if it is not filtered, at a bad line, or at the end if the run was filtered again meanwhile.
    """
    paths = (run.kept, run.dropped)
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: no such file; run the filters first")
    before = [path.stat() for path in paths]
    try:
        yield from read_jsonl(run.kept, Kept)
        yield from read_jsonl(run.dropped, Dropped)
    except DataError as error:
        raise DataError(f"{error}; run the filters again") from None
    if not all(map(samestat, before, (path.stat() for path in paths))):
        raise DataError(f"{run.path}: was filtered just now, while its answers were read; run the same command again")


@contextmanager
def staged(paths: Sequence[Path], stale: Sequence[Path] = ()) -> Iterator[Sequence[BinaryIO]]:
    """Opens files that take the places of `paths`, all of them, when the block ends well; none otherwise.

    All are on disk before the first is renamed, and no interrupt comes between the renames. Then `stale` files go away.
    """
    temporaries = [path.with_name(path.name + ".tmp") for path in paths]
    left = "no old file was replaced"
    try:
        with ExitStack() as stack:
            files = [stack.enter_context(temporary.open("wb")) for temporary in temporaries]
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        left = "some old files may be replaced: run the filters again"
        with _interrupts_held():
            for temporary, path in zip(temporaries, paths, strict=True):
                temporary.replace(path)
            for path in stale:
                path.unlink(missing_ok=True)
            sync_path(paths[0].parent)
    except OSError as error:
        raise DistillError(f"{error.filename or paths[0].parent}: {error.strerror}; {left}") from error
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """The signals that interrupt a stage are handled after the block. A mask would not do: other threads get them."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python handles signals in the main thread only
        return
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda signum, frame: came.append(signum)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for signum in came:
            signal.raise_signal(signum)
