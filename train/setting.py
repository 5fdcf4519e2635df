"""What a training is made with, beside the student and its rows: one value, which every method's trainer is given."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from pipeline.teacher_config import TeacherConfig
from pipeline.train_config import TrainConfig
from train.processes import ALONE, Processes


@dataclass(frozen=True)
class Setting:
    """What the trainer of any method is made with."""

    config: TrainConfig
    folder: Path  # of the checkpoints
    console: Console
    processes: Processes = ALONE
    teacher: TeacherConfig | None = None  # that a soft method follows
    logprobs: Path | None = None  # the file of what it said of the answers, if it is not beside the student
