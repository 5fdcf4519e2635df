"""report.json: the document, typed. `evaluate.report.assemble` fills it; `html` and `tables` beside it show it.

None, or a figure that is not there, means: not measured. docs/evaluation.md says what each figure is, with its formula
and its source.
"""

from collections.abc import Callable
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import msgspec

from pipeline.checks import Checklist
from pipeline.rundir import RunDir

SCHEMA = 4
Z = NormalDist().inv_cdf(0.975)  # standard errors on each side of a 95% interval

# What figures are of: the test answers, the served model (speed and memory), the probes (see ProbeSet), and the prompts
# whose answers are verified (see Accuracy).
Scope = Literal["test", "engine", "all", "seen", "unseen", "verified", "verified_unseen"]
Better = Literal["higher", "lower"]


def number(value: float) -> str:
    """A figure for people: 2.6e-07, 3.03, 45.2, 12,345, 412k, 1.3M."""
    size = abs(value)
    if 0 < size < 0.01:
        return f"{value:.2g}"
    if size < 1000:
        return f"{value:.2f}" if size < 10 else f"{value:.1f}"
    if size < 100_000:
        return f"{value:,.0f}"
    return f"{value / 1e3:.0f}k" if size < 1e6 else f"{value / 1e6:.1f}M" if size < 1e9 else f"{value:.0e}"


def percent(value: float) -> str:
    """A share or a ratio for people: 82%, 1,200%. What is nearly none or all has a decimal: 99.7% is not 100%."""
    text = f"{value:,.0%}"
    return f"{value:.1%}" if text in ("0%", "100%") and value not in (0, 1) else text


def millions(parameters: float) -> str:
    """134.5M, 1.54B."""
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"


class Measure(NamedTuple):
    """What a figure is called, how it is written, and which way is better; None: neither."""

    name: str
    show: Callable[[float], str]
    better: Better | None

    def told_change(self, change: "Estimate") -> str:
        """By how much the figure differs: `-0.1 (-0.138 to -0.062)`; of a share `+5.0 (+1.0–+9.0) points`."""
        if self.show(1).endswith("%"):
            return change.told(lambda value: f"{100 * value:+.1f}") + " points"
        return change.told("{:+.3g}".format)


SCORES = {  # of texts that are given to the model (docs/evaluation.md says what each is)
    "perplexity": Measure("perplexity", number, "lower"),
    "bits_per_character": Measure("bits per character", "{:.3f}".format, "lower"),
}
VERIFIED = {"accuracy": Measure("right answers", "{:.1%}".format, "higher")}  # share of the prompts
ENGINE = {  # of a served model; the first two from the slowest repetition to the fastest
    "answers_per_s": Measure("answers/s, as it is asked", number, "higher"),
    "tokens_per_s": Measure("tokens/s, saturated", number, "higher"),
    "tokens_per_s_alone": Measure("tokens/s, alone", number, "higher"),
    "first_token_s": Measure("first token, ms", lambda seconds: f"{1000 * seconds:,.0f}", "lower"),
    "completion_tokens": Measure("tokens per timed answer", number, None),
    "peak_rss_mib": Measure("peak memory, MiB", "{:,.0f}".format, "lower"),  # of the whole server; not on a GPU
    "weights_mib": Measure("weights, MiB", "{:,.0f}".format, "lower"),  # as stored
    "parameters": Measure("parameters", millions, None),
    "kv_bytes_per_token": Measure("KV bytes per token", "{:,.0f}".format, "lower"),
}
PROBES = {  # of a model's answers to the probes; shares are from 0 to 1, of the prompts
    "passing": Measure("passes every rule", percent, "higher"),
    "adherence": Measure("names all that was asked for", percent, "higher"),
    "named": Measure("named of what was asked for", percent, "higher"),
    "loops": Measure("loops", percent, "lower"),
    "stopped": Measure("ends by itself", percent, "higher"),
    "distinct_1": Measure("distinct-1", number, None),  # noise has the most
    "distinct_2": Measure("distinct-2", number, None),
    "characters": Measure("characters per answer", number, None),
    "judge": Measure("judge’s mean, 1 to 5", number, "higher"),
}
MEASURES = SCORES | VERIFIED | ENGINE | PROBES


