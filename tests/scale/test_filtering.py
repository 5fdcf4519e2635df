"""The filters on a Ray cluster of two nodes on this machine: the files of one machine, byte for byte."""

import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from filters.__main__ import main
from pipeline.records import Completion, Message, Prompt, encode_line
from tests.completion_fields import completion_fields
from tests.scale.test_near import texts

pytestmark = pytest.mark.timeout(400)  # they start nodes and commands, which takes long on a busy machine

ROWS = 3000
RULES = [
    {"rule": "length", "min_chars": 20},
    {"rule": "repetition"},
    {"rule": "function", "file": "my_rules.py", "name": "no_window"},
]
DEDUP = {"near": 0.8, "prompts": 1.0, "ngram": 3, "contamination": ["held_out.jsonl"]}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # a busy machine
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    small: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    cluster.add_node(**small)
    yield cluster.address
    ray.shutdown()
    cluster.shutdown()


def written(folder: Path, rows: int = ROWS) -> Path:
    """A run of so many answers, a prompts.jsonl with newer references, a held-out file, and the recipe."""
    made, run = texts(rows, seed=5), folder / "run"
    run.mkdir(parents=True)
    rng = random.Random(6)
    with (run / "completions.jsonl").open("wb") as file, (run / "prompts.jsonl").open("wb") as prompts:
        for number, text in enumerate(made):
            asked = [Message(role="user", content=f"say {number}")]
            text = "short" if rng.random() < 0.02 else text
            fields = completion_fields(f"{number * 7919 % 1_000_003:032x}", text, messages=asked)
            fields["prompt_id"] = f"p{number}"
            file.write(encode_line(Completion(**fields)))
            prompts.write(
                encode_line(Prompt(id=f"p{number}", messages=asked, slots={}, part="train", reference=number))
            )
        file.write(b'{"id": "torn')
    with (folder / "held_out.jsonl").open("w") as file:
        file.writelines(json.dumps({"prompt": f"ask {at}", "text": text}) + "\n" for at, text in enumerate(made[50:70]))
    (folder / "my_rules.py").write_text(
        "def no_window(answer):\n    return 'a window' if 'windowa' in answer.text else None\n"
    )
    recipe = {
        "name": "t",
        "teacher": {"model": "m"},
        "prompts": {"template": "x", "count": 1},
        "filters": {"rules": RULES, "dedup": DEDUP, "select": "all"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return run


class RayHere:
    """What the filters use of ray, in this process. A task gets what pickle makes of it without the user's modules."""

    def __init__(self, cloudpickle: Any) -> None:
        self.cloudpickle = cloudpickle

    exceptions = SimpleNamespace(RayTaskError=ZeroDivisionError, RayError=ZeroDivisionError)

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}

    def put(self, value: Any) -> Any:
        self.cloudpickle.dumps(value)
        return value

    def get(self, ref: Any) -> Any:
        return ref

    def cancel(self, ref: Any) -> None:
        pass

    def remote(self, function: Any) -> Any:
        def options(num_returns: int) -> Any:
            def call(*given: Any) -> Any:
                data = self.cloudpickle.dumps((function, given))
                own = {name: sys.modules.pop(name) for name in user_modules()}
                try:
                    task, arguments = self.cloudpickle.loads(data)
                finally:
                    sys.modules.update(own)
                made = task(*arguments)
                assert num_returns == 1 or len(made) == num_returns
                return made

            return SimpleNamespace(remote=call)

        return SimpleNamespace(options=options)


def user_modules() -> list[str]:
    return [name for name in sys.modules if name.startswith("user_code_")]


def forget_user_code() -> None:
    """Makes this process as new: it has loaded no file of a user, and told Ray of none."""
    cloudpickle = pytest.importorskip("ray.cloudpickle")
    for name in user_modules():
        module = sys.modules.pop(name)
        if name in cloudpickle.list_registry_pickle_by_value():
            cloudpickle.unregister_pickle_by_value(module)


def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on this process is the cluster."""
    monkeypatch.setitem(sys.modules, "ray", RayHere(pytest.importorskip("ray.cloudpickle")))  # type: ignore[arg-type]
    monkeypatch.setattr("scale.filtering.Cluster", lambda address, name: SimpleNamespace(close=lambda: None))


def test_the_files_are_those_of_one_machine_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch)
    compare("here", 600, tmp_path, monkeypatch)


@pytest.mark.slow
def test_the_files_are_those_of_one_machine(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(address, ROWS, tmp_path, monkeypatch)


def compare(address: str, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rules: str = "") -> None:
    """Filters the same run on one machine and on the cluster, by these rules of the user if any are given."""
    monkeypatch.setattr("scale.filtering.BLOCK", 1 << 17)
    outcome = []
    for more in ([], ["--cluster", address]):
        folder = tmp_path / ("cluster" if more else "alone")
        run = written(folder, rows)
        if rules:
            (folder / "my_rules.py").write_text(rules)
        monkeypatch.chdir(folder)
        forget_user_code()
        main(["recipe.yaml", "--run", "run", *more])
        outcome.append([(run / name).read_bytes() for name in ("kept.jsonl", "dropped.jsonl", "filter_report.json")])
    alone, cluster = outcome
    assert alone == cluster
    report = json.loads(alone[2])
    dropped = {rule["rule"]: rule["dropped"] for rule in report["rules"]}
    assert dropped["no_window"] > rows / 60
    assert dropped["exact_duplicate"] > rows / 60
    assert dropped["near_duplicate"] > rows / 30
    assert dropped["contamination"] >= 5
    assert b'"reference":7' in alone[0] + alone[1]


CACHED = """
from functools import cache, lru_cache

@cache
def windows(count):
    return count and 1 + windows(count - 1)

@lru_cache(maxsize=7)
def has_window(text):
    return windows(1) == 1 and "windowa" in text

def no_window(answer):
    return "a window" if has_window(answer.text) else None
"""


def test_a_function_of_the_user_may_use_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch)
    compare("here", 600, tmp_path, monkeypatch, CACHED)


def test_a_function_that_cannot_travel_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.errors import UsageError

    here(monkeypatch)
    run = written(tmp_path, 60)
    code = "import threading\nLOCK = threading.Lock()\ndef no_window(answer):\n    with LOCK:\n        return None\n"
    (tmp_path / "my_rules.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    forget_user_code()
    with pytest.raises(UsageError, match=r"cannot go to the nodes \(cannot pickle '_thread.lock' object\): make"):
        main(["recipe.yaml", "--run", str(run), "--cluster", "here"])


@pytest.mark.slow
def test_what_a_rule_raises_is_told_and_nothing_is_replaced(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.errors import DistillError

    run = written(tmp_path)
    (tmp_path / "my_rules.py").write_text("def no_window(answer):\n    raise ValueError('no idea')\n")
    (run / "kept.jsonl").write_text("old")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DistillError, match=r"no_window raised ValueError: no idea"):
        main(["recipe.yaml", "--run", "run", "--cluster", address])
    assert (run / "kept.jsonl").read_text() == "old"
