"""A process beside this one that does what may hang, crash or fill the memory: it can be killed, and is replaced.

`call` is this process's side, `main` the worker's (`python -m filters.verify.worker SOCKET`). Each process has one
worker, started when it is first needed. The worker can write no file, open no TCP connection (where Linux has
Landlock) and use no more than MEMORY; it ends with the process that started it.
"""

import importlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from filters.verify.guard import Unverified
from filters.verify.sandbox import die_with_parent, limit, restrict_files

MEMORY = 2 << 30  # bytes of address space: sympy takes a tenth of it
_START_S = 60  # for a worker to start, and to import and load what a verifier needs, on a busy machine
_ENVIRONMENT = ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH")  # what Python may need to start; nothing that is secret


Request = tuple[Any, ...]  # a module to import; or a module, its function and the arguments


class Worker:
    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        with theirs:
            command = [sys.executable, "-m", "filters.verify.worker", str(theirs.fileno())]
            self.process = subprocess.Popen(
                command,
                env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self.connection = Connection(ours.detach())
        self.replies = select.poll()  # a third of the time that the connection's own takes
        self.replies.register(self.connection, select.POLLIN)
        self.owner = os.getpid()
        self.ready: set[Request] = set()  # modules imported there, and calls that are made once
        self.usable = True

    def ask(self, request: Request, seconds: float, before: Sequence[Request]) -> Any:
        """What the function returns. Raises Unverified if it raises, takes longer, or takes the worker down."""
        for first in before:
            if first not in self.ready:
                self._exchange(first, _START_S)
                self.ready.add(first)
        return self._exchange(request, seconds)

    def _exchange(self, request: Request, seconds: float) -> Any:
        self.usable = False  # until the whole reply is here
        try:
            self.connection.send_bytes(msgspec.msgpack.encode(request))
            if not self.replies.poll(1000 * seconds):
                raise Unverified(f"the check took longer than {seconds:g} s")
            error, value = msgspec.msgpack.decode(self.connection.recv_bytes())
        except (EOFError, OSError):
            raise Unverified("the check ended its process (out of memory?)") from None
        self.usable = True
        if error:
            raise Unverified(error)
        return value

    def is_ours(self) -> bool:
        """After a fork the worker is the parent's; and it ends with the thread that started it."""
        return self.owner == os.getpid() and self.process.poll() is None

    def close(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()


_lock = threading.Lock()
_worker: Worker | None = None


def call(module: str, function: str, *arguments: Any, seconds: float, load: tuple[str, ...] = ()) -> Any:
    """Has the worker call `function` of `module`; values are JSON. Raises Unverified if it fails or takes longer.

    `load`: another function of the module and its arguments, which a new worker calls first; not in `seconds`.
    """
    global _worker
    before: list[Request] = [(module,)]
    if load:
        before.append((module, load[0], load[1:]))
    with _lock:
        if _worker is None or not _worker.is_ours():
            _worker = Worker()
        try:
            return _worker.ask((module, function, arguments), seconds, before)
        finally:
            if not _worker.usable:
                _worker.close()
                _worker = None


def main() -> None:
    """The worker's side: imports a module, or calls one of its functions, until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the other side's to handle
    limit("CORE", 0)
    if sys.platform == "linux":
        die_with_parent()
        limit("AS", MEMORY)
        restrict_files(read=["/"], write=[os.devnull])
    connection = Connection(int(sys.argv[1]))
    while True:
        try:
            module, *rest = msgspec.msgpack.decode(connection.recv_bytes())
        except EOFError:
            return
        try:
            imported = importlib.import_module(module)
            value = getattr(imported, rest[0])(*rest[1]) if rest else None
            reply = msgspec.msgpack.encode([None, value])
        except Exception as error:
            reply = msgspec.msgpack.encode([f"{type(error).__name__}: {error}"[:500], None])
        connection.send_bytes(reply)


if __name__ == "__main__":
    main()
