"""One pass over a run's answers: reads completions.jsonl; writes kept.jsonl, dropped.jsonl, filter_report.json and the
lineage section `filters`. The rules come first; the judge is asked about the answers that they let pass, and duplicates
are looked for among what is left, so that the better-scored one of two stays.

A record is written as the teacher's line stands, the new fields added at its end: only what is judged is decoded, and
nothing is written twice. The three files are staged beside the old ones and take their places together at the end.
"""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from filters.batch import read_batch
from filters.duplicates import dedup_rules, dedup_sources, deduplicate
from filters.judge import judge_rules, judge_survivors
from filters.report import FIRST_BAD_LINES, BadLine, FilterReport, make_report
from filters.rows import dropped_tail, kept_tail
from filters.ruleset import RuleSet, load_rules
from filters.stream import Chunk, process
from filters.tally import Tally
from filters.texts import doubtful_in_nfc
from pipeline.errors import DataError, DistillError
from pipeline.lineage import read_lineage, record_lineage, versions
from pipeline.recipe import DedupConfig, FiltersConfig, JudgeConfig, Recipe
from pipeline.rundir import RunDir


class LowKeepRate(DistillError):
    """Fewer answers were kept than the recipe's floor; the files are written."""


@dataclass
class Judged:
    """What is known of a chunk when its lines are written."""

    tally: Tally
    lines: int
    bad: list[tuple[int, str]]  # each line, numbered from 1 in the chunk, and what is wrong with it
    torn: bool


def recipe_rules(recipe: Recipe, recipe_path: Path) -> RuleSet:
    """The recipe's rules, checked; cheap enough to call before answers are asked for. Raises RecipeError."""
    return load_rules(recipe.filters, recipe_path, set(recipe.prompts.slots) if recipe.prompts.template else None)


def filter_run(recipe: Recipe, run: RunDir, recipe_path: Path, *, skip_bad: bool = False) -> FilterReport:
    """Judges every answer of a run and writes the outcome.

    Raises RecipeError for a wrong rule, DataError `path:line: reason` for a bad line (with `skip_bad` it is left out
    and counted) or where there is nothing to judge; nothing is overwritten then.
    """
    rules, dedup, judging = recipe_rules(recipe, recipe_path), recipe.filters.dedup, recipe.filters.judge
    sources = dedup_sources(dedup, run, recipe_path) if dedup else []
    tally, bad_lines, bad, torn, lines = Tally(), 0, list[BadLine](), False, 0
    size = completions_size(run.completions)
    read_lineage(run)  # it is added to at the end: if it cannot be read, say so before anything is replaced
    doubtful_in_nfc()  # made once, before processes are forked
    with _staged(run.kept, run.dropped, run.filter_report) as (kept, dropped, report_file), ExitStack() as stack:
        passed = stack.enter_context(_scratch(run.path / "survivors.jsonl.tmp")) if dedup or judging else kept
        with closing(process(run.completions, size, partial(judge, rules=rules), (passed, dropped))) as chunks:
            for judged in chunks:
                for number, reason in judged.bad:
                    line = BadLine(lines + number, reason)
                    if not skip_bad:
                        fix = "fix the line, or leave bad lines out with --skip-bad"
                        raise DataError(f"{run.completions}:{line.line}: {line.reason}; {fix}")
                    if len(bad) < FIRST_BAD_LINES:
                        bad.append(line)
                bad_lines += len(judged.bad)
                lines += judged.lines
                torn |= judged.torn  # a line that runs into the next chunk leaves that one empty
                tally.add(judged.tally)
        if not tally.kept + tally.dropped:
            what = f"none of its {lines} lines is a completion" if lines else "the file is empty"
            raise DataError(f"{run.completions}:1: {what}; run `python -m generate {recipe_path}` first")
        if judging:
            good = stack.enter_context(_scratch(run.path / "judged.jsonl.tmp")) if dedup else kept
            judge_survivors(Path(passed.name), recipe, run, (good, dropped), tally)
            passed = good
        if dedup:
            passed.flush()
            deduplicate(Path(passed.name), sources, dedup, run, (kept, dropped), tally)
        described = [*(rule.described() for rule in rules.rules), *judge_rules(judging), *dedup_rules(dedup)]
        report = make_report(tally, described, bad, bad_lines, torn=torn)
        report_file.write(report.encoded())
    record_lineage(run, "filters", _lineage(report, rules, dedup, judging))
    return report


def judge(chunk: Chunk, rules: RuleSet) -> tuple[Judged, tuple[memoryview, memoryview]]:
    """Runs every rule on every line of a chunk; also gives the lines of kept.jsonl and dropped.jsonl."""
    lines = read_batch(chunk)
    batch = lines.batch
    found = rules.all_reasons(batch)
    is_kept = np.ones(len(batch), np.bool_)
    is_kept[list(found)] = False
    tally, lengths = Tally(), batch.lengths()
    tally.count_kept(lengths[is_kept], batch.slots(is_kept))
    tally.count_dropped(lengths[~is_kept], batch.slots(~is_kept))
    tally.note_all(batch, found)
    kept, dropped = np.flatnonzero(is_kept), np.flatnonzero(~is_kept)  # in this order `found` has them, too
    kept_lines = batch.written(kept, [kept_tail({})] * len(kept))
    dropped_lines = batch.written(dropped, list(map(dropped_tail, found.values())))
    return Judged(tally, lines.count, lines.bad, lines.torn), (kept_lines, dropped_lines)


def check_keep_rate(
    report: FilterReport, config: FiltersConfig, recipe_path: Path, *, allow_low_keep: bool = False
) -> None:
    """Warns under filters.warn_keep_rate; raises LowKeepRate under filters.min_keep_rate unless it is allowed."""
    rate, floor = report.keep_rate, config.min_keep_rate
    if floor is not None and rate < floor and not allow_low_keep:
        raise LowKeepRate(
            f"keep rate {rate:.1%} is under filters.min_keep_rate {floor:.0%} ({recipe_path}); see which rules drop "
            "what above, fix the prompts or the rules, or go on with --allow-low-keep"
        )
    if rate < config.warn_keep_rate:
        print(
            f"warning: keep rate {rate:.1%} is under {config.warn_keep_rate:.0%} (filters.warn_keep_rate): "
            "is this teacher good enough at this task?",
            file=sys.stderr,
        )


def completions_size(completions: Path) -> int:
    """Bytes of the file. Raises DataError if there is none."""
    try:
        return completions.stat().st_size
    except FileNotFoundError:
        raise DataError(f"{completions}: no such file; run `python -m generate` first") from None


def _lineage(
    report: FilterReport, rules: RuleSet, dedup: DedupConfig | None, judging: JudgeConfig | None
) -> dict[str, object]:
    return {
        "rules": [rule.described() for rule in rules.rules],
        "dedup": dedup.model_dump(mode="json") if dedup else None,
        "judge": judging.model_dump(mode="json") if judging else None,
        "rows": report.rows,
        "kept": report.kept,
        "dropped": report.dropped,
        "keep_rate": report.keep_rate,
        "dropped_by_rule": {rule.rule: rule.dropped for rule in report.rules},
        "bad_lines": report.bad_lines,
        "versions": versions("msgspec", "pydantic", "py3langid", "numpy", "rensa"),
    }


@contextmanager
def _scratch(path: Path) -> Iterator[BinaryIO]:
    """A file that is gone when the block ends."""
    try:
        with path.open("wb") as file:
            yield file
    finally:
        path.unlink(missing_ok=True)


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
