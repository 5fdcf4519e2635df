"""`--sweep 30,50,80`: the best 30, 50 and 80% of a filtered run, as runs of their own to train on and compare.

Ranks every answer of the run, kept or dropped: fewer rules against it first, then the judge's score, then how far it is
from the rules' thresholds. Reads kept.jsonl, dropped.jsonl and the judge's verdicts; writes `sweep/<share>/` with
kept.jsonl, dropped.jsonl and lineage.json, which `python -m train RECIPE --run <run>/sweep/<share>` learns from.
Duplicates come last, and an answer without text is in no share. Keeps some hundred bytes an answer.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from rich.console import Console
from rich.table import Table

from filters.answer import Answer, RuleSettings, as_answer
from filters.duplicates import DEDUP_RULES
from filters.judge import RULE as JUDGE
from filters.judge import read_judgements
from filters.repetition import RepetitionSettings
from filters.rows import check_filtered, filtered_rows
from filters.rules import LengthSettings, RepeatedWordSettings, ScriptRatioSettings
from filters.ruleset import RuleSet
from pipeline.errors import DataError, UsageError
from pipeline.lineage import read_lineage, write_lineage
from pipeline.records import Completion, Dropped, Kept, encode_line
from pipeline.rundir import RunDir, replacing

STEPS = (0.2, 0.4, 0.6, 0.8)  # a rule is asked again with thresholds so much stricter
RANKED_OUT = "sweep"  # the rule of a row that passed all others and is not in the share

Rank = tuple[int, float, float, float, str]
Thresholds = list[tuple[Callable[[Answer, Any], str | None], list[RuleSettings]]]


@dataclass(frozen=True)
class Subset:
    """One share of a run."""

    percent: int
    run: RunDir
    rows: int
    dropped_by_rules: int  # of them: what a share over the keep rate takes in
    mean_score: float | None  # the judge's


def parse_shares(text: str) -> list[int]:
    """Percents, rising. Raises UsageError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and 1 <= int(part) <= 100 for part in parts):
        raise UsageError(f"--sweep wants percents from 1 to 100 with commas between, like 30,50,80; got {text!r}")
    return sorted({int(part) for part in parts})


def sweep(run: RunDir, rules: RuleSet, shares: Sequence[int]) -> list[Subset]:
    """Writes the shares. Raises DataError where the run is not filtered, or at a bad line."""
    check_filtered(run, "--sweep ranks a filtered run")
    thresholds, total, ranks = stricter(rules), 0, list[Rank]()
    scores = {judged.id: judged.score for judged in read_judgements(run).values() if judged.score is not None}
    for row in filtered_rows(run):
        total += 1
        if row.text.strip():
            score = row.scores.get(JUDGE, 0.0) if isinstance(row, Kept) else scores.get(row.id, 0)
            ranks.append(_rank(row, thresholds, score))
    if not ranks:
        raise DataError(f"{run.kept}: no answers to rank; run `python -m generate` and the filters first")
    order = {rank[-1]: place for place, rank in enumerate(sorted(ranks))}
    return [_write(run, percent, min(ceil(total * percent / 100), len(ranks)), order, total) for percent in shares]


def stricter(rules: RuleSet) -> Thresholds:
    """The rules that have a threshold, each with its settings so much stricter."""
    return [
        (rule.rule.check, [tighten(rule.settings, step) for step in STEPS])
        for rule in rules.rules
        if (tighten := _TIGHTEN.get(type(rule.settings)))
    ]


def margin(answer: Answer, thresholds: Thresholds) -> tuple[float, float]:
    """How far an answer is inside the rules' thresholds: of the rule that it is nearest to, and the mean; 0 to 1."""
    found = [sum(check(answer, settings) is None for settings in steps) / len(steps) for check, steps in thresholds]
    return (min(found), sum(found) / len(found)) if found else (0.0, 0.0)


def _rank(row: Kept | Dropped, thresholds: Thresholds, score: float) -> Rank:
    """Less is better. `score` is the judge's, 0 where there is none; of a row that it dropped, too."""
    against = 0
    if isinstance(row, Dropped):
        against = len(row.detail) if row.rule not in DEDUP_RULES else 1_000_000
    nearest, mean = margin(as_answer(row), thresholds)
    return against, -score, -nearest, -mean, row.id


def _write(run: RunDir, percent: int, count: int, order: dict[str, int], total: int) -> Subset:
    target = RunDir(run.path / "sweep" / str(percent))
    target.path.mkdir(parents=True, exist_ok=True)
    if run.recipe.exists():
        shutil.copyfile(run.recipe, target.recipe)
    by_rules, scores = 0, []
    with replacing(target.kept) as kept, replacing(target.dropped) as dropped:
        for row in filtered_rows(run):
            fields = {name: getattr(row, name) for name in Completion.__struct_fields__}
            if order.get(row.id, total) < count:
                own = row.scores if isinstance(row, Kept) else {}
                kept.write(encode_line(Kept(**fields, scores=own)))
                by_rules += isinstance(row, Dropped)
                scores += [own[JUDGE]] if JUDGE in own else []
            elif isinstance(row, Dropped):
                dropped.write(encode_line(row))
            else:
                why = f"rank {order.get(row.id, total) + 1} of {total}, the best {percent}% are kept"
                dropped.write(encode_line(Dropped(**fields, rule=RANKED_OUT, detail={RANKED_OUT: why})))
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
    """A table, and what to do next."""
    table = Table("share", "answers", "of them dropped by rules", "judge's mean", "run")
    for one in subsets:
        score = "-" if one.mean_score is None else f"{one.mean_score:.2f}"
        table.add_row(f"{one.percent}%", f"{one.rows:,}", f"{one.dropped_by_rules:,}", score, str(one.run.path))
    console.print(table)
    console.print("train each: python -m train RECIPE --run <run>", highlight=False)


def _tighter_length(settings: LengthSettings, step: float) -> LengthSettings:
    low, high = settings.min_chars, settings.max_chars
    if high is None:
        return settings.model_copy(update={"min_chars": ceil(low * (1 + step))})
    by = step * (high - low) / 2
    return settings.model_copy(update={"min_chars": ceil(low + by), "max_chars": int(high - by)})


def _tighter_repeated_word(settings: RepeatedWordSettings, step: float) -> RepeatedWordSettings:
    return settings.model_copy(update={"max_count": int(settings.max_count * (1 - step))})


def _tighter_script_ratio(settings: ScriptRatioSettings, step: float) -> ScriptRatioSettings:
    return ScriptRatioSettings(script=settings.script, min_share=settings.min_share + step * (1 - settings.min_share))


def _tighter_repetition(settings: RepetitionSettings, step: float) -> RepetitionSettings:
    def less(limit: Any) -> Any:
        if isinstance(limit, dict):
            return {n: share * (1 - step) for n, share in limit.items()}
        return None if limit is None else limit * (1 - step)

    names = (name for name in type(settings).model_fields if name != "repeated_span")
    return settings.model_copy(update={name: less(getattr(settings, name)) for name in names})


_TIGHTEN: dict[type[RuleSettings], Callable[[Any, float], RuleSettings]] = {
    LengthSettings: _tighter_length,
    RepeatedWordSettings: _tighter_repeated_word,
    ScriptRatioSettings: _tighter_script_ratio,
    RepetitionSettings: _tighter_repetition,
}
