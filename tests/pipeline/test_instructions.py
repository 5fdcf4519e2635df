"""What each model is told."""

from typing import Any

import pytest

from pipeline.instructions import asked_of_student, told_in_words, told_to_teacher
from pipeline.records import Message
from pipeline.student_config import StudentConfig
from pipeline.teacher_config import Example, TeacherConfig


def turns(*pairs: str) -> list[Message]:
    return [Message(*pair.split(":")) for pair in pairs]


TEACHER = {"model": "m", "system": "T", "examples": [{"prompt": "p", "answer": "a"}]}


@pytest.mark.parametrize(
    ("teacher", "asked", "told"),
    [
        ({"model": "m"}, ["system:S", "user:q"], ["system:S", "user:q"]),
        (TEACHER, ["user:q"], ["system:T", "user:p", "assistant:a", "user:q"]),
        (TEACHER, ["system:S", "user:q"], ["system:T\n\nS", "user:p", "assistant:a", "user:q"]),
        (TEACHER, ["developer:S", "user:q"], ["developer:T\n\nS", "user:p", "assistant:a", "user:q"]),
        ({**TEACHER, "system": None}, ["system:S", "user:q"], ["system:S", "user:p", "assistant:a", "user:q"]),
    ],
)
def test_what_the_teacher_is_told(teacher: dict[str, Any], asked: list[str], told: list[str]) -> None:
    messages = turns(*asked)
    assert told_to_teacher(messages, TeacherConfig(**teacher)) == turns(*told)
    assert messages == turns(*asked)


@pytest.mark.parametrize(
    ("system", "asked"),
    [(None, ["system:S", "user:q"]), ("N", ["system:N", "user:q"]), ("", ["user:q"])],
)
def test_what_the_student_is_asked(system: str | None, asked: list[str]) -> None:
    student = StudentConfig(model="m", system=system)
    assert asked_of_student(turns("system:S", "user:q"), student) == turns(*asked)
    assert asked_of_student(turns("user:q"), student) == [turn for turn in turns(*asked) if turn.content != "S"]
    assert asked_of_student(turns("user:q"), None) == turns("user:q")


@pytest.mark.parametrize(
    ("system", "examples", "words"),
    [
        (None, 0, ""),
        (None, 1, "1 example"),
        ("Be brief.", 0, "a system prompt"),
        ("Be brief.", 3, "a system prompt and 3 examples"),
    ],
)
def test_what_the_teacher_alone_is_told_in_words(system: str | None, examples: int, words: str) -> None:
    teacher = TeacherConfig(model="m", system=system, examples=[Example(prompt="on", answer="{}")] * examples)
    assert told_in_words(teacher) == words
