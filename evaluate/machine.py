"""The machine the figures come from: its description for the report, and the precisions of scoring and of serving."""

import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path

from evaluate.models import Subject, measure_weights
from pipeline.recipe import ServeConfig
from serve.command import build_command
from serve.machine import detect
from serve.model_facts import DTYPE_BYTES, model_facts

GIB = 1 << 30
FLOAT32_BYTES = 4
SHARE = 0.6  # of all memory, that a model's weights may take


def choose_precision(models: Sequence[Subject]) -> tuple[str, str]:
    """The dtype and the device that all models are scored with.

    Half precision on a GPU, and on a CPU that multiplies bfloat16 in hardware: SmolLM2-135M took 7.2 and 7.7 s there
    where float32 took 17.1 and 15.9 (32 rows, 2 shared cores). It moved the perplexity by +0.2%, Qwen2.5-Coder-0.5B's
    by -0.06%. Other CPUs emulate bfloat16, slowly: float32, unless the largest model would not fit.
    """
    import torch

    if torch.cuda.is_available():
        return ("bfloat16" if torch.cuda.is_bf16_supported() else "float16"), "cuda"
    weights = [measure_weights(subject.folder) for subject in models if subject.folder is not None]
    largest = max((w.parameters for w in weights if w), default=0)
    fits = largest * FLOAT32_BYTES < total_memory() * SHARE
    return ("float32" if fits and not detect().native_bfloat16 else "bfloat16"), "cpu"


def engine_facts(folder: Path, config: ServeConfig) -> dict[str, int | str | None]:
    """The dtype the engine computes in, and the bytes of KV cache that a token takes in it.

    2 (keys and values) · layers · KV heads · head size · bytes of the dtype, from the model's config.json.
    """
    facts = model_facts(str(folder), ask_hub=False)
    command = build_command(
        str(folder),
        served_name=folder.name,
        host="127.0.0.1",
        port=1,
        config=config,
        machine=detect(),
        facts=facts,
        environ={},
    )
    dtype = command.dtype or facts.dtype
    values, size = facts.kv_values_per_token, DTYPE_BYTES.get(dtype or "")
    return {"served_dtype": dtype, "kv_bytes_per_token": values * size if values and size else None}


def total_memory() -> int:
    """Bytes of memory this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def describe_machine() -> dict[str, str]:
    """What the figures were measured on; nothing that names the machine or its owner."""
    import torch

    cpu = re.search(r"^model name\s*:\s*(.*)$", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    machine = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu[1] if cpu else platform.processor() or "unknown",
        "cores": str(os.cpu_count()),
        "memory": f"{total_memory() / GIB:.0f} GiB",
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        machine["gpu"] = ", ".join(names)
    return machine


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
