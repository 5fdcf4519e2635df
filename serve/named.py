"""A run's own models by name: what is loaded for each, the name that clients ask for, and where it answers.

teacher    the recipe's teacher, under its own name, at teacher.base_url
student    the run's trained student, on the next port
before     the student as it was before training, on the port after that
"""

import os
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from pipeline.adapters import stamp_files
from pipeline.address import is_this_machine
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir
from pipeline.serve_config import ServeConfig
from pipeline.students import AFTER, BEFORE, TEACHER, after_training, before_training
from serve.checks import local_address, local_host
from serve.command import merge_args

KEYS = {"teacher": TEACHER, "before": BEFORE, "student": AFTER}  # by what users and clients call them
NAMES = {key: name for name, key in KEYS.items()}
HOST, TEACHER_PORT = "127.0.0.1", 8000  # if the teacher answers on another machine, or its URL names no port


class Address(NamedTuple):
    """A model of a run: what it is called, and where it is served on this machine."""

    served_name: str
    host: str
    port: int


def address_of(recipe: Recipe, key: str) -> Address:
    """Where the model of that key is served; another model takes the teacher's address.

    A student needs no teacher that can be started here: it may be a gateway at any path. Raises UsageError for the
    teacher's address if no server can be started there.
    """
    further = {AFTER: 1, BEFORE: 2}.get(key, 0)
    if not further:
        return Address(recipe.teacher.model if key == TEACHER else key, *local_address(recipe.teacher.url))
    name, teacher = NAMES[key], recipe.teacher.url
    if not is_this_machine(teacher):
        return Address(name, HOST, TEACHER_PORT + further)
    return Address(name, local_host(teacher), (urlsplit(teacher).port or TEACHER_PORT) + further)


def reference_of(recipe: Recipe, run: RunDir, key: str) -> str:
    """What is loaded for a key: a folder or a model reference. An adapter is merged for it, once.

    Raises UsageError if there is no student yet.
    """
    folders = {AFTER: after_training, BEFORE: before_training}
    if key in folders:
        return str(folders[key](recipe, run).resolve())
    return recipe.teacher.model if key == TEACHER else key


def name_of_files(name: str, folder: str) -> str:
    """The second name of a student's server. It differs once other files are in the folder, as after a training."""
    stamps = "\n".join([folder, *stamp_files(Path(folder))])
    return f"{name}-{blake2b(os.fsencode(stamps), digest_size=4).hexdigest()}"


def under_both_names(config: ServeConfig, name: str, folder: str) -> ServeConfig:
    """The settings of a student's server, with both of its names. The user's own flags win."""
    names = ["--served-model-name", name, name_of_files(name, folder)]
    return config.model_copy(update={"args": merge_args(names, config.args)})
