"""`python -m benchmarks.training`: tokens/s of training, ours against SFTTrainer's defaults, on the same rows.

Real tokens: padding is not counted. Both train the same adapter (rank, targets, learning rate, rows per step, epochs)
of the same model; all else is SFTTrainer's default on one side and that of `python -m train` on the other. In the end
both are scored on the same validation rows by the same code, to show if a training is fast because it learns less.
Rows: a run's kept.jsonl, or made-up stories with the lengths of a real run.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.table import show
from pipeline.models import resolve_model
from pipeline.rundir import RunDir
from pipeline.train_config import TrainConfig
from train.rows import read_rows, to_examples
from train.student_trainer import completion_logits
from train.trainer import Examples, Prepared, lora_config, prepare

LENGTHS: list[int] = json.loads(Path(__file__).with_name("lengths.json").read_text())["lengths"]
ANIMALS = ["Toby the rabbit", "a small brown bear", "Mimi the cat", "the old owl", "a shy hedgehog", "the gentle fox"]
THINGS = ["a red kite", "the last carrot", "a round stone", "a letter", "the warm lamp", "a boat of bark", "an acorn"]
PLACES = ["by the river", "under the oak", "in the snow", "behind the hill", "at the market", "in the quiet garden"]
DEEDS = ["found", "carried", "looked for", "gave away", "painted", "hid", "shared", "dreamt of", "fixed"]
WORDS_PER_TOKEN = 0.8


class Clock(TrainerCallback):
    """Real tokens per second of each step, and per CPU second over all steps, which a busy machine changes less."""

    def __init__(self) -> None:
        self.speeds: list[float] = []
        self.tokens, self.wall, self.cpu = 0, 0.0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        wall, cpu = time.perf_counter() - self.started[0], time.process_time() - self.started[1]
        tokens = int(state.num_input_tokens_seen) - self.tokens
        self.speeds.append(tokens / wall)
        self.tokens, self.wall, self.cpu = self.tokens + tokens, self.wall + wall, self.cpu + cpu
        self._start()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._start()  # what evaluation took is not the next step's

    def _start(self) -> None:
        self.started = time.perf_counter(), time.process_time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded:smollm2-135m")
    parser.add_argument("--kept", type=Path, help="a kept.jsonl; default: made-up stories")
    parser.add_argument("--rows", type=int, default=48, help="rows to train on")
    parser.add_argument("--validation", type=int, default=8, help="rows that both are scored on")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1, help="how often each side trains, in turn")
    options = parser.parse_args()
    model = resolve_model(options.model)
    rows = kept_rows(options.kept) if options.kept else made_up_rows(options.rows + options.validation)
    random.Random(0).shuffle(rows)
    count = min(options.rows, len(rows) - options.validation)
    examples = {"train": rows[:count], "validation": rows[count : count + options.validation]}
    # So few steps leave none for a warm-up, which SFTTrainer's default schedule has not.
    config = TrainConfig(epochs=options.epochs, max_length=2048, lora_dropout=0, warmup=0)
    clocks: dict[str, list[Clock]] = {"ours": [], "SFTTrainer": []}
    losses = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for side, clock in ((side, Clock()) for side in clocks):
                work = Path(folder) / side
                prepared = prepare(model, examples, config, work, Console(stderr=True))
                trainer = prepared.trainer if side == "ours" else defaults(model, examples, config, work)
                trainer.add_callback(clock)
                trainer.train()
                losses[side] = validation_loss(trainer, prepared)
                clocks[side].append(clock)
    lengths = length_range(prepared)
    print(f"{options.model}, {count} rows of {lengths} tokens, {options.epochs} epochs; ours in {prepared.precision}")
    print(report(clocks, losses))


def defaults(model: str, examples: Examples, config: TrainConfig, folder: Path) -> SFTTrainer:
    """SFTTrainer as it comes; given are only what is trained, the learning rate, and what writes no file."""
    return SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder),
            num_train_epochs=config.epochs,
            learning_rate=config.learning_rate,
            use_cpu=not torch.cuda.is_available(),
            include_num_input_tokens_seen="non_padding",  # for the clock
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(examples["train"]),
        peft_config=lora_config(config),
    )


def validation_loss(trainer: SFTTrainer, prepared: Prepared) -> float:
    """Cross-entropy per completion token, in nats."""
    total, tokens = 0.0, 0
    model = trainer.model.eval()
    for row in prepared.trainer.eval_dataset:
        batch = prepared.trainer.data_collator([{name: row[name] for name in ("input_ids", "labels")}])
        with torch.no_grad():
            logits, targets, _ = completion_logits(model, {k: v.to(model.device) for k, v in batch.items()})
        total += cross_entropy(logits.float(), targets, reduction="sum").item()
        tokens += len(targets)
    return total / tokens


def kept_rows(path: Path) -> list[dict[str, Any]]:
    return to_examples(read_rows(RunDir(path.parent)))


def made_up_rows(count: int) -> list[dict[str, Any]]:
    """Stories without sense, as long as the answers of a real run."""
    rng = random.Random(0)
    return [
        {
            "prompt": [{"role": "user", "content": f"Write a story about {rng.choice(ANIMALS)}, {number}."}],
            "completion": [{"role": "assistant", "content": _story(rng, rng.choice(LENGTHS))}],
        }
        for number in range(count)
    ]


def _story(rng: random.Random, tokens: int) -> str:
    words: list[str] = []
    while len(words) < tokens * WORDS_PER_TOKEN:
        who, what, where = rng.choice(ANIMALS), rng.choice(THINGS), rng.choice(PLACES)
        sentence = f"{who} {rng.choice(DEEDS)} {what} {where}."
        words += (sentence[0].upper() + sentence[1:]).split()
    return " ".join(words)


def length_range(prepared: Prepared) -> str:
    lengths = sorted(prepared.lengths["train"])
    return f"{lengths[0]} to {lengths[-1]} (median {statistics.median(lengths):.0f})"


def report(clocks: dict[str, list[Clock]], losses: dict[str, float]) -> str:
    """A table of medians, and the ratios that count."""
    figures = {
        side: (
            statistics.median(speed for clock in taken for speed in clock.speeds),
            statistics.median(clock.tokens / clock.wall for clock in taken),
            statistics.median(clock.tokens / clock.cpu for clock in taken),
        )
        for side, taken in clocks.items()
    }
    head: Sequence[str] = (
        "",
        "tokens/s, median step",
        "tokens/s, all steps",
        "tokens/CPU second",
        "validation loss",
    )
    lines = [(side, *(f"{speed:.0f}" for speed in found), f"{losses[side]:.4f}") for side, found in figures.items()]
    ratios = [f"{a / b:.2f}" for a, b in zip(figures["ours"], figures["SFTTrainer"], strict=True)]
    change = losses["ours"] / losses["SFTTrainer"] - 1
    return f"{show([head, *lines])}\n{', '.join(ratios)} times as fast; validation loss {change:+.1%}"


if __name__ == "__main__":
    main()
