"""`generate.processes: N`: one run over N processes of this machine, for when one core cannot keep the server full.

Each process sends the requests of every N-th prompt, with its part of the limits and of the budget, by the same loop
as a whole run (generate.loop), and appends to the same journals (they are made for it). The first process starts
the others, shows their sum, and stops them. When parts of the budget are spent, or all requests of a part are
forbidden, one more process sends what is left: the run ends as it would end in one process.

A child reads its pickled work from stdin and writes JSON lines to stdout: `["counters", {…}]` four times per second,
`["say", message]`, or `[class of an error, its message]`. SIGUSR1 stops it as Ctrl-C stops a run; after SIGUSR2, when
another child cannot go on, it waits for all that it has in flight; SIGTERM, which a system may send to all processes,
is for the parent. The end of stdin stops it at once: its parent has died, or was interrupted again. It inherits the
run's lock, which stays held until the last child is gone.
"""

import asyncio
import os
import pickle
import signal
import sys
from asyncio.subprocess import PIPE, Process
from contextlib import suppress
from typing import Any, BinaryIO

import msgspec

from generate.context import Outcome, Run, opened_run
from generate.event_loop import on_signals, run_loop
from generate.jobs import WHOLE, Partition
from generate.progress import Counters
from generate.servers import opened_loop
from pipeline.errors import AllRefused, BudgetReached, DistillError, by_name, file_error
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir

LINE_BYTES = 1 << 20
STOP, END = signal.SIGUSR1, signal.SIGUSR2

_parent: BinaryIO  # of a child: what its standard output was when it began


async def send_from_workers(run: Run, *, signals: bool) -> Outcome:
    """Sends all that is left, from `generate.processes` children. With `signals`, Ctrl-C and SIGTERM stop them."""
    workers = _Workers(run)
    try:
        with on_signals(workers.interrupt if signals else None):
            return await workers.send()
    finally:
        await workers.kill()


class _Workers:
    """The children of a run, as their parent knows them."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._children: list[Process] = []
        self._counts: list[dict[str, Any]] = []  # the last that each child told
        self._failed: list[DistillError] = []
        self._interrupted = False

    async def send(self) -> Outcome:
        """Starts the children, listens to them until they end, and says how that was."""
        config = self._run.recipe.generate
        count = config.processes
        if config.concurrency != "auto":  # each of them has a request in flight, at least
            count = min(count, config.concurrency)
        ends = await self._send_all([Partition(part, count) for part in range(count)])
        if self._failed and self._only_of_parts() and not self._interrupted:
            self._failed.clear()
            ends = await self._send_all([WHOLE])
        if self._failed:
            return self._failed[0]
        if self._interrupted:
            return KeyboardInterrupt()
        if code := next(filter(None, ends), 0):
            how = "was killed (out of memory?)" if code == -signal.SIGKILL else f"ended with {code}"
            return DistillError(f"a process of this run {how}; run the same command again")
        return None

    def interrupt(self) -> None:
        """Stops the children in order; a second call stops them at once."""
        if self._interrupted:
            for child in self._children:
                assert child.stdin
                child.stdin.close()  # not STOP again: of two signals at once a busy child sees one
            return
        self._interrupted = True
        self.signal(STOP)
        self._run.say_stopping()

    def signal(self, number: signal.Signals) -> None:
        for child in self._children:
            with suppress(ProcessLookupError):
                child.send_signal(number)

    async def kill(self) -> None:
        """Ends those that are left, and waits for it: until then they hold the run's lock."""
        self.signal(signal.SIGKILL)
        await asyncio.gather(*(child.wait() for child in self._children))

    def _only_of_parts(self) -> bool:
        """Whether what ended children is true of their parts, and perhaps not of the run."""
        return all(isinstance(error, BudgetReached | AllRefused) for error in self._failed)

    async def _send_all(self, partitions: list[Partition]) -> list[int]:
        """Children for the partitions; returns their exit codes."""
        first = len(self._children)
        for partition in partitions:
            self._counts.append(Counters().snapshot())
            self._children.append(await _start(self._run, partition))
        new = enumerate(self._children[first:], start=first)
        return await asyncio.gather(*(self._listen(index, child) for index, child in new))

    async def _listen(self, index: int, child: Process) -> int:
        assert child.stdout
        async for line in child.stdout:
            kind, said = msgspec.json.decode(line)
            if kind == "counters":
                self._counts[index] = said
                self._run.counters.gather(self._counts)
                self._run.show()
            elif kind == "say":
                self._run.say(said)
            else:
                self._failed.append(by_name(kind, said))
                if not self._only_of_parts():
                    self.signal(END)
        return await child.wait()


