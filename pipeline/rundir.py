"""A run directory: where each file of a run is, who may write to it, and how files appear in it.

Journals (completions, failures) are append-only and belong to `generate`; every other file appears by rename, so
that an interrupted stage leaves the old file or the new one.
"""

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec
import yaml

from pipeline.errors import UsageError
from pipeline.recipe import Recipe
from pipeline.records import encode_line


@dataclass(frozen=True)
class RunDir:
    """Paths of one run."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def lineage(self) -> Path:
        return self.path / "lineage.json"

    @property
    def prompts(self) -> Path:
        return self.path / "prompts.jsonl"

    @property
    def completions(self) -> Path:
        return self.path / "completions.jsonl"

    @property
    def failures(self) -> Path:
        return self.path / "failures.jsonl"

    @property
    def kept(self) -> Path:
        return self.path / "kept.jsonl"

    @property
    def dropped(self) -> Path:
        return self.path / "dropped.jsonl"

    @property
    def judgements(self) -> Path:
        """The judge's verdicts, written by `filters`."""
        return self.path / "judgements.jsonl"

    @property
    def review_sample(self) -> Path:
        """The answers that a person reviews, written by `filters.review`."""
        return self.path / "review_sample.json"

    @property
    def reviews(self) -> Path:
        """The person's verdicts, as they came."""
        return self.path / "reviews.jsonl"

    @property
    def filter_report(self) -> Path:
        return self.path / "filter_report.json"

    @property
    def checks(self) -> Path:
        """What was checked before training, written by `train`."""
        return self.path / "checks.json"

    @property
    def validation(self) -> Path:
        """The kept rows that chose the best checkpoint, written by `train`."""
        return self.path / "validation.jsonl"

    @property
    def test(self) -> Path:
        """The kept rows that training never saw, written by `train`, read by `evaluate`."""
        return self.path / "test.jsonl"

    @property
    def student(self) -> Path:
        return self.path / "student"

    @property
    def student_init(self) -> Path:
        """A student that had to be built first (`prune:<k>`), as it was before training."""
        return self.path / "student-init"

    @property
    def report(self) -> Path:
        return self.path / "report.json"

    @property
    def report_html(self) -> Path:
        return self.path / "report.html"

    def check_there(self) -> None:
        """Raises UsageError where the folder is not: a name mistyped should not make a run."""
        if not self.path.is_dir():
            raise UsageError(f"{self.path}: no such run; give its folder with --run, or generate first")

    @contextmanager
    def locked(self, *, new: bool = False) -> Iterator[None]:
        """Holds the run for this process; raises UsageError naming the holder if another has it.

        The kernel drops the lock with the process, so a killed run never leaves a stale one. `new`: the run may be one,
        and its folder is made; else raises UsageError where it is not there.
        """
        if new:
            self.path.mkdir(parents=True, exist_ok=True)
        else:
            self.check_there()
        with (self.path / ".lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise UsageError(
                    f"{self.path}: another process (pid {holder}) works on this run; wait for it, stop it, "
                    "or choose another directory with --run"
                ) from None
            os.set_inheritable(file.fileno(), True)  # for the processes that share the work, not for any other
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def save_recipe(self, recipe: Recipe) -> None:
        """Writes the recipe as resolved (YAML, environment and flags together). It holds no secret."""
        with replacing(self.recipe) as file:
            file.write(yaml.safe_dump(recipe.model_dump(mode="json"), allow_unicode=True, sort_keys=False).encode())


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that takes the place of `path` when the block ends well, and leaves `path` alone otherwise."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say where
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill that takes the place of `folder` when the block ends well, and leaves it alone otherwise."""
    building = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        yield building
        shutil.rmtree(folder, ignore_errors=True)
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def write_jsonl(path: Path, records: Iterable[msgspec.Struct]) -> None:
    """Writes records, a line each, in the place of what was there."""
    with replacing(path) as file:
        file.writelines(map(encode_line, records))
