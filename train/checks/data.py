"""Checks of the rows and of their tokens: enough, filtered, distinct, apart, whole, and ending with a stop token.

Pure: reads rows, the run's lineage and the tokens' figures; writes nothing.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.advice import ADVISED_ROWS, DISTINCT_SHARE, FAIR_START, SAFE_KEEP_RATE
from pipeline.checks import Check, Status
from pipeline.filters_config import FiltersConfig
from pipeline.lineage import rules_asked
from pipeline.recipe import Recipe
from pipeline.records import Kept, question_text
from pipeline.train_config import TrainConfig
from train.checks.run import graded
from train.rows import Parts

if TYPE_CHECKING:
    from train.prepared import Prepared

DROPPED_SHARE = 0.1  # of the rows, too long: with more, the student never sees long answers
JUDGED_BY = ("model", "rubric", "min_score")  # of the judge's settings
LABELS = {  # what all rows must do, and the fix
    "vocabulary": (
        "have only tokens that the student knows",
        "take the tokenizer that belongs to the student, or resize its embeddings (resize_token_embeddings)",
    ),
    "eos": ("end with a stop token", "fix the student's chat template: the student would never learn to stop"),
    "masked": ("carry loss", "fix the student's chat template: it leaves the answer out"),
    "labels": (
        "carry loss on the whole answer and on nothing else",
        'fix the student\'s chat template, or, if it moves the system message, set student.system: ""',
    ),
}


def row_checks(parts: Parts, lineage: Mapping[str, Any], recipe: Recipe) -> Iterator[Check]:
    """What can be checked before a model is loaded. `lineage`: the run's."""
    rows, (low, high) = parts.all, ADVISED_ROWS
    prompts = lineage.get("generate", {}).get("prompts", {})
    samples = prompts.get("samples") if prompts.get("asked", 0) > prompts.get("distinct", 0) else None
    asked = (row.sample % samples if samples else row.sample for row in rows)  # a repeated question's numbers go on
    count, distinct = len(rows), len({hash((_key(row), sample)) for row, sample in zip(rows, asked, strict=True)})
    finding = f"{count:,} rows; {low:,} to {high:,} are advised, {FAIR_START} are a fair start"
    fix = "raise prompts.count" if count < low else "more rows than these seldom teach more"
    yield graded("rows", count, finding, passes=low <= count <= high, otherwise="note", fix=fix)

    share = distinct / count
    finding = f"{count - distinct:,} of {count:,} rows ask what another row asks (samples of a prompt count apart)"
    fix = "the same prompts give the same answers: add slots or values to the template"
    yield graded("prompts", share, finding, passes=share >= DISTINCT_SHARE, otherwise="warn", fix=fix)
    yield parts_check(parts)
    yield from _filters(lineage.get("filters"), lineage.get("generate", {}), recipe.filters, rows)

    yield from _reasoning(rows, recipe.train)
    cut = sum(row.finish_reason not in ("stop", "tool_calls") for row in rows)
    finding = f"{cut:,} of {count:,} answers were cut off (finish_reason is not stop)"
    fix = "the student learns to stop like that: filter with the rule finish_reason"
    yield graded("cut_off", cut, finding, passes=not cut, otherwise="note", fix=fix)


def _reasoning(rows: Sequence[Kept], config: TrainConfig) -> Iterator[Check]:
    """Whether there is reasoning to learn; without it a teacher that is read again must not have needed it."""
    keep, reads = config.reasoning == "keep", config.soft and config.kd.teacher != "stored"
    if not (keep or reads):
        return
    thoughts, count = sum(bool(row.reasoning) for row in rows), len(rows)
    finding, fix = f"{thoughts:,} of {count:,} answers have reasoning", "the student learns the others without any"
    if keep:
        status: Status = "note" if thoughts else "warn"
        yield graded("reasoning", thoughts, finding, passes=thoughts == count, otherwise=status, fix=fix)
    elif thoughts:
        finding += ", without which the teacher reads them now: where they begin, it says how it would begin to think"
        fix = "set train.reasoning: keep, or train.method: lora or full, which learn from the text alone"
        yield graded("reasoning", thoughts, finding, passes=False, otherwise="warn", fix=fix)


def token_checks(prepared: "Prepared", ids: Iterable[str], config: TrainConfig) -> Iterator[Check]:
    """What the tokens show that the trainer will use. `ids`: of the rows of training, then validation."""
    left = {part: len(rows) for part, rows in prepared.rows.items()}
    yield _length(prepared, ids, config)
    if config.method == "on_policy" and prepared.context < sys.maxsize and left["train"]:
        yield _sample_length(prepared, config)
    if prepared.faults is None:  # pairs: their prompts and their better answers were looked at when they were rows
        return
    yield from label_checks(prepared.faults, sum(left.values()))
    yield context_check(prepared.differing, left["train"])


def context_check(differing: int, prompts: int) -> Check:
    """A prompt must be rendered the same when the student is asked it and in the row that it learns from."""
    finding = f"{differing} of {prompts} training prompts are rendered otherwise when they are asked"
    fix = (
        "the student trains on contexts that it will not see: name a template in student.chat_template that renders "
        "both alike (one that begins a thought when it asks is made for train.reasoning: keep)"
    )
    return graded("context", differing, finding, passes=not differing, otherwise="warn", fix=fix)


