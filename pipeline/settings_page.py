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
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pipeline.recipe import ChooseSlot, Recipe, RuleConfig, Section

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
PAGE = """# Settings

Every key of a recipe. `python -m <stage> --help` shows the same. A key can also be given as a flag
(`--sampling.temperature 0.7`) or as an environment variable (`DISTILL_SAMPLING__TEMPERATURE=0.7`). Flags override
variables, and variables override the file. `prompts.file`, `evaluate.probes_file` and the `file` of a filter rule are
relative to the recipe. Runs and model folders are relative to the working directory, as `--run` is.

This page is made by `python -m pipeline.settings_page > docs/settings.md`.
"""


class Setting(NamedTuple):
    """One key of a recipe, or a section (without type and default)."""

    key: str
    kind: str
    default: str
    meaning: str


def settings(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[Setting]:
    """All keys in the order of the recipe; each section comes before its keys."""
    nested = []
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        section = _section(field)
        if section is None:
            yield Setting(key, _kind(field.annotation), _default(field), field.description or "")
        else:
            nested.append((key, field, section))
    for key, field, section in nested:
        about = " ".join(filter(None, (section.__doc__, field.description)))
        if key == "evaluate.judge":  # the same section again
            yield Setting(key, "", "", f"{about} Its keys are those of `filters.judge`.")
            continue
        yield Setting(key, "", "", about)
        yield from settings(section, f"{key}.")


def help_text(width: int = 100) -> str:
    """The settings as the end of a command's help."""
    lines = ["recipe keys, each also a flag (--<key> VALUE) or a variable (DISTILL_<SECTION>__<KEY>):"]
    for setting in settings():
        if not setting.kind:
            lines += ["", *textwrap.wrap(f"{setting.key}: {setting.meaning}", width)]
            continue
        lines.append(f"  --{setting.key}  ({setting.kind}; {setting.default})")
        lines += textwrap.wrap(setting.meaning, width, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines) + "\n"


def page() -> str:
    """docs/settings.md."""
    lines = [PAGE]
    table = False
    for setting in settings():
        if not setting.kind:
            lines += ["", f"## {setting.key}", "", setting.meaning]
            table = False
            continue
        if not table:
            lines += ["", "| key | type | default | meaning |", "|---|---|---|---|"]
            table = True
        cells = (f"`{setting.key}`", setting.kind, setting.default, setting.meaning)
        lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a key holds; None for a plain value."""
    kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
    return next((kind for kind in kinds if issubclass(kind, Section)), None)


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


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    text: str = yaml.safe_dump(field.default, allow_unicode=True, default_flow_style=True, width=1000)
    return "see below" if len(text) > 100 else text.removesuffix("\n...\n").strip()


if __name__ == "__main__":
    print(page(), end="")
