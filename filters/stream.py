"""A JSONL file in blocks of whole lines, worked on by one process per core; results come in the file's order.

Memory stays flat: a process holds the result of one block. What is done with the lines is the caller's.
"""

import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import BinaryIO, TypeVar

from pipeline.errors import DistillError

BLOCK = 1 << 21  # bytes
LONGEST_LINE = 1 << 24  # bytes; a longer line is no answer
PARALLEL_FROM = 1 << 22  # bytes; for a smaller file other processes are not worth their start
MOST_PROCESSES = 16

Result = TypeVar("Result")
Line = tuple[int, bytes | None]  # its offset in the file; the line as it stands, None if it is over LONGEST_LINE
Work = Callable[[Iterator[Line]], Result]  # what is done with the lines of a block
Span = tuple[int, int]  # a block: the lines that begin at an offset in [start, stop)


def read_lines(file: BinaryIO, start: int, stop: int) -> Iterator[Line]:
    """The lines that begin at an offset in [start, stop), each with its newline; the file's last may have none."""
    position = start
    if start:  # the byte before tells whether a line begins at `start`
        file.seek(start - 1)
        position = _skip_line(file, start - 1, stop)
    while position < stop and (line := file.readline(LONGEST_LINE + 1)):
        if len(line) <= LONGEST_LINE:
            yield position, line
            position += len(line)
        else:
            yield position, None
            position = _skip_line(file, position + len(line), stop) if line[-1:] != b"\n" else position + len(line)


def _skip_line(file: BinaryIO, position: int, stop: int) -> int:
    """The offset where the next line begins; any offset from `stop` on means that it is not in this block."""
    while position < stop and (piece := file.readline(LONGEST_LINE)):
        position += len(piece)
        if piece.endswith(b"\n"):
            break
    return position


def in_blocks(path: Path, work: Work[Result]) -> Generator[Result, None, None]:
    """Yields what `work` makes of each block of the file, in order. What `work` raises is raised here.

    Small files are done in this process, larger ones by one process per core. Close the generator to end those early.
    """
    size = path.stat().st_size
    spans = [(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK)]
    processes = min(len(os.sched_getaffinity(0)), MOST_PROCESSES, len(spans)) if sys.platform == "linux" else 1
    if processes > 1 and size >= PARALLEL_FROM:
        yield from _in_processes(path, spans, work, processes)
    else:
        with path.open("rb") as file:
            for start, stop in spans:
                yield work(read_lines(file, start, stop))


def _in_processes(path: Path, spans: list[Span], work: Work[Result], processes: int) -> Generator[Result, None, None]:
    fork = multiprocessing.get_context("fork")  # the work need not be pickled: a user's function cannot be
    workers: list[tuple[BaseProcess, Connection]] = []
    worker: BaseProcess
    try:
        for first in range(processes):
            receiver, sender = fork.Pipe(duplex=False)
            worker = fork.Process(target=_worker, args=(path, spans[first::processes], work, sender), daemon=True)
            worker.start()
            sender.close()  # the worker has the only one, so its death ends the pipe
            workers.append((worker, receiver))
        for index in range(len(spans)):
            _, receiver = workers[index % processes]
            try:
                result = receiver.recv()
            except EOFError:
                what = "a filter process was killed (out of memory?)"
                raise DistillError(f"{what}; nothing was replaced, run again") from None
            if isinstance(result, Exception):
                raise result
            yield result
    finally:
        for worker, receiver in workers:
            worker.kill()
            worker.join()
            receiver.close()


def _worker(path: Path, spans: list[Span], work: Work[Result], sender: Connection) -> None:
    """Sends the result of each of its blocks, and waits until it is read. Ends by itself when its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.disable()  # rows hold no cycles, and a collection would look at all of a block's
    try:
        with path.open("rb") as file:
            for start, stop in spans:
                sender.send(work(read_lines(file, start, stop)))
    except ConnectionError:
        os._exit(1)
    except Exception as error:  # carried to the parent, which raises it
        sender.send(error)
