"""One pass over a run's answers: stream → rules → exact duplicates → judge → near duplicates → files.

Reads completions.jsonl; writes kept.jsonl, dropped.jsonl, filter_report.json and the lineage section `filters`. The
judge is asked about one of several exact copies; near duplicates are dropped after it: the better-scored of two stays.
A record is written as the teacher's line stands, the new fields added at its end. The three files are staged beside the
old ones and take their places together at the end.
"""

import os
import signal
import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec

from filters.answer import as_answer
from filters.duplicates import EXACT, dedup_rules, dedup_sources, exact_copies, find_duplicates
from filters.judge import Judgement, count_scores, judge_reason, judge_rows, judge_rules, read_judgements
from filters.minhash import Array
from filters.report import FilterReport, make_report
from filters.rows import decode_completion, dropped_line, kept_line
from filters.ruleset import RuleSet, load_rules
from filters.sketches import Kind, Source, Text, joined, question_of, sketch, sketch_file
from filters.stream import LONGEST_LINE, Line, Work, in_blocks
from filters.tally import Tally
from pipeline.errors import DataError, DistillError
from pipeline.lineage import read_lineage, record_lineage, versions
from pipeline.recipe import DedupConfig, FiltersConfig, Recipe
from pipeline.records import Completion, Reason, said
from pipeline.rundir import RunDir


class LowKeepRate(DistillError):
    """Fewer answers were kept than the recipe's floor; the files are written."""


class Judged(NamedTuple):
    """What the rules made of a block of lines."""

    tally: Tally
    passed: bytes  # lines of completions.jsonl, or of kept.jsonl
    dropped: bytes  # lines of dropped.jsonl
    sketch: Array | None  # of the answers that passed; None if duplicates are not looked for


def recipe_rules(recipe: Recipe, recipe_path: Path) -> RuleSet:
    """The recipe's rules, checked; cheap enough to call before answers are asked for. Raises RecipeError."""
    return load_rules(recipe.filters, recipe_path, set(recipe.prompts.slots) if recipe.prompts.template else None)


def filter_run(recipe: Recipe, run: RunDir, recipe_path: Path, *, skip_bad: bool = False) -> FilterReport:
    """Judges every answer of a run and writes the outcome.

    Raises RecipeError for a wrong rule, DataError `path:line: reason` for a bad line (with `skip_bad` it is left out
    and counted) or if there is nothing to judge; nothing is overwritten then.
    """
    rules, dedup, judging = recipe_rules(recipe, recipe_path), recipe.filters.dedup, recipe.filters.judge
    sources = dedup_sources(dedup, run, recipe_path) if dedup else []
    if not run.completions.exists():
        raise DataError(f"{run.completions}: no such file; run `python -m generate` first")
    read_lineage(run)  # it is added to at the end: if it cannot be read, say so before anything is replaced
    survivors = run.path / "survivors.jsonl.tmp"  # the completions that pass the rules
    verdicts: dict[int, Judgement] = {}  # of survivors, numbered from 0
    gone: dict[int, Reason] = {}  # survivors that are dropped after all
    with ExitStack() as stack:
        kept, dropped, report_file = stack.enter_context(_staged(run.kept, run.dropped, run.filter_report))
        stack.callback(survivors.unlink, missing_ok=True)
        later = dedup is not None or judging is not None
        with survivors.open("wb") as passed:
            work = partial(judge_lines, rules=rules, dedup=dedup, later=later)
            tally, own = _apply_rules(run, work, passed if later else kept, dropped, skip_bad=skip_bad)
        if not tally.rows:
            what = f"none of its {tally.lines} lines is a completion" if tally.lines else "the file is empty"
            raise DataError(f"{run.completions}:1: {what}; run `python -m generate {recipe_path}` first")
        sketches = None
        if dedup:
            others = [(source, sketch_file(source, dedup)) for source in sources]
            sketches = joined([*others, (Source(survivors, Kind.OWN, "this run"), own)], dedup)
        if judging:
            copies = exact_copies(sketches, dedup) if dedup and sketches else {}
            verdicts, gone = _ask_judge(recipe, run, survivors, copies, tally)
        if dedup and sketches:
            gone |= find_duplicates(sketches, dedup, gone, _scores(verdicts, run, survivors))
        _write(survivors, gone, verdicts, kept, dropped, tally)
        described = [*(rule.described() for rule in rules.rules), *judge_rules(judging), *dedup_rules(dedup)]
        report = make_report(tally, described)
        report_file.write(report.encoded())
    record_lineage(run, "filters", _lineage(report, rules, recipe.filters))
    return report


def _apply_rules(
    run: RunDir, work: Work[Judged], passed: BinaryIO, dropped: BinaryIO, *, skip_bad: bool
) -> tuple[Tally, list[Array]]:
    """Writes the answers that every rule lets pass to the first file, the others with their reasons to the second."""
    tally, sketches = Tally(), list[Array]()
    with closing(in_blocks(run.completions, work)) as blocks:
        for block in blocks:
            tally.add(block.tally)
            if tally.first_bad_lines and not skip_bad:
                bad = tally.first_bad_lines[0]
                fix = "fix the line, or leave bad lines out with --skip-bad"
                raise DataError(f"{run.completions}:{bad.line}: {bad.reason}; {fix}")
            if block.sketch is not None:
                block.sketch["start"] += passed.tell()
                sketches.append(block.sketch)
            passed.write(block.passed)
            dropped.write(block.dropped)
    return tally, sketches


