"""The experiments: what each one asks, and how the rows of its arms are made.

Everything that arms are compared on is set apart first: the test part of all their sources. The rest becomes
their rows. So all arms of an experiment are scored on the same rows, which none of them was trained on. An arm is an
ordinary run directory; it trains and is evaluated with the flags named here on top of the user's own.
"""

import json
import random
import shutil
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from math import ceil, nextafter
from pathlib import Path
from typing import Any

import msgspec

from chain.stages import judges, stage, teacher
from evaluate.measure.results import answer_row
from evaluate.run import say
from experiments.teachers import check_all_asked, check_judges, second_teacher
from filters.duplicates import DEDUP_RULES
from filters.rows import filtered_rows
from filters.run import recipe_rules
from filters.trials import parse_shares
from generate.journal import read_journal
from generate.prompts import PromptRow, make_prompt
from generate.run import pending
from pipeline.errors import DataError, UsageError
from pipeline.lineage import read_lineage, write_lineage
from pipeline.prompts_config import PromptsConfig
from pipeline.recipe import Recipe, load_recipe
from pipeline.records import (
    Completion,
    Dropped,
    Json,
    Kept,
    Message,
    Prompt,
    asked_fields,
    encode_line,
    question_text,
    read_jsonl,
)
from pipeline.rundir import CHAIN_LOCK, RunDir, replacing, write_jsonl
from pipeline.turns_and_tools import Turn
from train.checks.before import check_followed
from train.rows import part_rows, read_rows
from train.run import rows_to_train


@dataclass(frozen=True)
class Setup:
    """What the user asked for."""

    recipe: Recipe
    path: Path  # of the recipe
    flags: list[str]  # recipe values, as given
    base: RunDir  # the run that the experiment is about
    folder: Path  # of the experiment
    options: Namespace
    text: bytes  # of the recipe, when the experiment began
    read: dict[Path, int] = field(default_factory=dict)  # when each kept.jsonl that was read had last changed

    def stage(self, name: str, run: RunDir, *flags: str) -> int:
        """Runs a stage with the user's flags and further ones. Returns 0, or 4 where some requests failed for good.

        Raises UsageError if the recipe's file has changed since the experiment began, StageFailed if the stage failed.
        """
        if self.path.read_bytes() != self.text:
            raise UsageError(
                f"{self.path}: changed since the experiment began, so its arms would differ in more than they should; "
                "the same command goes on, and does again what the change touches"
            )
        with run.locked(new=True, name=CHAIN_LOCK):  # as of a chain: the stage waits for one that was started by hand
            return stage(name, run, self.path, [*self.flags, *flags])

    def rows(self, run: RunDir) -> Sequence[Kept]:
        """The kept rows of a run that arms are made from."""
        self.read[run.kept] = run.kept.stat().st_mtime_ns
        return read_rows(run)

    def recipe_of(self, arm: "Arm") -> Recipe:
        """The recipe with the arm's values."""
        return load_recipe(self.path, [*self.flags, *arm.flags])


@dataclass(frozen=True)
class Arm:
    """One of the trainings that are compared."""

    name: str
    run: RunDir
    flags: list[str]  # on top of the user's


@dataclass(frozen=True)
class Design:
    """Arms whose rows are on disk, and the test rows that they are scored on, by source."""

    arms: list[Arm]
    sources: Mapping[str, Sequence[Kept]]
    note: str = ""  # what a reader of the results must know


@dataclass(frozen=True)
class Experiment:
    """One line of the table below."""

    question: str
    prepare: Callable[[Setup], Design]
    needs: Mapping[str, str] = field(default_factory=dict)  # option: what it is for


def _keep_rate(setup: Setup) -> Design:
    """The best shares of all answers except those to test prompts; answers that the rules drop are ranked, too."""
    shares = parse_shares("--shares", setup.options.shares)
    base = _answered(setup, setup.base)
    test = part_rows(setup.rows(base), setup.recipe.prompts).test
    pool = _pool(setup, base, test)
    setup.stage("filters", pool, "--sweep", ",".join(map(str, shares)))
    kept = {f"keep-{share}": RunDir(pool.path / "sweep" / str(share)) for share in shares}
    flags = ["--train.too_long", "drop", *_accepting(setup, "keep_rate", "filters", "length")]
    arms = [_arm(setup, name, share, test, flags) for name, share in kept.items()]
    note = "every arm sees its rows equally often"
    if setup.options.match == "steps":
        rows = {arm.name: _rows_to_train(setup, arm) for arm in arms}
        epochs = matched_epochs(rows, setup.recipe.train.batch_size, setup.recipe.train.epochs)
        arms = [replace(arm, flags=[*arm.flags, "--train.epochs", repr(epochs[arm.name])]) for arm in arms]
        note = "every arm makes as many steps as the largest does in the recipe's epochs"
    return Design(arms, {"": test}, f"{note} (--match {setup.options.match})")


