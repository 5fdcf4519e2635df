"""What a run's files say to the checklist, at whatever stage the run is; what is not there yet is None or empty.

Reads filter_report.json, checks.json, lineage.json and the review of a person. Writes nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from evaluate.document import Report
from filters.duplicates import DEDUP_RULES, EXACT, NEAR
from filters.judge import RULE as JUDGE
from filters.report import FilterReport
from filters.review.agreement import Result, agreement
from pipeline.checks import Check
from pipeline.errors import DataError
from pipeline.lineage import read_lineage
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir

SCRIPT_RULES = ("script_ratio", "language", "foreign_script")  # what they drop is not in the wanted language


class TrainChecks(msgspec.Struct, frozen=True):
    """checks.json."""

    checks: list[Check]


@dataclass(frozen=True, kw_only=True)
class Filtered:
    """What the filters found; shares are of all answers. None: the file does not say."""

    rows: int
    kept: int
    keep_rate: float
    rules: list[str]  # that were asked, with duplicates and judge
    pass_rules: float | None = None  # share that no rule dropped, duplicates and judge aside
    failing: Mapping[str, float] = field(default_factory=dict)  # share that a rule would drop, whichever was first
    duplicates: float | None = None  # share that says the same as another; None: not looked for


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that the checklist is drawn from."""

    recipe: Recipe
    filters: Filtered | None = None
    distinct_prompts: float | None = None  # different prompts a request
    checks: Mapping[str, Check] = field(default_factory=dict)  # by name
    review: Result | None = None
    report: Report | None = None


def gather(recipe: Recipe, run: RunDir, report: Report | None) -> Evidence:
    """Reads the run. Raises DataError at a file that is not what its stage writes."""
    lineage = read_lineage(run)
    generated = lineage.get("generate") or {}
    requests = generated.get("requests")
    filtered = run.kept.is_file() and run.dropped.is_file()
    return Evidence(
        recipe=recipe,
        filters=_filtered(run, lineage.get("filters")),
        distinct_prompts=generated["prompts"]["distinct"] / requests if requests else None,
        checks={check.name: check for check in _checks(run)},
        review=agreement(recipe, run) if filtered and run.reviews.is_file() else None,
        report=report,
    )


def _filtered(run: RunDir, section: Mapping[str, Any] | None) -> Filtered | None:
    """From filter_report.json; a run that has none (a share of another run) has the sums in its lineage."""
    try:
        report = msgspec.json.decode(run.filter_report.read_bytes(), type=FilterReport)
    except FileNotFoundError:
        if not section:
            return None
        names = [*section["dropped_by_rule"]]
        return Filtered(rows=section["rows"], kept=section["kept"], keep_rate=section["keep_rate"], rules=names)
    except msgspec.DecodeError as error:
        raise DataError(f"{run.filter_report}: {error}; filter again") from None
    first = {rule.rule: rule.dropped / report.rows for rule in report.rules}
    later = (*DEDUP_RULES, JUDGE)
    return Filtered(
        rows=report.rows,
        kept=report.kept,
        keep_rate=report.keep_rate,
        rules=[*first],
        pass_rules=1 - sum(share for rule, share in first.items() if rule not in later),
        failing={rule.rule: (rule.alone + rule.together) / report.rows for rule in report.rules},
        duplicates=sum(first.get(rule, 0) for rule in (EXACT, NEAR)) if EXACT in first else None,
    )


def _checks(run: RunDir) -> list[Check]:
    path = run.checks
    try:
        return msgspec.json.decode(path.read_bytes(), type=TrainChecks).checks
    except FileNotFoundError:
        return []
    except msgspec.DecodeError as error:
        raise DataError(f"{path}: {error}; train again") from None
