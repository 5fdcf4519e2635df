"""The figures of a report as tables of text: printed on the terminal here, drawn in the page by `html`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from evaluate.document import (
    ENGINE,
    MEASURES,
    PROBES,
    SCORES,
    Estimate,
    ModelReport,
    Report,
    Scope,
    WinRate,
    number,
    percent,
)
from evaluate.figures.promise import ratio_format
from generate.progress import NodeCounts, clock
from pipeline.cli import printable
from pipeline.students import AFTER

NOTHING = "–"
NAME_WIDTH, FIGURE_WIDTH = 28, 13  # characters at most, on the terminal
REASONS = 12  # shown of those for which answers are wrong
MODELS_ACROSS = 4  # side by side on the terminal; more are printed below

Mark = Literal["pass", "warn", "fail", "unknown", "better", "worse", ""]
MARKS: dict[str, Mark] = {"yes": "pass", "no": "fail", "not shown": "warn", "not measured": "unknown"}
VERDICTS: dict[bool | None, tuple[str, Mark]] = {
    True: ("the promise holds", "pass"),
    False: ("the promise does not hold", "fail"),
    None: ("the promise is not shown", "warn"),
}


class Line(NamedTuple):
    """A line of a cell: a figure, its interval, or a remark on it."""

    text: str
    mark: Mark = ""


class Row(NamedTuple):
    """One figure of every model."""

    name: str
    cells: list[list[Line]]


class Table(NamedTuple):
    """Figures under heads: models, with their references where the page shows these."""

    title: str
    heads: list[str]
    rows: list[Row]
    references: Sequence[str] = ()


def verified(report: Report) -> list[Table]:
    """How often the models are right: in all, by category, and why they are wrong."""
    found = report.accuracy
    if not found:
        return []
    models = [model for model in [*report.models, *filter(None, [found.told])] if "verified" in model.figures]
    labels, keys = [model.label for model in models], [model.key for model in models]
    figures: list[tuple[str, Scope, str]] = [("", "verified", "accuracy"), ("unseen, ", "verified_unseen", "accuracy")]
    table = _table(report, models, f"{found.prompts.get('verified', 0)} test prompts", figures)
    names = {"verified": "over the teacher's", "verified_unseen": "unseen, over the teacher's"}
    share = MEASURES["accuracy"].show
    for part, ratio in found.over_teacher.items():
        table.rows.append(Row(names[part], [_lines(ratio, share) if key == AFTER else [Line("")] for key in keys]))
    categories = [Row(name, [_lines(own[key], share) for key in keys]) for name, own in found.categories.items()]
    tables = (
        table,
        Table("right, by category", labels, categories),
        Table("wrong", labels, _shares([found.wrong[key] for key in keys])[:REASONS]),
    )
    return [table for table in tables if table.rows]


def measured(report: Report) -> list[Table]:
    """Perplexity, speed and memory, and other tasks of every model; a figure that no model has is left out."""
    scores: list[tuple[str, Scope, str]] = [("", "test", name) for name in SCORES]
    scores += [("unseen ", "unseen", name) for name in SCORES]
    tables = (
        _table(report, report.models, "test answers", scores),
        _table(report, report.models, "speed and memory", [("", "engine", name) for name in ENGINE]),
    )
    references = [model.reference for model in report.models]
    found = [table._replace(references=references) for table in tables if table.rows]
    models = [model for model in report.models if any(model.key in own for own in report.tasks.values())]
    nothing = [Line(NOTHING)]
    rows = [
        Row(name, [_lines(own[m.key], number, counted=True) if m.key in own else nothing for m in models])
        for name, own in report.tasks.items()
    ]
    return found + ([Table("other tasks, by lm-eval", [model.label for model in models], rows)] if rows else [])


def probes(report: Report) -> list[Table]:
    """The answers to the probes: to all of them, to those with unseen values, and which rules they break."""
    models, asked = [model for model in report.models if "all" in model.figures], report.probes
    if not models or not asked:
        return []
    tables = [_table(report, models, f"{asked.seen + asked.unseen} prompts", [("", "all", name) for name in PROBES])]
    if asked.unseen and asked.seen:
        values = ", ".join(value for values in asked.unseen_values.values() for value in values)
        title = f"{asked.unseen} prompts with values unseen: {values}"
        tables.append(_table(report, models, title, [("", "unseen", name) for name in PROBES]))
    broken = _shares([model.failed_rules for model in models])
    tables.append(Table("answers that break", [model.label for model in models], broken))
    return [table for table in tables if table.rows]


def _shares(shares: Sequence[Mapping[str, float]]) -> list[Row]:
    """Shares by name, one mapping for each model; what is most frequent in any comes first."""
    names = sorted({name for own in shares for name in own})
    names.sort(key=lambda name: -max(own.get(name, 0) for own in shares))
    return [Row(name, [[Line(percent(own.get(name, 0)))] for own in shares]) for name in names]


def _table(
    report: Report, models: Sequence[ModelReport], title: str, figures: Iterable[tuple[str, Scope, str]]
) -> Table:
    """The figures (what stands before its name, part, name) that any of the models has."""
    rows = [
        Row(before + MEASURES[name].name, [_cell(report, model, part, name) for model in models])
        for before, part, name in figures
        if any(model.figure(part, name) for model in models)
    ]
    return Table(title, [model.label for model in models], rows)


def _cell(report: Report, model: ModelReport, part: Scope, name: str) -> list[Line]:
    """A figure, its interval, and in words how it differs significantly from other models'."""
    figure, show = model.figure(part, name), MEASURES[name].show
    if figure is None:
        return [Line(NOTHING)]
    lines = _lines(figure, show, counted=name in ENGINE)
    for d in report.differences:
        if (d.model, d.figure, d.part) == (model.key, name, part) and d.improved is not None:
            word: Mark = "better" if d.improved else "worse"
            lines.append(Line(f"{word} than {label_of(report, d.against).removeprefix('student ')}", word))
    return lines


