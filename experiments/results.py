"""What the arms of an experiment became, side by side: a table, a plot, and the differences that are there.

Reads each arm's report.json and the scores and answers under its evaluation/; writes results.md and results.svg. All
arms are scored on the same rows and answer the same probes, so their differences are paired: both on the same resamples
of the prompts. A difference is named only where its 95% interval does not hold zero.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from evaluate.document import Estimate, ModelReport, Report, number, read_report
from evaluate.figures.differences import BETTER
from evaluate.figures.quality import measure_quality, probe_answers
from evaluate.measure.perplexity import bootstrap
from evaluate.measure.probes import choose_probes
from evaluate.measure.results import AFTER, JudgeResult, PerplexityResult, ProbeResult, read_held_out
from evaluate.statistics import Figure
from experiments.arms import EXPERIMENTS, Arm, Prepared, Setup
from experiments.plot import Dot, Panel, dot_chart
from filters.run import recipe_rules
from pipeline.errors import DataError
from pipeline.lineage import read_lineage
from pipeline.rundir import replacing

PROBES = {"passing": "pass the rules", "adherence": "adherence", "loops": "loops", "judge": "judge"}
HELD_OUT = {"perplexity": "perplexity", "bits_per_character": "bits/char"}
UNSURE = (
    "95% bootstrap intervals over prompts, of one training each: what another seed would give is not in them. "
    "{count} pairs of figures were compared, so one in twenty of those without a difference may show one."
)

Saved = TypeVar("Saved", PerplexityResult, ProbeResult, JudgeResult)


@dataclass(frozen=True)
class Column:
    """One figure of every arm that has it."""

    title: str
    better: str | None  # higher, lower, or neither
    arms: Mapping[str, Figure]  # on the same resamples
    others: Mapping[str, Estimate]  # models that are no arm: teacher, student before


@dataclass(frozen=True)
class Difference:
    """Between two arms, in one figure."""

    title: str
    arm: str
    against: str
    change: Estimate
    better: str | None

    @property
    def shown(self) -> bool:
        """Whether the interval leaves zero out."""
        return not self.change.low <= 0 <= self.change.high

    def told(self) -> str:
        value, low, high = (f"{v:+.3g}" for v in (self.change.value, self.change.low, self.change.high))
        words = {None: "differs from", True: "is better than", False: "is worse than"}
        verdict = None if self.better is None else (self.change.value > 0) == (self.better == "higher")
        return f"{self.arm} {words[verdict]} {self.against} in {self.title}: {value} ({low} to {high})"


@dataclass(frozen=True)
class Results:
    """All that is shown of an experiment."""

    name: str
    question: str
    note: str
    arms: dict[str, list[str]]  # name: its plain cells, under `facts`
    facts: list[str]
    columns: list[Column]
    differences: list[Difference]
    remarks: list[str]


def compare(setup: Setup, prepared: Prepared) -> Results:
    """Puts the arms side by side. Raises DataError where an arm has no report."""
    reports = {arm.name: _report(arm) for arm in prepared.arms}
    others = _others(reports)
    columns = [*_held_out(prepared, others), *_probes(setup, prepared, reports, others)]
    differences = [
        Difference(column.title, one, other, column.arms[one].minus(column.arms[other]), column.better)
        for column in columns
        for other, one in combinations(column.arms, 2)
    ]
    facts, cells = _facts(prepared.arms, reports)
    spent = {arm.name: (read_lineage(arm.run).get("generate") or {}).get("spent") or {} for arm in prepared.arms}
    return Results(
        name=setup.options.kind,
        question=EXPERIMENTS[setup.options.kind].question,
        note=prepared.note,
        arms=cells,
        facts=facts,
        columns=columns,
        differences=differences,
        remarks=list(_money(spent, differences)) if setup.options.kind == "teachers" else [],
    )


def _report(arm: Arm) -> Report:
    report = read_report(arm.run)
    if report is None:
        raise DataError(f"{arm.run.report}: no report of this version; remove {arm.run.path / 'finished'}, run again")
    return report


def _others(reports: Mapping[str, Report]) -> dict[str, ModelReport]:
    """The models that are no arm, each once, under its name: two teachers are two."""
    found: dict[str, ModelReport] = {}
    for arm, report in reports.items():
        for model in report.models:
            if model.key in ("teacher", "student_before"):
                same = next((m for m in found.values() if (m.key, m.reference) == (model.key, model.reference)), None)
                if same is None:
                    found[model.label if model.label not in found else f"{model.label} ({arm})"] = model
    return found


def _held_out(prepared: Prepared, others: Mapping[str, ModelReport]) -> Iterator[Column]:
    """Perplexity of the held-out rows; bits a character also for the rows of each source."""
    saved = {arm.name: _saved(arm, "perplexity", PerplexityResult) for arm in prepared.arms}
    scored = {name: result.scores for name, result in saved.items() if result}
    common = set.intersection(*({score.id for score in scores} for scores in scored.values())) if scored else set()
    figures = _scores(scored, common)
    for place, (field, title) in enumerate(HELD_OUT.items()):
        known = {name: getattr(model, field) for name, model in others.items() if getattr(model, field)}
        yield Column(title, "lower", {name: pair[place] for name, pair in figures.items()}, known)
    for source, rows in prepared.sources.items() if len(prepared.sources) > 1 else ():
        own = _scores(scored, common & {row.id for row in rows})
        yield Column(f"bits/char of {source}", "lower", {name: pair[1] for name, pair in own.items()}, {})


def _scores(scored: Mapping[str, Sequence[Any]], ids: set[str]) -> dict[str, tuple[Figure, Figure]]:
    if not ids:
        return {}
    chosen = [[score for score in scores if score.id in ids] for scores in scored.values()]
    return dict(zip(scored, bootstrap(chosen), strict=True))


def _probes(
    setup: Setup, prepared: Prepared, reports: Mapping[str, Report], others: Mapping[str, ModelReport]
) -> Iterator[Column]:
    """What the recipe's rules say of the arms' answers to the same prompts."""
    arms = [arm for arm in prepared.arms if any(m.key == AFTER and m.probes for m in reports[arm.name].models)]
    probed = {arm.name: result for arm in arms if (result := _saved(arm, "probes", ProbeResult))}
    if not probed:
        return
    prompts = choose_probes(setup.recipe, arms[0].run, read_held_out(arms[0].run))
    answers = probe_answers(prompts, probed)
    judged = [(arm.name, _saved(arm, "judged", JudgeResult, whole=True)) for arm in arms]
    scores = {name: result.scores.get(AFTER, {}) for name, result in judged if result}
    quality = measure_quality(
        setup.recipe, recipe_rules(setup.recipe, setup.path), prompts, answers, _as_judged(scores) if scores else None
    )
    for field, title in PROBES.items():
        part = quality.parts.get("all")
        own = {name: figures[field] for name, figures in part.figures.items() if field in figures} if part else {}
        known = {
            name: estimate
            for name, model in others.items()
            if model.probes and (estimate := getattr(model.probes.all, field))
        }
        if own:
            yield Column(title, BETTER[field], own, known)


def _as_judged(scores: dict[str, dict[str, int]]) -> JudgeResult:
    return JudgeResult(fingerprint="", model="", is_teacher=False, scores=scores, pairs=[])


def _saved(arm: Arm, name: str, kind: type[Saved], *, whole: bool = False) -> Saved | None:
    """A measurement of the arm's student, or of all models; its report says that it is of this very student."""
    path = arm.run.path / "evaluation" / (f"{name}.json" if whole else f"{name}-{AFTER}.json")
    return msgspec.json.decode(path.read_bytes(), type=kind) if path.is_file() else None


