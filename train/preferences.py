"""Training after that on answers: where it starts; of preferences, their pairs in two parts.

Reads preferences.jsonl and the lineage of the student that it starts from; writes nothing.
"""

from pathlib import Path
from typing import Any

import msgspec

from pipeline.adapters import check_whole
from pipeline.checks import Check
from pipeline.errors import DataError, UsageError
from pipeline.instructions import asked_of_student
from pipeline.recipe import Recipe
from pipeline.records import Part, Preference, Prompt, question_text, read_jsonl
from pipeline.rundir import RunDir
from pipeline.students import check_parts, trained_section
from pipeline.train_config import FURTHER
from pipeline.turns_and_tools import template_turns
from train.rows import Parts, tools_text

Pairs = dict[str, list[Preference]]  # train and validation


def start_of(recipe: Recipe, run: RunDir) -> Path:
    """The folder of the student to start from: `train.start`, or the run's last one that learned from answers.

    That is the student, or student-sft if the student itself came of a further method. Raises UsageError if there is
    none, or if prompts that it learned may be test prompts now.
    """
    folder = recipe.train.start or learned(run)
    if not trained_section(folder):
        check_whole(folder if folder.is_dir() else run.student)
        raise UsageError(
            f"{folder}: no student to start from; train.method {recipe.train.method} follows another method: train "
            "with that one first, or name a student's folder in train.start"
        )
    if recipe.train.start is None:
        check_parts(recipe, folder, "what the new student would be tested on")
    return folder


def learned(run: RunDir) -> Path:
    """The folder of the run's last student that learned from answers; there may be none in it."""
    return run.student if learned_from_answers(run.student) else run.student_sft


def check_start(recipe: Recipe, run: RunDir) -> None:
    """Raises UsageError if a further method would replace the student that it starts from, or one of another method."""
    if not recipe.train.further:
        return
    start, method, made_by = recipe.train.start, recipe.train.method, trained_section(run.student).get("method")
    if start is not None and start.resolve() == run.student.resolve():
        raise UsageError(f"train.start is {start}, which this training replaces: leave it out, or name a copy of it")
    if start is None and made_by in FURTHER and made_by != method:
        raise UsageError(
            f"{run.student} is of train.method {made_by}, and {method} would begin at the one before it and take its "
            "place: move it elsewhere, and name it in train.start to begin there"
        )


def learned_from_answers(student: Path) -> bool:
    """Whether there is a student, and no further method made it."""
    return trained_section(student).get("method") not in (None, *FURTHER)


def checks_of(student: Path | None) -> list[Check]:
    """What was checked before a student that a training starts from was trained."""
    return msgspec.convert(trained_section(student).get("checks", []) if student else [], list[Check])


def read_pairs(recipe: Recipe, run: RunDir, parts: Parts) -> Pairs:
    """The run's preferences by the part of their prompt, without those of test prompts.

    `parts`: of the kept rows. If no pair is of a validation prompt, the training question (or group) of the lowest hash
    moves there. Raises DataError if the file is missing or a part is empty.
    """
    if not run.preferences.is_file():
        raise DataError(
            f"{run.preferences}: no such file; train.method dpo learns from its pairs: set filters.preferences, which "
            f"is {recipe.filters.preferences}, to 1 or more, and run the filters again"
        )
    prompts, known = recipe.prompts, dict[int, tuple[Part, float]]()  # by the hash of a question: part and position
    for part in ("train", "validation", "test"):
        rows = getattr(parts, part)
        known |= {hash(question_text(row.messages)): (part, prompts.position_of(row)) for row in rows}
    placed: dict[Part, list[tuple[float, Preference]]] = {"train": [], "validation": [], "test": []}
    for pair in read_jsonl(run.preferences, Preference):
        found = known.get(hash(question_text(pair.prompt)))
        if found is None and prompts.group is not None:
            continue  # a pair does not say its group; it may be one that train.test_rows test
        asked = Prompt(id=pair.id, messages=pair.prompt)
        part, position = found or (prompts.part_of(asked), prompts.position_of(asked))
        placed[part].append((position, pair))
    if placed["train"] and not placed["validation"]:
        lowest = min(position for position, _ in placed["train"])
        placed["validation"] = [one for one in placed["train"] if one[0] == lowest]
        placed["train"] = [one for one in placed["train"] if one[0] != lowest]
    if not placed["train"]:
        raise DataError(f"{run.preferences}: no pair is left to train on: sample more answers of each prompt")
    return {part: [pair for _, pair in placed[part]] for part in ("train", "validation")}


def to_pair(pair: Preference, recipe: Recipe) -> dict[str, Any]:
    turns = {"prompt": asked_of_student(pair.prompt, recipe.student), "chosen": pair.chosen, "rejected": pair.rejected}
    return {name: template_turns(own) for name, own in turns.items()} | {"tools": tools_text(pair.tools)}
