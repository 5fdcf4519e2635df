"""Another command of this project as a child process, in whose place the parent takes Ctrl-C."""

import signal
import subprocess
from collections.abc import Sequence

MOST_INTERRUPTS = 3  # the first asks the child to stop, the second to stop at once, the third kills it


def run_child(command: Sequence[str], *, pass_fds: Sequence[int] = ()) -> int:
    """Runs a command to its end. Returns its exit code, negative for a signal.

    Raises KeyboardInterrupt if it was interrupted. The child is in a process group of its own, so that Ctrl-C in a
    terminal reaches it once, through this process, and it keeps its time to end in order. It is told by SIGTERM, which
    every stage takes as Ctrl-C: what a script has put in the background ignores SIGINT, and so do its children.
    """
    process = subprocess.Popen(command, process_group=0, pass_fds=pass_fds)
    interrupts = 0
    while process.returncode is None:
        try:
            process.wait()
        except KeyboardInterrupt:
            interrupts += 1
            process.send_signal(signal.SIGTERM if interrupts < MOST_INTERRUPTS else signal.SIGKILL)
    if interrupts or process.returncode == 130:
        raise KeyboardInterrupt
    return process.returncode