class Estimate(msgspec.Struct, frozen=True):
    """A figure with its 95% interval."""

    value: float
    low: float
    high: float

    def interval(self, show: Callable[[float], str]) -> str:
        """`3.20–3.60`, `-0.1 to 0.2`: every interval that people see is written here."""
        return f"{show(self.low)}{' to ' if self.low < 0 else '–'}{show(self.high)}"

    def told(self, show: Callable[[float], str] = number) -> str:
        """`3.41 (3.20–3.60)`; only the figure if its interval has no width."""
        return show(self.value) + (f" ({self.interval(show)})" if self.low < self.high else "")


def exactly(value: float) -> Estimate:
    """A figure that was counted, not sampled."""
    return Estimate(value, value, value)


class ModelReport(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known of one model. A figure that was not measured is not there.

    `key` is teacher, student_before, student_after, or other_1, other_2, … in the order of `evaluate.models`.
    """

    key: str
    label: str
    reference: str
    missing: str = ""  # why its weights could not be read
    figures: dict[Scope, dict[str, Estimate]] = {}  # by the names in MEASURES
    failed_rules: dict[str, float] = {}  # share of its answers to all probes that each rule would drop, by its label

    def figure(self, part: Scope, name: str) -> Estimate | None:
        """One of its figures; None: not measured."""
        return self.figures.get(part, {}).get(name)


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """One part of the promise (evaluate.figures.promise), and whether this run keeps it.

    yes          the whole interval keeps the promise
    not shown    chance may explain it: the promised figure lies within the interval, or the prompts are too few
    """

    name: str  # quality_accuracy, or quality_bits, quality_probes and quality_judge; size, speed, memory
    axis: Literal["quality", "speed", "memory"]
    text: str  # for people: `bits per character: the teacher's over the student's`
    promised: float  # the ratio that is promised at least: 0.9 of the quality, 3 times smaller or faster
    value: Estimate | None = None  # that ratio
    verdict: Literal["yes", "not shown", "no", "not measured"] = "not measured"
    why: str = ""  # why it is not shown, if the interval is not the reason: `under 60 prompts`


class Headline(msgspec.Struct, frozen=True, kw_only=True):
    """What the student became, in one line and its numbers, and whether the promise is kept."""

    text: str
    perplexity_after_over_before: Estimate | None = None  # paired
    bits_after_over_teacher: Estimate | None = None  # bits per character, paired
    claims: list[Claim] = []  # every part of the promise, also those not measured
    holds: bool | None = None  # every measured part holds; None: they do, but an axis has no measured part


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """How far the trained student is from another model in one figure: paired, on the same prompts and resamples."""

    figure: str  # its name in MEASURES
    part: Scope
    model: str  # key: student_after
    against: str  # key: student_before, teacher
    change: Estimate  # the student's figure minus the other's
    better: Better | None  # which way is better; None: neither (length, distinct-n)
    improved: bool | None  # true or false: the whole interval is on the better or the worse side; None: it has zero


class WinRate(msgspec.Struct, frozen=True, kw_only=True):
    """The judge's choice between the trained student's answer and another model's, to the same prompt.

    Each pair is asked about in both orders. A win is a win in both; anything else is a tie.
    """

    model: str  # key: student_after
    against: str  # key
    part: Scope
    pairs: int  # judged in both orders
    unjudged: int  # a verdict is missing
    wins: int
    losses: int
    ties: int
    rate: Estimate | None  # (wins + ties / 2) / pairs; 0.5: as good; None if there is no pair
    first_chosen: float | None  # share of the verdicts, ties apart, for the answer shown first; 0.5 is no bias
    flipped: int  # pairs in which the order alone decided


class ProbeSet(msgspec.Struct, frozen=True, kw_only=True):
    """Which prompts the models answered. None of them was trained on.

    seen    new combinations of the recipe's slot values, or the prompts of a file, or the test prompts
    unseen  prompts with slot values that the recipe does not have
    """

    source: Literal["slots", "file", "test"]  # of the seen part
    seen: int  # prompts
    unseen: int
    answered: int  # of both, by every model: figures are over these, so that they compare
    unseen_values: dict[str, list[str]] = {}
    judge: str | None = None  # the model that judged; None: none did
    judge_is_teacher: bool = False
    judged: int = 0  # prompts that every model has a score for: the judge's figures are over these

    @property
    def kind(self) -> str:
        """What the seen ones are called; those of a file are new to the run, too."""
        return "test prompts" if self.source == "test" else "new prompts"

    @property
    def described(self) -> str:
        """`64 new prompts, 32 with values never seen`."""
        return f"{self.seen} {self.kind}" + (f", {self.unseen} with values never seen" if self.unseen else "")


class Rows(msgspec.Struct, frozen=True, kw_only=True):
    """What the models were scored on."""

    test: int  # test rows: kept answers to prompts that training and the choice of the checkpoint never saw
    scored: int  # chosen of them, and within every model's context
    left_out: int  # chosen, but too long for one of the models
    prompts: int  # different prompts among the scored
    unseen: int = 0  # the teacher's answers to unseen values that pass the rules, scored apart
    teacher_answers: int = 0  # all answers of the teacher to the test prompts, before the filters
    teacher_kept: int = 0  # of them, those that passed; `select` may have left them out; 0 of 0: not known


class ShownAnswer(msgspec.Struct, frozen=True):
    label: str
    text: str
    key: str = ""  # the model's
    finish_reason: str = ""
    dropped_by: dict[str, str] = {}  # why the recipe's rules would drop it, by rule; empty: it passes
    score: float | None = None  # the judge's, 1 to 5
    right: bool | None = None  # by evaluate.verify, whose rules `dropped_by` then has; None: not verified


class Sample(msgspec.Struct, frozen=True):
    """One prompt and what each model answered."""

    prompt: str
    answers: list[ShownAnswer]
    part: Scope = "seen"


class Accuracy(msgspec.Struct, frozen=True, kw_only=True):
    """What `evaluate.verify` says of the models, apart from their figures of `verified` and `verified_unseen`.

    `told` is the student before training once more, told what the teacher is told. It is not in `Report.models`.
    """

    rules: list[dict[str, Any]]  # with their settings
    prompts: dict[Scope, int]  # that every model has answered: test prompts, and those of `evaluate.probes_file`
    told: ModelReport | None = None
    over_teacher: dict[Scope, Estimate] = {}  # the trained student's share of right answers over the teacher's, paired
    categories: dict[str, dict[str, Estimate]] = {}  # category: model: share of right answers
    wrong: dict[str, dict[str, float]] = {}  # model: reason: share of its answers; unseen ones apart
    samples: list[Sample] = []


class LossPoint(msgspec.Struct, frozen=True):
    step: float
    loss: float


class TrainingLog(msgspec.Struct, frozen=True, kw_only=True):
    """What is shown of student/training_log.json."""

    loss: list[LossPoint] = []
    eval: list[LossPoint] = []
    method: str = ""
    train_rows: int | None = None
    tokens: int | None = None
    wall_s: float | None = None


class RuleDrops(msgspec.Struct, frozen=True):
    """How many answers a rule was the first to drop."""

    rule: str
    dropped: int


class FilterSummary(msgspec.Struct, frozen=True, kw_only=True):
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
    training: TrainingLog
    filters: FilterSummary | None
    lineage: dict[str, Any]
    commands: list[str]
    machine: dict[str, str]
    versions: dict[str, str]
    notes: list[str]
    probes: ProbeSet | None = None  # None: no probe was answered
    differences: list[Difference] = []  # student after against before, and against the teacher
    checklist: Checklist = Checklist()
    accuracy: Accuracy | None = None  # None: nothing is verified
    tasks: dict[str, dict[str, Estimate]] = {}  # task and metric of lm-eval: model: its figure
    wins: list[WinRate] = []  # the same pairs, by the judge; empty without a judge


def read_report(run: RunDir) -> Report | None:
    """The report on disk; None if there is none or it is of another version."""
    try:
        report = msgspec.json.decode(run.report.read_bytes(), type=Report)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    return report if report.schema == SCHEMA else None