def _rows_to_train(setup: Setup, arm: Arm) -> int:
    """The rows that make an arm's steps. Where there are none, its training says so."""
    return max(1, rows_to_train(setup.recipe_of(arm), arm.run))


def matched_epochs(rows: Mapping[str, int], batch_size: int, epochs: float) -> dict[str, float]:
    """Epochs that make the steps of every arm those of the largest one; a trainer rounds steps up."""
    steps = {name: ceil(count / batch_size) for name, count in rows.items()}
    wanted = ceil(epochs * max(steps.values()))
    found = {name: wanted / own for name, own in steps.items()}
    return {name: own if ceil(own * steps[name]) == wanted else nextafter(own, 0) for name, own in found.items()}


def _pool(setup: Setup, base: RunDir, test: Sequence[Kept]) -> RunDir:
    """The run without answers to test prompts, and without those that the filters found to repeat a test row."""
    pool, part_of = RunDir(setup.folder / "pool"), setup.recipe.prompts.part_of
    pool.path.mkdir(parents=True, exist_ok=True)
    questions, ids = {question_text(row.messages) for row in test}, {row.id for row in test}
    with replacing(pool.kept) as kept, replacing(pool.dropped) as dropped:
        for row in filtered_rows(base):
            reasons = row.detail if isinstance(row, Dropped) else []
            repeats = any(why.of in ids for why in reasons if why.rule in DEDUP_RULES)
            if not repeats and part_of(row) != "test" and question_text(row.messages) not in questions:
                (dropped if isinstance(row, Dropped) else kept).write(encode_line(row))
    for path in (base.lineage, base.recipe, base.judgements):
        (pool.path / path.name).unlink(missing_ok=True)
        if path.exists():
            shutil.copyfile(path, pool.path / path.name)
    pool.completions.unlink(missing_ok=True)
    pool.completions.symlink_to(base.completions.resolve())
    return pool


def _teachers(setup: Setup) -> Design:
    """The same prompts, rules and student; another teacher, with its own answers."""
    flags = second_teacher(setup.recipe.teacher, setup.options)
    recipe = load_recipe(setup.path, [*setup.flags, *flags])
    other, wanted = RunDir(setup.folder / "b"), setup.options.b_model
    check_judges(setup.recipe, recipe)
    asked = read_lineage(other).get("generate", {}).get("teacher", {}).get("asked", wanted)
    if asked != wanted and other.completions.is_file() and other.completions.stat().st_size:
        raise UsageError(f"{other.path}: it holds the answers of {asked}, not of {wanted}; remove this folder")
    check_all_asked(setup.recipe, setup.base, "name another --run")
    check_all_asked(recipe, other, "remove this folder")
    _answered(setup, other, *flags, anew=True)  # both: a run of an earlier recipe would have other prompts and rules
    base = _answered(setup, setup.base, anew=True)
    rows = {"A": setup.rows(base), "B": setup.rows(other)}
    test = part_rows([*rows["A"], *rows["B"]], setup.recipe.prompts).test
    arms = [_arm(setup, "a", base, test, []), _arm(setup, "b", other, test, flags)]
    names = {"A": setup.recipe.teacher.model, "B": setup.options.b_model}
    note = f"a is {names['A']}, b is {names['B']}; each with all that the filters kept of it, for the recipe's epochs"
    return Design(arms, _by_source(rows, test), note)


