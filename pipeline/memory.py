"""The most memory that a process has held. Reads Linux's /proc."""

import re
from pathlib import Path


def peak_bytes(pid: int | str = "self") -> int:
    """The most bytes that were resident at once (VmHWM); 0 if the process has ended.

    Of this program alone: what getrusage says of a child begins with the memory of its parent.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    peak = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    return int(peak[1]) * 1024 if peak else 0
