"""One pass over a run's answers: rules → `agrees` → exact duplicates → judge → near duplicates → selection → files.

Reads completions.jsonl, and prompts.jsonl for references and columns that are newer; writes kept.jsonl, dropped.jsonl,
filter_report.json, preferences.jsonl where the recipe wants it, and the lineage section `filters`. The judge is asked
about one of several exact copies; near duplicates are dropped after it: the better-scored of two stays. A record is
written as the teacher's line stands, unless its prompt has other values now, with the new fields at its end. The files
are staged beside the old ones and take their places together at the end.
"""

import sys
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import msgspec
import numpy as np

from filters.answer import UNVERIFIED, as_answer
from filters.blocks import Block, check_lines
from filters.duplicates import (
    EXACT,
    Search,
    Searching,
    dedup_rules,
    dedup_sources,
    exact_copies,
    find_duplicates,
)
from filters.fresh import fresh_values
from filters.groups import AGREES, SAMPLE, SELECT, count_votes, hash_of_prompt, not_selected, outvoted, solved
from filters.judgements import Judgement, count_scores, judge_reason, judge_rules, read_judgements
from filters.minhash import Array
from filters.preferences import write_preferences
from filters.report import FilterReport, PromptCounts, make_report
from filters.rows import as_dropped, as_kept, decode_kept, staged
from filters.ruleset import RuleSet, load_rules
from filters.sketches import Kind, Source, joined, sketch_file
from filters.stream import in_blocks
from filters.tally import Tally
from pipeline.errors import DataError, DistillError
from pipeline.filters_config import DedupConfig, FiltersConfig
from pipeline.lineage import encode_lineage, read_lineage, versions, with_section
from pipeline.progress import reporting
from pipeline.recipe import Recipe
from pipeline.records import Kept, Message, Reason, encode_line
from pipeline.rundir import RunDir, encode_json

if TYPE_CHECKING:
    from filters.judge import Judge

UNSOLVED_IDS = 100  # named in the report


class LowKeepRate(DistillError):
    """Fewer answers were kept than the recipe's floor; the files are written."""


class Machine(NamedTuple):
    """Where the work that takes long is done: here, or on a cluster (scale.filtering). The outcome is the same."""

    in_blocks: Callable[..., Generator[Block, None, None]] = in_blocks
    sketch_file: Callable[[Source, DedupConfig], list[Array]] = sketch_file
    search: Searching = Search


@dataclass
class Survivors:
    """The answers that every rule lets pass, numbered from 0, and what the later stages say of them."""

    path: Path  # as lines of kept.jsonl
    samples: Array  # of filters.groups.SAMPLE
    gone: dict[int, Reason] = field(default_factory=dict)  # dropped after all
    shares: Array | None = None  # of their prompt's answers that say the same; None: `agrees` is not asked
    verdicts: dict[int, Judgement] = field(default_factory=dict)

    @property
    def alive(self) -> Array:
        alive = np.ones(len(self.samples), bool)
        alive[[*self.gone]] = False
        return alive

    @property
    def quality(self) -> Array:
        """How good each is: the mean of the judge's scores, or of the verifiers' if no judge was asked."""
        quality = self.samples["score"].copy()
        for number, verdict in self.verdicts.items():
            quality[number] = sum(verdict.scores.values()) / max(len(verdict.scores), 1)
        return quality

    def scores(self, number: int) -> dict[str, float]:
        """What kept.jsonl says of one, besides the scores of the rules."""
        agrees = {} if self.shares is None else {AGREES: float(self.shares[number])}
        return agrees | (self.verdicts[number].scores if number in self.verdicts else {})

    def rows(self, left_out: Container[int] = ()) -> Iterator[tuple[int, Kept]]:
        """The survivors with their numbers, without some of them."""
        with self.path.open("rb") as file:
            for number, line in enumerate(file):
                if number not in left_out:
                    yield number, decode_kept(line)


