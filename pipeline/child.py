"""Another command of this project as a child process: its parent takes Ctrl-C in its place, and never dies alone."""

import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress

from pipeline.errors import INTERRUPTED

PARENT = "DISTILLATE_PARENT"  # the variable that tells the child who started it
PR_SET_PDEATHSIG = 1
LOOK_S = 1.0  # between two calls of `meanwhile`
MOST_INTERRUPTS = 3  # the first asks the child to stop, the second to stop at once, the third kills it


def run_child(
    command: Sequence[str], *, pass_fds: Sequence[int] = (), meanwhile: Callable[[], object] | None = None
) -> int:
    """Runs a command to its end, with a call of `meanwhile` every second. Returns its exit code, negative for a signal.

    Raises KeyboardInterrupt if it was interrupted. The child is in a process group of its own, so that Ctrl-C in a
    terminal reaches it once, through this process, and it keeps its time to end in order. It is told by SIGTERM, which
    every stage takes as Ctrl-C: what a script has put in the background ignores SIGINT, and so do its children.
    """
    environment = {**os.environ, PARENT: str(os.getpid())}
    process = subprocess.Popen(command, process_group=0, pass_fds=pass_fds, env=environment)
    interrupts = 0
    while process.returncode is None:
        try:
            process.wait(LOOK_S if meanwhile else None)
        except subprocess.TimeoutExpired:
            assert meanwhile is not None  # or there is no timeout
            meanwhile()
        except KeyboardInterrupt:
            interrupts += 1
            process.send_signal(signal.SIGTERM if interrupts < MOST_INTERRUPTS else signal.SIGKILL)
    if interrupts or process.returncode in (INTERRUPTED, -signal.SIGINT):
        raise KeyboardInterrupt
    return process.returncode


def shell_code(code: int) -> int:
    """An exit code as a shell says it: 128 + n after signal n."""
    return code if code >= 0 else 128 - code


def end_with_parent() -> None:
    """Has the kernel send SIGTERM when the command that started this one is gone, killed by SIGKILL too (on Linux).

    Nobody would stop it otherwise: it would go on spending. Raises KeyboardInterrupt if that one is gone already.
    """
    parent = int(os.environ.pop(PARENT, "0"))
    if not parent:
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    try:
        os.kill(parent, 0)
    except ProcessLookupError:
        raise KeyboardInterrupt from None
