"""The recipe's `train` section: how the student learns."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Warns = Literal["prompts", "keep_rate", "filters", "size_ratio", "templates", "chain", "licence", "length", "context"]
Weights = Literal["lora", "qlora", "full"]


class KdConfig(BaseModel):
    """Soft distillation: how the student follows the teacher's distribution (`method: kd` or `gkd`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: Weights = "lora"  # what is trained
    temperature: float = Field(1, gt=0)  # of both distributions
    alpha: float = Field(0.5, gt=0, le=1)  # kd: the divergence's weight; cross-entropy with the answers has the rest
    lmbda: float = Field(0.5, ge=0, le=1)  # gkd: share of the steps on the student's own samples
    beta: float = Field(0.5, ge=0, le=1)  # gkd: 0 is forward KL, 1 is reverse KL, between them Jensen-Shannon
    max_new_tokens: int = Field(256, ge=1)  # gkd: of a sample


class TrainConfig(BaseModel):
    """How the student learns (TRL SFTTrainer, PEFT)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["lora", "qlora", "full", "kd", "gkd"] = "lora"
    kd: KdConfig = KdConfig()
    epochs: float = Field(3, gt=0)
    learning_rate: float = Field(2e-4, gt=0)  # the peak: it rises during `warmup` and falls along a cosine
    warmup: float = Field(0.05, ge=0, lt=1)  # share of the steps
    batch_size: int = Field(8, ge=1)  # rows a step, over all forward passes and processes
    micro_batch_size: int | None = Field(None, ge=1)  # rows a forward pass, at most; None: as suits the machine
    gradient_checkpointing: Literal["auto"] | bool = "auto"  # less memory, slower by a third; auto: if memory asks
    max_length: int = Field(1024, ge=8)  # tokens of a row, prompt and completion
    too_long: Literal["refuse", "drop"] = "refuse"  # a row over max_length is never cut
    lora_rank: int = Field(16, ge=1)
    lora_alpha: int = Field(32, ge=1)
    lora_dropout: float = Field(0.05, ge=0, lt=1)
    test_rows: Path | None = None  # a test.jsonl to test on instead of the run's own, for runs to be compared
    eval_steps: int | None = Field(None, ge=1)  # steps between evaluations within an epoch; None: at its end alone
    early_stop: int | None = Field(
        None, ge=1
    )  # evaluations without a better validation loss, then it ends; None: never
    checkpoint_steps: int | None = Field(None, ge=1)  # steps between checkpoints to resume from; None: each evaluation
    report_to: list[Literal["tensorboard", "wandb"]] = []
    accept: list[Warns] = []  # checks whose warning does not stop the training; --force accepts them all
    teacher_licence: str | None = Field(None, min_length=1)  # your word on it, where the table does not know or errs
    seed: int = 0

    @property
    def soft(self) -> bool:
        """Whether the student follows the teacher's distribution, not its text alone."""
        return self.method in ("kd", "gkd")

    @property
    def weights(self) -> Weights:
        """What is trained: adapters, adapters over a base in 4 bits, or all of it."""
        return self.kd.weights if self.method == "kd" or self.method == "gkd" else self.method

    @model_validator(mode="after")
    def _micro_in_batch(self) -> "TrainConfig":
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} is more than batch_size {self.batch_size}")
        return self
