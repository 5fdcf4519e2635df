"""When a training evaluates, saves and stops, and what it shows meanwhile: a bar on a terminal, plain lines elsewhere.

Writes to stderr. Also notes the time spent beside each logged loss, so that a resumed training continues the count.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pipeline.errors import DistillError
from pipeline.rundir import sync_tree
from pipeline.train_config import TrainConfig
from train.processes import Processes

NEVER = 1_000_000_000  # steps
LINES = 20  # plain lines of a short training, evaluations aside
LINE_S = 60.0  # seconds after which a long one has the next
SAME_SIGNAL_S = 1.0  # make, a launcher or the chain pass a Ctrl-C on: one this soon after another is the same one


class Milestones(TrainerCallback):
    """Validation loss, then a checkpoint, at the end of each epoch and every `eval_steps`; more checkpoints if asked.

    In this order a checkpoint always holds the loss that belongs to it: a training killed right after one loses none.
    After `early_stop` evaluations without a better loss the training ends. After an interrupt it ends too, with a
    checkpoint of the step that was running.
    """

    def __init__(self, config: TrainConfig, processes: Processes, console: Console) -> None:
        self.config, self.processes, self.console = config, processes, console
        self.signalled: float | None = None  # when
        self.interrupted = False  # in all processes after the same step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        epoch_ends = float(state.epoch or 0).is_integer() or state.global_step >= state.max_steps
        eval_steps, checkpoint_steps = self.config.eval_steps or NEVER, self.config.checkpoint_steps or NEVER
        self.interrupted = self.processes.any(self.signalled is not None)
        control.should_evaluate = epoch_ends or state.global_step % eval_steps == 0
        save_is_due = self.interrupted or state.global_step % checkpoint_steps == 0
        control.should_save = control.should_evaluate or save_is_due
        control.should_training_stop = control.should_training_stop or self.interrupted

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        losses = _validation_losses(state)
        if losses and not isfinite(losses[-1]):
            why = f"step {state.global_step}: the validation loss is {losses[-1]}: the training has diverged"
            if len(losses) == 1:
                own = f"{self.config.method}." if self.config.further else ""  # which has a rate of its own
                raise DistillError(f"{why}; lower train.{own}learning_rate")
            self.console.print(f"{why}; the weights before are kept")
            control.should_training_stop = True
        patience = self.config.early_stop
        if is_stopped_early(state, patience) and not control.should_training_stop:
            control.should_training_stop = True
            self.console.print(f"step {state.global_step}: no better validation loss in {patience} evaluations")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            sync_tree(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM stop the training after the running step; KeyboardInterrupt is raised at the block's end.

        A second one, later, raises it at once.
        """
        if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.interrupted or self.signalled is not None:
            raise KeyboardInterrupt

    def _on_signal(self, *_: Any) -> None:
        now = time.monotonic()
        if self.signalled is None:
            self.signalled = now
            self.console.print("interrupted: saving a checkpoint after this step (Ctrl-C again stops at once)")
        elif now - self.signalled > SAME_SIGNAL_S:
            raise KeyboardInterrupt


def is_ended(state: TrainerState, patience: int | None) -> bool:
    """Whether nothing is left to train; the Trainer would take a step more if that was within an epoch."""
    return state.global_step >= state.max_steps or is_stopped_early(state, patience)


def is_stopped_early(state: TrainerState, patience: int | None) -> bool:
    """Whether the last `patience` evaluations were no better than the best before them."""
    losses = _validation_losses(state)
    return patience is not None and bool(losses) and len(losses) - 1 - losses.index(min(losses)) >= patience


def _validation_losses(state: TrainerState) -> list[float]:
    return [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]


class TrainProgress(TrainerCallback):
    """Shows steps, loss, tokens/s (padding not counted) and the time left."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]:,.0f} tokens/s  left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("training", loss="…", speed=0.0)
        self.started, self.earlier_s = time.monotonic(), 0.0
        self.told = self.started

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.started = time.monotonic()
        self.first_step, self.first_tokens = state.global_step, state.num_input_tokens_seen
        self.earlier_s = state.log_history[-1].get("elapsed_s", 0.0) if state.log_history else 0.0
        self.bar.update(self.task, total=state.max_steps, completed=state.global_step)
        self.bar.start()
        if state.global_step:
            self.console.print(f"resuming from step {state.global_step} of {state.max_steps}")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        logs: dict[str, float] = given["logs"]
        elapsed, step, steps = time.monotonic() - self.started, state.global_step, state.max_steps
        state.log_history[-1]["elapsed_s"] = round(self.earlier_s + elapsed, 3)
        if "eval_loss" in logs:
            self.console.print(f"step {step}/{steps}: validation loss {logs['eval_loss']:.4f}")
        elif "loss" in logs:
            loss = f"{logs['loss']:.4f}"
            speed = (state.num_input_tokens_seen - self.first_tokens) / max(elapsed, 1e-9)
            self.bar.update(self.task, completed=step, loss=loss, speed=speed)
            line_is_due = step % max(1, steps // LINES) == 0 or step in (self.first_step + 1, steps)
            if (line_is_due or time.monotonic() - self.told >= LINE_S) and not self.console.is_terminal:
                self.told = time.monotonic()
                left = elapsed / (step - self.first_step) * (steps - step)
                self.console.print(f"step {step}/{steps}: loss {loss}, {speed:,.0f} tokens/s, {left:,.0f} s left")