def _facts(arms: Sequence[Arm], reports: Mapping[str, Report]) -> tuple[list[str], dict[str, list[str]]]:
    """Plain figures: how many rows, at what keep rate, how many steps, what the answers cost."""
    cells = {}
    for arm in arms:
        lineage, training = read_lineage(arm.run), reports[arm.name].training
        rate = (lineage.get("filters") or {}).get("keep_rate")
        usd = ((lineage.get("generate") or {}).get("spent") or {}).get("usd")
        cells[arm.name] = [
            f"{training.train_rows:,}" if training.train_rows else "–",
            f"{training.loss[-1].step:,.0f}" if training.loss else "–",
            "–" if rate is None else f"{rate:.0%}",
            "–" if usd is None else f"{usd:.2f}",
        ]
    return ["rows", "steps", "keep rate", "USD"], cells


def _money(spent: Mapping[str, Mapping[str, Any]], differences: Sequence[Difference]) -> Iterator[str]:
    """The quality that the second teacher brought, for the money it took more than the first."""
    one, other = spent
    usd = {name: section.get("usd") for name, section in spent.items()}
    for name, price in usd.items():
        tokens = spent[name].get("tokens")
        said = "no price is known (teacher.price)" if price is None else f"{price:.2f} USD"
        yield f"{name}: {said}, {tokens:,} tokens" if tokens is not None else f"{name}: {said}"
    more = (usd[other] or 0.0) - (usd[one] or 0.0)
    for difference in differences:
        if difference.shown and difference.better and more > 0:
            gained = difference.change.value * (1 if difference.better == "higher" else -1)
            yield f"{difference.title}: {gained / more:+.3g} for each USD that {other} cost more than {one}"
        elif difference.better and more > 0:
            yield f"{difference.title}: {more:.2f} USD more bought no difference that is there for sure"


