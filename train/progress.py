"""Live progress of a training: one bar on a terminal, plain lines elsewhere (stderr).

Also decides when to evaluate and when to save, and notes the time spent beside each logged loss, so that a resumed
training goes on counting.
"""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

LINES = 20  # plain lines of a whole training, evaluations aside


class Milestones(TrainerCallback):
    """Validation loss, then a checkpoint, at the end of each epoch and every `eval_steps`; more checkpoints if asked.

    In this order a checkpoint always holds the loss that belongs to it: a training killed right after one loses none.
    After `patience` evaluations without a better loss the training ends.
    """

    def __init__(
        self, checkpoint_steps: int | None, eval_steps: int | None, patience: int | None, console: Console
    ) -> None:
        self.checkpoint_steps, self.eval_steps = checkpoint_steps, eval_steps
        self.patience, self.console = patience, console

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        epoch_ends = float(state.epoch or 0).is_integer() or state.global_step >= state.max_steps
        control.should_evaluate = epoch_ends or _is_due(self.eval_steps, state)
        control.should_save = control.should_evaluate or _is_due(self.checkpoint_steps, state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if is_stopped_early(state, self.patience) and not control.should_training_stop:
            control.should_training_stop = True
            self.console.print(f"step {state.global_step}: no better validation loss in {self.patience} evaluations")


def is_stopped_early(state: TrainerState, patience: int | None) -> bool:
    """Whether the last `patience` evaluations were no better than the best before them."""
    losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    return patience is not None and bool(losses) and len(losses) - 1 - losses.index(min(losses)) >= patience


def _is_due(every: int | None, state: TrainerState) -> bool:
    return every is not None and state.global_step % every == 0


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

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.started = time.monotonic()
        self.first_step, self.first_tokens = state.global_step, state.num_input_tokens_seen
        self.earlier_s = state.log_history[-1].get("elapsed_s", 0.0) if state.log_history else 0.0
        self.bar.update(self.task, total=state.max_steps, completed=state.global_step)
        self.bar.start()
        if state.global_step:
            self.console.print(f"going on from step {state.global_step} of {state.max_steps}")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        elapsed = time.monotonic() - self.started
        state.log_history[-1]["elapsed_s"] = round(self.earlier_s + elapsed, 3)
        if "eval_loss" in logs:
            self.console.print(f"step {state.global_step}/{state.max_steps}: validation loss {logs['eval_loss']:.4f}")
        elif "loss" in logs:
            speed = (state.num_input_tokens_seen - self.first_tokens) / max(elapsed, 1e-9)
            self.bar.update(self.task, completed=state.global_step, loss=f"{logs['loss']:.4f}", speed=speed)
            if not self.console.is_terminal and self._line_is_due(state):
                left = elapsed / (state.global_step - self.first_step) * (state.max_steps - state.global_step)
                self.console.print(
                    f"step {state.global_step}/{state.max_steps}: loss {logs['loss']:.4f}, {speed:,.0f} tokens/s, "
                    f"{left:,.0f} s left"
                )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the terminal as it was; also after an interrupt."""
        self.bar.stop()

    def _line_is_due(self, state: TrainerState) -> bool:
        every = max(1, state.max_steps // LINES)
        return state.global_step % every == 0 or state.global_step in (self.first_step + 1, state.max_steps)