def judge_lines(lines: Iterator[Line], rules: RuleSet, dedup: DedupConfig | None, *, later: bool) -> Judged:
    """Runs every rule on every line of a block. `later`: other stages follow, so what passes is not a kept row yet."""
    tally, passed, dropped = Tally(), bytearray(), bytearray()
    texts: list[Text] = []
    for _, line in lines:
        tally.lines += 1
        if line is None:
            tally.count_bad(f"over {LONGEST_LINE >> 20} MiB in one line: no answer is so long")
            continue
        if line.isspace():
            continue
        try:
            row = decode_completion(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            if line.endswith(b"\n") or isinstance(error, msgspec.ValidationError):
                tally.count_bad(str(error))
            else:
                tally.torn = True
            continue
        answer = as_answer(row)
        reasons = rules.reasons(answer)
        tally.count(row.id, answer, reasons)
        if reasons:
            dropped += dropped_line(line, reasons)
            continue
        if dedup:
            texts.append(Text(row.id, len(passed), said(row), question_of(row.messages)))
        passed += line.rstrip() + b"\n" if later else kept_line(line, {})
    return Judged(tally, bytes(passed), bytes(dropped), sketch(texts, dedup) if dedup else None)


def _rows(survivors: Path, left_out: Container[int] = ()) -> Iterator[tuple[int, Completion]]:
    """The survivors, numbered from 0, without some of them."""
    with survivors.open("rb") as file:
        for number, line in enumerate(file):
            if number not in left_out:
                yield number, decode_completion(line)


def _ask_judge(
    recipe: Recipe, run: RunDir, survivors: Path, copies: Mapping[int, int | None], tally: Tally
) -> tuple[dict[int, Judgement], dict[int, Reason]]:
    """The judge's verdicts by row, and the rows dropped for them. A copy has the verdict of the row it is a copy of."""
    assert recipe.filters.judge is not None
    by_id = judge_rows(recipe, run, (row for _, row in _rows(survivors, copies)))
    verdicts: dict[int, Judgement] = {}
    gone: dict[int, Reason] = {}
    for number, row in _rows(survivors, copies):
        verdicts[number] = by_id[row.id]
        count_scores(verdicts[number], tally.scores)
        if reason := judge_reason(verdicts[number], recipe.filters.judge):
            gone[number] = reason
    for copy, original in copies.items():
        if original is not None:
            verdicts[copy] = verdicts[original]
            if original in gone:
                gone[copy] = Reason(rule=EXACT, what="answer", of=verdicts[original].id)
    return verdicts, gone


def _scores(verdicts: Mapping[int, Judgement], run: RunDir, survivors: Path) -> dict[int, int]:
    """The judge's scores by row; of an earlier call if this one asked no judge."""
    if not verdicts and (earlier := read_judgements(run)):
        verdicts = {number: earlier[row.id] for number, row in _rows(survivors) if row.id in earlier}
    return {number: verdict.score for number, verdict in verdicts.items() if verdict.score is not None}


def _write(
    survivors: Path,
    gone: Mapping[int, Reason],
    verdicts: Mapping[int, Judgement],
    kept: BinaryIO,
    dropped: BinaryIO,
    tally: Tally,
) -> None:
    """Writes each survivor where it belongs, and moves the counts of those that are gone."""
    with survivors.open("rb") as file:
        for number, line in enumerate(file):
            if number in gone:
                row, reason = decode_completion(line), gone[number]
                tally.move_to_dropped(row.id, as_answer(row), reason)
                dropped.write(dropped_line(line, [reason]))
            else:
                kept.write(kept_line(line, verdicts[number].scores if number in verdicts else {}))


def check_keep_rate(
    report: FilterReport, config: FiltersConfig, recipe_path: Path, *, allow_low_keep: bool = False
) -> None:
    """Warns under filters.warn_keep_rate; raises LowKeepRate under filters.min_keep_rate unless it is allowed."""
    rate, floor = report.keep_rate, config.min_keep_rate
    if floor is not None and rate < floor and not allow_low_keep:
        raise LowKeepRate(
            f"keep rate {rate:.1%} is under filters.min_keep_rate {floor:.0%} ({recipe_path}); see above which rules "
            "drop what, fix the prompts or the rules, or go on with --allow-low-keep"
        )
    if rate < config.warn_keep_rate:
        print(
            f"warning: keep rate {rate:.1%} is under {config.warn_keep_rate:.0%} (filters.warn_keep_rate): "
            "is this teacher good enough at this task?",
            file=sys.stderr,
        )


def _lineage(report: FilterReport, rules: RuleSet, config: FiltersConfig) -> dict[str, object]:
    counts = {name: getattr(report, name) for name in ("rows", "kept", "dropped", "keep_rate", "bad_lines")}
    return {
        "rules": [rule.described() for rule in rules.rules],
        **config.model_dump(mode="json", include={"dedup", "judge"}),
        **counts,
        "dropped_by_rule": {rule.rule: rule.dropped for rule in report.rules},
        "versions": versions("msgspec", "pydantic", "py3langid", "numpy", "rensa"),
    }


@contextmanager
def _staged(*paths: Path) -> Iterator[Sequence[BinaryIO]]:
    """Opens files that take the places of `paths`, all of them, when the block ends well; none otherwise.

    All are on disk before the first is renamed, and no signal comes between the renames.
    """
    temporaries = [path.with_name(path.name + ".tmp") for path in paths]
    try:
        with ExitStack() as stack:
            files = [stack.enter_context(temporary.open("wb")) for temporary in temporaries]
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            for temporary, path in zip(temporaries, paths, strict=True):
                temporary.replace(path)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
    except OSError as error:
        raise DistillError(
            f"{error.filename or paths[0].parent}: {error.strerror}; no old file was replaced"
        ) from error
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
