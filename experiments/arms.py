"""The experiments: what each one asks, and how the rows of its arms are made.

Everything that arms are compared on is set apart first: the test part of all their sources. The rest becomes
their rows. So all arms of an experiment are scored on the same rows, which none of them was trained on. An arm is an
ordinary run directory; it trains and is evaluated with the flags named here on top of the user's own.
"""

import json
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, nextafter

from experiments.human import read_human
from experiments.runs import Arm, Design, Setup, answered, make_arm
from experiments.teachers import check_all_asked, check_judges, second_teacher
from filters.duplicates import DEDUP_RULES
from filters.rows import filtered_rows
from filters.trials import parse_shares
from pipeline.errors import UsageError
from pipeline.lineage import read_lineage
from pipeline.recipe import load_recipe
from pipeline.records import Dropped, Kept, Prompt, asked_fields, encode_line, question_text, read_jsonl
from pipeline.rundir import RunDir, replacing, write_jsonl
from train.checks.before import check_followed
from train.rows import part_rows
from train.run import rows_to_train


@dataclass(frozen=True)
class Experiment:
    """One line of the table below."""

    question: str
    prepare: Callable[[Setup], Design]
    needs: Mapping[str, str] = field(default_factory=dict)  # option: what it is for


def _keep_rate(setup: Setup) -> Design:
    """The best shares of all answers except those to test prompts; answers that the rules drop are ranked, too."""
    shares = parse_shares("--shares", setup.options.shares)
    base = answered(setup, setup.base)
    test = part_rows(setup.rows(base), setup.recipe.prompts).test
    pool = _pool(setup, base, test)
    setup.stage("filters", pool, "--sweep", ",".join(map(str, shares)))
    kept = {f"keep-{share}": RunDir(pool.path / "sweep" / str(share)) for share in shares}
    flags = ["--train.too_long", "drop", *_accepting(setup, "keep_rate", "filters", "length")]
    arms = [make_arm(setup, name, share, test, flags) for name, share in kept.items()]
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
    if recipe.prompts.answers:
        raise UsageError("prompts.answers: the second teacher would have the answers of the first; leave it out")
    other, wanted = RunDir(setup.folder / "b"), setup.options.b_model
    check_judges(setup.recipe, recipe)
    asked = read_lineage(other).get("generate", {}).get("teacher", {}).get("asked", wanted)
    if asked != wanted and other.completions.is_file() and other.completions.stat().st_size:
        raise UsageError(f"{other.path}: it holds the answers of {asked}, not of {wanted}; remove this folder")
    check_all_asked(setup.recipe, setup.base, "name another --run")
    check_all_asked(recipe, other, "remove this folder")
    answered(setup, other, *flags, anew=True)  # both: a run of an earlier recipe would have other prompts and rules
    base = answered(setup, setup.base, anew=True)
    rows = {"A": setup.rows(base), "B": setup.rows(other)}
    test = part_rows([*rows["A"], *rows["B"]], setup.recipe.prompts).test
    arms = [make_arm(setup, "a", base, test, []), make_arm(setup, "b", other, test, flags)]
    names = {"A": setup.recipe.teacher.model, "B": setup.options.b_model}
    note = f"a is {names['A']}, b is {names['B']}; each with all that the filters kept of it, for the recipe's epochs"
    return Design(arms, _by_source(rows, test), note)


def _human(setup: Setup) -> Design:
    """As many rows that people wrote as rows of the teacher; scored on both."""
    path, config = setup.options.human, setup.recipe.prompts
    read_human(path, config)  # a faulty file is told before the teacher is paid
    base = answered(setup, setup.base)
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
        arms.append(make_arm(setup, title, chosen, test, accept))
    return Design(arms, _by_source(sources, test), f"{sum(counts):,} rows in each arm, for the recipe's epochs")


def _soft(setup: Setup) -> Design:
    """The same rows, learned by the teacher's text, by its distribution, and then on the student's own samples."""
    hard = setup.recipe.train.weights
    methods: dict[str, list[str]] = {hard: ["--train.method", hard]}
    methods |= {soft: ["--train.method", soft, "--train.kd.weights", hard] for soft in ("kd", "on_policy")}
    for flags in methods.values():  # what cannot be trained is told before the first arm
        check_followed(load_recipe(setup.path, [*setup.flags, *flags]))
    base = answered(setup, setup.base)
    test = part_rows(setup.rows(base), setup.recipe.prompts).test
    arms = [make_arm(setup, name, base, test, flags) for name, flags in methods.items()]
    return Design(arms, {"": test}, "the same rows and trained weights in every arm; on_policy adds its own steps")


def _seeds(setup: Setup) -> Design:
    """The same rows and settings; only the seed of the training differs, and with it a new student's first weights."""
    if setup.options.seeds < 2:
        raise UsageError(f"--seeds {setup.options.seeds}: give at least 2, so that there is a spread")
    base, first = answered(setup, setup.base), setup.recipe.train.seed
    test = part_rows(setup.rows(base), setup.recipe.prompts).test
    seeds = range(first, first + setup.options.seeds)
    arms = [make_arm(setup, f"seed-{seed}", base, test, ["--train.seed", str(seed)]) for seed in seeds]
    return Design(arms, {"": test}, "the same rows and settings in every arm, but for the seed of the training")


EXPERIMENTS = {
    "keep-rate": Experiment("How strict should the filters be?", _keep_rate),
    "teachers": Experiment("What does another teacher bring?", _teachers, {"b_model": "the other teacher: --b-model"}),
    "human": Experiment("Distilled, or taught by people?", _human, {"human": "rows that people wrote: --human"}),
    "soft": Experiment("The teacher's text, or its distribution?", _soft),
    "seeds": Experiment("How much does the seed change?", _seeds),
}


def _by_source(sources: Mapping[str, Sequence[Kept]], test: Sequence[Kept]) -> dict[str, list[Kept]]:
    ids = {name: {row.id for row in rows} for name, rows in sources.items()}
    return {name: [row for row in test if row.id in ids[name]] for name in sources}


def _accepting(setup: Setup, *checks: str) -> list[str]:
    """A flag: these warnings are what the experiment is about, so they do not stop it."""
    return ["--train.accept", json.dumps(sorted({*setup.recipe.train.accept, *checks}))]
