"""The geometry of the report's charts, in percent of the drawing: pure numbers; the template draws them."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from evaluate.document import Estimate, Filtering, LossPoint, ModelReport, Report, Training, number
from evaluate.report.terminal import millions

WIDE = 50  # a longest bar this many times the shortest hides it: perplexity is then drawn on a logarithmic scale

Figure = Estimate | float | int

# Title, hint, the field of ModelReport, whether less of it is better, the ratio that the chapter promises.
AXES = (
    (
        "Quality",
        "bits per character of held-out answers, the teacher's over the model's",
        "bits_per_character",
        True,
        0.9,
    ),
    ("Speed", "tokens a second, saturated, the model's over the teacher's", "tokens_per_s", False, 3.0),
    ("Memory", "peak of the whole server, the teacher's over the model's", "peak_rss_mib", True, 3.0),
    ("Weights", "MiB as stored, the teacher's over the model's", "weights_mib", True, 3.0),
)


class Bar(msgspec.Struct, frozen=True, kw_only=True):
    """One bar and, where the figure has an interval, its whisker."""

    label: str
    text: str
    width: float
    low: float | None = None
    high: float | None = None
    kind: str = ""  # a CSS class


class BarGroup(msgspec.Struct, frozen=True):
    title: str
    hint: str
    bars: list[Bar]


class AxisDot(msgspec.Struct, frozen=True, kw_only=True):
    """A model on an axis."""

    label: str
    text: str
    at: float
    kind: str


class Axis(msgspec.Struct, frozen=True, kw_only=True):
    """One axis: ratios to the teacher, where more is better; all axes share one logarithmic scale."""

    title: str
    hint: str
    dots: list[AxisDot]
    one: float  # where the teacher is
    goal: float  # where the promise is


class Tick(msgspec.Struct, frozen=True):
    at: float
    label: str


class LossChart(msgspec.Struct, frozen=True, kw_only=True):
    """SVG path data in a 100 × 100 box, y downwards."""

    train: str
    eval: str
    eval_dots: list[tuple[float, float]]
    x: list[Tick]
    y: list[Tick]


def axis_charts(report: Report) -> list[Axis]:
    """Quality, speed and memory of every model as ratios to the teacher's; only axes on which two models are."""
    teacher = next((model for model in report.models if model.key == "teacher"), None)
    found = []
    for title, hint, field, lower, goal in AXES:
        base = _value(getattr(teacher, field)) if teacher else None
        values = [(model, _value(getattr(model, field))) for model in report.models]
        ratios = [(model, base / own if lower else own / base) for model, own in values if own and base]
        if len(ratios) > 1:
            found.append((title, hint, goal, ratios))
    ends = [value for *_, goal, ratios in found for value in (goal, 1.0, *(ratio for _, ratio in ratios))]
    if not ends:
        return []
    low, high = math.log(min(ends) / 1.15), math.log(max(ends) * 1.15)

    def place(ratio: float) -> float:
        return round(100 * (math.log(ratio) - low) / (high - low), 2)

    def dot(model: ModelReport, ratio: float) -> AxisDot:
        return AxisDot(label=model.label, text=f"{number(ratio)}×", at=place(ratio), kind=_kind(model))

    return [
        Axis(title=title, hint=hint, dots=[dot(*pair) for pair in ratios], one=place(1), goal=place(goal))
        for title, hint, goal, ratios in found
    ]


def _value(figure: Figure | None) -> float | None:
    return figure.value if isinstance(figure, Estimate) else figure


def _kind(model: ModelReport) -> str:
    return "other" if model.key.startswith("other_") else model.key


