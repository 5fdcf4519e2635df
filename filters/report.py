"""filter_report.json, and the same as tables on the terminal: how many answers are kept, why the others are not."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from filters.judge import FAILED, SCORES, UNREADABLE
from filters.judge import RULE as JUDGE
from filters.tally import BIN, LAST_BIN, MOST_VALUES, BadLine, Example, Tally


@dataclass(frozen=True)
class RuleCount:
    """What one rule dropped."""

    rule: str
    settings: dict[str, Any]
    dropped: int  # answers it was the first to drop: these add up to all that are dropped
    alone: int  # answers that no other rule would have dropped
    together: int  # answers that others would have dropped too
    examples: list[Example]


@dataclass(frozen=True)
class SlotCount:
    """How the answers to prompts with one value of a slot fared."""

    rows: int
    kept: int
    keep_rate: float


@dataclass(frozen=True)
class FilterReport:
    """What the filters did with a run's answers."""

    rows: int
    kept: int
    dropped: int
    keep_rate: float
    rules: list[RuleCount]
    overlaps: dict[str, int]  # rules that dropped the same answers, joined by " + ": answers
    slots: dict[str, dict[str, SlotCount]]  # slot, value; a slot with more than MOST_VALUES values is left out
    lengths: dict[str, dict[str, int]]  # characters (`150-199`): kept, dropped
    scores: dict[str, dict[str, int]] = field(default_factory=dict)  # `judge` or a criterion, score: answers
    judge_failures: int = 0  # answers without a score because the request for it failed; another call asks again
    bad_lines: int = 0
    first_bad_lines: list[BadLine] = field(default_factory=list)
    torn_last_line: bool = False  # the run was stopped while it wrote its last answer; not counted in rows

    def encoded(self) -> bytes:
        """The report as indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"


def make_report(tally: Tally, rules: Sequence[dict[str, Any]]) -> FilterReport:
    """Sums a tally up. `rules` are all that may have dropped a row, each its label (`rule`) and its settings."""
    rows = tally.kept + tally.dropped
    first: Counter[str] = Counter()
    every: Counter[str] = Counter()
    for labels, count in tally.failed.items():
        first[labels[0]] += count
        for label in labels:
            every[label] += count
    counts = [
        RuleCount(
            rule=rule["rule"],
            settings={key: value for key, value in rule.items() if key != "rule"},
            dropped=first[rule["rule"]],
            alone=tally.failed[(rule["rule"],)],
            together=every[rule["rule"]] - tally.failed[(rule["rule"],)],
            examples=tally.examples.get(rule["rule"], []),
        )
        for rule in rules
    ]
    overlaps = [(" + ".join(labels), count) for labels, count in tally.failed.most_common() if len(labels) > 1]
    return FilterReport(
        rows=rows,
        kept=tally.kept,
        dropped=tally.dropped,
        keep_rate=tally.kept / rows,
        rules=counts,
        overlaps=dict(overlaps),
        slots=_slot_counts(tally),
        lengths=_lengths(tally),
        scores={name: dict(sorted(counts.items())) for name, counts in tally.scores.items()},
        judge_failures=tally.scores.get(JUDGE, Counter())[FAILED],
        bad_lines=tally.bad_lines,
        first_bad_lines=tally.first_bad_lines,
        torn_last_line=tally.torn,
    )


def _slot_counts(tally: Tally) -> dict[str, dict[str, SlotCount]]:
    slots: dict[str, dict[str, SlotCount]] = {}
    for name in dict.fromkeys([*tally.kept_side.slots, *tally.dropped_side.slots]):
        kept = tally.kept_side.slots.get(name, Counter())
        rows = kept + tally.dropped_side.slots.get(name, Counter())
        if len(rows) <= MOST_VALUES:
            by_rate = sorted(rows, key=lambda value: (kept[value] / rows[value], value))
            slots[name] = {value: SlotCount(rows[value], kept[value], kept[value] / rows[value]) for value in by_rate}
    return slots


def _lengths(tally: Tally) -> dict[str, dict[str, int]]:
    lengths, kept, dropped = {}, tally.kept_side.lengths, tally.dropped_side.lengths
    for index in sorted({*kept, *dropped}):
        name = f"{index * BIN}+" if index == LAST_BIN else f"{index * BIN}-{index * BIN + BIN - 1}"
        lengths[name] = {"kept": kept[index], "dropped": dropped[index]}
    return lengths


def print_report(report: FilterReport, console: Console) -> None:
    """The drops by rule, the slot values that fare worst, the lengths, and last the keep rate."""
    if report.rules:
        counts = (Column(name, justify="right", no_wrap=True) for name in ("dropped", "alone", "with others"))
        table = Table(Column("rule", no_wrap=True), *counts, "for example")
        for rule in report.rules:
            example = rule.examples[0].reason if rule.examples else ""
            table.add_row(
                rule.rule, f"{rule.dropped:,}", f"{rule.alone:,}", f"{rule.together:,}", one_line(example, 60)
            )
        console.print(table)
    _print_slots(report, console)
    _print_lengths(report, console)
    _print_scores(report, console)
    console.print(
        f"{report.rows:,} answers in, {report.kept:,} kept, {report.dropped:,} dropped: "
        f"keep rate {report.keep_rate:.1%}",
        highlight=False,
    )


def _print_slots(report: FilterReport, console: Console) -> None:
    """The three values of each slot that are kept least, and the one that is kept most; all are in the JSON."""
    table = Table("slot", "value", *(Column(name, justify="right") for name in ("answers", "kept", "keep rate")))
    for name, values in report.slots.items():
        if len(values) < 2:
            continue
        items = [*values.items()]
        for value, count in items if len(items) <= 4 else [*items[:3], items[-1]]:
            table.add_row(name, one_line(value, 30), f"{count.rows:,}", f"{count.kept:,}", f"{count.keep_rate:.0%}")
            name = ""
        table.add_section()
    if table.row_count:
        console.print(table)


def _print_lengths(report: FilterReport, console: Console) -> None:
    table = Table("characters", Column("kept", justify="right"), Column("dropped", justify="right"), "")
    most = max((bar["kept"] + bar["dropped"] for bar in report.lengths.values()), default=0)
    for name, bar in report.lengths.items():
        kept, dropped = round(30 * bar["kept"] / most), round(30 * bar["dropped"] / most)
        table.add_row(name, f"{bar['kept']:,}", f"{bar['dropped']:,}", "█" * kept + "░" * dropped)
    if 1 < table.row_count <= 40:
        console.print(table)


def _print_scores(report: FilterReport, console: Console) -> None:
    """The judge's scores, of all in all and by criterion."""
    columns = [*map(str, SCORES), *(name for name in (UNREADABLE, FAILED) if name in report.scores.get(JUDGE, ()))]
    table = Table("judge's scores", *(Column(name, justify="right") for name in [*columns, "mean"]))
    for name, counts in report.scores.items():
        scored = {score: counts.get(str(score), 0) for score in SCORES}
        total = sum(scored.values())
        mean = f"{sum(score * count for score, count in scored.items()) / total:.2f}" if total else "-"
        table.add_row(name, *(f"{counts[column]:,}" if column in counts else "" for column in columns), mean)
    if table.row_count:
        console.print(table)


def one_line(text: str, chars: int) -> str:
    """The text shortened to `chars` characters, safe to print: no line breaks, control characters or console markup."""
    line = "".join(char if char.isprintable() else " " for char in text)
    line = line if len(line) <= chars else line[: chars - 1] + "…"
    return escape(line)
