"""What other settings would do to a run that is filtered already: `--dry-run` and `--sweep 30,50,80`.

`--dry-run` judges its rows by the recipe's rules as they are now, with the values that their prompts have now. It reads
kept.jsonl, dropped.jsonl, prompts.jsonl and completions.jsonl, writes nothing and takes no lock. `--sweep` ranks every
answer and writes the best 30, 50 and 80% as runs of their own, to train on and compare: `sweep/<share>/` with
kept.jsonl, dropped.jsonl and lineage.json. It keeps some hundred bytes per answer.
"""

import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from math import ceil
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from filters.answer import Answer, RuleSettings, as_answer
from filters.duplicates import CONTAMINATED, DEDUP_RULES
from filters.fresh import fresh_values
from filters.groups import AGREES, SELECT
from filters.judgements import JUDGE, Judgement, read_judgements
from filters.reasons import describe
from filters.repetition import RepetitionSettings
from filters.report import one_line
from filters.rows import as_dropped, as_kept, filtered_rows
from filters.rules import LengthSettings, RepeatedWordSettings, ScriptRatioSettings
from filters.ruleset import ActiveRule, RuleSet
from pipeline.errors import DataError, UsageError
from pipeline.lineage import read_lineage, write_lineage
from pipeline.progress import reporting
from pipeline.recipe import Recipe
from pipeline.records import Completion, Dropped, Kept, Reason, encode_line, said
from pipeline.rundir import RunDir, replacing

SHOWN = 10  # rows of each side
SHOWN_CHARS = 200
STEPS = (0.2, 0.4, 0.6, 0.8)  # how much stricter the thresholds are when a rule is asked again
RANKED_OUT = "sweep"  # the rule of a row that passed all others and is not in the share

JUDGED = "{:,} answers judged so far".format
DUPLICATES = "duplicates"
# What follows the rules, and is not asked again: by the rule of a row that it dropped, its name.
LATER = {AGREES: AGREES, **dict.fromkeys(DEDUP_RULES, DUPLICATES), JUDGE: JUDGE, SELECT: SELECT}

Flip = tuple[Completion, Sequence[Reason]]
Rank = tuple[bool, int, bool, float, float, float, str]
Thresholds = list[list[ActiveRule]]  # each rule with a threshold, by STEPS


@dataclass
class DryRun:
    """What would change: how many rows to each side, and the first of them with the reasons that drop them."""

    not_asked: set[str]  # of LATER: those that the recipe has, or had when the run was filtered
    rows: int = 0
    new_rows: int = 0  # answers that came since, which are in no other count
    kept_before: int = 0
    count: Counter[bool] = field(default_factory=Counter)  # by whether it would be kept
    first: dict[bool, list[Flip]] = field(default_factory=lambda: {True: [], False: []})

    def add(self, row: Completion, reasons: Sequence[Reason], *, kept: bool) -> None:
        self.count[kept] += 1
        if len(self.first[kept]) < SHOWN:
            self.first[kept].append((row, reasons))


@dataclass(frozen=True)
class Subset:
    percent: int
    run: RunDir
    rows: int
    dropped_by_rules: int  # of them: what a share over the keep rate takes in
    mean_score: float | None  # the judge's


def dry_run(recipe: Recipe, run: RunDir, rules: RuleSet) -> DryRun:
    """Judges a filtered run's rows again. Raises DataError if it is not filtered yet, or at a bad line."""
    config = recipe.filters
    wanted = {AGREES: rules.agrees, DUPLICATES: config.dedup, JUDGE: config.judge, SELECT: config.select != "all"}
    result = DryRun({name for name, setting in wanted.items() if setting})
    with fresh_values(run, recipe.prompts) as fresh:
        for row in reporting(filtered_rows(run), JUDGED):
            result.rows += 1
            reasons = rules.reasons(as_answer(fresh.updated(row) if fresh else row))
            if isinstance(row, Kept):
                result.kept_before += 1
                if reasons:
                    result.add(row, reasons, kept=False)
            elif row.rule in LATER:
                result.not_asked.add(LATER[row.rule])
            elif not reasons:
                result.add(row, row.detail, kept=True)
    if run.completions.exists():  # a share of --sweep has none
        with run.completions.open("rb") as file:
            lines = sum(line.endswith(b"\n") and not line.isspace() for line in file)  # a torn one is no answer
        result.new_rows = max(0, lines - result.rows - read_lineage(run).get("filters", {}).get("bad_lines", 0))
    return result


