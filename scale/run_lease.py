"""One machine at a time works on a run in a store: `lease/000001.json`, `000002.json`, …; the last one counts.

A lease is never changed by another than its holder and never removed, so of two machines that take the next number one
gets it. The holder says every BEAT_S that it is alive. On its machine one command at a time has the run's folder.
"""

import fcntl
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock, Thread, main_thread
from time import time
from typing import Any

import msgspec
from msgspec.structs import replace

from pipeline.errors import DistillError, UsageError
from pipeline.rundir import naming
from scale.storage import Store, read_record, retried

BEAT_S = 5.0
TICK_S = 1.0  # between two calls of what `repeated` repeats
STALE_S = 60.0  # without a beat: the holder is gone, or does not reach the store


class TakenOver(DistillError):
    """Another machine has the run now: this process must stop."""


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """What a lease says of its holder."""

    owner: str  # the folder in which it works
    host: str
    pid: int
    seen: float  # its last beat, seconds since 1970
    released: bool = False  # all it has is in the store
    unstored: dict[str, int] = {}  # by kind of part, the most rows that only its machine has had
    lost: dict[str, int] = {}  # the same of a machine that it has taken over from, until the budget counts them


class Lease:
    """This process's lease on a run. A thread may beat while another releases it."""

    def __init__(self, store: Store, name: str, holder: Holder) -> None:
        self._store, self._holder = store, holder
        self.name, self._changing = name, Lock()

    @classmethod
    def take(cls, store: Store, owner: str, *, take_over: bool = False) -> "Lease":
        """Takes the run. Raises UsageError if another machine has it; one without a beat gives way to `take_over`."""
        names = store.names("lease")
        before = _read_holder(store, names[-1]) if names else None
        name, lost = f"lease/{len(names) + 1:06}.json", dict(before.lost) if before else {}
        if before and before.owner != owner and not before.released:
            _check_stale(store.url, before, take_over=take_over)
            lost = {kind: lost.get(kind, 0) + before.unstored.get(kind, 0) for kind in lost | before.unstored}
        rows = before.unstored if before and before.owner == owner and not before.released else {}
        host, pid = socket.gethostname(), os.getpid()
        holder = Holder(owner=owner, host=host, pid=pid, seen=time(), unstored=rows, lost=lost)
        if not store.put_new(name, msgspec.json.encode(holder)):
            raise UsageError(f"{store.url}: another machine has just begun to work on this run")
        if store.put_new(name, b""):
            store.delete(name)
            raise DistillError(f"{store.url}: this storage ignores `If-None-Match`, and cannot keep two writers apart")
        return cls(store, name, holder)

    @property
    def lost(self) -> dict[str, int]:
        """By kind of part, the rows of a machine that was taken over, which the budget must count."""
        return self._holder.lost

    def counted(self) -> None:
        """The budget that is in the store counts the lost rows."""
        self._put(lost={})

    def beat(self, unstored: dict[str, int]) -> None:
        """Says that this process is alive, and how many rows only it has. Raises TakenOver, or DistillError."""
        self.check()
        most = {kind: max(rows, self._holder.unstored.get(kind, 0)) for kind, rows in unstored.items()}
        self._put(seen=time(), unstored=self._holder.unstored | most)

    def check(self) -> None:
        """Raises TakenOver if another machine has the run now."""
        check_lease(self._store, self.name)

    def release(self) -> None:
        """Everything is in the store; the next machine may begin."""
        self._put(seen=time(), released=True)

    def _put(self, **changes: Any) -> None:
        with self._changing:
            self._holder = replace(self._holder, **changes)
            retried(self._store.put, self.name, msgspec.json.encode(self._holder))


def check_lease(store: Store, name: str) -> None:
    """Raises TakenOver if another machine has the run now, under a lease after this one; DistillError without any."""
    leases = store.names("lease")
    if not leases:
        raise DistillError(f"{store.url}: the run has been removed from there")
    if leases[-1] != name:
        raise TakenOver(f"{store.url}: another machine has taken this run over; its answers are safe there")


def is_last(store: Store, owner: str, lease: str) -> bool:
    """Whether a folder that has had this lease is the last that has had the run: nothing in the store is newer.

    Its later leases are of commands that were stopped before they had fetched all.
    """
    names = store.names("lease")
    if lease not in names:
        return False
    holders = (_read_holder(store, name) for name in names[names.index(lease) :])
    return all(holder is not None and holder.owner == owner for holder in holders)


def _read_holder(store: Store, name: str) -> Holder | None:
    return read_record(store, name, Holder, "remove it, if no machine works on this run")


def _check_stale(url: str, holder: Holder, *, take_over: bool) -> None:
    age = time() - holder.seen  # below 0 where the clock of the holder's machine is ahead
    who = f"{url}: {holder.host} (process {holder.pid}) works on this run"
    if abs(age) < STALE_S:
        raise UsageError(f"{who}, its last sign is {max(age, 0):.0f} s old; wait for it, or stop it there")
    if not take_over:
        when = f"{age / 60:.0f} minutes old" if age > 0 else f"{-age / 60:.0f} minutes ahead of the clock here"
        raise UsageError(
            f"{who}, but its last sign is {when}. If it is gone for good, run the same "
            "command with --take-over: answers that it had not put into the store are asked again"
        )


@contextmanager
def held(folder: Path) -> Iterator[int]:
    """Holds the local folder for this process and its child. Raises UsageError if another process has it."""
    with (lock := folder / ".stored.lock").open("w") as file:
        try:
            with naming(lock):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{folder}: another command on this machine works on this run; wait for it or stop it"
            ) from None
        yield file.fileno()


def is_held(folder: Path) -> bool:
    """Whether a process runs a command on this folder of a run in a store."""
    try:
        with held(folder):
            return False
    except UsageError:
        return True


@contextmanager
def repeated(put: Callable[[], object], what: str, every: float | None = None) -> Iterator[None]:
    """Puts something every TICK_S while the block runs, in a thread; a store that is away is said once."""
    ended = Event()

    def repeat() -> None:
        said = False
        while not ended.wait(every or TICK_S):
            try:
                put()
                said = False
            except TakenOver as error:
                print(f"stopping: {error}", file=sys.stderr)
                signal.pthread_kill(main_thread().ident or 0, signal.SIGTERM)  # which run_stage takes as Ctrl-C
                return
            except (DistillError, OSError) as error:
                if not said:
                    print(f"warning: {error}; {what} wait on this machine", file=sys.stderr)
                said = True

    thread = Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