def _human(setup: Setup) -> Design:
    """As many rows that people wrote as rows of the teacher; scored on both."""
    path, config = setup.options.human, setup.recipe.prompts
    read_human(path, config)  # a faulty file is told before the teacher is paid
    base = _answered(setup, setup.base)
    asked = list(read_jsonl(base.prompts, Prompt)) if base.prompts.is_file() else []
    sources = {"teacher": setup.rows(base), "human": read_human(path, config, asked)}
    test = part_rows([*sources["teacher"], *sources["human"]], config).test
    parts = {name: part_rows(rows, config, test) for name, rows in sources.items()}
    tested = {question_text(prompt.messages) for prompt in asked if config.part_of(prompt) == "test"}
    learned = {  # in each part, so that the arms make equal steps
        name: [
            [row for row in rows if question_text(row.messages) not in tested] for rows in (own.train, own.validation)
        ]
        for name, own in parts.items()
    }
    counts = [min(map(len, rows)) for rows in zip(*learned.values(), strict=True)]
    pick = random.Random(setup.recipe.train.seed)
    people = [Prompt(id=row.prompt_id, **asked_fields(row)) for row in sources["human"]]
    arms = []
    for name, title in (("teacher", "distilled"), ("human", "human")):
        chosen = RunDir(setup.folder / "rows" / title)
        chosen.path.mkdir(parents=True, exist_ok=True)
        both = zip(learned[name], counts, strict=True)
        write_jsonl(chosen.kept, [row for rows, count in both for row in pick.sample(rows, count)])
        # A probe must be new to both arms. Of a question, the last line counts: the run's has its reference.
        write_jsonl(chosen.prompts, [*people, *asked])
        if name == "teacher":
            shutil.copyfile(base.lineage, chosen.lineage)
        accept = _accepting(setup, "filters", "prompts", "keep_rate") if name == "human" else []
        arms.append(_arm(setup, title, chosen, test, accept))
    return Design(arms, _by_source(sources, test), f"{sum(counts):,} rows in each arm, for the recipe's epochs")


def _soft(setup: Setup) -> Design:
    """The same rows, learned by the teacher's text, by its distribution, and then on the student's own samples."""
    hard = setup.recipe.train.weights
    methods: dict[str, list[str]] = {hard: ["--train.method", hard]}
    methods |= {soft: ["--train.method", soft, "--train.kd.weights", hard] for soft in ("kd", "on_policy")}
    for flags in methods.values():  # what cannot be trained is told before the first arm
        check_followed(load_recipe(setup.path, [*setup.flags, *flags]))
    base = _answered(setup, setup.base)
    test = part_rows(setup.rows(base), setup.recipe.prompts).test
    arms = [_arm(setup, name, base, test, flags) for name, flags in methods.items()]
    return Design(arms, {"": test}, "the same rows and trained weights in every arm; on_policy adds its own steps")


def _seeds(setup: Setup) -> Design:
    """The same rows and settings; only the seed of the training differs, and with it a new student's first weights."""
    if setup.options.seeds < 2:
        raise UsageError(f"--seeds {setup.options.seeds}: give at least 2, so that there is a spread")
    base, first = _answered(setup, setup.base), setup.recipe.train.seed
    test = part_rows(setup.rows(base), setup.recipe.prompts).test
    seeds = range(first, first + setup.options.seeds)
    arms = [_arm(setup, f"seed-{seed}", base, test, ["--train.seed", str(seed)]) for seed in seeds]
    return Design(arms, {"": test}, "the same rows and settings in every arm, but for the seed of the training")


EXPERIMENTS = {
    "keep-rate": Experiment("How strict should the filters be?", _keep_rate),
    "teachers": Experiment("What does another teacher bring?", _teachers, {"b_model": "the other teacher: --b-model"}),
    "human": Experiment("Distilled, or taught by people?", _human, {"human": "rows that people wrote: --human"}),
    "soft": Experiment("The teacher's text, or its distribution?", _soft),
    "seeds": Experiment("How much does the seed change?", _seeds),
}


def _answered(setup: Setup, run: RunDir, *flags: str, anew: bool = False) -> RunDir:
    """The run, with answers and filtered; what it lacks is done now. `anew`: what the recipe has changed, too."""
    filtered = run.kept.is_file() and run.dropped.is_file()
    if filtered and not run.completions.is_file():
        return run  # its rows are of the user's own
    recipe = load_recipe(setup.path, [*setup.flags, *flags])
    left, stale = pending(recipe, run), not (filtered and _filtered_so(recipe, setup.path, run))
    if filtered and not anew:
        if left or stale:
            changed = "its answers or the rules have changed since it was filtered"
            why = f"{left:,} requests of this recipe are not answered" if left else changed
            say(f"warning: {run.path}: {why}; the arms learn from the rows there are (else generate and filter first)")
        return run
    with teacher(recipe, run) if left or (stale and judges(recipe)) else nullcontext():
        if left:
            setup.stage("generate", run, *flags)
        if left or stale:
            setup.stage("filters", run, *flags)
    return run


def _filtered_so(recipe: Recipe, path: Path, run: RunDir) -> bool:
    """Whether all answers of a filtered run were filtered as the recipe says now."""
    said = read_lineage(run).get("filters", {})
    config = recipe.filters.model_dump(mode="json", include={"dedup", "judge", "select"})
    rules = recipe_rules(recipe, path)
    wanted = {"rules": rules.described(), **config}
    newer = any(file.stat().st_mtime_ns > run.kept.stat().st_mtime_ns for file in rules.files(path.parent))
    answers = read_journal(run.completions, Completion).models.total()
    return not newer and {**wanted, "rows": answers} == {name: said.get(name) for name in (*wanted, "rows")}


