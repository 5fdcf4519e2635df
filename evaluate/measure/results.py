"""What is measured on what, the results, and the files that cache them under evaluation/ in the run directory.

    evaluation/perplexity-<model>.json    the score of every test row
    evaluation/unseen-<model>.json        the score of the teacher's answers to probes with unseen values
    evaluation/speed-<model>.json         tokens/s alone and saturated, time to the first token, memory
    evaluation/probes-<model>.json        the answers to the probes
    evaluation/verify-<model>.json        the answers that `evaluate.verify` checks, and how long they took
    evaluation/verify-told-<model>.json   the same of the untrained student, told what the teacher is told
    evaluation/tasks-<model>.json         its figures in the tasks of lm-eval
    evaluation/judged.json                the judge's scores of these answers, and its choices between them

Each carries the fingerprint of all it was measured on, so a stopped evaluation continues where it was, and a figure of
another student, other rows or other settings is never taken for one of this run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from evaluate.document import Estimate
from evaluate.measure.probes import ProbePrompts
from evaluate.models import Subject, digest
from filters.ruleset import RuleSet
from pipeline.errors import DataError, UsageError
from pipeline.recipe import Recipe
from pipeline.records import Json, Kept, Prompt, Usage, asked_fields, read_jsonl, said
from pipeline.rundir import RunDir, write_file
from pipeline.students import AFTER, TEACHER

FOLDER = "evaluation"
ASKED_TEACHER, SCORED, COMPARED = "asked-teacher", "judge", "pairs"  # folders in it, of what may be paid for
SETTINGS: dict[str, dict[str, set[str] | bool]] = {  # of the recipe, that a measurement depends on
    "perplexity": {"train": {"reasoning"}},
    "unseen": {"train": {"reasoning"}},
    "speed": {
        "evaluate": {"speed_requests", "speed_concurrency", "speed_max_tokens", "speed_repeats", "speed_alone"},
        "sampling": True,
        "serve": True,
    },
    "probes": {"sampling": True, "serve": {"dtype", "device", "args"}},  # a change of the rules asks no model again
    "tasks": {"evaluate": {"lm_eval", "lm_eval_limit"}, "serve": {"dtype", "device", "args"}},
    "verify": {
        "evaluate": {"speed_requests", "speed_concurrency", "speed_repeats"},
        "sampling": {"max_tokens", "extra"},
        "serve": True,
    },
}


class RowScore(msgspec.Struct, frozen=True):
    """How surprised a model was by one answer."""

    id: str
    prompt_id: str
    nll_nats: float  # sum over the answer's tokens and the end of the turn
    tokens: int
    characters: int  # Unicode code points of the answer


class PerplexityResult(msgspec.Struct, frozen=True, kw_only=True):
    """How a model scored the rows."""

    fingerprint: str = ""
    dtype: str
    device: str
    scores: list[RowScore]


class Burst(msgspec.Struct, frozen=True):
    """All requests of the timing, as many in flight as the recipe says."""

    requests: int
    failed: int
    completion_tokens: int
    wall_s: float  # from the first request to the last answer
    machine: str = ""  # evaluate.models.name_machine; empty: an earlier version did not say


class Lone(msgspec.Struct, frozen=True):
    """One request with nothing beside it."""

    first_token_s: float
    wall_s: float
    tokens: int


class SpeedResult(msgspec.Struct, frozen=True, kw_only=True):
    """How a model ran on the engine."""

    fingerprint: str = ""
    device: str  # gpu or cpu, as the engine used it
    dtype: str | None  # that the engine was told; None: the stored one
    bursts: list[Burst]  # at least one with tokens in it
    alone: list[Lone]
    peak_rss_bytes: int | None  # of all the server's processes; None on a GPU: vLLM takes the share it is told to

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each burst."""
        return [burst.completion_tokens / burst.wall_s for burst in self.bursts]


class ProbeResult(msgspec.Struct, frozen=True, kw_only=True):
    """A model's answers: to the probes with the recipe's own sampling, to what is verified with temperature 0.

    An empty answer's finish_reason is the type of its failure (`empty_answer`, `thought_cut_off`). A request that
    failed for another reason has no answer.
    """

    fingerprint: str = ""
    answers: list[Kept]
    failed: int = 0  # requests that failed for good
    bursts: list[Burst] = []  # answers that were timed, where that was asked for

    @property
    def rates(self) -> list[float]:
        """Answers per second of each burst."""
        return [(burst.requests - burst.failed) / burst.wall_s for burst in self.bursts]


class PairVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """The judge's choice between the trained student and another model, in both orders: A is the answer shown first."""

    against: str
    prompt_id: str
    student_first: str | None  # A: the student; B: the other; tie; None: no verdict
    student_second: str | None  # A: the other; B: the student


class JudgeResult(msgspec.Struct, frozen=True, kw_only=True):
    """What the judge said of all models' answers."""

    fingerprint: str = ""
    model: str  # as the recipe names it
    is_teacher: bool
    scores: dict[str, dict[str, int]]  # model → prompt id → 1 to 5; those there are
    pairs: list[PairVerdict]
    failed: int = 0  # requests without a reply: the next evaluation makes them again


