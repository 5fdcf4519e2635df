"""What the judge says of the answers, and what follows from it: records and pure functions. filters.judge asks it."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import msgspec

from pipeline.errors import DistillError
from pipeline.filters_config import JudgeConfig
from pipeline.records import Reason, read_jsonl
from pipeline.rundir import RunDir

JUDGE = "judge"
SCORES = [1, 2, 3, 4, 5]
UNREADABLE, FAILED = "unreadable", "failed"  # why an answer has no score: no verdict in the reply, or no reply
ENOUGH = 20  # verdicts, to say that a judge does not tell its criteria apart


class Judgement(msgspec.Struct, frozen=True, kw_only=True):
    """A line of judgements.jsonl. `score` is None if no verdict could be read."""

    id: str  # the completion's
    score: int | None
    criteria: dict[str, int] = {}
    model: str | None = None  # as the judge's server named it
    version: str
    seed: int | None = None
    attempts: int
    error: str | None = None  # why the last request failed; None if it was answered

    @property
    def scores(self) -> dict[str, float]:
        """What kept.jsonl says of the answer."""
        return {} if self.score is None else {JUDGE: self.score, **self.criteria}


def read_judgements(run: RunDir) -> dict[str, Judgement]:
    """The run's judgements by id; none if it was not judged. Raises DistillError if the file is wrong."""
    if not run.judgements.exists():
        return {}
    try:
        return {judgement.id: judgement for judgement in read_jsonl(run.judgements, Judgement)}
    except DistillError as error:
        raise type(error)(f"{error}; move the file away, and it is made again from {run.path / 'judge'}") from None


def undiscerning(judgements: Iterable[Judgement]) -> str | None:
    """What is wrong with a judge that gives nearly every answer the same score for each of several criteria, or None.

    A small model does that: it agrees, or does not, and its scores say nothing (seen with Qwen2.5-Coder 1.5B).
    """
    scored = [one for one in judgements if one.score is not None and len(one.criteria) > 1]
    alike = sum({one.score} == {*one.criteria.values()} for one in scored)
    if len(scored) < ENOUGH or alike < 0.95 * len(scored):
        return None
    what = f"the judge gave {alike} of {len(scored)} answers the same score for every criterion"
    return f"{what}: it does not tell them apart; take a more able judge, and see whether a person agrees (make review)"


def judge_reason(judgement: Judgement, config: JudgeConfig) -> Reason | None:
    """Why the judge drops a row, or None. An unjudged row is dropped: nobody says that it is worth learning from."""
    if judgement.error is not None:
        return Reason(rule=JUDGE, what=FAILED, note=f"not judged: {judgement.error}")
    if judgement.score is None:
        return Reason(rule=JUDGE, what=UNREADABLE, count=judgement.attempts)
    if judgement.score >= config.min_score:
        return None
    low = {name: score for name, score in judgement.criteria.items() if score < config.min_score}
    return Reason(rule=JUDGE, value=judgement.score, at_least=config.min_score, scores=low)


def judge_rules(config: JudgeConfig | None) -> list[dict[str, Any]]:
    """The judge as a rule with its settings, for the report."""
    return [] if config is None else [{"rule": JUDGE, "min_score": config.min_score, "model": config.model}]


def count_scores(judgement: Judgement, scores: dict[str, Counter[str]]) -> None:
    """Adds a judgement to the histograms, the one of `score` under the judge's own name."""
    whole = judgement.score or (UNREADABLE if judgement.error is None else FAILED)
    for name, score in {JUDGE: whole, **judgement.criteria}.items():
        scores.setdefault(name, Counter())[str(score)] += 1
