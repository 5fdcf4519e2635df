"""The tasks of lm-eval, run by a stand-in for its command: what it is told, and what is read of its results."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evaluate.document import Estimate, Z
from evaluate.measure.lm_eval import find_command, measure_tasks, read_scores
from pipeline.errors import DistillError, UsageError
from pipeline.recipe import Recipe
from tests.tiny_student import make_recipe

RESULTS = {"ifeval": {"alias": "ifeval", "acc,none": 0.25, "acc_stderr,none": 0.02, "loose,none": 0.5, "n": 9}}
STAND_IN = """#!{python}
import json, os, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--output_path") + 1]) / "model"
out.mkdir(parents=True)
about = {{"argv": sys.argv[1:], "key": os.environ["OPENAI_API_KEY"], "path": os.environ.get("PYTHONPATH")}}
(out / "results_1.json").write_text(json.dumps({{"results": {results}, "about": about}}))
sys.exit({code})
"""


@pytest.fixture
def recipe() -> Recipe:
    made = make_recipe("student")
    own = made.evaluate.model_copy(update={"lm_eval": ["ifeval", "gsm8k"], "lm_eval_limit": 9, "speed_concurrency": 4})
    return made.model_copy(update={"evaluate": own})


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, code: int = 0) -> None:
    script = folder / "bin" / "lm_eval"
    script.parent.mkdir()
    script.write_text(STAND_IN.format(python=sys.executable, results=json.dumps(RESULTS), code=code))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent))
    monkeypatch.setenv("PYTHONPATH", "/ours")
    monkeypatch.setenv("VLLM_API_KEY", "secret")


def server() -> Any:
    return SimpleNamespace(served_name="student_after", base_url="http://127.0.0.1:9/v1")


def test_the_tasks_are_run_against_the_server(tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch)
    scores = measure_tasks(recipe, server(), tmp_path).scores
    assert scores == {
        "ifeval acc": Estimate(0.25, 0.25 - Z * 0.02, 0.25 + Z * 0.02),
        "ifeval loose": Estimate(0.5, 0.5, 0.5),
    }
    (written,) = tmp_path.rglob("results_*.json")
    about = json.loads(written.read_text())["about"]
    assert "model=student_after,base_url=http://127.0.0.1:9/v1/chat/completions,num_concurrent=4" in about["argv"]
    assert about["argv"][about["argv"].index("--tasks") + 1] == "ifeval,gsm8k" and about["argv"][-1] == "9"
    assert about["key"] == "secret" and about["path"] is None  # our `evaluate` is not the package that it needs


def test_a_command_that_fails_or_is_not_there_is_said(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, code=3)
    with pytest.raises(DistillError, match=r"lm_eval ended with 3 .* see .*lm_eval\.log"):
        measure_tasks(recipe, server(), tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="there is no `lm_eval` command"):
        find_command()


def test_a_figure_without_an_error_has_no_interval() -> None:
    assert read_scores({"t": {"m,strict": 0.5, "m_stderr,strict": "N/A"}}) == {"t m": Estimate(0.5, 0.5, 0.5)}