def rows_of(results: Results) -> tuple[list[str], list[list[str]]]:
    """The table: heads, and a row for each arm and each other model."""
    facts = [n for n in range(len(results.facts)) if any(cells[n] != "–" for cells in results.arms.values())]
    heads = ["", *(results.facts[n] for n in facts), *(column.title for column in results.columns)]
    rows = [
        [name, *(cells[n] for n in facts), *(_cell(column.arms.get(name)) for column in results.columns)]
        for name, cells in results.arms.items()
    ]
    names = dict.fromkeys(name for column in results.columns for name in column.others)
    for name in names:
        others = [column.others.get(name) for column in results.columns]
        rows.append([name, *("" for _ in facts), *map(_cell, others)])
    return heads, rows


def _cell(figure: Figure | Estimate | None) -> str:
    if figure is None:
        return "–"
    estimate = figure.estimate() if isinstance(figure, Figure) else figure
    return f"{_short(estimate.value)} ({_short(estimate.low)}–{_short(estimate.high)})"


def _short(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 2 else number(value)


def said(results: Results) -> list[str]:
    """The differences in words, the remarks, and what none of it says."""
    shown = [difference.told() for difference in results.differences if difference.shown]
    quiet = len(results.differences) - len(shown)
    lines = shown or (["No difference between the arms is there for sure."] if results.differences else [])
    if shown and quiet:
        lines = [*lines, f"{quiet} further pairs of figures show no difference."]
    return [*lines, *results.remarks, results.note, UNSURE.format(count=len(results.differences))]


def print_results(results: Results, console: Console) -> None:
    """The table on the terminal, and what it says."""
    heads, rows = rows_of(results)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    for place, head in enumerate(heads):
        table.add_column(head.replace(" ", "\n"), justify="left" if not place else "right")
    for row in rows:
        table.add_row(*(cell.replace(" (", "\n(") for cell in row))
    console.print(table)
    for line in said(results):
        console.print(f"- {line}", highlight=False, markup=False)


def write_results(results: Results, folder: Path) -> None:
    """results.md with the plot beside it."""
    heads, rows = rows_of(results)
    lines = [f"# {results.name}: {results.question}", ""]
    lines += [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    lines += ["", *(f"- {line}" for line in said(results)), "", "![](results.svg)", ""]
    with replacing(folder / "results.md") as file:
        file.write("\n".join(lines).encode())
    with replacing(folder / "results.svg") as file:
        file.write(dot_chart(f"{results.name}: {results.question}", list(_panels(results))).encode())


def _panels(results: Results) -> Iterator[Panel]:
    for column in results.columns:
        dots = [_dot(name, figure.estimate(), arm=True) for name, figure in column.arms.items()]
        dots += [_dot(name, estimate, arm=False) for name, estimate in column.others.items()]
        hint = {"higher": "higher is better", "lower": "lower is better"}.get(column.better or "", "")
        if dots:
            yield Panel(column.title, hint, dots)


def _dot(name: str, estimate: Estimate, *, arm: bool) -> Dot:
    return Dot(name, estimate.value, estimate.low, estimate.high, _short(estimate.value), arm)
