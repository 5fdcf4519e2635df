"""The report as tables in the terminal: answers held out, probes, speed and memory, the promise; 80 characters wide."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from evaluate.document import Claim, Estimate, ModelReport, ProbeFigures, Report, WinRate, number
from evaluate.figures.promise import answer
from evaluate.measure.results import AFTER

NOTHING = "–"
LABEL = 16  # characters of a model's name in a line
HELD_OUT = ("perplexity", "bits/char")
PROBES = ("passing", "named", "loops", "stopped", "dist-2", "length", "judge")
SPEED = ("tokens/s", "alone", "first token", "peak MiB", "weights MiB", "params", "KV bytes")
COLUMNS = (*HELD_OUT, *PROBES, *SPEED)


def print_report(report: Report, console: Console) -> None:
    """A row a model (95% intervals below the figures), the judge's choices, the promise, and the notes."""
    console.print(f"[bold]{report.recipe}[/bold]: {_asked(report)}", highlight=False)
    console.print(_held_out_table(report))
    if report.probes:
        console.print(_probe_table(report))
    for against in dict.fromkeys(difference.against for difference in report.differences):
        console.print(_compared(against, report), highlight=False, markup=False)
    for win in report.wins:
        if win.part == "all":
            console.print(_won(win, report), highlight=False, markup=False)
    console.print(_table(SPEED, [(model.label, speed_cells(model)) for model in report.models]))
    console.print(_promise_table(report.headline.claims))
    console.print(report.headline.text, style="bold", highlight=False, markup=False)
    for note in report.notes:
        console.print(note, style="dim", highlight=False, markup=False)


def cells(model: ModelReport) -> list[str]:
    """One text a column of COLUMNS."""
    probes = model.probes.all if model.probes else None
    return [*_scored(model.perplexity, model.bits_per_character), *probe_cells(probes), *speed_cells(model)]


def probe_cells(probes: ProbeFigures | None) -> list[str]:
    """One text a column of PROBES."""
    given = probes or ProbeFigures(prompts=0)
    return [
        _share(given.passing),
        _share(given.named),
        _share(given.loops),
        _share(given.stopped),
        _share(given.distinct_2),
        _estimate(given.characters, digits=0),
        _estimate(given.judge, digits=1),
    ]


def speed_cells(model: ModelReport) -> list[str]:
    """One text a column of SPEED."""
    speed = NOTHING if model.tokens_per_s is None else _rate(model.tokens_per_s)
    if model.tokens_per_s_range:
        speed += f"\n{_span(*map(_rate, model.tokens_per_s_range))}"
    return [
        speed,
        _estimate(model.tokens_per_s_alone),
        _milliseconds(model.first_token_s),
        _count(model.peak_rss_mib),
        _count(model.weights_mib),
        millions(model.parameters),
        _count(model.kv_bytes_per_token),
    ]


def claim_cells(claim: Claim) -> tuple[str, str, str]:
    """What is promised, what is here, and its interval where that has a width."""
    quality, value = claim.axis == "quality", claim.value
    shown = "{:.1%}" if quality else "{:.2f}×"
    promised = f"{claim.promised:.0%}" if quality else f"{claim.promised:.0f}×"
    here = shown.format(value.value) if value else NOTHING
    width = _span(shown.format(value.low), shown.format(value.high)) if value and value.low < value.high else ""
    return promised, here, width


def millions(parameters: int | None) -> str:
    """134.5M, 1.54B."""
    if parameters is None:
        return NOTHING
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"


def _asked(report: Report) -> str:
    text = f"{report.rows.scored} held-out answers"
    probes = report.probes
    if probes:
        text += f", {probes.seen} new prompts"
        text += f", {probes.unseen} with values never seen" if probes.unseen else ""
    return text


