"""A JSONL file in blocks of whole lines, worked on by one process per core; results come in the file's order.

Memory stays flat: a process holds the result of one block. What is done with the lines is the caller's.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import BinaryIO, TypeVar

from filters.verify.sandbox import die_with_parent
from pipeline.errors import DistillError
from pipeline.records import LONGEST_LINE

BLOCK = 1 << 21  # bytes
SLOW_BLOCK, SMALLEST_BLOCK = 1 << 17, 1 << 12  # bytes of a block whose rules run programs or queries
AHEAD = 4  # blocks a process that may wait for one that takes longer
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


def in_blocks(path: Path, work: Work[Result], *, slow: bool = False) -> Generator[Result, None, None]:
    """Yields what `work` makes of each block of the file, in order. What `work` raises is raised here.

    Small files are done in this process, larger ones by one process per core; `slow` work always by all cores, and in
    smaller blocks. Close the generator to end the processes early.
    """
    size = path.stat().st_size
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    processes = cores if slow else min(cores, MOST_PROCESSES)
    block = min(max(size // (16 * processes), SMALLEST_BLOCK), SLOW_BLOCK) if slow else BLOCK
    spans = [(start, min(start + block, size)) for start in range(0, size, block)]
    processes = min(processes, len(spans))
    if processes > 1 and (slow or size >= PARALLEL_FROM):
        yield from _in_processes(path, spans, work, processes)
    else:
        with path.open("rb") as file:
            for start, stop in spans:
                yield work(read_lines(file, start, stop))


def _in_processes(path: Path, spans: list[Span], work: Work[Result], processes: int) -> Generator[Result, None, None]:
    fork = multiprocessing.get_context("fork")  # the work need not be pickled: a user's function cannot be
    workers: dict[Connection, BaseProcess] = {}
    busy: dict[Connection, int] = {}  # the block that each of them has
    done: dict[int, Result | Exception] = {}  # blocks that came before their turn
    left = iter(enumerate(spans))
    try:
        for _ in range(processes):
            ours, theirs = fork.Pipe()
            parents = [*workers, ours]
            workers[ours] = fork.Process(target=_worker, args=(path, work, theirs, parents), daemon=True)
            workers[ours].start()
            theirs.close()  # the worker has the only one, so its death ends the pipe
        for index in range(len(spans)):
            while index not in done:
                for connection in workers.keys() - busy.keys():
                    if len(done) < AHEAD * processes and (following := next(left, None)):
                        busy[connection], span = following
                        connection.send(span)
                ready = wait([*busy])
                for connection in [one for one in busy if one in ready]:
                    done[busy.pop(connection)] = connection.recv()
            result = done.pop(index)
            if isinstance(result, Exception):
                raise result
            yield result
    except (EOFError, ConnectionError):
        raise DistillError("a filter process was killed (out of memory?); nothing was replaced, run again") from None
    finally:
        for connection, worker in workers.items():
            worker.kill()
            worker.join()
            connection.close()


def _worker(path: Path, work: Work[Result], connection: Connection, parents: list[Connection]) -> None:
    """Sends the result of each block that it is given. Ends with its parent: it would hold the run's lock."""
    die_with_parent()
    for one in parents:  # the other ends: only the parent may hold them open
        one.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with path.open("rb") as file:
            while True:
                start, stop = connection.recv()
                try:
                    result: Result | Exception = work(read_lines(file, start, stop))
                except Exception as error:  # carried to the parent, which raises it
                    result = error
                connection.send(result)
    except (EOFError, ConnectionError):
        os._exit(1)
