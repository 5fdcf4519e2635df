"""A training that is ready to start: its trainer, its rows and what their tokens say; it trains, and saves the model.

Importing this module imports torch, transformers and trl.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import PrinterCallback, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from pipeline.adapters import copy_processor
from pipeline.errors import DistillError, UsageError
from pipeline.loaded_model import context_of
from train.machine import precision
from train.progress import Milestones, TrainProgress, is_ended
from train.rates import FULL_STEPS, warmup_steps
from train.setting import Setting
from train.tokens import prompt_of, row_lengths

ROUNDING_LOSS = 0.01  # nats per token, 1% of perplexity: what storing a model in its own dtype may cost


@dataclass(frozen=True)
class Prepared:
    """A trainer whose rows are tokenised, and what their tokens say. Keys of the dicts: train, validation."""

    trainer: Any  # a StudentTrainer or TRL's DPOTrainer
    setting: Setting
    rows: dict[str, list[int]]  # indices into Examples: rows that are not too long
    lengths: dict[str, list[int]]  # tokens of every row, the too long ones too
    dtype: torch.dtype  # the student's own, as it was stored
    precision: str  # that of the training, for the lineage
    milestones: Milestones
    progress: TrainProgress
    faults: dict[str, list[str]] | None = None  # by kind, of the rows that are not too long (train.tokens)
    differing: int = 0  # training rows whose context is not the one that the student will be asked with

    def fit(self) -> None:
        """Trains, from the last checkpoint if there is one; then holds the weights of the best validation loss.

        Raises DistillError when memory runs out, and KeyboardInterrupt when interrupted, with a checkpoint saved.
        """
        checkpoint = get_last_checkpoint(self.trainer.args.output_dir)
        try:
            with quiet(), self.milestones.interruptible():
                state = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json") if checkpoint else None
                if state and is_ended(state, self.setting.config.early_stop):
                    self.trainer.state = state
                    self.trainer._load_best_model()
                else:
                    self.trainer.train(resume_from_checkpoint=checkpoint)
                self.setting.processes.share_weights(self.trainer.model)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
                raise DistillError(
                    "out of memory while training; lower train.micro_batch_size or set train.gradient_checkpointing: "
                    "true, and the command continues from the last checkpoint; or train adapters (train.method: lora)"
                ) from None
            raise
        finally:
            self.progress.bar.stop()  # leaves the terminal as it was; also after an interrupt

    @property
    def too_long(self) -> int:
        return sum(len(lengths) - len(self.rows[part]) for part, lengths in self.lengths.items())

    @property
    def seen(self) -> str:
        """How many rows an epoch trains on."""
        rows, args = len(self.rows["train"]), self.trainer.args
        full = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        left = rows % full if self.setting.config.method in FULL_STEPS else 0
        return f"{rows - left} of {rows}" if left else f"{rows}"

    @property
    def context(self) -> int:
        """Tokens that the student reads at once."""
        return context_of(self.trainer.model.config)

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest training prompt."""
        return max(len(prompt_of(row)) for row in self.trainer.train_dataset)

    @property
    def saved_step(self) -> int:
        """The step whose weights are kept: that of the best validation loss."""
        state: TrainerState = self.trainer.state
        return state.best_global_step or state.global_step

    def save(self, folder: Path) -> None:
        """Writes the model (full, dpo) or the adapter (lora), the tokenizer and the chat template.

        A model is stored in the dtype it came in, so that before and after are of one size, unless rounding to it
        undoes what was learned: a few steps of a low learning rate move the weights too little for bfloat16.
        All processes take part; one writes.
        """
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        adapter = hasattr(model, "peft_config")
        with quiet():
            if adapter and self.setting.config.further:  # an adapter over a student that nobody else has
                model = self.trainer.model = model.to(torch.float32).merge_and_unload()
                adapter = False
            if not adapter and self.dtype != model.dtype and self._survives_rounding(model):
                model = model.to(self.dtype)
            state = self.trainer.accelerator.get_state_dict(model) if self.trainer.is_fsdp_enabled else None
            if self.setting.processes.lead:
                model.save_pretrained(folder, state_dict=state)
                if not adapter:
                    copy_processor(model, folder)
                (folder / "README.md").unlink(missing_ok=True)  # PEFT's card of blanks, with a path of this machine
                self.trainer.processing_class.save_pretrained(folder)

    def _survives_rounding(self, model: Any) -> bool:
        """Rounds the weights and scores the validation rows again; puts the weights back if that cost too much."""
        exact = {name: value.clone() for name, value in model.state_dict().items()}
        before = float(self.trainer.state.best_metric)
        model.load_state_dict({name: value.to(self.dtype) for name, value in exact.items()})
        after = self.trainer.evaluate(metric_key_prefix="rounded")["rounded_loss"]
        if after - before <= ROUNDING_LOSS:
            return True
        model.load_state_dict(exact)
        self.setting.console.print(
            f"saved in {model.dtype}, not in {self.dtype}: rounded, its validation loss would be {after:.4f} instead "
            f"of {before:.4f}; a higher train.learning_rate or more rows move the weights further".replace("torch.", "")
        )
        return False


def ready(trainer: Any, dtype: torch.dtype, setting: Setting) -> Prepared:
    """A trainer with its callbacks, and without the rows that are too long.

    Raises UsageError if there are fewer rows than processes.
    """
    config, processes = setting.config, setting.processes
    milestones, progress = Milestones(config, processes, setting.console), TrainProgress(setting.console)
    with_callbacks(trainer, milestones, progress)
    parts = {"train": trainer.train_dataset, "validation": trainer.eval_dataset}
    lengths = {part: row_lengths(rows) for part, rows in parts.items()}
    longest = min(config.max_length, context_of(trainer.model.config))
    kept = {part: [i for i, n in enumerate(of) if n <= longest] for part, of in lengths.items()}
    trainer.train_dataset = trainer.train_dataset.select(kept["train"])
    trainer.eval_dataset = trainer.eval_dataset.select(kept["validation"])
    trainer.args.warmup_steps = warmup_steps(config, len(kept["train"]))
    if 0 < len(kept["train"]) < processes.count:
        raise UsageError(
            f"{len(kept['train'])} rows to train on are fewer than {processes.count} processes; start at most "
            f"{len(kept['train'])} (--num_processes), or generate more prompts"
        )
    return Prepared(trainer, setting, kept, lengths, dtype, precision(config.weights), milestones, progress)


def with_callbacks(trainer: Any, *callbacks: Any) -> Any:
    """The trainer, with callbacks of ours in place of the one that prints."""
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.remove_callback(PrinterCallback)
    return trainer


@contextmanager
def quiet() -> Iterator[None]:
    """Mutes the libraries' bars and warnings; ours say what matters. Errors still show."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