def parts_check(parts: Parts) -> Check:
    """No question may be in two parts, in other spacing or case either."""
    train, validation, test = (set(map(_key, part)) for part in (parts.train, parts.validation, parts.test))
    shared = (train & validation) | (train & test) | (validation & test)
    finding = f"{len(train)} prompts train, {len(validation)} validate, {len(test)} test; none does two of these"
    if shared:
        first = next(row.id for row in parts.all if _key(row) in shared)
        finding = f"{len(shared)} prompts are in two of the parts train, validation and test (the first: {first})"
    fix = "the evaluation would measure memory: split by prompt"
    return graded("parts", len(shared), finding, passes=not shared, otherwise="fail", fix=fix)


def _key(row: Kept) -> int:
    """A hash of the row's prompt: 8 bytes, however long the prompt is."""
    return hash(question_text(row.messages))


def label_checks(faults: Mapping[str, Sequence[str]], rows: int) -> Iterator[Check]:
    """Known tokens, and EOS in the labels of every row; loss on the whole answer, and on nothing else."""
    for name, (what, fix) in LABELS.items():
        bad = faults.get(name, ())
        finding = "; ".join((f"{rows - len(bad):,} of {rows:,} rows {what}", *bad[:1]))
        yield graded(name, len(bad), finding, passes=not bad, otherwise="fail", fix=fix)


def _filters(
    section: Mapping[str, Any] | None, generate: Mapping[str, Any], config: FiltersConfig, rows: Sequence[Kept]
) -> Iterator[Check]:
    fix = "a teacher's faults are copied too: name filters.rules and run the filters"
    if not section:
        yield Check(name="filters", status="warn", value=0, finding="no filters were run on these rows", fix=fix)
        return
    rules, judged, answers = rules_asked(section), section["rows"], generate.get("completed", 0)
    finding = f"{rules} rules judged {judged:,} answers"
    if behind := answers > judged + section.get("bad_lines", 0):
        finding, fix = f"{finding}, and the run has {answers:,}", "run `python -m filters` again"
    if edited := _edited(section, config):
        finding = f"{finding}; since then filters.{edited[0].removesuffix('_digest')} was changed in the recipe"
        fix = "run `python -m filters` again, or give `train` the flags that `filters` had"
    yield graded("filters", rules, finding, passes=rules > 0 and not behind and not edited, otherwise="warn", fix=fix)

    rate, kept = section["keep_rate"], "of the answers were kept"
    # Asked by the last call, or by an earlier one that had more prompts: their answers are among the rows.
    prompts = max(generate.get("prompts", {}).get("distinct", 0), section.get("prompts") or 0)
    if section.get("select", "all") != "all" and prompts:  # one answer of several, at most
        rate, kept = len({row.prompt_id for row in rows}) / prompts, "of the prompts have an answer that was kept"
    finding = f"{rate:.1%} {kept}; {SAFE_KEEP_RATE:.0%} or more is safe"
    fix = "see filter_report.json for what was dropped; fix the prompts, or take a teacher that can do this"
    yield graded("keep_rate", rate, finding, passes=rate >= SAFE_KEEP_RATE, otherwise="warn", fix=fix)


def _edited(section: Mapping[str, Any], config: FiltersConfig) -> list[str]:
    """What the recipe says otherwise than when the filters ran; of the judge, only what decides."""
    now = config.model_dump(mode="json", include={"dedup", "judge", "select"})
    then, now = {**section}, {"rules_digest": config.rules_digest, **now}
    for one in (then, now):
        if judge := one.get("judge"):
            one["judge"] = {name: judge.get(name) for name in JUDGED_BY}
    return [name for name in now if name in then and then[name] != now[name]]


def _length(prepared: "Prepared", ids: Iterable[str], config: TrainConfig) -> Check:
    lengths = [*prepared.lengths["train"], *prepared.lengths["validation"]]
    longest, row = max(zip(lengths, ids, strict=True), key=lambda pair: pair[0])
    context = prepared.context
    limit, longer = f"train.max_length {config.max_length}", f"raise it to {min(longest, context)}"
    if context < config.max_length:
        limit = f"the {context} tokens that the student reads at once"
        longer = "take a student that reads more"
    most = min(config.max_length, context)
    over = sum(length > most for length in lengths)
    share = over / len(lengths)
    finding = f"{over} of {len(lengths)} rows are longer than {limit} (the longest, {row}, has {longest} tokens)"
    status: Status = "note" if share <= DROPPED_SHARE else "warn"
    fix = f"{longer}; they are left out now"
    if config.too_long == "refuse":
        status, fix = "fail", f"{longer}, or leave such rows out with train.too_long: drop"
    elif empty := [part for part, rows in prepared.rows.items() if not rows]:
        status, fix = "fail", f"no {empty[0]} row would be left; {longer}"
    return graded("length", share, finding, passes=not over, otherwise=status, fix=fix)


def _sample_length(prepared: "Prepared", config: TrainConfig) -> Check:
    """The student reads a prompt and its own answer to it at once."""
    prompt, answer, context = prepared.longest_prompt, config.on_policy.max_new_tokens, prepared.context
    finding = f"a sample has up to {prompt + answer} tokens (the longest prompt has {prompt}, "
    finding += f"train.on_policy.max_new_tokens is {answer}); the student reads {context} at once"
    fix = f"lower train.on_policy.max_new_tokens to {context - prompt}"
    passes = prompt + answer <= context
    return graded("sample_length", prompt + answer, finding, passes=passes, otherwise="fail", fix=fix)