class TaskResult(msgspec.Struct, frozen=True, kw_only=True):
    """A model's figures in the tasks of lm-eval, by task and metric."""

    fingerprint: str = ""
    scores: dict[str, Estimate]


Answers = Mapping[str, Mapping[str, Kept]]  # model → prompt id → its answer
Result = TypeVar("Result", PerplexityResult, SpeedResult, ProbeResult, JudgeResult, TaskResult)


@dataclass(frozen=True)
class Results:
    """All that was measured, by the model's key."""

    scored: dict[str, PerplexityResult]
    unseen: dict[str, PerplexityResult]
    timed: dict[str, SpeedResult]
    probed: dict[str, ProbeResult]
    verified: dict[str, ProbeResult]
    tasks: dict[str, TaskResult]
    judged: JudgeResult | None = None

    def machines(self, *, verified: bool) -> list[str]:
        """Where teacher and trained student were timed, in answers per second if they are `verified`, else in tokens.

        Speeds of different machines are never compared.
        """
        return sorted({burst.machine for bursts in self._bursts(verified) for burst in bursts})

    def timings(self, *, verified: bool) -> int:
        """How often the one of these two was timed that was timed less often."""
        return min(map(len, self._bursts(verified)), default=0)

    def _bursts(self, verified: bool) -> list[list[Burst]]:
        own = self.verified if verified else self.timed
        return [own[key].bursts for key in (TEACHER, AFTER) if key in own]


@dataclass(frozen=True)
class Entry:
    """One measurement in the cache: its file, and the fingerprint of all it depends on."""

    path: Path
    fingerprint: str

    def read(self, kind: type[Result]) -> Result | None:
        """The cached result if it is of exactly this; None otherwise."""
        result = read_result(self.path, kind)
        return result if result and result.fingerprint == self.fingerprint else None

    def write(self, result: Result) -> Result:
        """Caches a result, and returns it with its fingerprint."""
        result = msgspec.structs.replace(result, fingerprint=self.fingerprint)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.path, msgspec.json.encode(result))
        return result


@dataclass(frozen=True)
class Plan:
    """What is measured on what, decided before anything is measured."""

    recipe: Recipe
    folder: Path  # of the recipe, where the files are that its rules name
    run: RunDir
    rules: RuleSet
    models: list[Subject]
    test_rows: int
    rows: list[Kept]  # of them, chosen for perplexity
    timing: list[Prompt]  # for tokens per second
    timing_answers: list[Prompt]  # for answers per second
    probes: ProbePrompts
    verify: RuleSet
    questions: ProbePrompts  # that `verify` is about
    dtype: str
    device: str
    weights: dict[str, str]  # model: what identifies its weights
    measure: bool  # what is not cached
    serve: bool  # start servers, for what needs one
    force: bool  # measure again what is cached

    def entry(self, name: str, subject: Subject, inputs: Sequence[Kept | Prompt]) -> Entry:
        """The cache of a measurement (a name above) of a model. `inputs` are as that model is asked them."""
        kind = name.removesuffix("-told")
        settings = [self.recipe.model_dump_json(include=SETTINGS[kind])]
        if kind in ("perplexity", "unseen"):
            settings.append(self.dtype)
        fingerprint = digest(self.weights[subject.key], "\n".join(map(_as_input, inputs)), *settings)
        return Entry(self.run.path / FOLDER / f"{name}-{subject.key}.json", fingerprint)


def _as_input(one: Kept | Prompt) -> str:
    """What a measurement of a row or prompt depends on."""
    asked = [one.id, one.messages, *([one.tools] if one.tools else [])]
    answer = [one.reasoning, one.text, one.finish_reason] if isinstance(one, Kept) else []
    return msgspec.json.encode([*asked, *answer]).decode()


def read_result(path: Path, kind: type[Result]) -> Result | None:
    """A cached result, whatever its fingerprint; None if there is none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def read_test(run: RunDir) -> list[Kept]:
    """The test rows: kept answers that neither training nor its choice of a checkpoint saw.

    Raises UsageError or DataError if there are none.
    """
    if not run.test.is_file():
        raise UsageError(f"{run.test}: no test rows; run train first, it sets them apart")
    rows = list(read_jsonl(run.test, Kept))
    if not rows:
        raise DataError(f"{run.test}: no rows in it; raise prompts.test or keep more answers, and train again")
    return rows


def answer_row(
    model: str,
    prompt: Prompt,
    text: str,
    finish_reason: str = "stop",
    reasoning: str = "",
    tool_calls: Sequence[Json] = (),
) -> Kept:
    """An answer outside the run's own, for rules, judge and perplexity; its id changes with its model and text."""
    row = Kept(
        id="",
        prompt_id=prompt.id,
        **asked_fields(prompt),
        endpoint="",
        sampling={},
        text=text,
        reasoning=reasoning,
        tool_calls=list(tool_calls),
        finish_reason=finish_reason,
        model=model,
        usage=Usage(),
        latency_s=0.0,
        attempts=1,
        created="",
    )
    return msgspec.structs.replace(row, id=digest(model, prompt.id, said(row))[:16])
