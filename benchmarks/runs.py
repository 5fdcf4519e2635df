"""Recipes of numbered questions, runs of `generate` on them, and what these send and when they are answered."""

import json
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.http_server import MODEL
from benchmarks.measure import question
from generate.dialect import Dialect
from generate.jobs import build_jobs
from generate.prompts import iter_prompts
from generate.run import generate
from generate.summary import Summary
from pipeline.recipe import Recipe
from pipeline.records import Completion, read_jsonl
from pipeline.rundir import RunDir


def recipe_for(folder: Path, url: str, requests: int, teacher: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    """A recipe of `requests` different questions, which are written into the folder. `teacher` adds to the section."""
    path = folder / f"questions-{requests}.jsonl"
    with path.open("w") as file:
        file.writelines(json.dumps({"prompt": question(number)}) + "\n" for number in range(requests))
    about = {"model": MODEL, "base_url": url, **(teacher or {})}
    return Recipe.model_validate({"name": "bench", "teacher": about, "prompts": {"file": path}, **sections})


@contextmanager
def fresh(
    url: str, requests: int, teacher: dict[str, Any] | None = None, **sections: Any
) -> Iterator[tuple[Recipe, RunDir]]:
    """Such a recipe and an empty run directory, for the time of the block."""
    with tempfile.TemporaryDirectory() as folder:
        yield recipe_for(Path(folder), url, requests, teacher, **sections), RunDir(Path(folder) / "run")


def run_quietly(recipe: Recipe, run: RunDir) -> Summary:
    """The whole of `generate`, without its progress."""
    return generate(recipe, run, quiet=True)


def billed(url: str) -> dict[str, int]:
    """What the stub has billed."""
    with urllib.request.urlopen(url.removesuffix("/v1") + "/billed") as reply:
        found: dict[str, int] = json.load(reply)
    return found


def bodies(recipe: Recipe, most: int | None = None) -> list[bytes]:
    """What `generate` sends, in order; the first `most` of it."""
    dialect = Dialect()
    return [dialect.body(job) for job in islice(build_jobs(iter_prompts(recipe), recipe), most)]


def answer_ends(run: RunDir) -> list[float]:
    """When each answer of the run came in, in seconds."""
    return [datetime.fromisoformat(line.created).timestamp() for line in read_jsonl(run.completions, Completion)]
