"""The figures of a report as tables of text: printed on the terminal here, drawn in the page by `html`."""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable

from evaluate.document import ENGINE, MEASURES, PROBES, SCORES, ModelReport, Part, Report, WinRate, percent
from evaluate.figures.promise import shown

NOTHING = "–"
NAME_WIDTH, FIGURE_WIDTH = 28, 13  # characters at most, on the terminal
MODELS_ACROSS = 4  # side by side on the terminal; more are printed below

Mark = Literal["pass", "warn", "fail", "unknown", "better", "worse", ""]
MARKS: dict[str, Mark] = {"yes": "pass", "no": "fail", "not shown": "warn", "not measured": "unknown"}
VERDICTS: dict[bool | None, tuple[str, Mark]] = {
    True: ("the promise holds", "pass"),
    False: ("the promise does not hold", "fail"),
    None: ("not all of it is measured", "unknown"),
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
    """Figures by model."""

    title: str
    models: Sequence[ModelReport]
    rows: list[Row]


class Promise(NamedTuple):
    """One part of the promise."""

    text: str
    promised: str
    here: str
    interval: str
    answer: str
    mark: Mark


class Win(NamedTuple):
    """The judge's choices between two models: in words, and in percent of the pairs."""

    title: str
    counts: str
    won: float
    tied: float
    lost: float


def measured(report: Report) -> list[Table]:
    """Perplexity, then speed and memory of every model; a figure that no model has is left out."""
    scores: list[tuple[str, Part, str]] = [("", "test", name) for name in SCORES]
    scores += [("unseen ", "unseen", name) for name in SCORES]
    tables = (
        _table(report, report.models, "test answers", scores),
        _table(report, report.models, "speed and memory", [("", "engine", name) for name in ENGINE]),
    )
    return [table for table in tables if table.rows]


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
    rules = sorted({rule for model in models for rule in model.failed_rules})
    rules.sort(key=lambda rule: -max(model.failed_rules.get(rule, 0) for model in models))
    broken = [Row(rule, [[Line(percent(model.failed_rules.get(rule, 0)))] for model in models]) for rule in rules]
    tables.append(Table("answers that break", models, broken))
    return [table for table in tables if table.rows]


def _table(
    report: Report, models: Sequence[ModelReport], title: str, figures: Iterable[tuple[str, Part, str]]
) -> Table:
    """The figures (what stands before its name, part, name) that any of the models has."""
    rows = [
        Row(before + MEASURES[name].name, [_cell(report, model, part, name) for model in models])
        for before, part, name in figures
        if any(model.figure(part, name) for model in models)
    ]
    return Table(title, models, rows)


def _cell(report: Report, model: ModelReport, part: Part, name: str) -> list[Line]:
    """A figure, its interval, and in words how it differs significantly from other models'."""
    figure, show = model.figure(part, name), MEASURES[name].show
    if figure is None:
        return [Line(NOTHING)]
    counted = figure.low == figure.high and name in ENGINE
    lines = [Line(show(figure.value))] + ([] if counted else [Line(figure.interval(show))])
    for d in report.differences:
        if (d.model, d.figure, d.part) == (model.key, name, part) and d.improved is not None:
            word: Mark = "better" if d.improved else "worse"
            lines.append(Line(f"{word} than {label_of(report, d.against).removeprefix('student ')}", word))
    return lines


def label_of(report: Report, key: str) -> str:
    """A model's name for people."""
    return next((model.label for model in report.models if model.key == key), key)


def promise(report: Report) -> list[Promise]:
    """Every part of the promise."""
    return [
        Promise(
            text=claim.text,
            promised=f"{claim.promised:.0%}" if claim.axis == "quality" else f"{claim.promised:.0f}×",
            here=shown(claim)(claim.value.value) if claim.value else NOTHING,
            interval=claim.value.interval(shown(claim)) if claim.value and claim.value.low < claim.value.high else "",
            answer=claim.verdict,
            mark=MARKS[claim.verdict],
        )
        for claim in report.headline.claims
    ]


def wins(report: Report) -> list[Win]:
    """The judge's choices over all probes."""
    return [_win(win, report) for win in report.wins if win.part == "all" and win.pairs]


def _win(win: WinRate, report: Report) -> Win:
    rate = f": {win.rate.told(percent)}" if win.rate else ""
    counts = f"{win.wins} won, {win.ties} tied, {win.losses} lost; in {win.flipped} the order alone decided"
    if win.first_chosen is not None:
        counts += f"; the answer shown first was chosen in {percent(win.first_chosen)}"
    counts += f"; verdicts that could not be read: {win.unjudged}" if win.unjudged else ""
    shares = [round(100 * count / win.pairs, 2) for count in (win.wins, win.ties, win.losses)]
    return Win(f"{label_of(report, win.model)} against {label_of(report, win.against)}{rate}", counts, *shares)


def print_report(report: Report, console: Console) -> None:
    """The tables (below each figure its 95% interval), the judge's choices, the promise, and the notes."""
    asked = f"{report.rows.scored} test answers"
    if report.probes:
        asked += f", {report.probes.seen} new prompts"
        asked += f", {report.probes.unseen} with values never seen" if report.probes.unseen else ""
    console.print(f"[bold]{report.recipe}[/bold]: {asked}", highlight=False)
    for table in (*measured(report), *probes(report)):
        for start in range(0, len(table.models), MODELS_ACROSS):
            console.print(_rich_table(table, slice(start, start + MODELS_ACROSS)))
    for win in wins(report):
        console.print(f"judge, {win.title}; {win.counts}", highlight=False, markup=False)
    parts = _bare_table("the promise", "promised", "here", "interval", "holds")
    for part in promise(report):
        parts.add_row(*part[:5])
    console.print(parts)
    console.print(report.headline.text, style="bold", highlight=False, markup=False)
    for note in report.notes:
        console.print(note, style="dim", highlight=False, markup=False)


def _rich_table(table: Table, models: slice) -> RichTable:
    found = _bare_table(table.title, *(model.label for model in table.models[models]))
    for row in table.rows:
        found.add_row(row.name, *("\n".join(line.text for line in cell) for cell in row.cells[models]))
    return found


def _bare_table(title: str, *columns: str) -> RichTable:
    table = RichTable(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.add_column(title, max_width=NAME_WIDTH)
    for column in columns:
        table.add_column(column, justify="right", max_width=FIGURE_WIDTH)
    return table
