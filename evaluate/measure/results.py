"""What is measured once and kept: one file a model and a measurement, under evaluation/ in the run directory.

    evaluation/perplexity-<model>.json    the score of every held-out row
    evaluation/unseen-<model>.json        the score of the teacher's answers to probes with unseen values
    evaluation/speed-<model>.json         tokens/s alone and saturated, time to the first token, memory
    evaluation/probes-<model>.json        the answers to the probes
    evaluation/judged.json                the judge's scores of these answers, and its choices between them

Each carries the fingerprint of what it was measured on. A stopped evaluation goes on where it was, and a figure of
another student, other rows or other settings is never taken for one of this run.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from evaluate.measure.perplexity import RowScore
from evaluate.models import Subject, digest_subject
from pipeline.errors import DataError, UsageError
from pipeline.recipe import Recipe
from pipeline.records import Completion, Kept, Prompt, Usage, read_jsonl
from pipeline.rundir import RunDir, replacing

TEACHER = "teacher"
BEFORE = "student_before"
AFTER = "student_after"
SPEED = {"speed_requests", "speed_concurrency", "speed_max_tokens", "speed_repeats", "speed_alone"}


class PerplexityResult(msgspec.Struct, frozen=True, kw_only=True):
    """How a model scored the rows."""

    fingerprint: str
    dtype: str
    device: str
    wall_s: float
    scores: list[RowScore]


class Burst(msgspec.Struct, frozen=True):
    """All requests of the timing, as many in flight as the recipe says."""

    requests: int
    failed: int
    completion_tokens: int
    wall_s: float  # from the first request to the last answer


class Lone(msgspec.Struct, frozen=True):
    """One request with nothing beside it."""

    first_token_s: float
    wall_s: float
    tokens: int


class SpeedResult(msgspec.Struct, frozen=True, kw_only=True):
    """How a model ran on the engine."""

    fingerprint: str
    device: str  # gpu or cpu, as the engine used it
    dtype: str | None  # that the engine was told; None: the stored one
    bursts: list[Burst]  # at least one with tokens in it
    alone: list[Lone]
    startup_s: float
    peak_rss_bytes: int | None  # of all the server's processes; None on a GPU, where it says nothing


class ProbeAnswer(msgspec.Struct, frozen=True):
    """A model's answer to one probe."""

    prompt_id: str
    text: str  # empty where the model said nothing
    finish_reason: str
    tokens: int | None


class ProbeResult(msgspec.Struct, frozen=True, kw_only=True):
    """A model's answers to the probes, with the recipe's own sampling. A request that failed has none."""

    fingerprint: str
    wall_s: float
    answers: list[ProbeAnswer]


class PairVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """The judge's choice between the trained student and another model, in both orders: A is the answer shown first."""

    against: str
    prompt_id: str
    student_first: str | None  # A: the student; B: the other; tie; None: no verdict could be read
    student_second: str | None  # A: the other; B: the student


class JudgeResult(msgspec.Struct, frozen=True, kw_only=True):
    """What the judge said of all models' answers."""

    fingerprint: str
    model: str  # as the recipe names it
    is_teacher: bool
    scores: dict[str, dict[str, int]]  # model → prompt id → 1 to 5; those that could be read
    pairs: list[PairVerdict]


Result = TypeVar("Result", PerplexityResult, SpeedResult, ProbeResult, JudgeResult)


@dataclass(frozen=True)
class Results:
    """All that was measured, by the model's key."""

    scored: dict[str, PerplexityResult] = field(default_factory=dict)
    unseen: dict[str, PerplexityResult] = field(default_factory=dict)
    timed: dict[str, SpeedResult] = field(default_factory=dict)
    probed: dict[str, ProbeResult] = field(default_factory=dict)
    judged: JudgeResult | None = None

    def __bool__(self) -> bool:
        return bool(self.scored or self.timed or self.probed)


@dataclass(frozen=True)
class Measurement:
    """One thing to measure: where its result is kept and what it depends on."""

    subject: Subject
    path: Path
    fingerprint: str

    def saved(self, kind: type[Result]) -> Result | None:
        """The result on disk if it is of exactly this; None otherwise."""
        return read_result(self.path, self.fingerprint, kind)

    def save(self, result: PerplexityResult | SpeedResult | ProbeResult) -> None:
        write_result(self.path, result)


def read_result(path: Path, fingerprint: str, kind: type[Result]) -> Result | None:
    """The result on disk if it is of exactly this; None otherwise."""
    try:
        result = msgspec.json.decode(path.read_bytes(), type=kind)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    return result if result.fingerprint == fingerprint else None


def write_result(path: Path, result: PerplexityResult | SpeedResult | ProbeResult | JudgeResult) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(msgspec.json.encode(result))


def read_held_out(run: RunDir) -> list[Kept]:
    """All rows that training never saw. Raises UsageError or DataError."""
    if not run.test.is_file():
        raise UsageError(f"{run.test}: no test rows; run train first, it sets them apart")
    rows = list(read_jsonl(run.test, Kept))
    if not rows:
        raise DataError(f"{run.test}: no rows in it; raise prompts.test or keep more answers, and train again")
    return rows


class Measurements:
    """What there is to measure of one model in one run."""

    def __init__(self, subject: Subject, recipe: Recipe, run: RunDir) -> None:
        self.subject, self._recipe, self._folder = subject, recipe, run.path / "evaluation"
        self._weights = digest_subject(subject)

    def perplexity(self, rows: Sequence[Kept], dtype: str) -> Measurement:
        """Of the held-out rows."""
        return self._of("perplexity", digest_rows(rows), dtype)

    def unseen(self, rows: Sequence[Kept], dtype: str) -> Measurement:
        """Of the teacher's answers to unseen values."""
        return self._of("unseen", digest_rows(rows), dtype)

    def speed(self, prompts: Sequence[Prompt]) -> Measurement:
        settings = self._recipe.model_dump_json(include={"evaluate": SPEED, "sampling": True, "serve": True})
        return self._of("speed", _prompts_digest(prompts), settings)

    def probes(self, prompts: Sequence[Prompt]) -> Measurement:
        """A change of the rules asks no model again: they are applied to the answers that are there."""
        settings = self._recipe.model_dump_json(include={"sampling": True, "serve": {"dtype", "device", "args"}})
        return self._of("probes", _prompts_digest(prompts), settings)

    def _of(self, name: str, *parts: str) -> Measurement:
        path = self._folder / f"{name}-{self.subject.key}.json"
        return Measurement(self.subject, path, _hash(self._weights, *parts))


def probe_row(key: str, prompt: Prompt, answer: ProbeAnswer) -> Kept:
    """An answer to a probe as a row, for rules, judge and perplexity; its id changes with its text."""
    return Kept(
        id=_hash(key, prompt.id, answer.text)[:16],
        prompt_id=prompt.id,
        messages=prompt.messages,
        slots=prompt.slots,
        endpoint="",
        sampling={},
        text=answer.text,
        finish_reason=answer.finish_reason,
        model=key,
        usage=Usage(completion_tokens=answer.tokens),
        latency_s=0.0,
        attempts=1,
        created="",
    )


def digest_rows(rows: Sequence[Completion]) -> str:
    """What identifies a list of rows."""
    return _hash(*(f"{row.id} {row.finish_reason} {row.text}" for row in rows))


def _prompts_digest(prompts: Sequence[Prompt]) -> str:
    return _hash(*(prompt.id for prompt in prompts))


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
