"""The promise: "90-95% of the teacher's quality, 3 times smaller, 3 times faster, a third of the memory". Is it kept?

Pure arithmetic. Each part is a ratio, and holds only if its whole interval is at least what is promised. A figure over
fewer than 60 prompts (or groups of them) shows no quality: the bootstrap's interval of a share near 1 is too narrow
there. With 29 of 30 right it begins at 90%, which 18% of the students that are right in just 90% reach; from 60 prompts
on, 3 to 8% of them are told yes, 12% where the teacher is right in 35. A share (right answers, or answers that pass)
shows no quality either if the teacher has fewer than 30 of them: if it is right in 18 of 60 prompts, 17% of such
students would be told yes, and 40% if it is right in 9. Over fewer than PROMPTS_TO_DIFFER no quality is missed. Source
of the promise: docs/evaluation.md.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import msgspec

from evaluate.document import MEASURES, Claim, Estimate, ModelReport, Scope, exactly
from evaluate.figures.quality import PROMPTS_TO_DIFFER
from evaluate.figures.statistics import Figures, quotient
from pipeline.students import AFTER, TEACHER

QUALITY = 0.9  # of the teacher's: the lower end of 90-95%
TIMES = 3.0  # smaller, faster, and less memory
ENOUGH = 60  # prompts
# By chance all timings of one of two equal models are above all of the other's: with 3 in 1 of 20, with 2 in 1 of 6.
ENOUGH_TIMINGS = 3
ENOUGH_RIGHT = 30  # right answers of the teacher, or answers of it that pass the rules
SHARES = ("accuracy", "passing")
AXES = ("quality", "speed", "memory")
LEAST_SCORE = 1  # a judge's: what an answer without any worth gets


def claims(
    figures: Mapping[Scope, Figures],
    teacher: ModelReport,
    after: ModelReport,
    *,
    verified: bool,
    machines: Sequence[str] = (),
    timings: int = ENOUGH_TIMINGS,
) -> list[Claim]:
    """All parts of the promise, in order; those that were not measured have no value.

    If answers are `verified`, the share of right ones is the quality, and answers per second are the speed. There is no
    speed if it was timed on several `machines`; `timings`: how often each model was timed, at least.
    """
    test, probes, right = (figures.get(part, {}) for part in ("test", "all", "verified"))
    if verified:
        quality = [_quality("quality_accuracy", "right answers to test prompts", right, "accuracy")]
        rate, unit = "answers_per_s", "answers/s as each is asked"
    else:
        quality = [
            _quality("quality_bits", "bits per character", test, "bits_per_character"),
            _quality("quality_probes", "probes that pass the rules", probes, "passing"),
            _quality("quality_judge", "judge's mean above 1", probes, "judge", less=LEAST_SCORE),
        ]
        rate, unit = "tokens_per_s", "tokens/s saturated"
    speed = _speed(teacher, after, rate) if len(machines) < 2 else None
    few = {1: "timed once", 2: "timed twice"}.get(timings, "")
    return [
        *quality,
        _claim("size", "memory", "parameters, teacher's over student's", _times(teacher, after, "parameters")),
        _claim("speed", "speed", f"{unit}, student's over teacher's", speed, few=few),
        _claim("memory", "memory", "weights, teacher's over student's", _times(teacher, after, "weights_mib")),
    ]


def holds(parts: Sequence[Claim]) -> bool | None:
    """False if any part is missed; None if none is, but one is not shown, or an axis is not measured."""
    verdicts = {claim.verdict for claim in parts}
    if "no" in verdicts:
        return False
    shown = {claim.axis for claim in parts if claim.verdict == "yes"}
    return True if "not shown" not in verdicts and shown == set(AXES) else None


def ratio_format(claim: Claim) -> Callable[[float], str]:
    """How the ratio of a part is written: 57.1% of the quality, 3.11×."""
    if claim.axis == "quality":
        return lambda value: f"{value:.1%}" if value < 10 else f"{value:.0f}×"
    return lambda value: f"{value:.2f}×" if value < 10 else f"{value:.0f}×"


def _quality(name: str, what: str, figures: Figures, figure: str, less: float = 0) -> Claim:
    """A student that is as good as its teacher has a ratio of 1, a better one has more."""
    above, below, over = AFTER, TEACHER, "student's over teacher's"
    if MEASURES[figure].better == "lower":
        above, below, over = TEACHER, AFTER, "teacher's over student's"
    prompts = [own[figure].prompts for key in (above, below) if figure in (own := figures.get(key, {}))]
    ratio = quotient(figures, figure, above, below, less)
    theirs = figures.get(TEACHER, {}).get(figure)
    rare = figure in SHARES and theirs is not None and theirs.value * theirs.prompts < ENOUGH_RIGHT
    return _claim(name, "quality", f"{what}, {over}", ratio, min(prompts, default=0), rare=rare)


def _claim(
    name: str,
    axis: Literal["quality", "speed", "memory"],
    text: str,
    value: Estimate | None,
    prompts: float = ENOUGH,
    *,
    few: str = "",
    rare: bool = False,
) -> Claim:
    claim = Claim(name=name, axis=axis, text=text, promised=QUALITY if axis == "quality" else TIMES)
    if value is None or not math.isfinite(value.low):
        return claim
    reached = value.low >= claim.promised
    could_be_reached = not reached and value.high >= claim.promised
    least = ENOUGH if reached else PROMPTS_TO_DIFFER
    why = ""
    if prompts < least:
        why = f"under {least} prompts"
    elif reached and rare:
        why = f"under {ENOUGH_RIGHT} of the teacher's"
    elif few:
        why = few
    verdict = "not shown" if why or could_be_reached else "yes" if reached else "no"
    return msgspec.structs.replace(claim, value=value, verdict=verdict, why=why)


def _times(teacher: ModelReport, after: ModelReport, name: str) -> Estimate | None:
    above, below = teacher.figure("engine", name), after.figure("engine", name)
    return exactly(above.value / below.value) if above and below and below.value else None


def _speed(teacher: ModelReport, after: ModelReport, rate: str) -> Estimate | None:
    """The ratio of the medians, from the slowest student over the fastest teacher to the other way round."""
    ours, theirs = after.figure("engine", rate), teacher.figure("engine", rate)
    if not ours or not theirs or not theirs.low:
        return None
    return Estimate(ours.value / theirs.value, ours.low / theirs.high, ours.high / theirs.low)
