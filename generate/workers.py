"""`generate.processes: N`: one run over N processes of this machine, for when one core cannot keep the server full.

Each process asks every N-th request, with its part of the limits and of the budget, and appends to the same journals
(they are made for it). The first process starts the others, shows their sum, and stops them. A share is asked by the
same code that asks a whole run (generate.asking), so there is no second way to do anything. When parts of the budget
are spent, one more process asks what the rest of it covers: the budget's end is that of a run in one process.

What a child reads: the pickled share on stdin, then `stop` lines; the end of stdin, when its parent has died, stops it
at once. What it writes to stdout: a JSON line a quarter of a second, and at its end. It inherits the run's lock, which
so stays held until the last of them is gone.
"""

import asyncio
import os
import pickle
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from io import RawIOBase
from typing import Any

import msgspec

from generate.asking import Left, dispatching, on_signals, run_loop
from generate.budget import Budget
from generate.jobs import WHOLE, Share
from generate.journal import Journal
from generate.loop import TICK_INTERVAL_S, Dispatcher
from generate.progress import Counters, Display
from pipeline import errors
from pipeline.errors import BudgetReached, DistillError
from pipeline.recipe import Recipe
from pipeline.records import Completion, Failure
from pipeline.rundir import RunDir

LINE_BYTES = 1 << 20


class Told(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One line of a child: where its share is, something to say, or the error that ended it."""

    counters: dict[str, Any] | None = None
    say: str | None = None
    error: str | None = None
    kind: str = "DistillError"  # the error's class


async def ask_in_shares(
    recipe: Recipe, run: RunDir, *, retry_failures: bool, counters: Counters, display: Display
) -> None:
    """Asks all that is left, in `generate.processes` children. Raises as `generate.asking.ask` does."""
    count = recipe.generate.processes
    parts: list[dict[str, Any]] = []
    failed: list[DistillError] = []
    children: list[Process] = []
    interrupts = 0

    def stop() -> None:
        for child in children:
            if child.stdin and not child.stdin.is_closing():
                child.stdin.write(b"stop\n")

    def interrupt() -> None:
        nonlocal interrupts
        interrupts += 1
        stop()
        if interrupts == 1:
            display.stopping()

    def heard(index: int, told: Told) -> None:
        if told.counters is not None:
            parts[index] = told.counters
            counters.gather(parts)
        if told.say is not None:
            display.say(told.say)
        if told.error is not None:
            failed.append(getattr(errors, told.kind, DistillError)(told.error))
            if not isinstance(failed[-1], BudgetReached):  # of a part: the others may have some left
                stop()

    async def ask_all(*shares: Share) -> list[int]:
        first = len(children)
        for share in shares:
            parts.append(Counters(total=0).snapshot())
            children.append(await _start(recipe, run, share, retry_failures=retry_failures))
        listening = (_listen(child, first + index, heard) for index, child in enumerate(children[first:]))
        return await asyncio.gather(*listening)

    ticking = asyncio.create_task(_tick(display))
    try:
        with on_signals(interrupt), display:
            ends = await ask_all(*(Share(index, count) for index in range(count)))
            if failed and all(isinstance(error, BudgetReached) for error in failed) and not interrupts:
                failed.clear()
                ends = await ask_all(WHOLE)
    finally:
        ticking.cancel()
        for child in children:
            if child.returncode is None:
                child.kill()
    if failed:
        raise failed[0]
    if interrupts:
        display.stopped("still to ask")
        raise KeyboardInterrupt
    if any(ends):
        raise DistillError(f"a process of this run ended with {next(filter(None, ends))}; run the same command again")


async def _start(recipe: Recipe, run: RunDir, share: Share, *, retry_failures: bool) -> Process:
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "generate.workers"),
        stdin=PIPE,
        stdout=PIPE,
        limit=LINE_BYTES,
        close_fds=False,  # the run's lock goes along; nothing else is inheritable
        start_new_session=True,  # Ctrl-C is for the first process, which stops the others in order
    )
    assert child.stdin
    work = pickle.dumps((recipe, run, share, retry_failures))
    child.stdin.write(len(work).to_bytes(8) + work)
    await child.stdin.drain()
    return child


async def _listen(child: Process, index: int, heard: Callable[[int, Told], None]) -> int:
    assert child.stdout
    async for line in child.stdout:
        heard(index, msgspec.json.decode(line, type=Told))
    return await child.wait()


async def _tick(display: Display) -> None:
    while True:
        await asyncio.sleep(TICK_INTERVAL_S)
        display.tick()


def main() -> None:
    """A child: asks its share."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    source = os.fdopen(sys.stdin.fileno(), "rb", buffering=0)  # what follows the work is read by the loop
    recipe, run, share, retry_failures = pickle.loads(_exactly(source, int.from_bytes(_exactly(source, 8))))
    try:
        _ask_share(recipe, run, share, retry_failures, source)
    except DistillError as error:
        _tell(Told(error=str(error), kind=type(error).__name__))
        sys.exit(error.exit_code)


def _exactly(source: RawIOBase, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        parts += source.read(size - len(parts)) or sys.exit("the parent has gone")
    return bytes(parts)


def _ask_share(recipe: Recipe, run: RunDir, share: Share, retry_failures: bool, source: RawIOBase) -> None:
    with Journal(run.completions, Completion) as completions, Journal(run.failures, Failure) as failures:
        left = Left(completions.found.ids, failures.found.ids, retry_failures=retry_failures)
        budget = Budget.open(recipe, run, completions.found, share)
        counters = Counters(total=0)

        async def ask() -> None:
            jobs = left.jobs(recipe, share)
            say = _say if share.part == 0 else _ignore  # they all see the same endpoints
            async with dispatching(recipe, jobs, completions, failures, counters, budget, say, share) as dispatcher:
                listener = asyncio.create_task(_obey(dispatcher, source))
                await dispatcher.run(lambda: _tell(Told(counters=counters.snapshot())))
                listener.cancel()

        try:
            run_loop(ask())
        finally:
            budget.save()
            _tell(Told(counters=counters.snapshot()))


async def _obey(dispatcher: Dispatcher, source: RawIOBase) -> None:
    """Stops when the parent says so, and at once when it is gone or says it again."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), source)
    while await reader.readline():
        dispatcher.interrupt()
    dispatcher.interrupt()
    dispatcher.interrupt()


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
