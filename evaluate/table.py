"""The report as a table in the terminal."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from evaluate.report import Estimate, ModelReport, Report, number

NOTHING = "–"
COLUMNS = ("perplexity", "bits/char", "tokens/s", "peak MiB", "weights MiB", "params")


def print_report(report: Report, console: Console) -> None:
    """The headline, a row a model (95% intervals below the figures), and the notes."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.add_column("", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column.replace(" ", "\n"), justify="right", no_wrap=True)  # 80 characters hold it all
    for model in report.models:
        table.add_row(model.label, *cells(model))
    console.print(f"[bold]{report.recipe}[/bold]: {report.rows.scored} held-out answers", highlight=False)
    console.print(table)
    console.print(report.headline.text, style="bold", highlight=False, markup=False)
    for note in report.notes:
        console.print(note, style="dim", highlight=False, markup=False)


def cells(model: ModelReport) -> list[str]:
    """One text a column."""
    return [
        _estimate(model.perplexity),
        _estimate(model.bits_per_character, digits=3),
        NOTHING if model.tokens_per_s is None else number(model.tokens_per_s),
        _count(model.peak_rss_mib),
        _count(model.weights_mib),
        millions(model.parameters),
    ]


def millions(parameters: int | None) -> str:
    """134.5M, 1.54B."""
    if parameters is None:
        return NOTHING
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"


def _estimate(estimate: Estimate | None, digits: int | None = None) -> str:
    if estimate is None:
        return NOTHING
    shown = [number(v) if digits is None else f"{v:.{digits}f}" for v in (estimate.value, estimate.low, estimate.high)]
    return f"{shown[0]}\n{shown[1]}–{shown[2]}"


def _count(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.0f}"
