"""The recipe's `evaluate` section: what the report measures."""

from pathlib import Path

from pydantic import Field

from pipeline.filters_config import JudgeConfig, RuleConfig
from pipeline.section import Section


class EvaluateConfig(Section):
    """What the report measures, for the teacher, the student before and after, and every other model named."""

    models: list[str] = Field([])
    """More models to compare: a folder, a Hub id, `embedded:<name>`, or another run's folder."""
    verify: list[RuleConfig] = Field([])
    """Rules that a right answer passes, as in `filters.rules`; how often a model is right is then its quality."""
    verify_count: int = Field(300, ge=1)
    """Test prompts that are verified, at most, and as many prompts of `probes_file`."""
    category: str | None = None
    """A column of the prompts, a slot or the reference; right answers are shown for each of its values, too."""
    max_rows: int = Field(200, ge=1)
    """Test rows scored for perplexity, at most."""
    probes: int = Field(64, ge=0)
    """New prompts that every model answers; 0: none."""
    probes_file: Path | None = None
    """Such prompts in the format of `prompts.file`, unlike all of the run; null: new combinations of the slots."""
    unseen: dict[str, list[str]] = Field({})
    """Values that the slots do not have, to see how the student does beyond them."""
    unseen_probes: int = Field(32, ge=1)
    """Prompts with unseen values."""
    adherence: list[str] | None = None
    """Slots whose values an answer must name; null: those of the rule `adherence`, or all."""
    judge: JudgeConfig | None = None
    """A model that scores and compares the answers; null: the judge of `filters`."""
    ask_teacher: bool = False
    """Ask a teacher whose weights are elsewhere to answer the probes at its endpoint; this may cost money."""
    lm_eval: list[str] = Field([])
    """Tasks of lm-eval, like `ifeval`, that every model here is asked: what the student forgot. Installed apart."""
    lm_eval_limit: int | None = Field(None, ge=1)
    """Questions of each such task, at most; null: all."""
    seed: int = 0
    """Seed of the choice of probes."""
    speed_requests: int = Field(64, ge=1)
    """Requests timed together."""
    speed_concurrency: int = Field(32, ge=1)
    """Requests in flight while they are timed."""
    speed_max_tokens: int = Field(64, ge=1)
    """Tokens of each timed answer."""
    speed_repeats: int = Field(3, ge=1)
    """How often the timed requests are repeated; the median counts."""
    speed_alone: int = Field(8, ge=1)
    """Requests timed one after the other."""
