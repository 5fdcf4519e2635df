"""Charts as panels of marks, placed in percent of the drawing: pure numbers.

Used by report.html, whose template draws the panels in the page, and by experiments, for which `draw_svg` draws them as
one self-contained SVG.
"""

import math
from collections.abc import Callable, Sequence
from html import escape

import msgspec

from evaluate.document import Estimate, Filtering, LossPoint, ModelReport, Report, Training, exactly, millions, number
from evaluate.figures.promise import QUALITY, TIMES
from evaluate.models import TEACHER

WIDE = 50  # if the ends of a scale are so many times apart, it is logarithmic: else a long bar hides the short ones
ROOM = 1.15  # left at both ends of the three axes
LOGARITHMIC = "; logarithmic scale"

# Title, hint, the field of ModelReport, whether less of it is better, the ratio that is promised.
AXES = (
    ("Quality", "bits per character of test answers, teacher's over the model's", "bits_per_character", True, QUALITY),
    ("Speed", "tokens per second, saturated, the model's over the teacher's", "tokens_per_s", False, TIMES),
    ("Memory", "peak of the whole server, the teacher's over the model's", "peak_rss_mib", True, TIMES),
    ("Weights", "MiB as stored, the teacher's over the model's", "weights_mib", True, TIMES),
)
# Title, hint, the field of ModelReport.
BARS = (
    ("Perplexity", "per token, on the teacher's test answers; lower is better", "perplexity"),
    ("Bits per character", "fair between tokenizers; lower is better", "bits_per_character"),
    ("Speed", "tokens per second on the same engine; higher is better", "tokens_per_s"),
    ("Peak memory", "MiB, the whole server", "peak_rss_mib"),
    ("Alone", "tokens per second, one request in flight; higher is better", "tokens_per_s_alone"),
    ("First token", "seconds, one request in flight; lower is better", "first_token_s"),
    ("Weights", "MiB on disk", "weights_mib"),
    ("KV cache", "bytes per token; lower is better", "kv_bytes_per_token"),
    ("Parameters", "", "parameters"),
)

Scale = Callable[[float], float]


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """One figure on a scale: a bar that ends at `at`, or a dot there. Places are in percent."""

    label: str
    text: str
    at: float
    low: float | None = None  # its interval, if that has a width
    high: float | None = None
    kind: str = ""  # a CSS class: the model's key, other, drop, arm


class Panel(msgspec.Struct, frozen=True, kw_only=True):
    """Marks on one scale."""

    title: str
    hint: str
    marks: list[Mark]
    one: float | None = None  # where the teacher is
    goal: float | None = None  # where the promise is


class LossChart(msgspec.Struct, frozen=True, kw_only=True):
    """SVG path data in a 100 × 100 box, y downwards."""

    train: str
    eval: str
    eval_dots: list[tuple[float, float]]
    x: list[tuple[float, str]]  # labelled places on the axis
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
        return Mark(label=label, text=text, at=at, kind=kind)
    return Mark(label=label, text=text, at=at, low=place(figure.low), high=place(figure.high), kind=kind)


def dot_panel(title: str, hint: str, figures: Sequence[tuple[str, Estimate, str, str]]) -> Panel:
    """Figures (label, estimate, kind, text) on a scale from the lowest end of an interval to the highest."""
    low, high = min(one.low for _, one, _, _ in figures), max(one.high for _, one, _, _ in figures)
    far = low > 0 and high > WIDE * low
    place = scale(low, high, logarithmic=far)
    marks = [mark(label, one, place, kind, text) for label, one, kind, text in figures]
    return Panel(title=title, hint=hint + LOGARITHMIC * far, marks=marks)


def axis_panels(report: Report) -> list[Panel]:
    """Quality, speed and memory of every model as ratios to the teacher's; only axes that two models have.

    More is better, and all panels share one logarithmic scale.
    """
    teacher = next((model for model in report.models if model.key == TEACHER), None)
    found = []
    for title, hint, field, lower, goal in AXES:
        base = _figure(teacher, field) if teacher else None
        ratios = []
        for model in report.models:
            if base and (own := _figure(model, field)):
                ratios.append((model, base.value / own.value if lower else own.value / base.value))
        if len(ratios) > 1:
            found.append((title, hint, goal, ratios))
    ends = [value for *_, goal, ratios in found for value in (goal, 1.0, *(ratio for _, ratio in ratios))]
    if not ends:
        return []
    place = scale(min(ends) / ROOM, max(ends) * ROOM, logarithmic=True)
    return [
        Panel(
            title=title,
            hint=hint,
            marks=[mark(m.label, exactly(ratio), place, _kind(m), f"{number(ratio)}×") for m, ratio in ratios],
            one=place(1),
            goal=place(goal),
        )
        for title, hint, goal, ratios in found
    ]


