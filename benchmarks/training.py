"""`python -m benchmarks.training`: tokens per second of training, ours against SFTTrainer's defaults, on the same rows.

Padding is not counted. Both sides train the same adapter (rank, targets, learning rate, rows per step, epochs) of the
same model; all else is SFTTrainer's default on one side and that of `python -m train` on the other. In the end both are
scored on the same validation rows by the same code: a training that is fast because it learns less would show. Rows are
a run's kept.jsonl (`--kept`), or made-up stories whose lengths are those of a real run. `--rounds`: how often each side
trains, in turn.
"""

import random
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.made_up import made_up_rows
from benchmarks.measure import flags, show
from pipeline.cli import run_stage
from pipeline.errors import UsageError
from pipeline.models import resolve_model
from pipeline.train_config import TrainConfig
from train.arguments import lora_config
from train.rows import read_checked, to_examples
from train.setting import Setting
from train.trainer import Examples, prepare

TEXTS = ("prompt", "completion")  # of a row, without tools


class Clock(TrainerCallback):
    """Tokens, wall seconds and CPU seconds of each step. A busy machine changes the CPU seconds least."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, float, float]] = []
        self.seen = 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter(), time.process_time()

    on_evaluate = on_train_begin  # the time of an evaluation is no step's

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # it computes behind the program's back
        wall, cpu = time.perf_counter() - self.started[0], time.process_time() - self.started[1]
        self.steps.append((state.num_input_tokens_seen - self.seen, wall, cpu))
        self.seen = state.num_input_tokens_seen
        self.on_train_begin()


def main() -> None:
    options = flags(__doc__, model="embedded:smollm2-135m", kept="", rows=48, validation=8, epochs=1, rounds=1)
    if options.kept:
        rows = [*to_examples(read_checked(Path(options.kept)))]
    else:
        rows = made_up_rows(options.rows + options.validation)
    if len(rows) <= options.validation:
        raise UsageError(f"{options.kept}: {len(rows)} rows; more than --validation {options.validation} are needed")
    model = resolve_model(options.model)
    random.Random(0).shuffle(rows)
    count = min(options.rows, len(rows) - options.validation)
    examples = {"train": rows[:count], "validation": rows[count : count + options.validation]}
    # So few steps leave none for a warm-up, which SFTTrainer's default schedule does not have.
    config = TrainConfig(epochs=options.epochs, learning_rate=2e-4, max_length=2048, lora_dropout=0, warmup=0)
    clocks: dict[str, list[Clock]] = {"ours": [], "SFTTrainer": []}
    losses = {}
    with tempfile.TemporaryDirectory() as folder:
        for side in list(clocks) * options.rounds:
            prepared = prepare(model, examples, Setting(config, Path(folder) / side, Console(stderr=True)))
            scorer = prepared.trainer
            trainer = scorer if side == "ours" else defaults(model, examples, config, Path(folder) / side)
            clocks[side].append(Clock())
            trainer.add_callback(clocks[side][-1])
            trainer.train()
            scorer.model = trainer.model
            losses[side] = scorer.evaluate()["eval_loss"]
    lengths = sorted(prepared.lengths["train"])
    sizes = f"{lengths[0]} to {lengths[-1]} (median {median(lengths):.0f})"
    print(f"{options.model}, {count} rows of {sizes} tokens, {options.epochs} epochs; ours in {prepared.precision}")
    print(report(clocks, losses))


def defaults(model: str, examples: Examples, config: TrainConfig, folder: Path) -> SFTTrainer:
    """SFTTrainer with its defaults, except what is trained, the learning rate, and settings that write no file."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)  # as SFTTrainer loads a name
    return SFTTrainer(
        model=loaded,
        args=SFTConfig(
            output_dir=str(folder),
            num_train_epochs=config.epochs,
            learning_rate=config.learning_rate,
            per_device_train_batch_size=config.batch_size,
            use_cpu=not torch.cuda.is_available(),
            include_num_input_tokens_seen="non_padding",  # for the clock
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{name: row[name] for name in TEXTS} for row in examples["train"]]),
        peft_config=None if config.weights == "full" else lora_config(config, loaded),
    )


def report(clocks: dict[str, list[Clock]], losses: dict[str, float]) -> str:
    """A table of medians, and the ratios."""
    figures = {}
    for side, taken in clocks.items():
        sums = [[sum(column) for column in zip(*clock.steps, strict=True)] for clock in taken]
        steps = median(tokens / wall for clock in taken for tokens, wall, _ in clock.steps)
        figures[side] = steps, median(t / wall for t, wall, _ in sums), median(t / cpu for t, _, cpu in sums)
    head = ("", "tokens/s, median step", "tokens/s, all steps", "tokens per CPU second", "validation loss")
    lines = [(side, *(f"{speed:.0f}" for speed in found), f"{losses[side]:.4f}") for side, found in figures.items()]
    ratios = [f"{a / b:.2f}" for a, b in zip(figures["ours"], figures["SFTTrainer"], strict=True)]
    change = losses["ours"] / losses["SFTTrainer"] - 1
    return f"{show([head, *lines])}\n{', '.join(ratios)} times as fast; validation loss {change:+.1%}"


if __name__ == "__main__":
    run_stage(main)