def print_dry_run(result: DryRun, console: Console) -> None:
    dropped, kept = result.count[False], result.count[True]
    if dropped or kept:
        table = Table(f"kept, would be dropped ({dropped:,})", f"dropped, would be kept ({kept:,})", show_lines=True)
        for one, other in zip_longest(result.first[False], result.first[True]):
            table.add_row(_cell(one, "now"), _cell(other, "was"))
        console.print(table)
    before, after, rows = result.kept_before, result.kept_before - dropped + kept, max(result.rows, 1)
    console.print(
        f"{result.rows:,} answers: {before:,} kept ({before / rows:.1%}), with these rules {after:,} "
        f"({after / rows:.1%}). Nothing was written.",
        highlight=False,
    )
    left_out = []
    if result.not_asked:
        names = ", ".join(name for name in dict.fromkeys(LATER.values()) if name in result.not_asked)
        left_out.append(f"{names} (they come after the rules; what they dropped stays dropped)")
    if result.new_rows:
        left_out.append(f"{result.new_rows:,} answers that came since the run was filtered")
    if left_out:
        print(f"notice: not in these figures: {' and '.join(left_out)}; the filters themselves tell", file=sys.stderr)


def _cell(flip: Flip | None, when: str) -> str:
    if flip is None:
        return ""
    row, why = flip
    reasons = one_line("; ".join(f"{reason.rule}: {describe(reason)}" for reason in why), SHOWN_CHARS)
    return f"{one_line(row.id, 12)}  [dim]{when}: {reasons}[/dim]\n{one_line(said(row), SHOWN_CHARS)}"


def parse_shares(option: str, text: str) -> list[int]:
    """The percents of an option, rising. Raises UsageError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and 1 <= int(part) <= 100 for part in parts):
        raise UsageError(f"{option} wants percents from 1 to 100 with commas between, like 30,50,80; got {text!r}")
    return sorted({int(part) for part in parts})


def sweep(run: RunDir, rules: RuleSet, shares: Sequence[int]) -> list[Subset]:
    """Writes the shares. Raises DataError if the run is not filtered, or at a bad line.

    Fewer rules against an answer come first, then the judge's score, then the distance to the rules' thresholds. What
    only `select` left out has no rule against it, and comes after all that is kept. Duplicates come last. An answer
    without text, and one that `contamination` dropped, is in no share.
    """
    thresholds, total, ranks, judged = stricter(rules), 0, list[Rank](), read_judgements(run)
    for row in reporting(filtered_rows(run), JUDGED):
        total += 1
        if said(row).strip() and not (isinstance(row, Dropped) and row.rule == CONTAMINATED):
            ranks.append(_rank(row, thresholds, _scores(row, judged).get(JUDGE, 0.0)))
    if not ranks:
        raise DataError(f"{run.kept}: no answers to rank; run `python -m generate` and the filters first")
    order = {rank[-1]: place for place, rank in enumerate(sorted(ranks))}
    counts = {percent: min(ceil(total * percent / 100), len(ranks)) for percent in shares}
    return [_write(run, percent, count, order, total, judged) for percent, count in counts.items()]


def _scores(row: Kept | Dropped, judged: dict[str, Judgement]) -> dict[str, float]:
    """The scores of a row; of one that was dropped, the judge's if it was asked."""
    if isinstance(row, Kept):
        return row.scores
    return judged[row.id].scores if row.id in judged else {}


def _rank(row: Kept | Dropped, thresholds: Thresholds, score: float) -> Rank:
    """Less is better. `score` is the judge's, of a row that it dropped too; 0 if it gave none."""
    is_duplicate = isinstance(row, Dropped) and row.rule in DEDUP_RULES
    against = sum(reason.rule != SELECT for reason in row.detail) if isinstance(row, Dropped) else 0
    nearest, mean = margin(as_answer(row), thresholds)
    return is_duplicate, against, isinstance(row, Dropped), -score, -nearest, -mean, row.id


