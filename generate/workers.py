"""`generate.processes: N`: one run over N processes of this machine, for when one core cannot keep the server full.

Each process sends every N-th request, with its part of the limits and of the budget, and appends to the same journals
(they are made for it). The first process starts the others, shows their sum, and stops them. A partition is sent by the
same loop as a whole run (generate.online), so there is no second way to do anything. When parts of the budget are
spent, one more process sends what the rest of it covers: the budget ends the run where it would end it in one process.

A child reads the pickled work from stdin, then `stop` lines; the end of stdin, when its parent has died, stops it at
once. It writes a JSON line to stdout four times a second, and at its end. It inherits the run's lock, which stays held
until the last child is gone.
"""

import asyncio
import os
import pickle
import signal
import sys
from asyncio.subprocess import PIPE, Process
from io import RawIOBase
from typing import Any, NamedTuple

import msgspec

from generate.budget import Budget
from generate.context import (
    Finished,
    Interrupted,
    Left,
    Outcome,
    Run,
    Stopped,
    raise_unless_finished,
    stopped,
)
from generate.jobs import WHOLE, Partition
from generate.journal import Journal
from generate.loop import SHOW_INTERVAL_S, Loop
from generate.online import on_signals, opened_loop, run_loop
from generate.progress import Counters, Display
from pipeline import errors
from pipeline.errors import BudgetReached, DistillError
from pipeline.recipe import Recipe
from pipeline.records import Completion, Failure
from pipeline.rundir import RunDir

LINE_BYTES = 1 << 20


class Work(NamedTuple):
    """What a child is given."""

    recipe: Recipe
    run: RunDir
    partition: Partition
    retry_failures: bool


