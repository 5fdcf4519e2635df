"""lineage.json: where a student comes from. Each stage writes its own section and no other.

    {"name": …, "generate": {…}, "filters": {…}, "train": {…}, "evaluate": {…}}

Every section has the versions of the packages that did the work.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from math import inf
from typing import Any

from pipeline.errors import DataError
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir, write_file


def versions(*packages: str) -> dict[str, str]:
    """The versions of the named packages, without those that are not installed."""
    found = {}
    for package in ("distillate", *packages):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def read_lineage(run: RunDir) -> dict[str, Any]:
    """The run's lineage, empty for a new run. Raises DataError if the file is not JSON."""
    try:
        lineage: dict[str, Any] = json.loads(run.lineage.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{run.lineage}: {error}; move it away to start a new one") from None
    return lineage


def answered_by(teacher: str, lineage: Mapping[str, Any]) -> list[str]:
    """The models whose answers a run holds, the last one asked first; the recipe's `teacher` if the lineage names none.

    A model that a killed call asked is one of them, unless the filters read no more answers than there were before it.
    """
    models = lineage.get("generate", {}).get("teacher", {})
    names = [models.get("asked", teacher), *models.get("earlier", [])]
    killed, read = models.get("asking"), lineage.get("filters", {}).get("rows", inf)
    return list(dict.fromkeys([killed["model"], *names])) if killed and killed["answers"] < read else names


def taught_by(recipe: Recipe, lineage: Mapping[str, Any]) -> list[str]:
    """The models that a student learns from: those that answered, and the recipe's teacher if its tokens are scored."""
    followed = [recipe.teacher.model] if recipe.train.soft and recipe.train.kd.teacher != "stored" else []
    return list(dict.fromkeys([*answered_by(recipe.teacher.model, lineage), *followed]))


def spent_in_all(spent: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Tokens and USD of several runs' `generate.spent`, without empty ones; USD is None if a price was not known."""
    known = [one for one in spent if one]
    usd = [one.get("usd") for one in known]
    return {
        "tokens": sum(one.get("tokens") or 0 for one in known),
        "usd": sum(usd) if known and None not in usd else None,
    }


def spent_on_answers(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's answers have cost, those of earlier turns included. `asked`: its lineage of `generate`."""
    return spent_in_all([asked.get("spent", {}), asked.get("user", {}).get("spent_before", {})])


def rules_asked(filters: Mapping[str, Any]) -> int:
    """How many rules judged the answers, by the lineage's section `filters`; duplicates and the judge are one each."""
    return len(filters["rules"]) + bool(filters.get("dedup")) + bool(filters.get("judge"))


def record_lineage(run: RunDir, stage: str, section: dict[str, Any]) -> None:
    """Replaces the stage's section."""
    write_lineage(run, with_section(run, stage, section))


def with_section(run: RunDir, stage: str, section: dict[str, Any]) -> dict[str, Any]:
    """The run's lineage with the stage's section replaced."""
    return {"name": run.name, **read_lineage(run), stage: section}


def write_lineage(run: RunDir, lineage: dict[str, Any]) -> None:
    """Replaces the whole file."""
    write_file(run.lineage, encode_lineage(lineage))


def encode_lineage(lineage: dict[str, Any]) -> bytes:
    """The content of the file. Bytes of a path that are not UTF-8 are replaced by U+FFFD."""
    text = json.dumps(lineage, ensure_ascii=False, indent=2) + "\n"
    return text.encode(errors="surrogateescape").decode(errors="replace").encode()
