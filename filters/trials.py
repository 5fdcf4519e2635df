"""`--dry-run`: what the recipe's rules, as they are now, would do to a run that is filtered already.

Reads kept.jsonl and dropped.jsonl; writes nothing, and takes no lock. A row dropped as a duplicate or by
the judge stays dropped.
"""

from dataclasses import dataclass, field
from itertools import zip_longest

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from filters.answer import as_answer
from filters.duplicates import DEDUP_RULES
from filters.judge import RULE as JUDGE
from filters.rows import check_filtered, filtered_rows
from filters.ruleset import RuleSet
from pipeline.records import Completion, Dropped
from pipeline.rundir import RunDir

SHOWN = 10  # rows of each side
SHOWN_CHARS = 200


@dataclass(frozen=True)
class Flip:
    """A row that would change sides, and the reason that drops it (then or now)."""

    id: str
    reason: str
    text: str


@dataclass
class DryRun:
    """How many rows would change sides; the first of them."""

    kept_before: int = 0
    kept_after: int = 0
    rows: int = 0
    to_dropped: int = 0
    to_kept: int = 0
    first_to_dropped: list[Flip] = field(default_factory=list)
    first_to_kept: list[Flip] = field(default_factory=list)


def dry_run(run: RunDir, rules: RuleSet) -> DryRun:
    """Judges a filtered run's rows again. Raises DataError if it is not filtered yet, or at a bad line."""
    check_filtered(run, "--dry-run compares with a filtered run")
    result = DryRun()
    for row in filtered_rows(run):
        reasons = rules.reasons(as_answer(row))
        if isinstance(row, Dropped) and row.rule in (*DEDUP_RULES, JUDGE):
            reasons = reasons or row.detail  # neither duplicates nor the judge are asked again
        was_kept = not isinstance(row, Dropped)
        result.rows += 1
        result.kept_before += was_kept
        result.kept_after += not reasons
        if was_kept and reasons:
            result.to_dropped += 1
            if len(result.first_to_dropped) < SHOWN:
                result.first_to_dropped.append(_flip(row, reasons))
        elif isinstance(row, Dropped) and not reasons:
            result.to_kept += 1
            if len(result.first_to_kept) < SHOWN:
                result.first_to_kept.append(_flip(row, row.detail))
    return result


def _flip(row: Completion, reasons: dict[str, str]) -> Flip:
    return Flip(row.id, "; ".join(f"{label}: {reason}" for label, reason in reasons.items()), row.text)


def print_dry_run(result: DryRun, console: Console) -> None:
    """Both directions side by side, then the counts."""
    if result.to_dropped or result.to_kept:
        table = Table(
            f"kept, would be dropped ({result.to_dropped:,})",
            f"dropped, would be kept ({result.to_kept:,})",
            show_lines=True,
        )
        for dropped, kept in zip_longest(result.first_to_dropped, result.first_to_kept):
            table.add_row(_cell(dropped, "now"), _cell(kept, "was"))
        console.print(table)
    before, after = (count / result.rows if result.rows else 0.0 for count in (result.kept_before, result.kept_after))
    console.print(
        f"{result.rows:,} answers: {result.kept_before:,} kept ({before:.1%}), with these rules {result.kept_after:,} "
        f"({after:.1%}). Nothing was written.",
        highlight=False,
    )


def _cell(flip: Flip | None, when: str) -> str:
    if flip is None:
        return ""
    text = "".join(char if char.isprintable() else " " for char in flip.text[:SHOWN_CHARS])
    more = "…" if len(flip.text) > SHOWN_CHARS else ""
    return f"{escape(flip.id[:12])}  [dim]{when}: {escape(flip.reason)}[/dim]\n{escape(text)}{more}"
