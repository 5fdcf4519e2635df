"""Runs a server and makes sure that none of its processes outlives the process that wanted it.

    python guard.py COMMAND…

Runs COMMAND in a session of its own and ends it, with every process below it, when standard input is closed. The
kernel closes it when the process at the other end dies, so even SIGKILL leaves no server behind. If COMMAND ends by
itself, its exit code is returned. Uses only the standard library and psutil; reads and writes no file.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
from types import FrameType

import psutil

TICK_S = 0.2
GRACE_S = 10.0  # for the server to end by itself
KILL_S = 3.0  # for its children, and then for the kernel
PR_SET_CHILD_SUBREAPER = 36

_stop = False


def main(command: list[str]) -> int:
    """Runs the command until it ends or is no longer wanted. Returns its exit code; 128 + n after signal n."""
    _adopt_orphans()
    signal.signal(signal.SIGTERM, _on_signal)
    signal.signal(signal.SIGINT, _on_signal)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    while child.poll() is None and not _stop:
        if select.select([0], [], [], TICK_S)[0] and not os.read(0, 4096):
            break
    if child.poll() is None:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_S)
    end_descendants()
    code = child.wait()
    return code if code >= 0 else 128 - code


def end_descendants() -> None:
    """Ends every process below this one: first by SIGTERM, then by SIGKILL, repeated for processes born meanwhile."""
    for signum in (signal.SIGTERM, signal.SIGKILL, signal.SIGKILL, signal.SIGKILL):
        processes = psutil.Process().children(recursive=True)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signum)
        psutil.wait_procs(processes, timeout=KILL_S)


def _adopt_orphans() -> None:
    """On Linux a process whose parent died becomes our child, so that we find it; elsewhere init takes it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _on_signal(signum: int, frame: FrameType | None) -> None:
    global _stop
    _stop = True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
