"""What a recipe is read from: its YAML, and the DISTILL_* variables. `load_recipe` puts them and the flags together."""

import os
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_settings import EnvSettingsSource, InitSettingsSource

from pipeline.errors import RecipeError
from pipeline.section import Section, section_of

ENV_PREFIX = "DISTILL_"
QUOTE_START = "put a text that begins with `{`, `[`, `*`, `@`, `%` or a quote in quotes as a whole"
YAML_FIXES = {  # by a part of PyYAML's message
    "mapping values are not allowed": "put a text with `: ` in it in quotes; keys of one section begin in one column",
    r"'\t' that cannot start": "indent with spaces, not with tabs",
    "cannot start any token": QUOTE_START,
    "<scalar>": QUOTE_START,
    "undefined alias": QUOTE_START,
    "unhashable key": QUOTE_START,
    "recursion depth": "a value is nested too deeply; make it flatter, or text",
}
INT = "tag:yaml.org,2002:int"
DECIMAL = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$")  # PyYAML reads 010 as 8, and 1:30 as 90
TEXTS = (("prompts", "slots"), ("evaluate", "unseen"))  # mappings to lists of texts


class Variables(EnvSettingsSource):
    """The DISTILL_* variables. What is not JSON where JSON is expected is left for the check of the whole."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        try:
            return super().decode_complex_value(field_name, field, value)
        except ValueError:
            return value

    def __call__(self) -> dict[str, Any]:
        return without_replaced(super().__call__(), self.current_state, self.settings_cls)


class Yaml(InitSettingsSource):
    """What the recipe's file says."""

    def __call__(self) -> dict[str, Any]:
        return without_replaced(super().__call__(), self.current_state, self.settings_cls)


def without_replaced(values: dict[str, Any], given: dict[str, Any], section: type[BaseModel]) -> dict[str, Any]:
    """A source's values without the mappings that a source before it gave: sections are joined, a mapping is one value.

    pydantic-settings would join both key by key, and nobody could take a key out.
    """
    kept = {}
    for name, value in values.items():
        other = given.get(name)
        if isinstance(value, dict) and isinstance(other, dict):
            inner = section_of(section.model_fields[name]) if name in section.model_fields else None
            if inner is None:
                continue
            value = without_replaced(value, other, inner)
        kept[name] = value
    return kept


def check_variables(recipe: type[Section]) -> None:
    """Raises RecipeError at a DISTILL_* variable that is meant for the recipe and misses it. Its value is not shown.

    Meant for it are names with two underscores, or that begin with a section. Others (`DISTILL_CACHE`, a key) are not.
    """
    for name in sorted(name for name in os.environ if name.upper().startswith(ENV_PREFIX)):
        first, *keys = name.upper().removeprefix(ENV_PREFIX).lower().split("__")
        meant = bool(keys) or first.split("_")[0] in recipe.model_fields
        if meant and first not in recipe.model_fields:
            raise RecipeError(
                f"{name}: no such key: {first}; there are {', '.join(recipe.model_fields)} "
                f"({ENV_PREFIX}<SECTION>__<KEY>, with two underscores); unset or rename it"
            )
        if (within := _mapping_above(recipe, [first, *keys])) is not None:
            raise RecipeError(
                f"{name}: {'.'.join(within)} is one value, in which a variable sets no key; give all of it as JSON in "
                f"{ENV_PREFIX}{'__'.join(within).upper()}"
            )


def _mapping_above(section: type[Section] | None, keys: list[str]) -> list[str] | None:
    """The first of the keys that lead to a mapping which is no section, if any follow; else None."""
    for count, key in enumerate(keys, start=1):
        if section is None:
            return keys[: count - 1]
        if key not in section.model_fields:
            return None  # the check of the whole says so
        section = section_of(section.model_fields[key])
    return None


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, which PyYAML takes in silence, and leaves values of slots as they are written.

    PyYAML makes 7.0 of 7.00, and True of yes.
    """

    def get_single_node(self) -> yaml.Node | None:
        recipe = super().get_single_node()
        for section, key in TEXTS:
            for slot in _at(recipe, section, key, None):
                for values in (slot, *_at(slot, "from")):
                    _keep_as_written(values)
        return recipe

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], int] = {}  # the line of each key
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in first:
                raise RecipeError(f"{self.name}:{line}: {key.value} is given twice (see line {first[name]}); keep one")
            first[name] = line
        return node


_Loader.yaml_implicit_resolvers = {  # dates are texts: JSON, and so a request, has none
    first: [(tag, DECIMAL if tag == INT else pattern) for tag, pattern in tags if tag != "tag:yaml.org,2002:timestamp"]
    for first, tags in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _at(node: yaml.Node | None, *path: str | None) -> list[yaml.Node]:
    """What nested mappings have at a path of keys; None in it stands for every key."""
    found = [node]
    for key in path:
        pairs = (pair for one in found if isinstance(one, yaml.MappingNode) for pair in one.value)
        found = [value for name, value in pairs if key in (None, name.value)]
    return [one for one in found if one is not None]


def _keep_as_written(values: yaml.Node) -> None:
    """Makes the items of a list texts."""
    for item in values.value if isinstance(values, yaml.SequenceNode) else []:
        if isinstance(item, yaml.ScalarNode) and item.tag != "tag:yaml.org,2002:null":
            item.tag = "tag:yaml.org,2002:str"


def expanded(given: str | Path) -> Path:
    """A path with `~` as a home folder; as it is if that folder is not known (`~nobody/x`): then it is not there."""
    return Path(os.path.expanduser(given))  # noqa: PTH111, pathlib raises RuntimeError


def read_yaml(path: Path) -> dict[str, Any]:
    """The sections of a recipe. Raises RecipeError if the file cannot be read, is no mapping, or has a key twice."""
    try:
        with path.open("rb") as file:
            data = yaml.load(file, _Loader)
    except OSError as error:
        reason = "no such recipe" if isinstance(error, FileNotFoundError) else error.strerror
        raise RecipeError(f"{path}: {reason}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # of them: bytes that are no UTF-8, a huge number
        said = " ".join(str(error).split())
        fix = next((f"; {fix}" for part, fix in YAML_FIXES.items() if part in said), "")
        raise RecipeError(f"{path}: not YAML: {said}{fix}") from None
    if data is None:
        raise RecipeError(f"{path}: the recipe is empty; it needs name, teacher and prompts")
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise RecipeError(f"{path}: a recipe is a mapping of sections, got {type(data).__name__}")
    return data
