"""Every key of a recipe with its type, default and meaning: for `--help`, and as docs/settings.md.

    python -m pipeline.settings_page > docs/settings.md

Reads the models of `pipeline.recipe`, where each key's text stands under the key, and prints.
"""

import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pipeline.filters_config import RuleConfig
from pipeline.prompts_config import ChooseSlot
from pipeline.recipe import FILES, Recipe
from pipeline.section import Section, section_of

NAMES = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "true or false",
    Path: "path",
    Any: "any value",
    ChooseSlot: "a choice",
    RuleConfig: "rules",
}
WIDTH = 100  # characters of the help
PAGE = """# Settings

Every key of a recipe. `python -m <stage> --help` shows the same. A key can also be given as a flag
(`--sampling.temperature 0.7`) or as an environment variable (`DISTILL_SAMPLING__TEMPERATURE=0.7`). Flags override
variables, and variables override the file. In a variable a list or mapping is JSON. A mapping that is no section
(`sampling.extra`, `prompts.slots`, …) is one value: the one given replaces the whole of it, and `{{}}` empties it.
Runs, model folders and what `filters.dedup` names are relative to the working directory, as `--run` is. Other files are
relative to the recipe: those that a rule names (`file`, `database`, `schema`), and
{files}.
Given as a flag or a variable, a file is relative to the working directory, too.

This page is made by `python -m pipeline.settings_page > docs/settings.md`.
"""


class RecipeKey(NamedTuple):
    """One key of a recipe."""

    key: str
    kind: str
    default: str
    meaning: str


class Group(NamedTuple):
    """A section of a recipe and its own keys. The first, without a name, is the recipe itself."""

    name: str
    about: str
    keys: list[RecipeKey]


def groups(section: type[Section] = Recipe, name: str = "", about: str = "") -> Iterator[Group]:
    """All sections in the order of the recipe, each before the sections within it."""
    fields = {f"{name}.{field.alias or key}".lstrip("."): field for key, field in section.model_fields.items()}
    yield Group(name, about, [_recipe_key(key, field) for key, field in fields.items() if not section_of(field)])
    for key, field in fields.items():
        if inner := section_of(field):
            text = " ".join(filter(None, (inner.__doc__, field.description)))
            if key == "evaluate.judge":
                yield Group(key, f"{text} Its keys are those of `filters.judge`.", [])
            else:
                yield from groups(inner, key, text)


def help_text() -> str:
    """The settings as the end of a command's help."""
    lines = ["recipe keys, each also a flag (--<key> VALUE) or a variable (DISTILL_<SECTION>__<KEY>):"]
    for group in groups():
        if group.name:
            lines += ["", *textwrap.wrap(f"{group.name}: {group.about}", WIDTH)]
        for key, kind, default, meaning in group.keys:
            lines.append(f"  --{key}  ({kind}; {default})")
            lines += textwrap.wrap(meaning, WIDTH, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines) + "\n"


def page() -> str:
    """docs/settings.md."""
    lines = [PAGE.format(files=", ".join(f"`{section}.{key}`" for section, key in FILES))]
    for group in groups():
        if group.name:
            lines += [f"## {group.name}", "", group.about, ""]
        if group.keys:
            lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
            for key, *cells in group.keys:
                lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in (f'`{key}`', *cells))} |")
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _recipe_key(key: str, field: FieldInfo) -> RecipeKey:
    if field.default is PydanticUndefined:
        default = "required"
    elif isinstance(field.default, dict) and field.default:
        default = ", ".join(field.default)
    else:
        default = str(yaml.safe_dump(field.default, allow_unicode=True)).removesuffix("...\n").strip()
    return RecipeKey(key, _kind(field.annotation), default, " ".join((field.description or "").split()))


def _kind(annotation: Any) -> str:
    """A type in words."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(parts[0])
    if origin in (Union, UnionType):
        return " or ".join(_kind(part) for part in parts if part is not NoneType)
    if origin is Literal:
        return " or ".join(map(str, parts))
    if origin is list:
        return f"list of {_kind(parts[0])}"
    if origin is dict:
        return f"mapping to {_kind(parts[1])}"
    return NAMES[annotation]


if __name__ == "__main__":
    print(page(), end="")
