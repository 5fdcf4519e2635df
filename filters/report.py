"""filter_report.json, and the same as tables on the terminal: how many answers are kept, why the others are not."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from filters.groups import SELECT
from filters.judgements import FAILED, JUDGE, SCORES, UNREADABLE
from filters.tally import BIN, LAST_BIN, MOST_VALUES, BadLine, Example, Tally

EXAMPLE_CHARS = 120  # of a reason, in the table: what was said and what was wanted
FEW_VALUES = 20  # of a slot or column: reported always


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
class PromptCounts:
    """The same by prompts, which may have several answers. An answer passes that no rule drops."""

    prompts: int  # with an answer
    kept: int  # with a kept answer
    keep_rate: float
    answers: int  # to one prompt, the most
    pass_at: dict[int, float]  # pass@k, the mean over the prompts that have k answers or more
    unsolved: int  # prompts none of whose answers passes
    unsolved_ids: list[str]  # the first of them


@dataclass(frozen=True)
class FilterReport:
    """What the filters did with a run's answers."""

    rows: int
    kept: int
    dropped: int
    keep_rate: float
    rules: list[RuleCount]
    overlaps: dict[str, int]  # rules that dropped the same answers, joined by " + ": answers
    slots: dict[str, dict[str, SlotCount]]  # slot or column, value; left out: those with nearly a value per answer
    lengths: dict[str, dict[str, int]]  # characters (`150-199`): kept, dropped
    prompts: PromptCounts
    scores: dict[str, dict[str, int]] = field(default_factory=dict)  # `judge` or a criterion, score: answers
    judge_failures: int = 0  # answers without a score because the request for it failed; another call asks again
    bad_lines: int = 0
    first_bad_lines: list[BadLine] = field(default_factory=list)
    torn_last_line: bool = False  # the run was stopped while it wrote its last answer; not counted in rows

    @property
    def useful_share(self) -> float:
        """The share of the answers that are kept; of the prompts, where one answer to each stays (`select`)."""
        selects = any(rule.rule == SELECT for rule in self.rules)
        return self.prompts.keep_rate if selects else self.keep_rate


def make_report(tally: Tally, rules: Sequence[dict[str, Any]], prompts: PromptCounts) -> FilterReport:
    """Sums a tally up. `rules` are all that may have dropped a row, each its label (`rule`) and its settings."""
    dropped_by = [(labels, count) for labels, count in tally.outcomes.most_common() if labels]
    first: Counter[str] = Counter()
    every: Counter[str] = Counter()
    for labels, count in dropped_by:
        first[labels[0]] += count
        every.update(dict.fromkeys(labels, count))
    counts = [
        RuleCount(
            rule=rule["rule"],
            settings={key: value for key, value in rule.items() if key != "rule"},
            dropped=first[rule["rule"]],
            alone=tally.outcomes[rule["rule"],],
            together=every[rule["rule"]] - tally.outcomes[rule["rule"],],
            examples=tally.examples.get(rule["rule"], []),
        )
        for rule in rules
    ]
    return FilterReport(
        rows=tally.rows,
        kept=tally.kept,
        dropped=tally.rows - tally.kept,
        keep_rate=tally.kept / tally.rows,
        rules=counts,
        overlaps={" + ".join(labels): count for labels, count in dropped_by if len(labels) > 1},
        slots=_slot_counts(tally),
        lengths=_lengths(tally),
        prompts=prompts,
        scores={name: dict(sorted(counts.items())) for name, counts in tally.scores.items()},
        judge_failures=tally.scores.get(JUDGE, Counter())[FAILED],
        bad_lines=tally.bad_lines,
        first_bad_lines=tally.first_bad_lines,
        torn_last_line=tally.torn,
    )


