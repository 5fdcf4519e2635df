"""Charts as panels of marks, placed in percent of the drawing: pure numbers.

The templates report.html.j2 (in the page) and dots.svg.j2 (of an experiment, one self-contained SVG) draw them.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from evaluate.document import (
    MEASURES,
    Estimate,
    FilterSummary,
    ModelReport,
    Report,
    Scope,
    TrainingLog,
    exactly,
    number,
)
from evaluate.figures.promise import QUALITY, TIMES
from pipeline.students import TEACHER

WIDE = 50  # a scale whose ends are more times apart than this is logarithmic: else one long bar hides the short ones
ROOM = 1.15  # left at both ends of the three axes
LOGARITHMIC = "logarithmic scale"

# Title, hint, which figure, the ratio that is promised.
AXES: tuple[tuple[str, str, Scope, str, float], ...] = (
    ("Quality", "right answers to test prompts, model's over the teacher's", "verified", "accuracy", QUALITY),
    ("Quality", "bits per character of test answers, teacher's over model's", "test", "bits_per_character", QUALITY),
    ("Speed", "answers per second as each is asked, the model's over the teacher's", "engine", "answers_per_s", TIMES),
    ("Speed", "tokens per second, saturated, the model's over the teacher's", "engine", "tokens_per_s", TIMES),
    ("Memory", "weights as stored, the teacher's over the model's", "engine", "weights_mib", TIMES),
)

Scale = Callable[[float], float]


class Mark(NamedTuple):
    """One figure on a scale: a bar that ends at `at`, or a dot there. Places are in percent."""

    label: str
    text: str
    at: float
    kind: str  # a CSS class: the model's key, other, drop, arm
    low: float | None = None  # its interval, if that has a width
    high: float | None = None


class Panel(NamedTuple):
    """Marks on one scale."""

    title: str
    hint: str
    marks: list[Mark]
    one: float | None = None  # where the teacher is
    goal: float | None = None  # where the promise is


class Axis(NamedTuple):
    """One of the three axes: what each model that has its figure is, times the teacher."""

    title: str
    hint: str
    goal: float  # the ratio that is promised
    ratios: list[tuple[ModelReport, float]]


class LossChart(NamedTuple):
    """Points in a 100 × 100 box, y downwards, and the labelled places on the axes."""

    train: list[tuple[float, float]]
    eval: list[tuple[float, float]]
    x: list[tuple[float, str]]
    y: list[tuple[float, str]]


def scale(first: float, last: float, *, logarithmic: bool = False) -> Scale:
    """From a figure to its place between `first` (0%) and `last` (100%); 50% if these are the same."""

    def place(value: float) -> float:
        start, end, own = (math.log(v) if logarithmic else v for v in (first, last, value))
        return round(100 * (own - start) / (end - start), 2) if end > start else 50.0

    return place


def mark(label: str, figure: Estimate, place: Scale, kind: str, text: str) -> Mark:
    """A figure at its place, with its interval."""
    at = place(figure.value)
    if figure.low == figure.high:
        return Mark(label, text, at, kind)
    return Mark(label, text, at, kind, place(figure.low), place(figure.high))


def dot_panel(title: str, hint: str, figures: Sequence[tuple[str, Estimate, str, str]]) -> Panel:
    """Figures (label, estimate, kind, text) on a scale from the lowest end of an interval to the highest."""
    low, high = min(one.low for _, one, _, _ in figures), max(one.high for _, one, _, _ in figures)
    far = low > 0 and high > WIDE * low
    place = scale(low, high, logarithmic=far)
    marks = [mark(label, one, place, kind, text) for label, one, kind, text in figures]
    return Panel(title, "; ".join(filter(None, [hint, LOGARITHMIC * far])), marks)


def axis_panels(report: Report) -> list[Panel]:
    """Quality, speed and memory of every model as ratios to the teacher's; only axes that two models have.

    More is better, and all panels share one logarithmic scale.
    """
    teacher = next((model for model in report.models if model.key == TEACHER), None)
    found: list[Axis] = []
    for title, hint, part, name, goal in AXES:
        base, ratios = teacher.figure(part, name) if teacher else None, []
        for model in report.models:
            if base and (own := model.figure(part, name)) and base.value and own.value:
                times = base.value / own.value
                ratios.append((model, times if MEASURES[name].better == "lower" else 1 / times))
        if len(ratios) > 1 and title not in [axis.title for axis in found]:  # the first that was measured
            found.append(Axis(title, hint, goal, ratios))
    ends = [value for axis in found for value in (axis.goal, 1.0, *(ratio for _, ratio in axis.ratios))]
    if not ends:
        return []
    place = scale(min(ends) / ROOM, max(ends) * ROOM, logarithmic=True)
    return [
        Panel(
            title=axis.title,
            hint=axis.hint,
            marks=[mark(m.label, exactly(ratio), place, _kind(m), f"{number(ratio)}×") for m, ratio in axis.ratios],
            one=place(1),
            goal=place(axis.goal),
        )
        for axis in found
    ]


def drop_bars(filters: FilterSummary | None) -> list[Mark]:
    """Dropped answers by the rule that dropped them, most first."""
    drops = sorted((d for d in (filters.rules if filters else ()) if d.dropped), key=lambda d: -d.dropped)
    place = scale(0, max((d.dropped for d in drops), default=0))
    return [mark(d.rule, exactly(d.dropped), place, "drop", f"{d.dropped:,}") for d in drops]


def _kind(model: ModelReport) -> str:
    return "other" if model.key.startswith("other_") else model.key


def loss_chart(training: TrainingLog) -> LossChart | None:
    """Training and validation loss over steps; None without at least two points."""
    train, evaluated = ([p for p in points if math.isfinite(p.loss)] for points in (training.loss, training.eval))
    points = [*train, *evaluated]
    if len({point.step for point in points}) < 2:
        return None
    right = max(point.step for point in points)
    y_ticks = _ticks(min(point.loss for point in points), max(point.loss for point in points))
    x, y = scale(0, right), scale(-y_ticks[-1], -y_ticks[0])  # y downwards

    return LossChart(
        train=[(x(point.step), y(-point.loss)) for point in train],
        eval=[(x(point.step), y(-point.loss)) for point in evaluated],
        x=[(x(tick), f"{tick:g}") for tick in _ticks(0, right) if tick <= right],
        y=[(y(-tick), f"{tick:g}") for tick in y_ticks],
    )


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from at most `low` to at least `high`: steps of 1, 2 or 5 times a power of ten."""
    least = ((high - low) or abs(high) or 1.0) / 5  # of a step: there are about five
    power = 10 ** math.floor(math.log10(least))
    step = power * next(factor for factor in (1, 2, 5, 10) if power * factor >= least)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(index * step, 10) for index in range(first, max(last, first + 1) + 1)]
