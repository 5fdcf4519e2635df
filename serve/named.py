"""A run's own models by name: what is loaded for each, the name that clients ask for, and where it answers.

teacher    the recipe's teacher, under its own name, at teacher.base_url
student    the run's trained student, on the next port
before     the student as it was before training, on the port after that
"""

from pathlib import Path
from typing import NamedTuple

from pipeline.address import is_this_machine
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir
from pipeline.students import after_training, before_training
from serve.checks import local_address

TEACHER, STUDENT, BEFORE = "teacher", "student", "before"
HOST, TEACHER_PORT = "127.0.0.1", 8000  # if the teacher answers on another machine


class Address(NamedTuple):
    """A model of a run: what it is called, and where it is served on this machine."""

    served_name: str
    host: str
    port: int


def address_of(recipe: Recipe, name: str) -> Address:
    """Where the model of that name is served; another model takes the teacher's address.

    Raises UsageError if the teacher is asked for and is not on this machine.
    """
    further = {STUDENT: 1, BEFORE: 2}.get(name, 0)
    if not further:
        return Address(recipe.teacher.model if name == TEACHER else name, *local_address(recipe.teacher.url))
    teacher = recipe.teacher.url
    host, port = local_address(teacher) if is_this_machine(teacher) else (HOST, TEACHER_PORT)
    return Address(name, host, port + further)


def reference_of(recipe: Recipe, run: RunDir, name: str) -> str:
    """What is loaded for a name: a folder or a model reference. An adapter is merged for it, once.

    Raises UsageError if there is no student yet.
    """
    folders = {STUDENT: after_training, BEFORE: before_training}
    if name in folders:
        return str(Path(folders[name](recipe, run)).resolve())
    return recipe.teacher.model if name == TEACHER else name
