"""The recipe's `train` section: how the student learns."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from pipeline.section import Section

Warns = Literal[
    "prompts", "keep_rate", "filters", "reasoning", "teacher", "size_ratio", "templates", "chain", "licence", "length",
    "context",
]  # fmt: skip
Weights = Literal["lora", "qlora", "full"]
SOFT = ("kd", "gold", "on_policy")  # methods that follow the teacher's distribution, not its text alone
FURTHER = ("on_policy", "dpo")  # methods that start from a student that another method has trained


class KdConfig(Section):
    """Soft distillation: how the student follows the teacher's distribution (`method: kd`, `on_policy` or `gold`)."""

    weights: Weights = "lora"
    """What is trained: adapters, adapters over a base in 4 bits, or all weights."""
    teacher: Literal["local", "served", "stored"] = "local"
    """local: loaded beside the student. served: asked at its endpoint (vLLM). stored, for kd: as `sampling.logprobs`
    stored it. The last two know the likeliest tokens only."""
    top_k: int = Field(20, ge=1)
    """served: how many of the likeliest tokens the endpoint is asked for, per token of an answer."""
    temperature: float = Field(1, gt=0)
    """Temperature of both distributions, and of on_policy's samples."""
    alpha: float = Field(0.5, gt=0, le=1)
    """kd, gold: weight of the divergence; cross-entropy with the answers has the rest."""


class OnPolicyConfig(Section):
    """On-policy distillation (`method: on_policy`): a student that learned from answers learns from its own samples."""

    beta: float = Field(1, ge=0, le=1)
    """0 is forward KL, 1 is reverse KL, between them is Jensen-Shannon."""
    max_new_tokens: int = Field(256, ge=1)
    """Tokens of a sample, at most."""
    learning_rate: float = Field(2e-5, gt=0)
    """Takes the place of `train.learning_rate`: a tenth of it is usual."""
    epochs: float = Field(1, gt=0)
    """Takes the place of `train.epochs`: samples of each training prompt."""
    rollouts: Literal["generate", "vllm"] = "generate"
    """What draws the samples: the trainer itself, or vLLM in the same process, which needs a GPU."""


class DpoConfig(Section):
    """Preferences (`method: dpo`): how a student that learned from answers follows the better of two."""

    weights: Literal["lora", "full"] = "lora"
    """What is trained: adapters, which are merged when the student is saved, or all weights."""
    beta: float = Field(0.1, gt=0)
    """How strongly the student is held to what it was at the start; lower lets it go further."""
    learning_rate: float = Field(1e-5, gt=0)
    """Takes the place of `train.learning_rate`: a tenth of it or less is usual."""
    epochs: float = Field(1, gt=0)
    """Takes the place of `train.epochs`."""