def recipe_rules(recipe: Recipe, recipe_path: Path) -> RuleSet:
    """The recipe's rules, checked; cheap enough to call before answers are asked for. Raises RecipeError."""
    return load_rules(recipe.filters, recipe_path, set(recipe.prompts.slots) if recipe.prompts.template else None)


def filter_run(
    recipe: Recipe, run: RunDir, recipe_path: Path, *, skip_bad: bool = False, machine: Machine | None = None
) -> FilterReport:
    """Judges every answer of a run and writes the outcome.

    Raises RecipeError for a wrong rule, DataError `path:line: reason` for a bad line (with `skip_bad` it is left out
    and counted) or if there is nothing to judge; nothing is overwritten then.
    """
    rules, config, machine = recipe_rules(recipe, recipe_path), recipe.filters, machine or Machine()
    dedup = _dedup(config, rules)
    if not run.completions.exists():
        raise DataError(f"{run.completions}: no such file; run `python -m generate` first")
    read_lineage(run)  # it is added to at the end: if it cannot be read, say so before anything is replaced
    judge = _judge_of(recipe, run)
    wanted, stale = ([run.preferences], []) if config.preferences else ([], [run.preferences])
    path = run.path / "survivors.jsonl.tmp"
    with ExitStack() as stack:
        sources = dedup_sources(dedup, run, recipe_path, stack) if dedup else []
        staging = staged([run.kept, run.dropped, run.filter_report, run.lineage, *wanted], stale)
        kept, dropped, report_file, lineage_file, *preferences = stack.enter_context(staging)
        stack.callback(path.unlink, missing_ok=True)
        fresh = stack.enter_context(fresh_values(run, recipe.prompts))
        compared = rules.agrees is not None or config.select == "agreed"  # the answers to a prompt, by their results
        later = bool(rules.agrees or dedup or config.judge or config.select != "all")  # a stage follows the rules
        work = partial(check_lines, rules=rules, dedup=dedup, fresh=fresh, results=compared)
        output = path.open("wb") if later else nullcontext(kept)
        with closing(machine.in_blocks(run.completions, work, slow=rules.slow)) as blocks, output as passed:
            tally, own, samples = _gather(blocks, passed, dropped, None if skip_bad else run.completions)
        if not tally.rows:
            what = f"none of its {tally.lines} lines is a completion" if tally.lines else "the file is empty"
            raise DataError(f"{run.completions}:1: {what}; run `python -m generate {recipe_path}` first")
        survivors = Survivors(Path(passed.name), samples[samples["passed"]])
        votes = count_votes(samples if compared else samples[:0])  # it takes some 80 bytes per answer
        if rules.agrees:
            survivors.gone = outvoted(votes, rules.agrees)
            survivors.shares = votes.same / votes.total
        sketches = None
        if dedup:
            others = [(source, machine.sketch_file(source, dedup)) for source in sources]
            survived = stack.enter_context(path.open("rb"))
            sketches = joined([*others, (Source(survived, Kind.OWN, "this run"), own)], dedup)
        if judge:
            _ask_judge(judge, run, survivors, exact_copies(sketches, survivors.gone) if sketches else {}, tally)
        if sketches:
            scores = _judge_scores(survivors, run)
            survivors.gone |= find_duplicates(sketches, survivors.gone, scores, machine.search)
        survivors.gone |= not_selected(survivors.samples, survivors.alive, config.select, survivors.quality, votes)
        if later:
            _write(survivors, kept, dropped, tally)
        for file in (kept, dropped):
            file.flush()  # they are read again
        for pairs in preferences:
            good, wrong = survivors.samples[survivors.alive], samples[samples["wrong"]]
            sides = (Path(kept.name), good), (Path(dropped.name), wrong)
            write_preferences(pairs, config.preferences, *sides, recipe.prompts)
        labels = _labels(rules, config, dedup, tally)
        report = make_report(tally, labels, _prompts(samples, survivors, Path(dropped.name)))
        report_file.write(encode_json(report))
        lineage_file.write(encode_lineage(with_section(run, "filters", _lineage(report, rules, config))))
    return report


