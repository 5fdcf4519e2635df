"""The runs of an experiment: the one that it is about, with its answers, and one for each arm.

Asks and filters what a run lacks, by the stages that `chain` runs; copies the rows of an arm into a run of its own.
"""

import shutil
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chain.stages import judges, stage, teacher
from evaluate.run import say
from filters.run import recipe_rules
from generate.journal import read_journal
from generate.run import pending
from pipeline.errors import UsageError
from pipeline.lineage import read_lineage, write_lineage
from pipeline.recipe import Recipe, load_recipe
from pipeline.records import Completion, Kept
from pipeline.rundir import CHAIN_LOCK, RunDir, write_jsonl
from train.rows import read_rows


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


def answered(setup: Setup, run: RunDir, *flags: str, anew: bool = False) -> RunDir:
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
    asks = left and recipe.prompts.answers is None
    with teacher(recipe, run) if asks or ((left or stale) and judges(recipe)) else nullcontext():
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


def make_arm(setup: Setup, name: str, rows: RunDir, test: Sequence[Kept], flags: list[str]) -> Arm:
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
