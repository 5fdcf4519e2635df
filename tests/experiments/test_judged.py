"""A local teacher that judges its own answers is served while an experiment filters them."""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.runs import Setup, answered
from pipeline.recipe import load_recipe
from pipeline.rundir import RunDir


@pytest.mark.parametrize(
    ("left", "filters", "asked"),
    [
        (0, {"judge": {"min_score": 3}}, ["filters, served"]),
        (0, {"judge": {"min_score": 3, "base_url": "https://judge.example/v1"}}, ["filters"]),
        (0, {}, ["filters"]),
        (5, {}, ["generate, served", "filters, served"]),
    ],
)
@pytest.mark.parametrize("given", [False, True], ids=["asked", "given"])
def test_the_teacher_is_served_where_it_is_asked(
    given: bool, left: int, filters: dict[str, Any], asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, done, served = tmp_path / "recipe.yaml", list[str](), list[RunDir]()
    teacher = {"model": "m", "base_url": "http://127.0.0.1:8123/v1"}
    prompts = {"file": "rows.csv", "answers": "output"} if given else {"template": "x", "count": 1}
    path.write_text(yaml.safe_dump({"name": "t", "teacher": teacher, "prompts": prompts, "filters": filters}))

    @contextmanager
    def serving(recipe: object, run: RunDir) -> Iterator[None]:
        served.append(run)
        yield
        served.clear()

    monkeypatch.setattr("experiments.runs.teacher", serving)
    monkeypatch.setattr("experiments.runs.pending", lambda *_: left)
    monkeypatch.setattr("experiments.runs.stage", lambda name, *_: done.append(name + ", served" * bool(served)))
    run = RunDir(tmp_path / "run")
    answered(Setup(load_recipe(path), path, [], run, run.path / "experiments", Namespace(), path.read_bytes()), run)
    if given and left:  # the rows bring them
        asked = ["generate", "filters"]
    assert done == asked
