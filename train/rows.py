"""Rows to learn from: kept.jsonl to prompt/completion rows, in three parts: train, validation and test.

Reads kept.jsonl and `train.test_rows`; writes nothing. Tokens, lengths and labels are train.tokens' business.
"""

import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import DataError
from pipeline.instructions import asked_of_student
from pipeline.prompts_config import PromptsConfig
from pipeline.reasoning import Reasoning, answer_turn
from pipeline.recipe import Recipe
from pipeline.records import Json, Kept, Part, question_text, read_jsonl
from pipeline.rundir import RunDir
from pipeline.student_config import StudentConfig
from pipeline.train_config import TrainConfig
from pipeline.turns_and_tools import ROLES, template_turns
from train.lazy import Lazy, joined, stored_records


@dataclass(frozen=True)
class Parts:
    """Kept rows by what they are for; no question is in two parts, and no part is empty."""

    train: Sequence[Kept]
    validation: Sequence[Kept]
    test: Sequence[Kept]

    @property
    def all(self) -> Sequence[Kept]:
        return joined(self.train, self.validation, self.test)


def read_rows(run: RunDir) -> Sequence[Kept]:
    """All kept rows, each one checked. Raises DataError as read_checked does, and where no answer was kept."""
    rows = read_checked(run.kept)
    if not rows:
        raise DataError(f"{run.kept}: no rows; no answer passed the filters: see {run.filter_report.name} for why")
    return rows


def read_checked(path: Path) -> Sequence[Kept]:
    """The rows of a file like kept.jsonl, which stay on disk until they are asked for.

    Raises DataError if the file is missing, a line is not a kept row (a content that is not text, an image
    for one), an answer is empty, a role is unknown, or a conversation does not end with the user's turn.
    """
    rows = enumerate(read_jsonl(path, Kept), start=1)
    try:
        faulty = next(((number, row.id, fault) for number, row in rows if (fault := _fault(row))), None)
    except DataError as error:
        if not path.is_file():
            raise
        wanted = "a row is an answer as filters keeps it: id, messages of role and content, text, all of it plain text"
        raise DataError(f"{error}; {wanted}; filter again") from None
    if faulty is not None:
        number, id_, fault = faulty
        raise DataError(f"{path}: row {number} (id {id_}): {fault}; remove it, or filter again")
    return stored_records(path, Kept)


def read_parts(recipe: Recipe, run: RunDir) -> Parts:
    """The run's kept rows in the parts that training uses.

    Raises DataError as read_rows and part_rows do, and where a row lacks the column that `prompts.group` names.
    """
    group, rows = recipe.prompts.group, read_rows(run)
    lacking = (row.id for row in rows if group not in row.columns and group not in row.slots)
    if group is not None and (id_ := next(lacking, None)):
        raise DataError(f"{run.kept}: row {id_} has no column {group!r}, which prompts.group names; filter again")
    return part_rows(rows, recipe.prompts, read_test_rows(recipe.train))


def read_test_rows(config: TrainConfig) -> Sequence[Kept] | None:
    """The rows that `train.test_rows` gives in place of the run's own. Raises DataError as read_checked does."""
    path = config.test_rows
    if path is not None and not path.is_file():
        raise DataError(f"train.test_rows {path}: no such file; give the test.jsonl of a run")
    return None if path is None else read_checked(path)


def part_rows(rows: Sequence[Kept], prompts: PromptsConfig, test_rows: Sequence[Kept] | None = None) -> Parts:
    """The rows by the part of their prompt (pipeline.prompts_config).

    `test_rows` take the place of the run's own test rows; rows that ask one of their questions, or are of one of their
    groups, are left out. If a part has no row, as in a small run, the training question (or group) of the lowest hash
    moves there. Raises DataError if a part is still empty.
    """
    tested = {key for row in test_rows or () for key in (question_text(row.messages), prompts.position_of(row))}
    places: dict[Part, array[int]] = {part: array("Q") for part in ("train", "validation", "test")}  # in `rows`
    for place, row in enumerate(rows):
        if not tested or tested.isdisjoint((question_text(row.messages), prompts.position_of(row))):
            places[prompts.part_of(row)].append(place)
    parts: dict[Part, Sequence[Kept]] = {part: Lazy(own, rows.__getitem__) for part, own in places.items()}
    if test_rows is not None:
        parts["test"] = test_rows
    for part in ("test", "validation"):
        if not parts[part] and len(positions := {prompts.position_of(row) for row in parts["train"]}) > 1:
            lowest = min(positions)
            moved = {place for place in places["train"] if prompts.position_of(rows[place]) == lowest}
            parts[part] = Lazy(sorted(moved), rows.__getitem__)
            places["train"] = array("Q", (place for place in places["train"] if place not in moved))
            parts["train"] = Lazy(places["train"], rows.__getitem__)
    if empty := [part for part, own in parts.items() if not own]:
        distinct = f"{len({question_text(row.messages) for row in rows})} distinct prompts"
        if prompts.group:
            distinct += f" of {len({prompts.position_of(row) for row in rows})} groups"
        where = (
            f", without the questions of train.test_rows ({len({question_text(row.messages) for row in test_rows})})"
            if test_rows is not None
            else ""
        )
        raise DataError(
            f"{len(rows)} kept rows answer {distinct}{where}; no row is left for {', '.join(empty)}: "
            "generate more prompts, or lower prompts.validation and prompts.test"
        )
    return Parts(**parts)


def to_examples(
    rows: Sequence[Kept], student: StudentConfig | None = None, reasoning: Reasoning | None = None
) -> Lazy[dict[str, Any]]:
    """TRL's conversational prompt-completion shape: what the student is asked, and the answer that it learns.

    `reasoning`: the field of the answer's turn that has it (`reasoning_form`); None leaves it out. Each example is made
    when it is asked for.
    """

    def example(row: Kept) -> dict[str, Any]:
        return {
            "prompt": template_turns(asked_of_student(row.messages, student)),
            "completion": [answer_turn(row, reasoning)],
            "tools": tools_text(row.tools),
        }

    return Lazy(rows, example)


def tools_text(tools: list[Json]) -> str | None:
    """Tools as TRL takes them too: as JSON text, which needs no common shape; None if there are none."""
    return json.dumps(tools, ensure_ascii=False) if tools else None


def _fault(row: Kept) -> str | None:
    if not row.text.strip() and not row.tool_calls:
        return "the answer is empty"
    if unknown := [message.role for message in row.messages if message.role not in ROLES]:
        return f"no role {unknown[0]!r} is known; there are {', '.join(ROLES)}"
    if (last := row.messages[-1].role if row.messages else "none") not in ("user", "tool"):
        return f"the conversation must end with a user message or a tool's result, the last one is {last!r}"
    if last == "user" and not row.messages[-1].content.strip():
        return "the question is empty"
    return None