def stricter(rules: RuleSet) -> Thresholds:
    """The rules that have a threshold, each with its settings made stricter, by STEPS."""
    found = ([(rule, _tighter(rule.settings, step)) for step in STEPS] for rule in rules.rules)
    every = ([rule._replace(settings=settings) for rule, settings in steps if settings] for steps in found)
    return [steps for steps in every if steps]


def margin(answer: Answer, thresholds: Thresholds) -> tuple[float, float]:
    """How far an answer is inside the rules' thresholds: of the rule that it is nearest to, and the mean; 0 to 1."""
    found = [sum(rule.verify(answer).reason is None for rule in steps) / len(steps) for steps in thresholds]
    return (min(found), sum(found) / len(found)) if found else (0.0, 0.0)


def _write(
    run: RunDir, percent: int, count: int, order: dict[str, int], total: int, judged: dict[str, Judgement]
) -> Subset:
    target = RunDir(run.path / "sweep" / str(percent))
    target.path.mkdir(parents=True, exist_ok=True)
    if run.recipe.exists():
        shutil.copyfile(run.recipe, target.recipe)
    by_rules, scores = 0, []
    with replacing(target.kept) as kept, replacing(target.dropped) as dropped:
        for row in filtered_rows(run):
            rank = order.get(row.id, total)
            if rank < count:
                own = _scores(row, judged)
                kept.write(encode_line(as_kept(row, own)))
                by_rules += isinstance(row, Dropped) and row.rule != SELECT
                scores += [own[JUDGE]] if JUDGE in own else []
            elif isinstance(row, Dropped):
                dropped.write(encode_line(row))
            else:
                why = Reason(rule=RANKED_OUT, value=rank + 1, total=total, at_most=percent / 100)
                dropped.write(encode_line(as_dropped(row, why)))
    lineage = {key: value for key, value in read_lineage(run).items() if key in ("name", "generate", "filters")}
    lineage["filters"] = {
        **lineage.get("filters", {}),
        "kept": count,
        "dropped": total - count,
        "keep_rate": count / total,
        "sweep": {"percent": percent, "dropped_by_rules": by_rules},
    }
    write_lineage(target, lineage)
    return Subset(percent, target, count, by_rules, sum(scores) / len(scores) if scores else None)


def print_sweep(subsets: Sequence[Subset], console: Console) -> None:
    table = Table("share", "answers", "of them dropped by rules", "judge's mean", "run")
    for one in subsets:
        score = "-" if one.mean_score is None else f"{one.mean_score:.2f}"
        table.add_row(f"{one.percent}%", f"{one.rows:,}", f"{one.dropped_by_rules:,}", score, escape(str(one.run.path)))
    console.print(table)
    console.print("train each: python -m train RECIPE --run <run>", highlight=False)


def _tighter(settings: RuleSettings, step: float) -> RuleSettings | None:
    """The same settings with stricter thresholds; None for a rule that has none. `step`: 0 to 1, how much stricter."""

    def less(limit: Any) -> Any:
        if isinstance(limit, dict):
            return {n: share * (1 - step) for n, share in limit.items()}
        return None if limit is None else limit * (1 - step)

    match settings:
        case LengthSettings(min_chars=low, max_chars=None):
            return settings.model_copy(update={"min_chars": ceil(low * (1 + step))})
        case LengthSettings(min_chars=low, max_chars=int(high)):
            by = step * (high - low) / 2
            return settings.model_copy(update={"min_chars": ceil(low + by), "max_chars": int(high - by)})
        case RepeatedWordSettings(max_count=count):
            return settings.model_copy(update={"max_count": int(count * (1 - step))})
        case ScriptRatioSettings(min_share=share):
            return settings.model_copy(update={"min_share": share + step * (1 - share)})
        case RepetitionSettings():
            names = (name for name in type(settings).model_fields if name not in ("of", "repeated_span"))
            return settings.model_copy(update={name: less(getattr(settings, name)) for name in names})
    return None
