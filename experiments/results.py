"""What the arms of an experiment became, side by side: a table, a plot, and the significant differences.

Reads each arm's report.json and the scores and answers under its evaluation/; writes results.md and results.svg. All
arms are scored on the same rows and answer the same probes, so their differences are paired: both on the same resamples
of the prompts. A difference is named only if its 95% interval excludes zero, over PROMPTS_TO_DIFFER prompts or more.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from evaluate.document import MEASURES, Difference, Estimate, Measure, ModelReport, Report, Scope, read_report
from evaluate.figures.accuracy import accuracy_figures, verify, verify_rules
from evaluate.figures.quality import (
    FEW,
    PROMPTS_TO_DIFFER,
    common_rows,
    difference,
    groups_of,
    measure_quality,
    perplexity_figures,
    probe_answers,
    probe_rules,
)
from evaluate.figures.statistics import Figure, Figures, merged
from evaluate.measure.probes import choose_probes, choose_questions
from evaluate.measure.results import FOLDER, JudgeResult, PerplexityResult, ProbeResult, Result, read_result, read_test
from evaluate.report.charts import dot_panel
from evaluate.report.html import draw_svg
from experiments.arms import EXPERIMENTS
from experiments.runs import Arm, Design, Setup
from pipeline.errors import DataError
from pipeline.lineage import spent_on_answers
from pipeline.rundir import write_file
from pipeline.students import AFTER, BEFORE, TEACHER

COMPARED: dict[Scope, tuple[str, ...]] = {  # the figures that arms are compared in
    "verified": ("accuracy",),
    "test": ("perplexity", "bits_per_character"),
    "all": ("passing", "adherence", "loops", "judge"),
}
FACTS = ("rows", "steps", "keep rate", "USD")
CAUTION = (
    "95% intervals over prompts (bootstrap; Wilson's for shares), of one training each: what another seed would "
    "give is not in them. {count} pairs of figures were compared, so one in twenty of those without a difference may "
    "show one."
)


@dataclass(frozen=True)
class Column:
    """One figure of every arm that has it."""

    title: str
    measure: Measure
    arms: Mapping[str, Figure]  # on the same resamples
    others: Mapping[str, Estimate]  # models that are no arm: teacher, student before

    @property
    def prompts(self) -> float:
        """Over how many prompts it is, for the arm that has the fewest."""
        return min(figure.prompts for figure in self.arms.values())


@dataclass(frozen=True)
class Comparison:
    """All that is shown of an experiment."""

    name: str
    question: str
    note: str
    facts: dict[str, list[str]]  # arm: one text for each of FACTS
    columns: list[Column]
    differences: list[Difference]
    remarks: list[str]


def compare(setup: Setup, design: Design) -> Comparison:
    """Puts the arms side by side. Raises DataError if an arm has no report."""
    reports = {arm.name: _report(arm) for arm in design.arms}
    columns = _columns(setup, design, reports)
    differences = list(_differences(columns))
    spent = {name: spent_on_answers(report.lineage.get("generate") or {}) for name, report in reports.items()}
    kind, remarks = setup.options.kind, list(_few(columns))
    if kind == "seeds":
        remarks += _spread(columns)
    elif kind == "teachers":
        remarks += _money(spent, differences)
    return Comparison(
        name=kind,
        question=EXPERIMENTS[kind].question,
        note=design.note,
        facts={name: _facts(report, spent[name].get("usd")) for name, report in reports.items()},
        columns=columns,
        differences=differences,
        remarks=remarks,
    )


def _differences(columns: Sequence[Column]) -> Iterator[Difference]:
    """Each pair of arms in each figure."""
    for column in columns:
        for other, one in combinations(column.arms, 2):
            figures = (column.arms[one], column.arms[other])
            yield difference(column.title, one, other, *figures, column.measure.better, "test")


def _few(columns: Sequence[Column]) -> Iterator[str]:
    for column in columns:
        if column.prompts < PROMPTS_TO_DIFFER:
            yield f"{column.title}: over {FEW} no difference is named"


def _report(arm: Arm) -> Report:
    report = read_report(arm.run)
    if report is None:
        raise DataError(f"{arm.run.report}: no report of this version; run the same command again")
    return report


def _other_models(reports: Mapping[str, Report]) -> dict[str, ModelReport]:
    """The models that are no arm, each once, under its name: two teachers are two."""
    found: dict[str, ModelReport] = {}
    known: set[tuple[str, str]] = set()
    for arm, report in reports.items():
        for model in report.models:
            if model.key in (TEACHER, BEFORE) and (model.key, model.reference) not in known:
                known.add((model.key, model.reference))
                found[model.label if model.label not in found else f"{model.label} ({arm})"] = model
    return found


def _columns(setup: Setup, design: Design, reports: Mapping[str, Report]) -> list[Column]:
    """Perplexity and the figures of the probes; bits per character also for the test rows of each source.

    An arm's figure is shown if its report has it: what is cached may be of an earlier student.
    """
    scored = _cached(design.arms, f"perplexity-{AFTER}", PerplexityResult)
    scores = common_rows(scored)
    tested = (row for rows in design.sources.values() for row in rows)
    groups = groups_of(tested, setup.recipe.prompts)
    figures = merged(perplexity_figures(scores, groups), _probe_figures(setup, design.arms))
    figures = merged(figures, _accuracy_figures(setup, design.arms))
    columns, others = [], _other_models(reports)
    for part, name in ((part, name) for part, names in COMPARED.items() for name in names):
        arms = {arm: own[name] for arm, own in figures.items() if name in own and _shows(reports[arm], part, name)}
        known = {label: estimate for label, model in others.items() if (estimate := model.figure(part, name))}
        if arms:
            columns.append(Column(MEASURES[name].name, MEASURES[name], arms, known))
    if len(design.sources) == 1:
        return columns
    for source, rows in design.sources.items():
        ids = {row.id for row in rows}
        here = {name: [score for score in own if score.id in ids] for name, own in scores.items()}
        scored_here = perplexity_figures(here, groups)
        arms = {name: own["bits_per_character"] for name, own in scored_here.items()}
        measure = MEASURES["bits_per_character"]
        if arms:
            columns.append(Column(f"{measure.name} of {source}", measure, arms, {}))
    return columns


def _shows(report: Report, part: Scope, name: str) -> bool:
    return any(model.key == AFTER and model.figure(part, name) for model in report.models)


def _probe_figures(setup: Setup, arms: Sequence[Arm]) -> Figures:
    """What the recipe's rules and the judge say of the arms' answers to the same prompts."""
    probed = _cached(arms, f"probes-{AFTER}", ProbeResult)
    if not probed:
        return {}
    prompts = choose_probes(setup.recipe, arms[0].run, read_test(arms[0].run))
    judged = _cached(arms, "judged", JudgeResult)
    scores = {name: result.scores.get(AFTER, {}) for name, result in judged.items()}
    rules, answers = probe_rules(setup.recipe, setup.path), probe_answers(prompts, probed)
    return measure_quality(setup.recipe, rules, prompts, answers, scores).figures.get("all", {})


def _accuracy_figures(setup: Setup, arms: Sequence[Arm]) -> Figures:
    """How often the arms' students are right, if the recipe verifies answers."""
    answered = _cached(arms, f"verify-{AFTER}", ProbeResult)
    if not answered:
        return {}
    questions, rules = choose_questions(setup.recipe, arms[0].run), verify_rules(setup.recipe, setup.path)
    return accuracy_figures(verify(rules, questions, answered, setup.recipe.prompts)).get("verified", {})


