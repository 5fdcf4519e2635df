"""One line for each error in a recipe: the file, flag or variable, the key, and the value."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard, get_args

from pydantic import BaseModel

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

MOVED = {
    "train.held_out": "is now two shares: prompts.validation (chooses the checkpoint) and prompts.test (is evaluated)",
    "train.held_out_rows": "is now train.test_rows",
}


def explain(problem: "ErrorDetails", recipe: type[BaseModel], path: Path, flags: list[str], env_prefix: str) -> str:
    """One pydantic problem of a recipe as `where: key: what is wrong, got value`."""
    names = [str(part) for part in problem["loc"]]
    key = "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in names).lstrip(".")
    flag = "--" + ".".join(names[:2])
    variable = env_prefix + "__".join(names).upper()
    if any(given.split("=")[0] == flag for given in flags):
        where = flag
    elif variable in {name.upper() for name in os.environ}:
        where = variable
    else:
        where = str(path)
    if problem["type"] == "extra_forbidden":
        if key in MOVED:
            return f"{where}: {key} {MOVED[key]}"
        known = _known_keys(recipe, names[:-1])
        return f"{where}: {key}: no such key" + (f"; there are {', '.join(known)}" if known else "")
    if problem["type"] == "missing":
        return f"{where}: {key} is missing"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    value = problem["input"]
    shown = "" if isinstance(value, dict | BaseModel) else f", got {value!r}"
    return f"{where}: {key} {message}{shown}" if key else f"{where}: {message}"


def _known_keys(model: type[BaseModel], names: list[str]) -> list[str]:
    """The keys of the section at `names`; none if there is no section."""
    for name in names:
        field = model.model_fields.get(name)
        sections = [t for t in (field.annotation, *get_args(field.annotation)) if _is_model(t)] if field else []
        if not sections:
            return []
        model = sections[0]
    return [field.alias or name for name, field in model.model_fields.items()]


def _is_model(annotation: object) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