def _held_out_table(report: Report) -> Table:
    """With the teacher's answers to unseen values beside, where there are any."""
    columns: tuple[str, ...] = HELD_OUT
    rows = []
    if report.rows.unseen:
        columns = (*HELD_OUT, *(f"{name} (unseen)" for name in HELD_OUT))
    for model in report.models:
        shown = _scored(model.perplexity, model.bits_per_character)
        if report.rows.unseen:
            shown += _scored(model.unseen_perplexity, model.unseen_bits_per_character)
        rows.append((model.label, shown))
    return _table(columns, rows)


def _probe_table(report: Report) -> Table:
    rows = []
    for model in report.models:
        rows.append((model.label, probe_cells(model.probes.all if model.probes else None)))
        if model.probes and model.probes.unseen and model.probes.seen:
            rows.append(("  unseen", probe_cells(model.probes.unseen)))
    return _table(PROBES, rows)


def _promise_table(claims: list[Claim]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.add_column("the chapter's promise")
    for column in ("promised", "here", "interval", "holds"):
        table.add_column(column, justify="right", no_wrap=True)
    for claim in claims:
        table.add_row(claim.text, *claim_cells(claim), answer(claim))
    return table


def _table(columns: tuple[str, ...], rows: list[tuple[str, list[str]]]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.add_column("", max_width=LABEL)
    for column in columns:
        table.add_column(column.replace(" ", "\n", 1), justify="right", no_wrap=True)
    for label, shown in rows:
        table.add_row(label, *shown)
    return table


def _compared(against: str, report: Report) -> str:
    """In which figures the trained student is better than another model, in which worse, over all prompts."""
    found: dict[bool | None, list[str]] = {True: [], False: [], None: []}
    for difference in report.differences:
        if difference.against == against and difference.part in ("held_out", "all") and difference.better:
            found[difference.improved].append(difference.figure)
    words = {True: "better in", False: "worse in", None: "may be chance:"}
    said = "; ".join(f"{words[key]} {', '.join(names)}" for key, names in found.items() if names)
    return f"{_label(AFTER, report)} against {_label(against, report)}: {said}"


def _won(win: WinRate, report: Report) -> str:
    rate = f"{win.rate.value:.0%} ({_span(f'{win.rate.low:.0%}', f'{win.rate.high:.0%}')})" if win.rate else NOTHING
    text = (
        f"judge, {_label(win.model, report)} against {_label(win.against, report)}: {rate}; {win.wins} won, "
        f"{win.ties} tied, {win.losses} lost"
    )
    if win.first_chosen is not None:
        text += f"; chose the first {win.first_chosen:.0%}, order decided {win.flipped}"
    return text + (f"; {win.unjudged} unread" if win.unjudged else "")


def _label(key: str, report: Report) -> str:
    return next((model.label for model in report.models if model.key == key), key)


def _scored(perplexity: Estimate | None, bits: Estimate | None) -> list[str]:
    return [_estimate(perplexity), _estimate(bits, digits=3)]


def _estimate(estimate: Estimate | None, digits: int | None = None) -> str:
    if estimate is None:
        return NOTHING
    shown = [number(v) if digits is None else f"{v:.{digits}f}" for v in (estimate.value, estimate.low, estimate.high)]
    return f"{shown[0]}\n{_span(*shown[1:])}"


def _share(estimate: Estimate | None) -> str:
    if estimate is None:
        return NOTHING
    low, high = f"{100 * estimate.low:.0f}", f"{100 * estimate.high:.0f}"
    return f"{estimate.value:.0%}\n{low if low == high else _span(low, high)}"


def _rate(value: float) -> str:
    return number(value) if value < 100 else f"{value:,.0f}"


def _milliseconds(estimate: Estimate | None) -> str:
    if estimate is None:
        return NOTHING
    low, high = f"{1000 * estimate.low:,.0f}", f"{1000 * estimate.high:,.0f}"
    return f"{1000 * estimate.value:,.0f} ms\n{_span(low, high)}"


def _span(low: str, high: str) -> str:
    return f"{low}–{high}"


def _count(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.0f}"
