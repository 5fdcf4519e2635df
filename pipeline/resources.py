"""The memory and the cores that a process may use, the memory that one has used, and the machine's number format.

Reads Linux's /proc and /sys, with the limits that a container sets; `root` is `/`, and another folder stands for a
machine. What a GPU computes in, torch says.
"""

import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

GIB = 1 << 30
NATIVE_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}  # flags of CPUs: x86, x86 with AMX, Arm


def peak_bytes(pid: int | str = "self") -> int:
    """The most bytes that were resident at once (VmHWM); 0 if the process has ended.

    Of this program alone: what getrusage says of a child begins with the memory of its parent.
    """
    status = read_or_empty(Path(f"/proc/{pid}/status"))
    peak = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    return int(peak[1]) * 1024 if peak else 0


def usable_cores(affinity: Iterable[int], root: Path) -> tuple[int, ...]:
    """One CPU of each physical core this process may run on, cut to the CPU quota of its control group.

    Two threads on one physical core slow each other down, and threads beyond the quota are stopped for a part of every
    scheduling period.
    """
    cores: dict[str, int] = {}
    for cpu in sorted(affinity):
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        siblings = read_or_empty(topology / "thread_siblings_list").strip() or str(cpu)
        cores.setdefault(siblings, cpu)
    quota = _cpu_quota(root)
    chosen = sorted(cores.values())
    return tuple(chosen[: max(1, math.ceil(quota))] if quota else chosen)


def free_bytes(root: Path) -> int:
    """Bytes for a new process: MemAvailable, or what a container's limit leaves if that is less."""
    available = re.search(r"^MemAvailable:\s*(\d+) kB", read_or_empty(root / "proc/meminfo"), re.MULTILINE)
    free = int(available[1]) * 1024 if available else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for folder in _cgroups(root, "memory"):
        for limit_file, usage_file in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, usage = read_or_empty(folder / limit_file).strip(), read_or_empty(folder / usage_file).strip()
            if limit.isdigit() and usage.isdigit():
                cached = re.search(
                    r"^(?:total_)?inactive_file (\d+)", read_or_empty(folder / "memory.stat"), re.MULTILINE
                )
                free = min(free, max(0, int(limit) - int(usage) + (int(cached[1]) if cached else 0)))
    return free


def _cpu_quota(root: Path) -> float | None:
    """CPUs that the control group and all its parents may use; None if there is no limit."""
    quotas = []
    for folder in _cgroups(root, "cpu"):
        quota, _, period = read_or_empty(folder / "cpu.max").strip().partition(" ")
        if not period:
            quota, period = (read_or_empty(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
        if quota.isdigit() and period.isdigit():
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _cgroups(root: Path, controller: str) -> list[Path]:
    """The control group of this process and its parents, for one controller, in both versions of the layout.

    The root is always in the list, because a container often sees its own group there under another name.
    """
    base = root / "sys/fs/cgroup"
    folders = [base, base / controller]
    for line in read_or_empty(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            inside = Path(path.strip("/"))
            folders += [(base / controller if controllers else base) / part for part in (inside, *inside.parents)]
    return folders


def half_dtype() -> "torch.dtype | None":
    """The format of 16 bits that this machine computes in without emulating it, if any.

    GPUs before Ampere, such as a T4, have no bfloat16, but float16.
    """
    import torch

    if native_bf16():
        return torch.bfloat16
    return torch.float16 if torch.cuda.is_available() else None


def native_bf16() -> bool:
    """Whether this machine computes in bfloat16 without emulating it."""
    import torch

    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return cpu_multiplies_bf16(Path("/"))


def cpu_multiplies_bf16(root: Path) -> bool:
    """Whether the CPU multiplies bfloat16 in hardware; otherwise bfloat16 is emulated and slow."""
    cpuinfo = read_or_empty(root / "proc/cpuinfo")
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)  # of the first CPU, on x86 and on Arm
    return bool(flags and NATIVE_BF16 & set(flags[1].split()))


def read_or_empty(path: Path) -> str:
    """A file's text; empty if it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
