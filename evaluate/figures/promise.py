"""What the chapter promises of a student, and whether this run keeps it. Pure arithmetic.

The promise is "90-95% of the teacher's quality, 3 times smaller, 3 times faster, a third of the memory". Each part is
a ratio that must be at least so large, and holds only where the whole of its interval is. A figure over fewer than 30
prompts shows no quality, whatever its interval: answers that all pass have one of no width, while by the rule of three
(Hanley and Lippman-Hand 1983) 30 without a fault leave room for 10% of faults, which is what the promise allows.
"""

import math
from collections.abc import Sequence
from typing import Literal

import msgspec

from evaluate.document import Claim, Estimate, ModelReport
from evaluate.measure.results import AFTER, TEACHER
from evaluate.statistics import Figure, Figures

QUALITY = 0.9  # of the teacher's: the lower end of the chapter's 90-95%
TIMES = 3.0  # smaller, faster, and less memory
ENOUGH = 30  # prompts
AXES = ("quality", "memory", "speed")
LEAST_SCORE = 1  # a judge's: what an answer without any worth gets


def claims(
    held_out: Figures, probes: Figures, teacher: ModelReport, after: ModelReport, *, scored: int, answered: int
) -> list[Claim]:
    """All parts of the promise, in order; those that were not measured have no value.

    `held_out` has bits per character, over `scored` prompts; `probes` the figures of all `answered` probes.
    """
    bits = _over(held_out, "bits_per_character", TEACHER, AFTER)
    passing = _over(probes, "passing", AFTER, TEACHER)
    judge = _over(probes, "judge", AFTER, TEACHER, less=LEAST_SCORE)
    memory, what = _point(teacher.peak_rss_mib, after.peak_rss_mib), "peak memory of the server"
    if memory is None:
        memory, what = _point(teacher.weights_mib, after.weights_mib), "weights"
    return [
        _quality("quality_bits", "bits per character, teacher's over student's", bits, scored),
        _quality("quality_probes", "probes that pass the rules, student's over teacher's", passing, answered),
        _quality("quality_judge", "judge's mean above 1, student's over teacher's", judge, answered),
        _claim(
            "size",
            "memory",
            "parameters, teacher's over student's",
            TIMES,
            _point(teacher.parameters, after.parameters),
        ),
        _claim("speed", "speed", "tokens/s saturated, student's over teacher's", TIMES, _speed(teacher, after)),
        _claim("memory", "memory", f"{what}, teacher's over student's", TIMES, memory),
    ]


def holds(parts: Sequence[Claim]) -> bool | None:
    """False where any part that was measured does not hold; None where those that were do, but an axis has none."""
    measured = [claim for claim in parts if claim.holds is not None]
    if not all(claim.holds for claim in measured):
        return False
    return True if {claim.axis for claim in measured} == set(AXES) else None


def verdict(parts: Sequence[Claim]) -> str:
    """The promise and each part of it in one line."""
    found = holds(parts)
    word = {True: "kept", False: "not kept", None: "not all measured"}[found]
    said = "; ".join(f"{claim.name} {describe(claim)}" for claim in parts if claim.value)
    missing = [claim.name for claim in parts if not claim.value]
    text = f"The chapter's promise (90% of the quality, 3 times smaller, faster, and less memory): {word}"
    return text + (f". {said}" if said else "") + (f". Not measured: {', '.join(missing)}" if missing else "") + "."


def describe(claim: Claim) -> str:
    """57.1% (52.0% to 63.2%): no; 3.11×: yes; not measured."""
    value = claim.value
    if value is None:
        return "not measured"
    shown = _percent if claim.axis == "quality" else _times
    width = f" ({shown(value.low)} to {shown(value.high)})" if value.low < value.high else ""
    return f"{shown(value.value)}{width}: {answer(claim)}"


def answer(claim: Claim) -> str:
    """Yes, no, not shown (the promise lies within the interval), or a dash."""
    if claim.holds is None:
        return "–"
    return "yes" if claim.holds else "not shown" if claim.undecided else "no"


def _quality(name: str, text: str, value: Estimate | None, prompts: int) -> Claim:
    claim = _claim(name, "quality", text, QUALITY, value)
    return msgspec.structs.replace(claim, holds=False, undecided=True) if claim.holds and prompts < ENOUGH else claim


def _claim(
    name: str, axis: Literal["quality", "speed", "memory"], text: str, promised: float, value: Estimate | None
) -> Claim:
    if value is None or not math.isfinite(value.low):
        return Claim(name=name, axis=axis, text=text, promised=promised)
    return Claim(
        name=name,
        axis=axis,
        text=text,
        promised=promised,
        value=value,
        holds=value.low >= promised,
        undecided=value.low < promised <= value.high,
    )


def _over(figures: Figures, name: str, above: str, below: str, less: float = 0) -> Estimate | None:
    one, other = figures.get(above, {}).get(name), figures.get(below, {}).get(name)
    if one is None or other is None:
        return None
    return Figure(one.value - less, one.resampled - less).over(Figure(other.value - less, other.resampled - less))


def _point(above: float | None, below: float | None) -> Estimate | None:
    return Estimate(above / below, above / below, above / below) if above and below else None


def _speed(teacher: ModelReport, after: ModelReport) -> Estimate | None:
    """The ratio of the medians, from the slowest student over the fastest teacher to the other way round."""
    ours, theirs = after.tokens_per_s_range, teacher.tokens_per_s_range
    if not after.tokens_per_s or not teacher.tokens_per_s or not ours or not theirs or not theirs[0]:
        return None
    return Estimate(after.tokens_per_s / teacher.tokens_per_s, ours[0] / theirs[1], ours[1] / theirs[0])


def _percent(value: float) -> str:
    return f"{value:.1%}" if value < 10 else f"{value:.0f}×"


def _times(value: float) -> str:
    return f"{value:.2f}×" if value < 10 else f"{value:.0f}×"