def _cached(arms: Sequence[Arm], name: str, kind: type[Result]) -> dict[str, Result]:
    """What was measured of each arm's student, from the files that the arm's report was made of."""
    found = {arm.name: read_result(arm.run.path / FOLDER / f"{name}.json", kind) for arm in arms}
    return {arm: result for arm, result in found.items() if result}


def _facts(report: Report, usd: float | None) -> list[str]:
    """How many rows and steps, at what keep rate, what the answers cost."""
    training, rate = report.training, (report.lineage.get("filters") or {}).get("keep_rate")
    return [
        f"{training.train_rows:,}" if training.train_rows else "–",
        f"{training.loss[-1].step:,.0f}" if training.loss else "–",
        "–" if rate is None else f"{rate:.0%}",
        "–" if usd is None else f"{usd:.2f}",
    ]


def _spread(columns: Sequence[Column]) -> Iterator[str]:
    """Mean, standard deviation and range of each figure over the seeds."""
    for column in columns:
        values, show = [figure.value for figure in column.arms.values()], column.measure.show
        if len(values) > 1:
            said = f"{show(mean(values))} on average over {len(values)} seeds, standard deviation {show(stdev(values))}"
            yield f"{column.title}: {said} ({show(min(values))} to {show(max(values))})"


def _money(spent: Mapping[str, Mapping[str, Any]], differences: Sequence[Difference]) -> Iterator[str]:
    """What the second teacher gained over the first for the money it cost more."""
    one, other = spent
    for name, section in spent.items():
        usd, tokens = section.get("usd"), section.get("tokens")
        said = "no price is known (teacher.price)" if usd is None else f"{usd:.2f} USD"
        yield f"{name}: {said}, {tokens:,} tokens" if tokens is not None else f"{name}: {said}"
    before, after = spent[one].get("usd"), spent[other].get("usd")
    if before is None or after is None:
        yield f"what {other} cost more than {one} is unknown"
        return
    more = after - before
    if more <= 0:
        return
    for found in differences:
        gain = found.change.value * (-1 if found.better == "lower" else 1)
        if found.improved is None:
            yield f"{found.figure}: {more:.2f} USD more made no significant difference"
        else:
            yield f"{found.figure}: {gain / more:+.3g} for each USD that {other} cost more than {one}"