def _slot_counts(tally: Tally) -> dict[str, dict[str, SlotCount]]:
    slots: dict[str, dict[str, SlotCount]] = {}
    for name, counts in tally.slots.items():
        values = {value for value, _ in counts}
        if len(values) <= min(MOST_VALUES, max(FEW_VALUES, tally.rows // 2)):
            by_value = {value: _slot_count(counts[value, True], counts[value, False]) for value in values}
            slots[name] = dict(sorted(by_value.items(), key=lambda item: (item[1].keep_rate, item[0])))
    return slots


def _slot_count(kept: int, dropped: int) -> SlotCount:
    return SlotCount(kept + dropped, kept, kept / (kept + dropped))


def _lengths(tally: Tally) -> dict[str, dict[str, int]]:
    lengths = {}
    for index in sorted({index for index, _ in tally.lengths}):
        name = f"{index * BIN}+" if index == LAST_BIN else f"{index * BIN}-{index * BIN + BIN - 1}"
        lengths[name] = {"kept": tally.lengths[index, True], "dropped": tally.lengths[index, False]}
    return lengths


_number = partial(Column, justify="right", no_wrap=True)


def print_report(report: FilterReport, console: Console) -> None:
    """The drops by rule, the slot values that fare worst, the lengths, and last the keep rate."""
    numbers, example = map(_number, ("dropped", "alone", "with others")), Column("for example", overflow="fold")
    rules = Table(Column("rule", no_wrap=True), *numbers, example)
    for rule in report.rules:
        reason = one_line(rule.examples[0].reason, EXAMPLE_CHARS) if rule.examples else ""
        rules.add_row(rule.rule, f"{rule.dropped:,}", f"{rule.alone:,}", f"{rule.together:,}", reason)
    for table in (rules, _slots_table(report), _lengths_table(report), _scores_table(report)):
        if table.row_count:
            console.print(table)
    console.print(
        f"{report.rows:,} answers in, {report.kept:,} kept, {report.dropped:,} dropped: "
        f"keep rate {report.keep_rate:.1%}",
        highlight=False,
    )
    if report.prompts.answers > 1:
        _print_prompts(report.prompts, console)


def _print_prompts(counts: PromptCounts, console: Console) -> None:
    passes = ", ".join(f"pass@{k} {share:.1%}" for k, share in counts.pass_at.items())
    console.print(
        f"{counts.prompts:,} prompts, {counts.kept:,} with a kept answer ({counts.keep_rate:.1%}); {passes}; "
        f"{counts.unsolved:,} with no answer that passes",
        highlight=False,
    )


def _slots_table(report: FilterReport) -> Table:
    """The three values of each slot that are kept least, and the one that is kept most; all are in the JSON."""
    table = Table("slot", "value", *map(_number, ("answers", "kept", "keep rate")))
    for name, values in report.slots.items():
        if len(values) < 2:
            continue
        name, items = one_line(name, 30), [*values.items()]
        for value, count in items if len(items) <= 4 else [*items[:3], items[-1]]:
            table.add_row(name, one_line(value, 30), f"{count.rows:,}", f"{count.kept:,}", f"{count.keep_rate:.0%}")
            name = ""
        table.add_section()
    return table


def _lengths_table(report: FilterReport) -> Table:
    table = Table("characters", _number("kept"), _number("dropped"), "")
    if 1 < len(report.lengths) <= 40:
        most = max(bar["kept"] + bar["dropped"] for bar in report.lengths.values())
        for name, bar in report.lengths.items():
            kept, dropped = round(30 * bar["kept"] / most), round(30 * bar["dropped"] / most)
            table.add_row(name, f"{bar['kept']:,}", f"{bar['dropped']:,}", "█" * kept + "░" * dropped)
    return table


def _scores_table(report: FilterReport) -> Table:
    """The judge's scores, of all in all and by criterion."""
    columns = [*map(str, SCORES), *(name for name in (UNREADABLE, FAILED) if name in report.scores.get(JUDGE, ()))]
    table = Table("judge's scores", *map(_number, [*columns, "mean"]))
    for name, counts in report.scores.items():
        total = sum(counts.get(str(score), 0) for score in SCORES)
        mean = f"{sum(score * counts.get(str(score), 0) for score in SCORES) / total:.2f}" if total else "-"
        table.add_row(name, *(f"{counts[column]:,}" if column in counts else "" for column in columns), mean)
    return table


def one_line(text: str, chars: int) -> str:
    """The text shortened to `chars` characters, safe to print: no line breaks, control characters or console markup."""
    line = "".join(char if char.isprintable() else " " for char in text)
    line = line if len(line) <= chars else line[: chars - 1] + "…"
    return escape(line)
