"""A JSONL file, chunk by chunk of whole lines, worked on by one process a core; what they make is written in order.

Memory stays flat: a process holds two chunks. No answer travels between processes: a worker tells how many bytes it
has for each output, is told where they go, and writes them there. What is done with the lines is the caller's.
"""

import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from pipeline.errors import DistillError

CHUNK = 1 << 22  # bytes
LONGEST_LINE = 1 << 24  # bytes; a longer line is no answer
PARALLEL_FROM = 1 << 24  # bytes; a smaller file is done before the other processes are up
MOST_PROCESSES = 16
_FLUSH_FROM = 1 << 25  # bytes; a disk is not asked for fewer
_LIKELY_LINE = 1 << 13  # bytes read beyond a chunk at once, to find the end of its last line
# glibc keeps as much memory as the largest block that was ever freed; without such a one it would give back every
# chunk's, and be given it anew page by page. A second block comes to lie where the chunks will, and numpy asks for huge
# pages there.
_KEPT_MEMORY = 31 << 20  # bytes; never touched

Piece = bytes | memoryview
Summary = TypeVar("Summary")
Work = Callable[["Chunk"], tuple[Summary, tuple[Piece, ...]]]  # what the caller wants to know; what goes to each output


@dataclass(frozen=True)
class Chunk:
    """The lines that begin in one stretch of a file: `data` as they stand there."""

    data: bytes

    @cached_property
    def lines(self) -> list[bytes | None]:
        """Each line without its newline. None stands for one over LONGEST_LINE."""
        lines = self.data.split(b"\n")
        if not lines[-1]:
            lines.pop()
        return [line if len(line) <= LONGEST_LINE else None for line in lines]

    @property
    def torn(self) -> bool:
        """Whether the last line has no newline: the file ends in it."""
        return bool(self.data) and not self.data.endswith(b"\n") and self.lines[-1] is not None


def read_chunk(file: BinaryIO, start: int, stop: int) -> Chunk:
    """The lines that begin at an offset in [start, stop)."""
    position = max(start - 1, 0)  # the byte before tells whether a line begins at `start`
    file.seek(position)
    data = file.read(stop - position + _LIKELY_LINE)
    first = data.find(b"\n", 0, stop - position - 1) + 1
    if start and not first:
        return Chunk(b"")  # no line begins here
    if not start:
        first = 0
    end = data.find(b"\n", stop - position - 1)
    if end >= 0:
        return Chunk(data[first : end + 1])
    return Chunk(data[first:] + file.readline(LONGEST_LINE + 1))


def process(path: Path, size: int, work: Work[Summary], outputs: Sequence[BinaryIO]) -> Generator[Summary, None, None]:
    """Works on each chunk of the first `size` bytes of a file; yields the summaries, and fills the outputs, in order.

    Small files are done here; larger ones by one process a core, each taking every n-th chunk. What `work` raises is
    raised here. Outputs are complete when the generator is at its end.
    """
    spans = [(start, min(start + CHUNK, size)) for start in range(0, size, CHUNK)]
    processes = min(len(os.sched_getaffinity(0)), MOST_PROCESSES) if sys.platform == "linux" else 1
    if processes > 1 and size >= PARALLEL_FROM:
        yield from _in_processes(path, spans, work, outputs, processes)
        return
    offsets = [0] * len(outputs)
    with path.open("rb") as file:
        for start, stop in spans:
            summary, pieces = work(read_chunk(file, start, stop))
            offsets = _write(outputs, pieces, offsets)
            yield summary


def _in_processes(
    path: Path, spans: list[tuple[int, int]], work: Work[Summary], outputs: Sequence[BinaryIO], processes: int
) -> Generator[Summary, None, None]:
    fork = multiprocessing.get_context("fork")  # the rules need not be pickled: a user's function cannot be
    early = _EarlyFlush(outputs)
    ends: list[Connection] = []
    workers = []
    gc.freeze()  # so that the workers' collector leaves our pages alone
    try:
        for first in range(processes):
            ours, theirs = fork.Pipe()
            ends.append(ours)
            arguments = (path, spans[first::processes], work, outputs, theirs, tuple(ends))
            worker = fork.Process(target=_worker, args=arguments, daemon=True)
            worker.start()
            theirs.close()
            workers.append(worker)
        offsets = [0] * len(outputs)
        for index in range(len(spans)):
            end = ends[index % processes]
            summary, sizes = _receive(end)
            with suppress(ConnectionError):  # it has failed since, and what it raised comes next
                end.send(offsets)
            offsets = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
            early.note(sum(sizes))
            yield summary
        for end in ends:
            _receive(end)  # its last chunk is written
    finally:
        gc.unfreeze()
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join()
        for end in ends:
            end.close()
        early.end()


class _EarlyFlush:
    """Has the disk write what the outputs hold while there is work yet to do: the wait for it at the end is short."""

    def __init__(self, outputs: Sequence[BinaryIO]) -> None:
        self._outputs = outputs
        self._thread = ThreadPoolExecutor(1)
        self._flush: Future[None] | None = None
        self._grown = 0  # bytes since then

    def note(self, size: int) -> None:
        """Bytes more are there. Raises OSError where an earlier flush failed: fsync might not tell of that again."""
        self._grown += size
        if self._grown >= _FLUSH_FROM and (self._flush is None or self._flush.done()):
            if self._flush is not None:
                self._flush.result()
            self._flush, self._grown = self._thread.submit(self._write_back), 0

    def _write_back(self) -> None:
        for output in self._outputs:
            os.fdatasync(output.fileno())

    def end(self) -> None:
        self._thread.shutdown()
        if self._flush is not None:
            self._flush.result()


def _receive(end: Connection) -> Any:
    try:
        result = end.recv()
    except (EOFError, ConnectionError):
        raise DistillError("a filter process was killed (out of memory?); nothing was replaced, run again") from None
    if isinstance(result, Exception):
        raise result
    return result


def _worker(
    path: Path,
    spans: list[tuple[int, int]],
    work: Work[Summary],
    outputs: Sequence[BinaryIO],
    parent: Connection,
    others: tuple[Connection, ...],
) -> None:
    """Works on its chunks; writes each while the next is awaited. Ends by itself when its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for _ in range(2):
        np.empty(_KEPT_MEMORY, np.uint8)
    for end in others:
        end.close()  # the parent's ends: else we would wait for a parent that is gone
    waiting: tuple[Piece, ...] | None = None  # made, but not yet placed
    try:
        gc.disable()  # what a chunk leaves behind is freed by its counts of references
        with path.open("rb") as file:
            for start, stop in spans:
                summary, pieces = work(read_chunk(file, start, stop))
                if waiting is not None:
                    _write(outputs, waiting, parent.recv())
                parent.send((summary, [len(piece) for piece in pieces]))
                waiting = pieces
        if waiting is not None:
            _write(outputs, waiting, parent.recv())
        parent.send(None)
    except (EOFError, ConnectionError):
        os._exit(1)
    except Exception as error:  # carried to the parent, which raises it
        parent.send(error)


def _write(outputs: Sequence[BinaryIO], pieces: Sequence[Piece], offsets: list[int]) -> list[int]:
    """Writes each piece at its output's offset; returns the offsets behind them."""
    for output, piece, offset in zip(outputs, pieces, offsets, strict=True):
        view = memoryview(piece)
        while view:
            written = os.pwrite(output.fileno(), view, offset)
            view, offset = view[written:], offset + written
    return [offset + len(piece) for offset, piece in zip(offsets, pieces, strict=True)]
