"""What this machine can do for a training: number formats, and what fits into its memory.

Looks at the processor or GPU and at free memory; reads and writes no file.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pipeline.errors import DistillError, RecipeError, UsageError
from pipeline.resources import GIB, free_bytes, half_dtype, peak_bytes
from pipeline.train_config import TrainConfig, Weights
from train.processes import Processes

ADAMW_BYTES = 12  # per trained parameter: gradient and two moments, in float32
AUTOCAST_BYTES = 2  # per parameter: the copy in 16 bits that a forward pass in mixed precision computes with
LOGITS_BYTES = 1 << 30  # on a CPU, for the logits of one forward pass; on a GPU, for the tiles of the fused head
GPU_TOKENS = 32_768  # per forward pass on a GPU, at most: by then its matrices are large enough to fill a card
# Tokens: batches are as wide as a multiple of it, since torch.compile makes code of its own for other widths.
GPU_WIDTH = 8
CPU_TOKENS = 512  # per forward pass on a CPU; more are slower (SmolLM2-135M: 139 tokens per CPU second, with 2048 108)
SAFE_SHARE = 0.8  # of free memory that a step may plan for
COMPILED_STEPS = 1000  # by then compiled layers have won back what compiling them took (docs/gpu.md)


def precision(weights: Weights) -> str:
    """In words: the weights' dtype, and autocast if there is any."""
    cast = {torch.bfloat16: ", bfloat16 autocast", torch.float16: ", float16 autocast with loss scaling", None: ""}
    return f"{weights_dtype(weights)} weights{cast[autocast(weights)]}".removeprefix("torch.")


def weights_dtype(weights: Weights) -> torch.dtype:
    """The dtype that a student is loaded in for training.

    `full`: always float32. bfloat16 weights lose an update below half a unit in the last place, and most are: after 6
    steps at a learning rate of 1e-5 SmolLM2-135M had a loss of 0.848 in float32, and still its first 1.225 in bfloat16.
    Adapters: the frozen base stays in 16 bits where those are native; PEFT keeps the adapter in float32.
    """
    return (None if weights == "full" else half_dtype()) or torch.float32


def autocast(weights: Weights) -> torch.dtype | None:
    """What forward passes run in: 16 bits wherever those are native, except for `full` on a CPU; None: float32.

    For `full` on a CPU, autocast was 17% faster (2 cores with avx512_bf16) but rounds the weights of each step, so
    small updates have no effect: a loss of 1.173 in the comparison of `weights_dtype`, against 0.848.

    In float16 small gradients would be zero, so the loss is scaled up before the backward pass (Micikevicius et al.
    2018, arXiv 1710.03740).
    """
    return half_dtype() if weights != "full" or torch.cuda.is_available() else None


def trained_in_float32(model: Any) -> None:
    """Puts trained weights into float32: TRL has adapters over 4 bits in bfloat16, whose gradients are not scaled."""
    for weights in model.parameters():
        if weights.requires_grad:
            weights.data = weights.data.float()


def flash_attention() -> bool:
    """Whether FlashAttention is installed and this GPU can run it: from Ampere on. The other way is torch's (SDPA)."""
    able = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    return able and find_spec("flash_attn") is not None


def plain_attention() -> None:
    """Leaves out cuDNN's attention: it makes a plan for every new shape of a batch, and each step has a new one."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def wants_compiling(config: TrainConfig, rows: int, processes: Processes) -> bool:
    """Whether torch.compile is to be used: as the recipe says, or on a GPU in a training that is long enough.

    Not where it is not tried: over 4 bits, in shards, beside a teacher, and where the student also generates.
    """
    if config.compile != "auto":
        return config.compile
    able = config.method in ("lora", "full") and processes.shards == 1
    return able and torch.cuda.is_available() and config.epochs * rows >= COMPILED_STEPS * config.batch_size


def compile_layers(model: Any, *, adapters: bool) -> None:
    """Compiles each layer by itself. They share the code, so it is compiled once, not for each layer.

    With adapters the first layer's inputs need no gradient, and it would be compiled apart, so they are given one.
    """
    if adapters:
        embeddings = model.get_input_embeddings()
        embeddings.register_forward_hook(lambda _, __, output: output.requires_grad_(torch.is_grad_enabled()))
    for layer in model.modules():
        if type(layer).__name__ in (model._no_split_modules or ()):
            layer.compile(dynamic=True)


def check_machine(config: TrainConfig, processes: Processes) -> None:
    """Raises UsageError or RecipeError if the recipe asks for what this machine does not have."""
    if config.weights == "qlora" and not (torch.cuda.is_available() and find_spec("bitsandbytes")):
        raise RecipeError("train.method qlora needs a GPU and bitsandbytes (pip install bitsandbytes); or use lora")
    if config.padding_free and not flash_attention():
        raise RecipeError(
            "train.padding_free needs a GPU (Ampere or newer) and FlashAttention (pip install flash-attn), which keeps "
            "rows that lie end to end apart at no cost; leave it out"
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
    """Bytes that are free: the GPU's, with those that torch holds ready, or what the machine or its container has."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return free_bytes(Path("/"))


