"""What the checklist of a run is made from: its filter report, lineage, checks, review and report.

Reads the files of a run at any stage; writes nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from evaluate.document import Report, read_report
from evaluate.models import student_lineage
from filters.duplicates import DEDUP_RULES, EXACT, NEAR
from filters.groups import SELECT
from filters.judgements import JUDGE
from filters.report import FilterReport
from filters.review.agreement import Result, agreement
from pipeline.checks import Check
from pipeline.lineage import read_lineage, rules_asked
from pipeline.recipe import Recipe
from pipeline.records import read_json
from pipeline.rundir import RunDir
from pipeline.students import trained_section


class TrainChecks(msgspec.Struct, frozen=True):
    """checks.json."""

    checks: list[Check]


@dataclass(frozen=True, kw_only=True)
class Filtered:
    """What the filters found; shares are of all answers. None: the file does not say."""

    rows: int
    kept: int
    keep_rate: float
    rules: int | None  # that were asked, with duplicates and judge
    pass_rules: float | None = None  # share that no rule dropped, duplicates and judge aside
    failing: Mapping[str, float] = field(default_factory=dict)  # share that a rule would drop, whichever was first
    duplicates: float | None = None  # share that says the same as another; None: not looked for


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that the checklist is made from; None or empty: the run is not so far."""

    recipe: Recipe
    filters: Filtered | None = None
    distinct_prompts: float | None = None  # share of the prompts that are different, however often each is answered
    checks: Mapping[str, Check] = field(default_factory=dict)  # of training, by name
    review: Result | None = None
    report: Report | None = None


def report_of_student(run: RunDir) -> Report | None:
    """The run's report, if it is of the student that is there; None: that one is not evaluated yet."""
    report = read_report(run)
    return report if report and report.lineage.get("train") == student_lineage(run).get("train") else None


def gather(recipe: Recipe, run: RunDir, report: Report | None) -> Evidence:
    """What the files of a run and its report say. Raises DataError at a file that is wrong."""
    lineage = read_lineage(run)
    generated = lineage.get("generate") or {}
    prompts = generated.get("prompts") or {}
    filtered = run.kept.is_file() and run.dropped.is_file()
    return Evidence(
        recipe=recipe,
        filters=_filtered(run, lineage.get("filters")),
        distinct_prompts=prompts["distinct"] / prompts["asked"] if prompts.get("asked") else None,
        checks={check.name: check for check in _checks(run)},
        review=agreement(recipe, run) if filtered and run.reviews.is_file() else None,
        report=report,
    )


def _checks(run: RunDir) -> list[Check]:
    """The checks of the student that is there; without one those of the last training, from checks.json."""
    if found := trained_section(run.student).get("checks"):
        return msgspec.convert(found, list[Check])
    trained = read_json(run.checks, TrainChecks, "train again (--again)")
    return trained.checks if trained else []


def _filtered(run: RunDir, section: Mapping[str, Any] | None) -> Filtered | None:
    """From filter_report.json; a run that has none (the best share of another run) has the sums in its lineage."""
    report = read_json(run.filter_report, FilterReport, "filter again")
    if report is None:
        if not section:
            return None
        counts = {name: section[name] for name in ("rows", "kept", "keep_rate")}
        return Filtered(**counts, rules=rules_asked(section))
    first = {rule.rule: rule.dropped / report.rows for rule in report.rules}
    return Filtered(
        rows=report.rows,
        kept=report.kept,
        keep_rate=report.useful_share,
        rules=rules_asked(section) if section else None,
        pass_rules=1 - sum(share for rule, share in first.items() if rule not in (*DEDUP_RULES, JUDGE, SELECT)),
        failing={rule.rule: (rule.alone + rule.together) / report.rows for rule in report.rules},
        duplicates=sum(first.get(rule, 0) for rule in (EXACT, NEAR)) if EXACT in first else None,
    )
