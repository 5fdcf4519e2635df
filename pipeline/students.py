"""A run's student as folders that an engine serves: before training and after it.

Reads the recipe and the run's student/ and student-init/. Writes an adapter's student once more, merged into its base.
"""

import json
from pathlib import Path
from typing import Any

from pipeline.adapters import check_whole, torn_file, whole_model
from pipeline.errors import UsageError
from pipeline.instructions import system_of_student
from pipeline.lineage import read_lineage
from pipeline.models import ADAPTER, model_folder
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir
from pipeline.student_config import BUILT, StudentConfig

TEACHER, BEFORE, AFTER = "teacher", "student_before", "student_after"  # the keys of a run's models


def check_trained(recipe: Recipe, run: RunDir) -> StudentConfig:
    """The recipe's student.

    Raises UsageError if it is not trained yet, its files are damaged, or another recipe trained what is there.
    """
    student = named_student(recipe)
    if not any((run.student / name).is_file() for name in (ADAPTER, "config.json")):
        raise UsageError(f"{run.student}: no student yet; run train first (python -m train RECIPE --run {run.path})")
    check_whole(run.student)
    trained = trained_section(run.student)
    of_recipe = {"student": student.model, "teacher": recipe.teacher.model, "system": system_of_student(recipe)}
    for name, wanted in of_recipe.items():
        if (found := trained.get(name, wanted)) != wanted:
            raise UsageError(
                f"{run.student}: trained with {name} {found!r}, but the recipe says {wanted!r}; train again, or "
                "give the recipe and flags it was trained with"
            )
    return student


def check_parts(recipe: Recipe, student: Path, known: str) -> None:
    """Raises UsageError if a student was trained with other parts: then it may know `known`, which tests it."""
    if (parts := other_parts(recipe, student)) is not None:
        raise UsageError(
            f"{student}: trained when the prompts were parted otherwise ({parts}), so it may know {known}; train "
            "again, or give the recipe it was trained with"
        )


def other_parts(recipe: Recipe, student: Path) -> str | None:
    """How the prompts were parted when a student of the run was trained; None if as they are now.

    If otherwise, it may have been trained on what is a test prompt now.
    """
    trained = trained_section(student).get("parts", recipe.prompts.parted_by)
    if trained == recipe.prompts.parted_by:
        return None
    return ", ".join(f"{name} {value}" for name, value in trained.items())


def trained_section(student: Path) -> dict[str, Any]:
    """The `train` section of a saved student's lineage; empty if there is no such student, or its files are damaged."""
    if torn_file(student):
        return {}
    section: dict[str, Any] = read_lineage(RunDir(student)).get("train", {})
    return section


def named_student(recipe: Recipe) -> StudentConfig:
    """The recipe's `student`. Raises UsageError if it names none."""
    if recipe.student is None:
        raise UsageError("the recipe names no student; add `student: {model: …}` and run train")
    return recipe.student


def before_training(recipe: Recipe, run: RunDir) -> Path:
    """The student as it was before training.

    Raises UsageError if it is not there, or is no longer what the run's student was trained from: an adapter over
    another model than it learned on answers wrongly, and nothing else would tell.
    """
    student = named_student(recipe)
    folder = run.student_init if student.built else model_folder(student.model)
    if student.built and not (folder / "config.json").is_file():
        raise UsageError(f"{folder}: student {student.model} as it was before training is not there; run train")
    trained = trained_section(run.student)
    if (origin := trained.get("built") or trained.get("base")) and origin != origin_of(student, run):
        raise UsageError(f"{folder}: is no longer the model that {run.student} was trained from; run train")
    return folder


def origin_of(student: StudentConfig, run: RunDir) -> dict[str, Any] | None:
    """What tells a student before training from others in its folder: how it was made, or its own training.

    None of a model that neither this run nor another one has made.
    """
    if student.built:
        mark = run.student_init / BUILT
        return dict(json.loads(mark.read_bytes())) if mark.is_file() else None
    fingerprint = trained_section(Path(student.model)).get("fingerprint")
    return {"fingerprint": fingerprint} if fingerprint else None


def after_training(recipe: Recipe, run: RunDir) -> Path:
    """The trained student as a whole model. Raises UsageError if there is none yet."""
    check_trained(recipe, run)
    if not (run.student / ADAPTER).is_file():
        return run.student
    return whole_model(run.student, before_training(recipe, run), merged_folder(run, AFTER))


def merged_folder(run: RunDir, key: str) -> Path:
    """The folder of an adapter that was evaluated, merged into its base: an engine serves whole models."""
    return run.path / "evaluation" / f"{key}-merged"