def _lines(figure: Estimate, show: Callable[[float], str], *, counted: bool = False) -> list[Line]:
    """A figure and its interval. One without width is left out of a figure that was counted, or came alone."""
    told = not counted or figure.low < figure.high
    return [Line(show(figure.value)), *([Line(figure.interval(show))] if told else [])]


def label_of(report: Report, key: str) -> str:
    """A model's name for people."""
    return next((model.label for model in report.models if model.key == key), key)


def promise(report: Report) -> Table:
    """Every part of the promise: what is promised, what is here, and the verdict."""
    rows = []
    for claim in report.headline.claims:
        promised = f"{claim.promised:.0%}" if claim.axis == "quality" else f"{claim.promised:.0f}×"
        here = _lines(claim.value, ratio_format(claim), counted=True) if claim.value else [Line(NOTHING)]
        verdict = [Line(claim.verdict, MARKS[claim.verdict]), *([Line(claim.why)] if claim.why else [])]
        rows.append(Row(claim.text, [[Line(promised)], here, verdict]))
    return Table("the promise", ["promised", "here", "holds"], rows)


def nodes(report: Report) -> Table | None:
    """What each node has done, if a cluster generated the answers."""
    counted = msgspec.convert(report.lineage.get("generate", {}).get("nodes", {}), dict[str, NodeCounts])
    rows = []
    for name, own in sorted(counted.items()):
        seconds = max(own.active_s, 1e-9)
        rates = (f"{value / seconds:,.1f}" for value in (own.answered, own.completion_tokens))
        totals = (f"{value:,}" for value in (own.answered, own.completion_tokens))
        again = (f"{value:,}" for value in (own.retried, own.asked_again))
        rows.append(Row(name, [[Line(text)] for text in (*totals, clock(own.active_s), *rates, *again)]))
    heads = ["answers", "tokens", "active", "answers/s", "tokens/s", "retried", "asked again"]
    return Table("node", heads, rows) if rows else None


def wins(report: Report) -> list[tuple[WinRate, str, str]]:
    """The judge's choices over all probes: a title, and the counts in words."""
    return [(win, *_told(win, report)) for win in report.wins if win.part == "all" and win.pairs]


def _told(win: WinRate, report: Report) -> tuple[str, str]:
    rate = f": {win.rate.told(percent)}" if win.rate else ""
    counts = f"{win.wins} won, {win.ties} tied, {win.losses} lost; in {win.flipped} the order alone decided"
    if win.first_chosen is not None:
        counts += f"; the answer shown first was chosen in {percent(win.first_chosen)}"
    counts += f"; pairs without both verdicts: {win.unjudged}" if win.unjudged else ""
    return f"{label_of(report, win.model)} against {label_of(report, win.against)}{rate}", counts


def print_report(report: Report, console: Console) -> None:
    """The tables (below each figure its 95% interval), the judge's choices, the promise, and the notes."""
    asked = f"{report.accuracy.prompts.get('verified', 0)} test prompts verified, " if report.accuracy else ""
    asked += f"{report.rows.scored} test answers"
    asked += f", {report.probes.described}" if report.probes else ""
    console.print(Text.assemble((report.recipe, "bold"), f": {asked}"))
    for table in (*verified(report), *measured(report), *probes(report)):
        _print_table(table, console)
    for _, title, counts in wins(report):
        console.print(f"judge, {title}; {counts}", highlight=False, markup=False)
    _print_table(promise(report), console)
    console.print(report.headline.text, style="bold", highlight=False, markup=False)
    for note in report.notes:
        console.print(note, style="dim", highlight=False, markup=False)


def _print_table(table: Table, console: Console) -> None:
    for start in range(0, len(table.heads), MODELS_ACROSS):
        shown_here = slice(start, start + MODELS_ACROSS)
        rich = RichTable(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
        rich.add_column(Text(table.title), max_width=NAME_WIDTH)
        for head in table.heads[shown_here]:
            rich.add_column(Text(head), justify="right", max_width=FIGURE_WIDTH)
        for row in table.rows:
            cells = ("\n".join(line.text for line in cell) for cell in row.cells[shown_here])
            short = (Text(cell.replace("better than", "▲").replace("worse than", "▼")) for cell in cells)
            rich.add_row(Text(printable(row.name)), *short)  # a category is a value of the user's data
        console.print(rich)
