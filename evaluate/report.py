"""report.json: the document, typed. `evaluate.assemble` fills it; `evaluate.html` and `evaluate.table` show it."""

from typing import Any

import msgspec

from pipeline.rundir import RunDir, replacing

SCHEMA = 1


class Estimate(msgspec.Struct, frozen=True):
    """A figure with its 95% bootstrap interval."""

    value: float
    low: float
    high: float


class ModelReport(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known of one model; None is: not measured."""

    key: str
    label: str
    reference: str
    missing: str = ""  # why its weights could not be read
    parameters: int | None = None
    weights_mib: float | None = None
    perplexity: Estimate | None = None
    bits_per_character: Estimate | None = None
    tokens_per_s: float | None = None
    mean_completion_tokens: float | None = None
    completion_tokens: int | None = None
    requests: int | None = None
    requests_failed: int | None = None
    speed_wall_s: float | None = None
    startup_s: float | None = None
    peak_rss_mib: float | None = None


class Headline(msgspec.Struct, frozen=True, kw_only=True):
    """What the student became, in one line and its numbers."""

    text: str
    parameters_share: float | None = None  # of the teacher's
    speed_ratio: float | None = None  # student's tokens/s over the teacher's
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    perplexity_teacher: float | None = None
    perplexity_after_over_before: Estimate | None = None  # paired
    bits_after_over_teacher: Estimate | None = None  # bits per character, paired


class Rows(msgspec.Struct, frozen=True, kw_only=True):
    """What the models were scored on."""

    held_out: int  # rows that training never saw
    scored: int  # chosen of them, and within every model's context
    left_out: int  # chosen, but too long for one of the models
    prompts: int  # different prompts among the scored


class Answer(msgspec.Struct, frozen=True):
    label: str
    text: str


class Sample(msgspec.Struct, frozen=True):
    """One prompt and what each model answered."""

    prompt: str
    answers: list[Answer]


class LossPoint(msgspec.Struct, frozen=True):
    step: float
    loss: float


class Training(msgspec.Struct, frozen=True, kw_only=True):
    """What is shown of student/training_log.json."""

    loss: list[LossPoint] = []
    eval: list[LossPoint] = []
    method: str = ""
    train_rows: int | None = None
    held_out_rows: int | None = None
    tokens: int | None = None
    wall_s: float | None = None


class RuleDrops(msgspec.Struct, frozen=True):
    """How many answers a rule was the first to drop."""

    rule: str
    dropped: int


class Filtering(msgspec.Struct, frozen=True, kw_only=True):
    """What is shown of filter_report.json."""

    rows: int
    kept: int
    keep_rate: float
    rules: list[RuleDrops] = []


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """report.json."""

    schema: int
    recipe: str
    fingerprint: str
    created: str  # ISO 8601, UTC
    headline: Headline
    models: list[ModelReport]
    rows: Rows
    samples: list[Sample]
    training: Training
    filters: Filtering | None
    lineage: dict[str, Any]
    commands: list[str]
    machine: dict[str, str]
    versions: dict[str, str]
    notes: list[str]


def write_report(run: RunDir, report: Report) -> None:
    with replacing(run.report) as file:
        file.write(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")


def read_report(run: RunDir) -> Report | None:
    """The report on disk; None where there is none or it is of another version."""
    try:
        return msgspec.json.decode(run.report.read_bytes(), type=Report)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def number(value: float) -> str:
    """A figure for people: 3.03, 45.2, 12,345, 412k, 1.3M."""
    size = abs(value)
    if size < 1000:
        return f"{value:.2f}" if size < 10 else f"{value:.1f}"
    if size < 100_000:
        return f"{value:,.0f}"
    return f"{value / 1e3:.0f}k" if size < 1e6 else f"{value / 1e6:.1f}M" if size < 1e9 else f"{value:.0e}"