def bar_groups(report: Report) -> list[BarGroup]:
    """Perplexity, bits per character, speed, memory and size of every model that has the figure."""
    groups = []
    for title, hint, field in (
        ("Perplexity", "a token, on held-out teacher answers; lower is better", "perplexity"),
        ("Bits per character", "fair between tokenizers; lower is better", "bits_per_character"),
        ("Speed", "tokens a second on the same engine; higher is better", "tokens_per_s"),
        ("Peak memory", "MiB, the whole server", "peak_rss_mib"),
        ("Alone", "tokens a second, one request in flight; higher is better", "tokens_per_s_alone"),
        ("First token", "seconds, one request in flight; lower is better", "first_token_s"),
        ("Weights", "MiB on disk", "weights_mib"),
        ("KV cache", "bytes a token; lower is better", "kv_bytes_per_token"),
        ("Parameters", "", "parameters"),
    ):
        figures = [(model, getattr(model, field)) for model in report.models]
        bars = [(model, figure) for model, figure in figures if figure is not None]
        if len(bars) < 2:  # nothing to compare
            continue
        ends = [end for _, figure in bars for end in (_low(figure), _high(figure))]
        scale, shown = partial(_percent, top=max(ends)), _parameters if field == "parameters" else number
        if field == "perplexity" and max(ends) > WIDE * min(ends):
            scale, hint = partial(_log_percent, top=max(ends)), f"{hint}; logarithmic scale from 1"
        groups.append(BarGroup(title, hint, [_bar(model, figure, scale, shown) for model, figure in bars]))
    return groups


def _bar(model: ModelReport, figure: Figure, scale: Callable[[float], float], shown: Callable[[float], str]) -> Bar:
    if isinstance(figure, Estimate):
        return Bar(
            label=model.label,
            text=shown(figure.value),
            width=scale(figure.value),
            low=scale(figure.low),
            high=scale(figure.high),
            kind=_kind(model),
        )
    return Bar(label=model.label, text=shown(figure), width=scale(figure), kind=_kind(model))


def _parameters(count: float) -> str:
    return millions(round(count))


def _low(figure: Figure) -> float:
    return figure.low if isinstance(figure, Estimate) else figure


def _high(figure: Figure) -> float:
    return figure.high if isinstance(figure, Estimate) else figure


def drop_bars(filters: Filtering | None) -> list[Bar]:
    """Dropped answers by the rule that dropped them, most first."""
    drops = sorted((d for d in (filters.rules if filters else ()) if d.dropped), key=lambda d: -d.dropped)
    top = max((d.dropped for d in drops), default=0)
    return [Bar(label=d.rule, text=f"{d.dropped:,}", width=_percent(d.dropped, top), kind="drop") for d in drops]


def loss_chart(training: Training) -> LossChart | None:
    """Training and evaluation loss over steps; None without at least two points."""
    points = [p for p in (*training.loss, *training.eval) if math.isfinite(p.loss)]
    if len({point.step for point in points}) < 2:
        return None
    x_ticks = _ticks(0, max(point.step for point in points))
    y_ticks = _ticks(min(point.loss for point in points), max(point.loss for point in points))
    right, bottom, top = max(point.step for point in points), y_ticks[0], y_ticks[-1]

    def place(point: LossPoint) -> tuple[float, float]:
        return round(100 * point.step / right, 2), round(100 * (top - point.loss) / (top - bottom), 2)

    dots = [place(point) for point in training.eval if math.isfinite(point.loss)]
    return LossChart(
        train=_path([place(point) for point in training.loss if math.isfinite(point.loss)]),
        eval=_path(dots),
        eval_dots=dots,
        x=[Tick(round(100 * tick / right, 2), f"{tick:g}") for tick in x_ticks if tick <= right],
        y=[Tick(round(100 * (top - tick) / (top - bottom), 2), f"{tick:g}") for tick in y_ticks],
    )


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{'L' if index else 'M'}{x} {y}" for index, (x, y) in enumerate(points))


def _ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`: steps of 1, 2 or 5 times a power of ten."""
    span = (high - low) or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / wanted))
    step = power * next(factor for factor in (1, 2, 5, 10) if power * factor >= span / wanted)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(index * step, 10) for index in range(first, max(last, first + 1) + 1)]


def _log_percent(value: float, top: float) -> float:
    return round(100 * math.log(value) / math.log(top), 2)


def _percent(value: float, top: float) -> float:
    return round(100 * value / top, 2) if top else 0.0
