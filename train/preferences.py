"""Training after that on answers: where it starts; of preferences, their pairs in two parts.

Reads preferences.jsonl and the lineage of the student that it starts from; writes nothing.
"""

from pathlib import Path
from typing import Any

from pipeline.chat import asked_of_student
from pipeline.conversation import template_turns
from pipeline.errors import DataError, UsageError
from pipeline.lineage import read_lineage
from pipeline.partition import position
from pipeline.recipe import Recipe
from pipeline.records import Preference, question_text, read_jsonl
from pipeline.rundir import RunDir
from train.rows import Parts, prompt_text, tools_text

Pairs = dict[str, list[Preference]]  # train and validation


def start_of(recipe: Recipe, run: RunDir) -> Path:
    """The folder of the student to start from: `train.start`, or the run's last one that learned from answers.

    That is the student, or student-sft if the student itself came of a further method. Raises UsageError if there is
    none.
    """
    if recipe.train.start is not None:
        folder = recipe.train.start
    else:
        folder = run.student if learned_from_answers(run.student) else run.student_sft
    if not trained_section(folder):
        raise UsageError(
            f"{folder}: no student to start from; train.method {recipe.train.method} follows another method: train "
            "with that one first, or name a student's folder in train.start"
        )
    return folder


def learned_from_answers(student: Path) -> bool:
    """Whether there is a student, and no further method made it."""
    return trained_section(student).get("method", "dpo") not in ("on_policy", "dpo")


def trained_section(student: Path) -> dict[str, Any]:
    """The `train` section of a saved student's lineage; empty if there is no such student."""
    section: dict[str, Any] = read_lineage(RunDir(student)).get("train", {})
    return section


def read_pairs(recipe: Recipe, run: RunDir, parts: Parts) -> Pairs:
    """The run's preferences by the part of their prompt, without those of test prompts.

    `parts`: of the kept rows. If no pair is of a validation prompt, the training question of the lowest hash moves
    there. Raises DataError if the file is missing or a part is empty.
    """
    texts = {"test": set(map(prompt_text, parts.test)), "validation": set(map(prompt_text, parts.validation))}
    pairs: dict[str, list[Preference]] = {"train": [], "validation": [], "test": []}
    for pair in read_jsonl(run.preferences, Preference):
        text, part = question_text(pair.prompt), recipe.prompts.part_of(pair.prompt)
        pairs[next((name for name, own in texts.items() if text in own), part)].append(pair)
    if pairs["train"] and not pairs["validation"]:
        first = min(pairs["train"], key=lambda pair: position(pair.prompt, recipe.prompts.seed))
        moved = question_text(first.prompt)
        pairs["validation"] = [pair for pair in pairs["train"] if question_text(pair.prompt) == moved]
        pairs["train"] = [pair for pair in pairs["train"] if question_text(pair.prompt) != moved]
    if not pairs["train"]:
        raise DataError(f"{run.preferences}: no pair is left to train on: sample more answers of each prompt")
    return {name: pairs[name] for name in ("train", "validation")}


def to_pair(pair: Preference, recipe: Recipe) -> dict[str, Any]:
    turns = {"prompt": asked_of_student(pair.prompt, recipe.student), "chosen": pair.chosen, "rejected": pair.rejected}
    return {name: template_turns(own) for name, own in turns.items()} | {"tools": tools_text(pair.tools)}