async def _start(run: Run, partition: Partition) -> Process:
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "generate.workers"),
        stdin=PIPE,
        stdout=PIPE,
        limit=LINE_BYTES,
        close_fds=False,  # the run's lock goes along; nothing else is inheritable
        start_new_session=True,  # Ctrl-C is for the first process, which stops the others in order
    )
    assert child.stdin
    earlier = run.failures.found.good_bytes  # of failures.jsonl: what follows has failed in this call
    child.stdin.write(pickle.dumps((run.recipe, run.dir, partition, run.left.retry_failures, earlier)))
    await child.stdin.drain()
    return child


class _Id(msgspec.Struct):
    id: str


def main() -> None:
    """A child: sends its partition."""
    global _parent
    _parent = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a user's own rows() prints must not come between the lines for the parent
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        _send_partition(*pickle.load(sys.stdin.buffer))
    except (EOFError, pickle.UnpicklingError):
        sys.exit("the parent has gone")
    except DistillError as error:
        _tell(type(error).__name__, str(error))
        sys.exit(error.exit_code)
    except OSError as error:  # a full disk, a folder that may not be written
        _tell(DistillError.__name__, file_error(error))
        sys.exit(DistillError.exit_code)


def _send_partition(recipe: Recipe, folder: RunDir, partition: Partition, retry_failures: bool, earlier: int) -> None:
    """Raises what ended it; an interrupt is the parent's to tell.

    What failed in this call, behind the first `earlier` bytes of failures.jsonl, the last process leaves alone.
    """
    counters = Counters()
    with opened_run(
        recipe,
        folder,
        counters,
        say=lambda message: _tell("say", message) if partition.part == 0 else None,  # all see the same endpoints
        show=lambda: _tell("counters", counters.snapshot()),
        retry_failures=retry_failures,
        partition=partition,
    ) as run:
        if partition == WHOLE:  # the others have ended
            with folder.failures.open("rb") as file:
                file.seek(earlier)
                for line in file:
                    if line.strip():
                        run.left.left_alone.add(msgspec.json.decode(line, type=_Id).id)
        try:
            outcome = run_loop(_send(run))
        finally:
            for number in (STOP, END):  # it has ended: a stop must not cost the last counts
                signal.signal(number, lambda *_: None)  # with SIG_IGN Python prints an error if one came just before
            run.budget.save()
            run.show()
        if outcome and not isinstance(outcome, KeyboardInterrupt):
            raise outcome


async def _send(run: Run) -> Outcome:
    events = asyncio.get_running_loop()
    async with opened_loop(run, run.jobs_to_send()) as (loop, _):

        def stop_at_once() -> None:
            events.remove_reader(sys.stdin)
            loop.interrupt()
            loop.interrupt()

        events.add_reader(sys.stdin, stop_at_once)
        events.add_signal_handler(STOP, loop.interrupt)
        events.add_signal_handler(END, loop.close)
        return await loop.run()


def _tell(kind: str, said: object) -> None:
    with suppress(BrokenPipeError):  # the parent has died: stdin's end says so too
        _parent.write(msgspec.json.encode([kind, said]) + b"\n")
        _parent.flush()


if __name__ == "__main__":
    main()