def _by_source(sources: Mapping[str, Sequence[Kept]], test: Sequence[Kept]) -> dict[str, list[Kept]]:
    ids = {name: {row.id for row in rows} for name, rows in sources.items()}
    return {name: [row for row in test if row.id in ids[name]] for name in sources}


def _arm(setup: Setup, name: str, rows: RunDir, test: Sequence[Kept], flags: list[str]) -> Arm:
    """An arm's run directory, with the rows of another one; the test rows are a file of the experiment.

    Raises UsageError if those rows are others than the experiment has read.
    """
    run = RunDir(setup.folder / name)
    run.path.mkdir(parents=True, exist_ok=True)
    shared = setup.folder / "test.jsonl"
    write_jsonl(shared, test)
    if rows.path != run.path:
        asked = rows if rows.prompts.is_file() else setup.base  # a share has rows alone
        for path in (rows.kept, rows.dropped, rows.filter_report, rows.preferences, asked.prompts):
            target = run.path / path.name
            target.unlink(missing_ok=True)
            if path.is_file():
                shutil.copyfile(path, target)
        run.logprobs.unlink(missing_ok=True)
        if asked.logprobs.is_file():
            run.logprobs.symlink_to(asked.logprobs.resolve())
        own, given = read_lineage(run), read_lineage(rows)
        if rows.kept in setup.read and rows.kept.stat().st_mtime_ns != setup.read[rows.kept]:
            raise UsageError(
                f"{rows.kept}: filtered again while the arms were made, so they would learn from different rows; "
                "the same command makes them again"
            )
        sections: dict[str, Any] = {key: given[key] for key in ("generate", "filters") if key in given}
        write_lineage(run, {"name": run.path.name, **own, **sections})
    return Arm(name, run, [*flags, "--train.test_rows", str(shared)])


def _accepting(setup: Setup, *checks: str) -> list[str]:
    """A flag: these warnings are what the experiment is about, so they do not stop it."""
    return ["--train.accept", json.dumps(sorted({*setup.recipe.train.accept, *checks}))]


class HumanRow(msgspec.Struct, frozen=True):
    """A line that people wrote: `prompt` and `completion`, or `messages` that end with the assistant's.

    Its other keys are columns, as in a file of prompts.
    """

    prompt: str | None = None
    completion: str | None = None
    messages: list[Message] | None = None

    def conversation(self) -> list[Message]:
        """The question, and the assistant's answer last. Raises ValueError if the row has no such thing."""
        match self.prompt, self.completion, self.messages:
            case str(prompt), str(completion), None:
                turns = [Message("user", prompt), Message("assistant", completion)]
            case None, None, [*turns]:
                pass
            case _:
                raise ValueError("give either `prompt` and `completion`, or `messages`")
        if not turns or turns[-1].role != "assistant":
            raise ValueError("`messages` must end with the assistant's")
        if not turns[-1].content.strip():
            raise ValueError("the answer is empty")
        return turns


def read_human(path: Path, config: PromptsConfig, asked: Sequence[Prompt] = ()) -> list[Kept]:
    """The rows as kept ones. Raises DataError, which names the row, and UsageError if there is no file.

    A row that does not say its group has the group of the same question in the prompts `asked`, or none.
    """
    if not path.is_file():
        raise UsageError(f"--human {path}: no such file; give a JSONL of rows with prompt and completion, or messages")
    rows, groups = [], {question_text(prompt.messages): config.group_of(prompt) for prompt in asked}
    for number, line in enumerate(read_jsonl(path, dict), start=1):
        columns: Json = {name: value for name, value in line.items() if name not in HumanRow.__struct_fields__}
        try:
            *question, answer = msgspec.convert(line, HumanRow).conversation()
            turns = [Turn(turn.role, turn.content) for turn in question]
            prompt = make_prompt(PromptRow(messages=turns, columns=columns), config)
        except ValueError as error:
            raise DataError(f"{path}: row {number}: {error}") from None
        if config.group is not None and config.group not in columns:
            group = groups.get(question_text(prompt.messages))
            prompt = msgspec.structs.replace(prompt, columns={**columns, config.group: group})
        rows.append(answer_row("human", prompt, answer.content))
    if not rows:
        raise DataError(f"{path}: no rows in it")
    return rows