class TrainConfig(Section):
    """How the student learns (TRL's trainers, PEFT)."""

    method: Literal["lora", "qlora", "full", "kd", "gold", "on_policy", "dpo"] = "lora"
    """lora, qlora, full: from the teacher's text (adapters, adapters over 4 bits, all weights). kd, gold: from its
    distribution (one tokenizer, two). on_policy, dpo: after one of these, from own samples or from preferences."""
    kd: KdConfig = KdConfig()
    on_policy: OnPolicyConfig = OnPolicyConfig()
    dpo: DpoConfig = DpoConfig()
    start: Path | None = None
    """on_policy, dpo: the folder of the student to start from; null: the run's own, as another method left it."""
    epochs: float = Field(3, gt=0)
    """Passes over the training rows."""
    learning_rate: float | None = Field(None, gt=0)
    """The peak; null: 2e-4 for adapters, 2e-5 for all weights (TRL's), 1e-3 for a new or pruned student (SmolLM2's)."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the steps, rounded down."""
    batch_size: int = Field(8, ge=1)
    """Rows per step, over all forward passes and processes."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Rows per forward pass, at most; null: what suits the machine."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Saves memory and is a third slower; auto: only if memory is short."""
    compile: Literal["auto"] | bool = "auto"
    """Layers by torch.compile: slow first steps, then faster ones; auto: on a GPU, from 1,000 steps on."""
    max_length: int = Field(1024, ge=8)
    """Tokens of a row, prompt and completion together."""
    reasoning: Literal["strip", "keep"] = "strip"
    """keep: the student learns the answers' reasoning too, in the form of its chat template or as <think>…</think>."""
    loss_on: Literal["last", "all"] = "last"
    """all: on every turn of the assistant in a conversation, if the student's chat template can tell them apart."""
    too_long: Literal["refuse", "drop"] = "refuse"
    """What to do with a row over `max_length`; it is never cut."""
    lora_rank: int = Field(16, ge=1)
    """Rank of the adapters."""
    lora_alpha: int = Field(32, ge=1)
    """Scale of the adapters: alpha / rank."""
    lora_dropout: float = Field(0.05, ge=0, lt=1)
    """Dropout of the adapters' input; none where the student's experts are adapted, since PEFT cannot."""
    rslora: bool = False
    """Scale of the adapters: alpha / √rank, for large ranks (Kalajdzievski 2023, arXiv 2312.03732)."""
    dora: bool = False
    """Adapters learn the weights' sizes and directions apart (Liu et al. 2024, arXiv 2402.09353); slower."""
    neftune_alpha: float | None = Field(None, gt=0)
    """Noise on the embeddings while training, 5 is usual (Jain et al. 2023, arXiv 2310.05914); null: none."""
    padding_free: bool = False
    """Rows of a forward pass end to end, without padding; needs FlashAttention. Methods lora, qlora and full."""
    test_rows: Path | None = None
    """A test.jsonl to test on instead of the run's own, for runs to be compared; relative to the recipe."""
    eval_steps: int | None = Field(None, ge=1)
    """Steps between evaluations within an epoch; null: only at its end."""
    early_stop: int | None = Field(None, ge=1)
    """End after so many evaluations without a better validation loss; null: never."""
    checkpoint_steps: int | None = Field(None, ge=1)
    """Steps between checkpoints to resume from; null: at each evaluation."""
    report_to: list[Literal["tensorboard", "wandb"]] = Field([])
    """Where the training is reported, beside the log."""
    accept: list[Warns] = Field([])
    """Checks whose warning does not stop the training; --force accepts them all."""
    teacher_licence: str | None = Field(None, min_length=1)
    """The teacher's licence by your word, if the table does not know it or is wrong."""
    seed: int = Field(0, ge=0, lt=1 << 32)
    """Seed of the training."""

    @property
    def soft(self) -> bool:
        """Whether the student follows the teacher's distribution, not its text alone."""
        return self.method in SOFT

    @property
    def further(self) -> bool:
        """Whether the method starts from a student that another method has trained."""
        return self.method in FURTHER

    @property
    def weights(self) -> Weights:
        """What is trained: adapters, adapters over a base in 4 bits, or all of it."""
        if self.method == "dpo":
            return self.dpo.weights
        if self.method == "lora" or self.method == "qlora" or self.method == "full":
            return self.method
        return self.kd.weights

    @model_validator(mode="after")
    def _fits_together(self) -> "TrainConfig":
        if self.loss_on == "all" and (self.method in ("gold", "on_policy", "dpo") or self._teacher == "stored"):
            what = "kd.teacher stored" if self._teacher == "stored" else f"method {self.method}"
            raise ValueError(f"loss_on all is not for {what}, which looks at last turns; use last")
        if self.reasoning == "keep" and self.method == "dpo":
            raise ValueError("reasoning keep is not for method dpo: preferences.jsonl has none; use strip")
        if self.padding_free and self.method not in ("lora", "qlora", "full"):
            raise ValueError(f"padding_free is not for method {self.method}; leave it out")
        if self.padding_free and self.neftune_alpha:
            raise ValueError("neftune_alpha would be weaker with padding_free, by the rows of a pass; leave one out")
        if (self.rslora or self.dora) and self.weights == "full":
            raise ValueError("rslora and dora are about adapters, and all weights are trained; leave them out")
        if self._teacher == "stored" and self.method == "on_policy":
            raise ValueError(
                "kd.teacher stored is not for method on_policy: nothing is stored of the student's samples"
            )
        if self._teacher != "local" and self.method == "gold":
            raise ValueError(f"kd.teacher {self._teacher} is not for method gold, which needs all logits; use local")
        if self._teacher in ("served", "stored") and self.kd.temperature != 1:
            raise ValueError(f"kd.temperature must be 1 with kd.teacher {self._teacher}: endpoints give top-k of that")
        if self.method == "on_policy" and self.kd.weights == "qlora":
            raise ValueError(
                "kd.weights qlora is not for method on_policy, which saves a whole model; use lora or full"
            )
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} is more than batch_size {self.batch_size}")
        return self

    @property
    def _teacher(self) -> str:
        """Where the distribution comes from; empty if none is followed."""
        return self.kd.teacher if self.soft else ""