def _labels(rules: RuleSet, config: FiltersConfig, dedup: DedupConfig | None, tally: Tally) -> list[dict[str, Any]]:
    """All that a reason may be under, each with its settings."""
    said = any(UNVERIFIED in labels for labels in tally.outcomes)  # a function of the user's may say so, too
    unverified = [{"rule": UNVERIFIED}] if rules.verifies or said else []
    last = [] if config.select == "all" else [{"rule": SELECT, "select": config.select}]
    return [*rules.described(), *unverified, *judge_rules(config.judge), *dedup_rules(dedup), *last]


def _dedup(config: FiltersConfig, rules: RuleSet) -> DedupConfig | None:
    """How duplicates are looked for. Verified answers are compared with their question, if the recipe does not say."""
    if config.dedup is None:
        return None
    return config.dedup.model_copy(update={"of": config.dedup.of or ("row" if rules.verifies else "answer")})


def _gather(
    blocks: Iterable[Block], passed: BinaryIO, dropped: BinaryIO, strict: Path | None
) -> tuple[Tally, list[Array], Array]:
    """Writes the answers that every rule lets pass to the first file, the others with their reasons to the second.

    `strict`: the file in which a bad line is an error; None: bad lines are left out. Returns the tally, the sketches of
    the answers that passed, and a row of filters.groups.SAMPLE for each answer.
    """
    tally, sketches, samples = Tally(), list[Array](), [np.empty(0, SAMPLE)]
    for block in reporting(blocks, lambda _: f"{tally.rows:,} answers so far, {tally.kept:,} pass the rules"):
        tally.add(block.tally)
        if tally.first_bad_lines and strict:
            bad = tally.first_bad_lines[0]
            fix = "fix the line, or leave bad lines out with --skip-bad"
            raise DataError(f"{strict}:{bad.line}: {bad.reason}; {fix}")
        samples.append(block.samples.copy())  # what another node sends cannot be written to
        samples[-1]["start"] += np.where(block.samples["passed"], passed.tell(), dropped.tell())
        if block.sketch is not None:
            sketches.append(block.sketch.copy())
            sketches[-1]["start"] += passed.tell()
        passed.write(block.passed)
        dropped.write(block.dropped)
    return tally, sketches, np.concatenate(samples)


def _judge_of(recipe: Recipe, run: RunDir) -> "Judge | None":
    """The judge, checked: the rules before it may take hours."""
    if recipe.filters.judge is None:
        return None
    from filters.judge import Judge  # here: the client is slow to import, and most calls ask no judge

    judge = Judge.of_filters(recipe, run)
    judge.check()
    return judge


def _ask_judge(
    judge: "Judge", run: RunDir, survivors: Survivors, copies: Mapping[int, int | None], tally: Tally
) -> None:
    """Asks about the survivors that are still there. A copy has the verdict of the row it is a copy of."""
    from filters.judge import judge_rows

    left_out = {*copies, *survivors.gone}
    rows = reporting(survivors.rows(left_out), "{:,} answers looked at for the judge so far".format)
    by_id = judge_rows(judge, run, (row for _, row in rows))
    for number, row in survivors.rows(left_out):
        survivors.verdicts[number] = verdict = by_id[row.id]
        count_scores(verdict, tally.scores)
        if reason := judge_reason(verdict, judge.config):
            survivors.gone[number] = reason
    for copy, original in copies.items():
        if original is not None:
            survivors.verdicts[copy] = verdict = survivors.verdicts[original]
            if original in survivors.gone:
                survivors.gone[copy] = Reason(rule=EXACT, what="answer", of=verdict.id)