def rows_of(results: Comparison) -> tuple[list[str], list[list[str]]]:
    """The table: heads (arms, then other models), and a row for each fact and figure."""
    arms = list(results.facts)
    others = list(dict.fromkeys(name for column in results.columns for name in column.others))
    rows = []
    for number, fact in enumerate(FACTS):
        texts = [own[number] for own in results.facts.values()]
        if any(text != "–" for text in texts):
            rows.append([fact, *texts, *("" for _ in others)])
    for column in results.columns:
        estimates = {name: figure.estimate() for name, figure in column.arms.items()} | dict(column.others)
        rows.append([column.title, *(_cell(column, estimates.get(name)) for name in (*arms, *others))])
    return ["", *arms, *others], rows


def _cell(column: Column, estimate: Estimate | None) -> str:
    return estimate.told(column.measure.show) if estimate else "–"


def conclusions(results: Comparison) -> list[str]:
    """The significant differences in words, the remarks, and how far all of it can be trusted."""
    measures = {column.title: column.measure for column in results.columns}
    lines = [_told(found, measures[found.figure]) for found in results.differences if found.improved is not None]
    quiet = len(results.differences) - len(lines)
    if lines and quiet:
        lines.append(f"{quiet} further pairs of figures show no significant difference.")
    elif quiet:
        lines.append("No difference between the arms is significant.")
    return [*lines, *results.remarks, results.note, CAUTION.format(count=len(results.differences))]


def _told(found: Difference, measure: Measure) -> str:
    """`soft is better than hard in bits per character: -0.1 (-0.138 to -0.062)`."""
    word = "better" if found.improved else "worse"
    return f"{found.model} is {word} than {found.against} in {found.figure}: {measure.told_change(found.change)}"


def as_markdown(results: Comparison) -> str:
    """The question, the table and what it says."""
    heads, rows = rows_of(results)
    lines = [f"# {results.name}: {results.question}", ""]
    lines += [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join([*lines, "", *(f"- {line}" for line in conclusions(results)), ""])


def write_results(results: Comparison, folder: Path) -> None:
    """results.md, with the plot beside it."""
    panels = []
    for column in results.columns:
        figures = [(name, figure.estimate(), "arm") for name, figure in column.arms.items()]
        figures += [(name, estimate, "other") for name, estimate in column.others.items()]
        dots = [(name, estimate, kind, column.measure.show(estimate.value)) for name, estimate, kind in figures]
        panels.append(dot_panel(column.title, f"{column.measure.better} is better", dots))
    svg = draw_svg(f"{results.name}: {results.question}", panels)
    for name, text in (("results.md", as_markdown(results) + "\n![](results.svg)\n"), ("results.svg", svg)):
        write_file(folder / name, text.encode())