def bar_panels(report: Report) -> list[Panel]:
    """Every figure that at least two models have, as bars from zero."""
    panels = []
    for title, hint, field in BARS:
        figures = [(model, _figure(model, field)) for model in report.models]
        bars = [(model, figure) for model, figure in figures if figure]
        if len(bars) < 2:  # nothing to compare
            continue
        top, bottom = max(figure.high for _, figure in bars), min(figure.low for _, figure in bars)
        far = field == "perplexity" and top > WIDE * bottom
        place = scale(1, top, logarithmic=True) if far else scale(0, top)
        show = millions if field == "parameters" else number
        marks = [mark(m.label, figure, place, _kind(m), show(figure.value)) for m, figure in bars]
        panels.append(Panel(title=title, hint=f"{hint}{LOGARITHMIC} from 1" if far else hint, marks=marks))
    return panels


def drop_panel(filters: Filtering | None) -> Panel:
    """Dropped answers by the rule that dropped them, most first."""
    drops = sorted((d for d in (filters.rules if filters else ()) if d.dropped), key=lambda d: -d.dropped)
    place = scale(0, max((d.dropped for d in drops), default=0))
    marks = [mark(d.rule, exactly(d.dropped), place, "drop", f"{d.dropped:,}") for d in drops]
    return Panel(title="", hint="", marks=marks)


def _figure(model: ModelReport, field: str) -> Estimate | None:
    """A figure of a model; a plain number is one without a width. None: not measured, or zero."""
    value = getattr(model, field)
    return value if isinstance(value, Estimate) else exactly(value) if value else None


def _kind(model: ModelReport) -> str:
    return "other" if model.key.startswith("other_") else model.key


def loss_chart(training: Training) -> LossChart | None:
    """Training and validation loss over steps; None without at least two points."""
    train, evaluated = ([p for p in points if math.isfinite(p.loss)] for points in (training.loss, training.eval))
    points = [*train, *evaluated]
    if len({point.step for point in points}) < 2:
        return None
    right = max(point.step for point in points)
    y_ticks = _ticks(min(point.loss for point in points), max(point.loss for point in points))
    x, y = scale(0, right), scale(-y_ticks[-1], -y_ticks[0])  # y downwards

    def place(point: LossPoint) -> tuple[float, float]:
        return x(point.step), y(-point.loss)

    return LossChart(
        train=_path([place(point) for point in train]),
        eval=_path([place(point) for point in evaluated]),
        eval_dots=[place(point) for point in evaluated],
        x=[(x(tick), f"{tick:g}") for tick in _ticks(0, right) if tick <= right],
        y=[(y(-tick), f"{tick:g}") for tick in y_ticks],
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


WIDTH, LEFT, RIGHT, LINE, HEAD = 640, 150, 70, 22, 40  # of an SVG, in its own units
COLOURS = {"arm": "#1f7a6d", "other": "#8a8f94"}


def draw_svg(title: str, panels: Sequence[Panel]) -> str:
    """Panels of dots with their intervals, one below the other, as one self-contained SVG; text stays text."""
    height = HEAD + sum(HEAD + LINE * len(panel.marks) for panel in panels)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif"'
    parts = [f'{head} font-size="12">', f'<rect width="{WIDTH}" height="{height}" fill="white"/>']
    parts.append(_text(12, 24, title, 'font-size="14"'))
    top = HEAD
    for panel in panels:
        parts += [
            _text(12, top + 14, panel.title, 'font-weight="bold"'),
            _text(WIDTH - 12, top + 14, panel.hint, 'text-anchor="end" fill="#63676a"'),
        ]
        for number_, one in enumerate(panel.marks):
            parts += _draw_dot(one, top + HEAD - 8 + LINE * number_)
        top += HEAD + LINE * len(panel.marks)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _draw_dot(one: Mark, y: int) -> list[str]:
    low, at, high = (
        f"{LEFT + (WIDTH - LEFT - RIGHT) * (one.at if place is None else place) / 100:.1f}"
        for place in (one.low, one.at, one.high)
    )
    colour = COLOURS[one.kind]
    return [
        _text(LEFT - 12, y + 4, one.label, 'text-anchor="end"'),
        f'<line x1="{low}" x2="{high}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>',
        f'<circle cx="{at}" cy="{y}" r="4" fill="{colour}"/>',
        _text(WIDTH - 12, y + 4, one.text, 'text-anchor="end"'),
    ]


def _text(x: int, y: int, text: str, style: str) -> str:
    return f'<text x="{x}" y="{y}" {style}>{escape(text)}</text>'