def _judge_scores(survivors: Survivors, run: RunDir) -> dict[int, int]:
    """The judge's scores by row; of an earlier call if this one asked no judge."""
    verdicts = survivors.verdicts
    if not verdicts and (earlier := read_judgements(run)):
        verdicts = {number: earlier[row.id] for number, row in survivors.rows() if row.id in earlier}
    return {number: verdict.score for number, verdict in verdicts.items() if verdict.score is not None}


def _write(survivors: Survivors, kept: BinaryIO, dropped: BinaryIO, tally: Tally) -> None:
    """Writes each survivor where it belongs, and moves the counts of those that are gone."""
    with survivors.path.open("rb") as file:
        for number, line in reporting(enumerate(file), "{:,} answers written so far".format):
            if reason := survivors.gone.get(number):
                row = decode_kept(line)
                tally.move_to_dropped(row.id, as_answer(row), reason)
                dropped.write(encode_line(as_dropped(row, reason)))
                continue
            survivors.samples["start"][number] = kept.tell()
            if more := survivors.scores(number):
                row = decode_kept(line)
                line = encode_line(as_kept(row, row.scores | more))
            kept.write(line)


def _prompts(samples: Array, survivors: Survivors, dropped: Path) -> PromptCounts:
    """What became of the prompts; the ids of those without an answer that passes are looked up in dropped.jsonl."""
    prompts, answers = np.unique(samples["prompt"], return_counts=True)
    kept = len(np.unique(survivors.samples["prompt"][survivors.alive]))
    unsolved, pass_at = solved(samples)
    wanted, ids = set(unsolved.tolist()), list[str]()
    with dropped.open("rb") as file:
        for line in file:
            if not wanted or len(ids) == UNSOLVED_IDS:
                break
            row = _decode_asked(line)
            if (found := hash_of_prompt(row.prompt_id, row.messages)) in wanted:
                wanted.remove(found)
                ids.append(row.prompt_id)
    counts = len(prompts), kept, kept / len(prompts), int(answers.max())
    return PromptCounts(*counts, pass_at, len(unsolved), ids)


class _Asked(msgspec.Struct):
    prompt_id: str
    messages: list[Message]


_decode_asked = msgspec.json.Decoder(_Asked).decode


def check_keep_rate(
    report: FilterReport, config: FiltersConfig, recipe_path: Path, *, allow_low_keep: bool = False
) -> None:
    """Warns under filters.warn_keep_rate; raises LowKeepRate under filters.min_keep_rate unless it is allowed.

    Where one answer to a prompt stays, the rate is that of prompts.
    """
    rate, floor = report.useful_share, config.min_keep_rate
    what = "keep rate" if config.select == "all" else "keep rate by prompt"
    if floor is not None and rate < floor and not allow_low_keep:
        raise LowKeepRate(
            f"{what} {rate:.1%} is under filters.min_keep_rate {floor:.0%} ({recipe_path}); see above which rules "
            "drop what, fix the prompts or the rules, or go on with --allow-low-keep"
        )
    if rate < config.warn_keep_rate:
        most = max((rule for rule in report.rules if rule.rule != SELECT), key=lambda rule: rule.dropped)
        print(
            f"warning: {what} {rate:.1%} is under {config.warn_keep_rate:.0%} (filters.warn_keep_rate); {most.rule} "
            f"drops most, {most.dropped:,} answers: is it right, and is this teacher good enough at this task?",
            file=sys.stderr,
        )


def _lineage(report: FilterReport, rules: RuleSet, config: FiltersConfig) -> dict[str, object]:
    counts = {name: getattr(report, name) for name in ("rows", "kept", "dropped", "keep_rate", "bad_lines")}
    return {
        "rules": rules.described(),
        "rules_digest": config.rules_digest,
        **config.model_dump(mode="json", include={"dedup", "judge", "select"}),
        **counts,
        "prompts": report.prompts.prompts,
        "dropped_by_rule": {rule.rule: rule.dropped for rule in report.rules},
        "versions": versions("msgspec", "pydantic", "py3langid", "numpy", "rensa"),
    }
