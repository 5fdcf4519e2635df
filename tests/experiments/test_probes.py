"""The arms' answers to the probes, by the same rules as in each arm's report."""

from argparse import Namespace
from pathlib import Path

import pytest
import yaml

from evaluate.measure.probes import ProbePrompts
from evaluate.measure.results import ProbeResult
from experiments.results import _probe_figures
from experiments.runs import Arm, Setup
from pipeline.recipe import load_recipe
from pipeline.records import Kept, Message, Prompt
from pipeline.rundir import RunDir
from tests.completion_fields import completion_fields


@pytest.mark.parametrize(("reasoning", "passing"), [("strip", 1.0), ("keep", 0.0)])
def test_a_student_that_learned_no_thoughts_breaks_no_rule_about_them(
    reasoning: str, passing: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, run = tmp_path / "recipe.yaml", RunDir(tmp_path / "run")
    rules = [{"rule": "length", "max_chars": 99}, {"rule": "length", "of": "reasoning", "max_chars": 9}]
    recipe = {
        "name": "t",
        "teacher": {"model": "m"},
        "prompts": {"template": "x", "count": 1},
        "filters": {"rules": rules},
        "student": {"model": "s"},
        "train": {"reasoning": reasoning},
    }
    path.write_text(yaml.safe_dump(recipe))
    probes = ProbePrompts("slots", [Prompt(id="p", messages=[Message("user", "q")])])
    answers = ProbeResult(answers=[Kept(**completion_fields("a", "text"))])
    monkeypatch.setattr("experiments.results.choose_probes", lambda *_: probes)
    monkeypatch.setattr("experiments.results.read_test", lambda _: [])
    monkeypatch.setattr(
        "experiments.results._cached", lambda arms, name, kind: {"arm": answers} if kind is ProbeResult else {}
    )
    setup = Setup(load_recipe(path), path, [], run, tmp_path, Namespace(), path.read_bytes())
    assert _probe_figures(setup, [Arm("arm", run, [])])["arm"]["passing"].value == passing
