"""What a training is made with, and what this machine can do for it: number formats, and what fits into its memory.

Looks at the processor or GPU and at free memory; reads and writes no file.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console

from pipeline.errors import DistillError, RecipeError, UsageError
from pipeline.recipe import TeacherConfig
from pipeline.train_config import TrainConfig, Weights
from train.processes import Processes

GIB = 1 << 30
ADAMW_BYTES = 12  # per trained parameter: gradient and two moments, in float32
LOGITS_BYTES = 1 << 30  # for the logits of one forward pass, in float32, which are the larger part
CPU_TOKENS = 512  # per forward pass on a CPU; more are slower (SmolLM2-135M: 139 tokens per CPU second, with 2048 108)
SAFE_SHARE = 0.8  # of free memory that a step may plan for


@dataclass(frozen=True)
class Setting:
    """What the trainer of any method is made with, beside the student and its rows."""

    config: TrainConfig
    folder: Path  # of the checkpoints
    console: Console
    processes: Processes
    teacher: TeacherConfig | None = None  # that a soft method follows


def precision(weights: Weights) -> str:
    """In words: the weights' dtype, and autocast if there is any."""
    dtype = str(weights_dtype(weights)).removeprefix("torch.")
    return f"{dtype} weights, bfloat16 autocast" if autocast(weights) else f"{dtype} weights"


def weights_dtype(weights: Weights) -> torch.dtype:
    """The dtype that a student is loaded in for training.

    `full`: always float32. bfloat16 weights lose an update below half a unit in the last place, and most are: after 6
    steps at a learning rate of 1e-5 SmolLM2-135M had a loss of 0.848 in float32, and still its first 1.225 in bfloat16.
    Adapters: the frozen base stays in bfloat16 where that is native; PEFT keeps the adapter in float32.
    """
    return torch.bfloat16 if weights != "full" and native_bf16() else torch.float32


def autocast(weights: Weights) -> bool:
    """Whether forward passes run in bfloat16: wherever that is native, except for `full` on a CPU.

    There, autocast was 17% faster (2 cores with avx512_bf16) but rounds the weights of each step, so small updates have
    no effect: a loss of 1.173 in the comparison above, against 0.848.
    """
    return native_bf16() and (weights != "full" or torch.cuda.is_available())


def native_bf16() -> bool:
    """Whether this machine computes in bfloat16 without emulating it."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def check_machine(config: TrainConfig, processes: Processes) -> None:
    """Raises UsageError or RecipeError if the recipe asks for what this machine does not have."""
    if config.weights == "qlora" and not (torch.cuda.is_available() and find_spec("bitsandbytes")):
        raise RecipeError("train.method qlora needs a GPU and bitsandbytes (pip install bitsandbytes); or use lora")
    if config.padding_free and not (torch.cuda.is_available() and find_spec("flash_attn")):
        raise RecipeError(
            "train.padding_free needs a GPU and FlashAttention (pip install flash-attn), which keeps rows that lie end "
            "to end apart at no cost; leave it out"
        )
    if config.method == "on_policy" and config.on_policy.rollouts == "vllm" and not torch.cuda.is_available():
        raise RecipeError("train.on_policy.rollouts vllm needs a GPU; use generate")
    for name in config.report_to:
        if find_spec(name) is None:
            raise RecipeError(f"train.report_to: {name} is not installed; pip install {name}, or leave it out")
    if processes.count > config.batch_size:
        raise RecipeError(
            f"train.batch_size {config.batch_size} is less than a row for each of {processes.count} processes; raise it"
        )
    if processes.count == 1 and (gpus := torch.cuda.device_count()) > 1:
        raise UsageError(
            f"{gpus} GPUs are visible to one process; use them all with `accelerate launch --multi_gpu --num_processes "
            f"{gpus} -m train …`, or show it one: CUDA_VISIBLE_DEVICES=0"
        )


def free_memory() -> int:
    """Bytes that are free: the GPU's, or the machine's."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available


def micro_tokens(vocabulary: int, *, soft: bool) -> int:
    """Tokens of one forward pass: as many as there is room for their logits, and on a CPU no more than help.

    Soft losses hold four times as much: the logits and log-probabilities of two models.
    """
    room = LOGITS_BYTES // (4 * vocabulary) // (4 if soft else 1)
    return max(1, room if torch.cuda.is_available() else min(room, CPU_TOKENS))


def micro_rows(config: TrainConfig, rows: int, tokens: int, longest: int, processes: Processes) -> tuple[int, int]:
    """Rows of a step in this process, and of a forward pass of so many `tokens`: TRL's trainers want equal ones."""
    share = max(1, min(config.batch_size, rows) // processes.count)
    most = config.micro_batch_size or max(1, tokens // longest)
    return share, max(size for size in range(1, min(most, share) + 1) if share % size == 0)


def activation_bytes(config: Any, tokens: int, *, width: int, adapters: bool, soft: bool) -> int:
    """Bytes that a decoder keeps of a forward pass for its backward pass, estimated.

    `config`: the model's; `width`: bytes per activation. Per token and layer of a gated block it counts what two norms
    (in float32), four projections, attention, gate and product keep. Adapters keep the input of each of the seven
    projections again, in float32 and with dropout.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    kv = head * getattr(config, "num_key_value_heads", config.num_attention_heads)
    layer = width * (8 * hidden + 4 * kv + 5 * inner) + 4 * 4 * hidden
    layer += (width + 4) * (6 * hidden + inner) if adapters else 0
    logits = 4 * config.vocab_size * (6 if soft else 3)
    return tokens * (config.num_hidden_layers * layer + logits)


def wants_checkpointing(model: Any, config: TrainConfig, tokens: int, console: Console, shards: int = 1) -> bool:
    """Whether to use gradient checkpointing for forward passes of so many tokens. `shards`: as Processes has them.

    The recipe decides, or short memory, which is printed. Raises DistillError if memory does not suffice even so.
    """
    free = free_memory()
    optimizer = ADAMW_BYTES * model.num_parameters() // shards if config.weights == "full" else 0
    if optimizer > free:
        raise DistillError(
            f"training all of {model.name_or_path} needs {optimizer / GIB:.1f} GiB more than its weights, "
            f"{free / GIB:.1f} GiB are free; use train.method: lora, or a smaller student"
        )
    if config.gradient_checkpointing != "auto":
        return config.gradient_checkpointing
    try:
        shape, width = model.config.get_text_config(), 2 if autocast(config.weights) else 4
        needed = activation_bytes(shape, tokens, width=width, adapters=config.weights != "full", soft=config.soft)
    except AttributeError:
        return False  # a shape that is not known
    left = SAFE_SHARE * free - optimizer
    if needed > left:
        console.print(
            f"gradient checkpointing is on: {tokens:,} tokens need about {needed / GIB:.1f} GiB without it, there is "
            f"room for {max(left, 0) / GIB:.1f} (train.gradient_checkpointing: auto)"
        )
    return needed > left
