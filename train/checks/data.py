"""Checks of the rows and of their tokens: enough, filtered, distinct, apart, whole, and ending with a stop token.

Pure: reads rows, the run's lineage and the tokens' figures; writes nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.advice import ADVISED_ROWS, DISTINCT_SHARE, FAIR_START, SAFE_KEEP_RATE
from pipeline.checks import Check, Status
from pipeline.records import Kept
from pipeline.train_config import TrainConfig
from train.rows import Parts, prompt_text
from train.tokens import LabelFaults

if TYPE_CHECKING:
    from train.trainer import Prepared

DROPPED_SHARE = 0.1  # of the rows, too long: with more, the student never sees long answers


def row_checks(parts: Parts, lineage: Mapping[str, Any]) -> Iterator[Check]:
    """What can be checked before a model is loaded. `lineage`: the run's."""
    rows = parts.all
    yield _rows(len(rows))
    yield _prompts(rows)
    yield parts_check(parts)
    yield from _filters(lineage.get("filters"))
    yield _cut_off(rows)


def token_checks(prepared: "Prepared", parts: Parts, config: TrainConfig) -> Iterator[Check]:
    """What the tokens show that the trainer will use: those of training and validation."""
    ids = [row.id for row in (*parts.train, *parts.validation)]
    left = {part: len(rows) for part, rows in prepared.rows.items()}
    yield _length(ids, [*prepared.lengths["train"], *prepared.lengths["validation"]], left, config)
    yield from label_checks(prepared.faults, sum(left.values()))
    yield _context(prepared.differing, left["train"])


def parts_check(parts: Parts) -> Check:
    """No question may be in two parts, in other spacing or case either."""
    train, validation, test = (set(map(prompt_text, part)) for part in (parts.train, parts.validation, parts.test))
    if not (shared := (train & validation) | (train & test) | (validation & test)):
        finding = f"{len(train)} prompts train, {len(validation)} validate, {len(test)} test; none does two of these"
        return Check(name="parts", status="pass", value=0, finding=finding)
    first = next(row for row in parts.all if prompt_text(row) in shared)
    finding = f"{len(shared)} prompts are in two of the parts train, validation and test (the first: {first.id})"
    fix = "the evaluation would measure memory: split by prompt"
    return Check(name="parts", status="fail", value=len(shared), finding=finding, fix=fix)


def label_checks(faults: LabelFaults, rows: int) -> Iterator[Check]:
    """EOS in the labels of every row; loss on the whole answer, and on nothing else."""
    named = {
        "eos": ("end with a stop token", "fix the student's chat template: the student would never learn to stop"),
        "masked": ("carry loss", "fix the student's chat template: it leaves the answer out"),
        "labels": ("carry loss on the whole answer and on nothing else", "fix the student's chat template"),
    }
    for name, (what, fix) in named.items():
        if bad := faults.counts.get(name, 0):
            finding = f"{rows - bad:,} of {rows:,} rows {what}; {faults.first[name]}"
            yield Check(name=name, status="fail", value=bad, finding=finding, fix=fix)
        else:
            yield Check(name=name, status="pass", value=0, finding=f"all {rows:,} rows {what}")


def _rows(count: int) -> Check:
    low, high = ADVISED_ROWS
    finding = f"{count:,} rows; {low:,} to {high:,} are advised, {FAIR_START} are a fair start"
    if low <= count <= high:
        return Check(name="rows", status="pass", value=count, finding=finding)
    fix = "raise prompts.count" if count < low else "more rows than these seldom teach more"
    return Check(name="rows", status="note", value=count, finding=finding, fix=fix)


def _prompts(rows: Sequence[Kept]) -> Check:
    distinct = len({prompt_text(row) for row in rows})
    share = distinct / len(rows)
    finding = f"{distinct:,} distinct prompts in {len(rows):,} rows ({share:.0%})"
    if share >= DISTINCT_SHARE:
        return Check(name="prompts", status="pass", value=share, finding=finding)
    fix = "the same prompts give the same answers: add slots or values to the template"
    return Check(name="prompts", status="warn", value=share, finding=finding, fix=fix)


def _filters(section: Mapping[str, Any] | None) -> Iterator[Check]:
    rules = len(section["rules"]) + bool(section.get("dedup")) + bool(section.get("judge")) if section else 0
    if not section or not rules:
        finding = "the filters had no rule" if section else "no filters were run on these rows"
        fix = "a teacher's faults are copied too: name filters.rules and run the filters"
        yield Check(name="filters", status="warn", value=0, finding=finding, fix=fix)
    else:
        finding = f"{rules} rules judged {section['rows']:,} answers"
        yield Check(name="filters", status="pass", value=rules, finding=finding)
    if not section:
        return
    rate = section["keep_rate"]
    finding = f"{rate:.1%} of the answers were kept; {SAFE_KEEP_RATE:.0%} or more is safe"
    if rate >= SAFE_KEEP_RATE:
        yield Check(name="keep_rate", status="pass", value=rate, finding=finding)
    else:
        fix = "see filter_report.json for what was dropped; fix the prompts, or take a teacher that can do this"
        yield Check(name="keep_rate", status="warn", value=rate, finding=finding, fix=fix)


def _cut_off(rows: Sequence[Kept]) -> Check:
    cut = sum(row.finish_reason != "stop" for row in rows)
    if not cut:
        return Check(name="cut_off", status="pass", value=0, finding="no answer was cut off")
    finding = f"{cut:,} of {len(rows):,} answers were cut off (finish_reason is not stop): the student learns that"
    return Check(name="cut_off", status="note", value=cut, finding=finding, fix="filter with the rule finish_reason")


def _length(ids: Sequence[str], lengths: Sequence[int], left: Mapping[str, int], config: TrainConfig) -> Check:
    over = sum(length > config.max_length for length in lengths)
    longest = max(lengths)
    limit = f"train.max_length {config.max_length}"
    if not over:
        finding = f"no row is longer than {limit} (the longest has {longest} tokens)"
        return Check(name="length", status="pass", value=0, finding=finding)
    share = over / len(lengths)
    worst = f"the longest, {ids[lengths.index(longest)]}, has {longest} tokens"
    finding = f"{over} of {len(lengths)} rows are longer than {limit} ({worst})"
    status: Status = "note" if share <= DROPPED_SHARE else "warn"
    fix = f"raise it to {longest}; they are left out now"
    if config.too_long == "refuse":
        status, fix = "fail", f"raise it to {longest}, or leave such rows out with train.too_long: drop"
    elif empty := [part for part, rows in left.items() if not rows]:
        status, fix = "fail", f"no {empty[0]} row would be left; raise it"
    return Check(name="length", status=status, value=share, finding=finding, fix=fix)


def _context(differing: int, rows: int) -> Check:
    if not differing:
        finding = "the student trains on every prompt as it will be asked"
        return Check(name="context", status="pass", value=0, finding=finding)
    finding = (
        f"in {differing} of {rows} rows the student's chat template renders a prompt before its answer otherwise than "
        "a prompt that asks for one: the student trains on a context that it will not see"
    )
    return Check(name="context", status="warn", value=differing, finding=finding, fix="fix the chat template")
