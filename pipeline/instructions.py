"""What the teacher is told and what the student is asked: one place, for every stage. Reads and writes no file."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.recipe import Recipe
from pipeline.records import Json, Message, as_text, said
from pipeline.student_config import StudentConfig
from pipeline.teacher_config import TeacherConfig

INSTRUCTIONS = ("system", "developer")  # the roles of a first message that instructs


def told_to_teacher(messages: Sequence[Message], teacher: TeacherConfig) -> list[Message]:
    """The conversation as the teacher gets it: `teacher.system`, `teacher.examples` as turns, then the messages.

    A system message of the prompt's own is joined to `teacher.system`, because many chat templates take only one.
    """
    system, turns = _parted(messages)
    if teacher.system is not None:
        own = [message.content for message in system]
        role = system[0].role if system else "system"
        system = [Message(role=role, content="\n\n".join([teacher.system, *own]))]
    examples = [
        turn
        for example in teacher.examples
        for turn in (Message(role="user", content=example.prompt), Message(role="assistant", content=example.answer))
    ]
    return [*system, *examples, *turns]


def told_in_words(teacher: TeacherConfig) -> str:
    """What only the teacher is told: `a system prompt and 3 examples`; empty if nothing is."""
    count = len(teacher.examples)
    examples = [f"{count} example{'s' * (count > 1)}"] if count else []
    return " and ".join([*(["a system prompt"] if teacher.system else []), *examples])


def asked_of_student(messages: Sequence[Message], student: StudentConfig | None) -> list[Message]:
    """The conversation as the student gets it: with `student.system`, if set, in place of the prompt's own.

    An empty `student.system` takes the prompt's system message away.
    """
    if student is None or student.system is None:
        return list(messages)
    system = [Message(role="system", content=student.system)] if student.system else []
    return [*system, *_parted(messages)[1]]


def conversation_text(messages: Sequence[Message], tools: Sequence[Json] = ()) -> str:
    """What is asked, as one text to read. With several turns each has its role before it; tools come first."""
    if len([message for message in messages if message.role not in INSTRUCTIONS]) <= 1 and not tools:
        return "\n\n".join(map(said, messages))
    told = [f"tools: {as_text(tools)}"] if tools else []
    return "\n\n".join([*told, *(f"{message.role}: {said(message)}" for message in messages)])


def system_of_student(recipe: Recipe) -> str | None:
    """The system prompt of a student's every prompt; empty: none at all, None: what a prompt itself brings."""
    own = recipe.student.system if recipe.student else None
    return recipe.prompts.system if own is None else own


def shared_system(conversations: Iterable[Sequence[Message]]) -> str | None:
    """The system message that all conversations begin with; None if one has another or none."""
    shared = None
    for first, *_ in conversations:
        if first.role != "system" or shared not in (None, first.content):
            return None
        shared = first.content
    return shared


def with_system_of_rows(recipe: Recipe, trained: Mapping[str, Any]) -> Recipe:
    """The recipe with the system message that all rows of a training brought, as if it were `prompts.system`.

    `trained`: `train` of the lineage.
    """
    system = trained.get("system_of_rows") or recipe.prompts.system
    return recipe.model_copy(update={"prompts": recipe.prompts.model_copy(update={"system": system})})


def _parted(messages: Sequence[Message]) -> tuple[list[Message], list[Message]]:
    """The first message if it instructs, and the turns after it."""
    split = int(bool(messages) and messages[0].role in INSTRUCTIONS)
    return list(messages[:split]), list(messages[split:])
