"""One line for each error in a recipe: the file, flag or variable, the key, and the value."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_settings import SettingsError

from pipeline.recipe_sources import ENV_PREFIX
from pipeline.section import Section, section_of

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


def explain_all(problems: list["ErrorDetails"], recipe: type[Section], path: Path, flags: list[str]) -> list[str]:
    """A line for each value of a recipe that is wrong.

    Where a key takes one of several types, pydantic has a problem for each of them: they are one line here.
    """
    found: dict[tuple[str, ...], ErrorDetails] = {}
    for problem in problems:
        names = tuple(_keys(problem["loc"], recipe))
        if first := found.get(names):
            first["msg"] += f", or {problem['msg'].removeprefix('Input ')}"
        found.setdefault(names, problem)
    return [_explain(problem, names, recipe, path, flags) for names, problem in found.items()]


def _keys(place: Iterable[int | str], recipe: type[Section]) -> Iterator[str]:
    """The keys to a value, without the types that pydantic puts between them."""
    section: type[Section] | None = recipe
    several = False
    for part in map(str, place):
        if several or part.startswith("<"):  # a type, or the kind of a slot (prompts_config)
            several = False
            continue
        yield part
        field = section.model_fields.get(part) if section else None
        several = field is not None and _types(field.annotation) > 1
        section = section_of(field) if field else None


def _types(annotation: Any) -> int:
    """How many types it names, without None."""
    if get_origin(annotation) is Annotated:
        return _types(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return sum(_types(member) for member in get_args(annotation) if member is not NoneType)
    return 1


def _explain(problem: "ErrorDetails", names: Sequence[str], recipe: type[Section], path: Path, flags: list[str]) -> str:
    """One problem as `where: key: what is wrong, got value`."""
    key = "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in names).lstrip(".")
    where = _flag_or_variable(names, flags) or str(path)
    if problem["type"] == "extra_forbidden":
        known = ", ".join(_known_keys(recipe, names[:-1]))
        return f"{where}: {key}: no such key" + (f"; there are {known}" if known else "")
    if problem["type"] == "missing":
        return f"{where}: {key} is missing"
    message, value = problem["msg"].removeprefix("Value error, ").removeprefix("Input "), problem["input"]
    if problem["type"] in ("model_type", "dict_type"):
        known = ", ".join(_known_keys(recipe, names))
        message = f"takes keys ({known})" if known else "takes a mapping, `{key: value}`"
    secret = [*names[-1:]] == ["api_key_env"]  # a key may be there by mistake
    shown = "" if secret or isinstance(value, dict | BaseModel) else f", got {value!r}"
    if not secret:
        shown += advice(problem)
    if [*names[:2]] == ["prompts", "columns"] and names[-1] == "[key]":
        shown += "; these map to your names, and the other columns travel along unnamed"
    if problem["type"] in ("list_type", "dict_type", "model_type") and where.startswith((ENV_PREFIX, "--")):
        section = _section_at(recipe, names)
        needed = [name for name, field in section.model_fields.items() if field.is_required()] if section else []
        example = ", ".join(f'"{name}": …' for name in needed)
        shown = f"; give JSON: '{{{example}}}'" if example else "; give JSON"  # without the value: it may be a header
    return f"{where}: {key} {message}{shown}" if key else f"{where}: {message}"


def advice(problem: "ErrorDetails") -> str:
    """What to do about a value that YAML reads as another one than was meant; empty where nothing is known."""
    kind, value = problem["type"], problem["input"]
    if kind == "string_type" and isinstance(value, bool | int | float | dict):
        read = "yes, no, on and off" if isinstance(value, bool) else "{…}" if isinstance(value, dict) else ""
        return (f" (as YAML reads {read})" if read else "") + "; put it in quotes"
    if kind in ("model_type", "dict_type", "list_type") and value is None:
        return "; it is empty: remove its line, or fill it"
    if kind == "invalid_key" and type(value) is int:
        return "; a comma ends a value: write decimals with a point, as in 0.5"
    return ""


def explain_flag(error: SettingsError, flags: list[str]) -> str:
    """A flag that could not be read, as `--key: what is wrong`."""
    found = re.search(r'field "([\w.]+)"|encountered for ([\w.]+):', str(error))  # in the words of pydantic-settings
    if found is None:
        return str(error).removeprefix("error parsing CLI: ")
    key = found[1] or found[2]
    if within := [flag.split("=")[0] for flag in flags if flag.startswith(f"--{key}.")]:  # it names the section only
        variable = f"{ENV_PREFIX}{key.upper()}__…"
        return f"{', '.join(within)}: no JSON that a flag can hold; check it, or give it in the recipe or as {variable}"
    return f"--{key}: its value is no JSON; give JSON, in single quotes for the shell"


def _flag_or_variable(names: Sequence[str], flags: list[str]) -> str | None:
    """The flag or, failing that, the variable that gave the value at `names` or what it is a part of, if one did."""
    upper, given = {name.upper() for name in os.environ}, {flag.split("=")[0] for flag in flags}
    parts = [names[:count] for count in range(len(names), 0, -1)]
    found = [flag for part in parts if (flag := "--" + ".".join(part)) in given]
    found += [variable for part in parts if (variable := ENV_PREFIX + "__".join(part).upper()) in upper]
    return found[0] if found else None


def _known_keys(section: type[Section] | None, names: Sequence[str]) -> list[str]:
    """The keys of the section at `names`; none if there is no section."""
    section = _section_at(section, names)
    return [field.alias or name for name, field in section.model_fields.items()] if section else []


def _section_at(section: type[Section] | None, names: Sequence[str]) -> type[Section] | None:
    for name in names:
        section = section_of(section.model_fields[name]) if section and name in section.model_fields else None
    return section