def free_beside(*models: Any, shards: int = 1) -> int:
    """Bytes that are free when these models are where they are used: on a GPU, to which they may not be moved yet."""
    weights = [tensor for model in models for tensor in model.parameters()]
    waiting = [tensor.nbytes for tensor in weights if torch.cuda.is_available() and not tensor.is_cuda]
    return free_memory() - sum(waiting) // shards


def peak_memory() -> int:
    """Bytes that this process has held at once, at most: of the GPU's memory, or of the machine's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak_bytes()


def micro_tokens(model: Any, config: TrainConfig, free: int, shards: int = 1) -> int:
    """Tokens of one forward pass: on a GPU as many as the `free` bytes hold, on a CPU no more than help.

    On a CPU soft losses hold four times as much: the logits and log-probabilities of two models.
    """
    left = SAFE_SHARE * free - optimizer_bytes(model, config, shards) - LOGITS_BYTES
    per_token = token_bytes(model, config) if torch.cuda.is_available() else None
    if per_token is not None:
        return tokens_within(left, per_token)
    room = LOGITS_BYTES // (4 * model.config.get_text_config().vocab_size) // (4 if config.soft else 1)
    return max(1, min(room, CPU_TOKENS))


def micro_rows(config: TrainConfig, rows: int, tokens: int, longest: int, processes: Processes) -> tuple[int, int]:
    """Rows of a forward pass of so many `tokens`, and passes of a step in this process: equal ones, as TRL wants."""
    share = max(1, min(config.batch_size, rows) // processes.count)
    most = config.micro_batch_size or max(1, tokens // longest)
    micro = max(size for size in range(1, min(most, share) + 1) if share % size == 0)
    return micro, share // micro


def tokens_within(room: float, per_token: int) -> int:
    """Tokens of one forward pass on a GPU that has so many bytes left for it: at least one, and no more than help."""
    return max(1, min(GPU_TOKENS, int(room // per_token)))


def activation_bytes(config: Any, tokens: int, *, width: int, adapters: bool, logits: int) -> int:
    """Bytes that a decoder keeps of a forward pass for its backward pass, estimated.

    `config`: the model's; `width`: bytes per activation; `logits`: how often the logits are kept, in float32. Per token
    and layer of a gated block it counts what two norms (in float32), four projections, attention, gate and product
    keep. Adapters keep the input of each of the seven projections again, in float32 and with dropout.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    kv = head * getattr(config, "num_key_value_heads", config.num_attention_heads)
    layer = width * (8 * hidden + 4 * kv + 5 * inner) + 4 * 4 * hidden
    layer += (width + 4) * (6 * hidden + inner) if adapters else 0
    return tokens * (config.num_hidden_layers * layer + 4 * config.vocab_size * logits)


def token_bytes(model: Any, config: TrainConfig) -> int | None:
    """Bytes that a forward pass keeps per token; None of a shape that is not known."""
    logits = 6 if config.soft else 3
    if torch.cuda.is_available() and config.method in ("lora", "qlora", "full"):
        logits = 0  # the fused head (train.student_trainer) keeps none
    width = 4 if autocast(config.weights) is None else 2
    try:
        shape = model.config.get_text_config()
        return activation_bytes(shape, 1, width=width, adapters=config.weights != "full", logits=logits)
    except AttributeError:
        return None


def optimizer_bytes(model: Any, config: TrainConfig, shards: int = 1) -> int:
    """Bytes for the training of all weights, besides the weights. Those of adapters are few."""
    if config.weights != "full":
        return 0
    copies = AUTOCAST_BYTES if autocast(config.weights) else 0
    return (ADAMW_BYTES + copies) * int(model.num_parameters()) // shards


def wants_checkpointing(
    model: Any, config: TrainConfig, tokens: int, free: int, console: Console, shards: int = 1
) -> bool:
    """Whether to use gradient checkpointing for forward passes of so many tokens. `shards`: as Processes has them.

    The recipe decides, or short memory, which is printed. Raises DistillError if memory does not suffice even so.
    """
    optimizer = optimizer_bytes(model, config, shards)
    if optimizer > free:
        raise DistillError(
            f"training all of {model.name_or_path} needs {optimizer / GIB:.1f} GiB more than its weights, "
            f"{free / GIB:.1f} GiB are free; use train.method: lora, or a smaller student"
        )
    if config.gradient_checkpointing != "auto":
        return config.gradient_checkpointing
    needed, left = tokens * (token_bytes(model, config) or 0), SAFE_SHARE * free - optimizer
    if needed > left:
        console.print(
            f"gradient checkpointing is on: {tokens:,} tokens need about {needed / GIB:.1f} GiB without it, there is "
            f"room for {max(left, 0) / GIB:.1f} (train.gradient_checkpointing: auto)"
        )
    return needed > left