class Told(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One line of a child: where its partition is, something to say, or the error that ended it."""

    counters: dict[str, Any] | None = None
    say: str | None = None
    error: str | None = None
    kind: str = "DistillError"  # the error's class


async def send_from_workers(run: Run, display: Display, *, signals: bool) -> Outcome:
    """Sends all that is left, from `generate.processes` children."""
    workers = _Workers(run, display)
    ticking = asyncio.create_task(_tick(display))
    try:
        with on_signals(workers.interrupt if signals else None), display:
            return await workers.send()
    finally:
        ticking.cancel()
        workers.kill()


class _Workers:
    """The children of a run, as their parent knows them."""

    def __init__(self, run: Run, display: Display) -> None:
        self._run, self._display = run, display
        self._children: list[Process] = []
        self._counts: list[dict[str, Any]] = []  # the last that each child told
        self._failed: list[DistillError] = []
        self._interrupted = False

    async def send(self) -> Outcome:
        """Starts the children, listens to them until they end, and says how that was."""
        count = self._run.recipe.generate.processes
        ends = await self._send_all([Partition(part, count) for part in range(count)])
        if not self._interrupted and self._failed and self._only_budget():
            self._failed.clear()
            ends = await self._send_all([WHOLE])
        if self._failed:
            return Stopped(self._failed[0])
        if self._interrupted:
            return Interrupted()
        if any(ends):
            return stopped(f"a process of this run ended with {next(filter(None, ends))}; run the same command again")
        return Finished()

    def interrupt(self) -> None:
        """Stops the children in order; a second call stops them at once."""
        self._stop()
        if not self._interrupted:
            self._display.stopping()
        self._interrupted = True

    def kill(self) -> None:
        """Ends the children that are still there."""
        for child in self._children:
            if child.returncode is None:
                child.kill()

    def _only_budget(self) -> bool:
        return all(isinstance(error, BudgetReached) for error in self._failed)

    def _stop(self) -> None:
        for child in self._children:
            if child.stdin and not child.stdin.is_closing():
                child.stdin.write(b"stop\n")

    async def _send_all(self, partitions: list[Partition]) -> list[int]:
        """Children for the partitions; returns their exit codes."""
        first = len(self._children)
        for partition in partitions:
            self._counts.append(Counters(total=0).snapshot())
            work = Work(self._run.recipe, self._run.dir, partition, self._run.left.retry_failures)
            self._children.append(await _start(work))
        new = enumerate(self._children[first:], start=first)
        return await asyncio.gather(*(self._listen(index, child) for index, child in new))

    async def _listen(self, index: int, child: Process) -> int:
        assert child.stdout
        async for line in child.stdout:
            self._hear(index, msgspec.json.decode(line, type=Told))
        return await child.wait()

    def _hear(self, index: int, told: Told) -> None:
        if told.counters is not None:
            self._counts[index] = told.counters
            self._run.counters.gather(self._counts)
        if told.say is not None:
            self._run.say(told.say)
        if told.error is not None:
            self._failed.append(getattr(errors, told.kind, DistillError)(told.error))
            if not self._only_budget():  # of a part: the others may have some left
                self._stop()


async def _start(work: Work) -> Process:
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "generate.workers"),
        stdin=PIPE,
        stdout=PIPE,
        limit=LINE_BYTES,
        close_fds=False,  # the run's lock goes along; nothing else is inheritable
        start_new_session=True,  # Ctrl-C is for the first process, which stops the others in order
    )
    assert child.stdin
    pickled = pickle.dumps(work)
    child.stdin.write(len(pickled).to_bytes(8) + pickled)
    await child.stdin.drain()
    return child


async def _tick(display: Display) -> None:
    while True:
        await asyncio.sleep(SHOW_INTERVAL_S)
        display.tick()


def main() -> None:
    """A child: sends its partition."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    source = os.fdopen(sys.stdin.fileno(), "rb", buffering=0)  # what follows the work is read by the loop
    work = pickle.loads(_exactly(source, int.from_bytes(_exactly(source, 8))))
    try:
        _send_partition(work, source)
    except DistillError as error:
        _tell(Told(error=str(error), kind=type(error).__name__))
        sys.exit(error.exit_code)


def _exactly(source: RawIOBase, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        parts += source.read(size - len(parts)) or sys.exit("the parent has gone")
    return bytes(parts)


def _send_partition(work: Work, source: RawIOBase) -> None:
    """Raises what ended it; an interrupt is the parent's to tell."""
    with Journal(work.run.completions, Completion) as completions, Journal(work.run.failures, Failure) as failures:
        counters = Counters(total=0)
        run = Run(
            recipe=work.recipe,
            dir=work.run,
            completions=completions,
            failures=failures,
            left=Left(completions.found.ids, failures.found.ids, retry_failures=work.retry_failures),
            budget=Budget.open(work.recipe, work.run, completions.found, work.partition),
            counters=counters,
            say=_say if work.partition.part == 0 else _ignore,  # they all see the same endpoints
            show=lambda: _tell(Told(counters=counters.snapshot())),
            partition=work.partition,
        )
        try:
            outcome = run_loop(_send(run, source))
        finally:
            run.budget.save()
            run.show()
        if not isinstance(outcome, Interrupted):
            raise_unless_finished(outcome, run.budget)


async def _send(run: Run, source: RawIOBase) -> Outcome:
    async with opened_loop(run) as loop:
        listener = asyncio.create_task(_obey(loop, source))
        try:
            return await loop.run()
        finally:
            listener.cancel()


async def _obey(loop: Loop, source: RawIOBase) -> None:
    """Stops when the parent says so, and at once when it is gone or says it again."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), source)
    while await reader.readline():
        loop.interrupt()
    loop.interrupt()
    loop.interrupt()


def _say(message: str) -> None:
    _tell(Told(say=message))


def _ignore(message: str) -> None:
    pass


def _tell(told: Told) -> None:
    try:
        sys.stdout.buffer.write(msgspec.json.encode(told) + b"\n")
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        pass  # the parent has died: stdin's end says so too


if __name__ == "__main__":
    main()
