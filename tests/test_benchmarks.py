"""The benchmarks run, at tiny sizes, and compute what they say."""

import argparse
import json
import random
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import yaml
from misbehaving_server import answer, misbehaving, recipe_for

from benchmarks import kills, simulated, stuck
from benchmarks.client import measure
from benchmarks.http_server import running
from benchmarks.plot import line_chart
from benchmarks.simulator import LENGTHS, answer_tokens, ideal_seconds
from benchmarks.table import show

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("tokens", "replicas", "slots", "seconds"),
    [
        ([2, 3, 1], 1, 2, 3.0),  # the third begins when the first ends, and ends with the second
        ([2, 3, 1], 2, 1, 3.0),
        ([5], 8, 256, 5.0),
        ([1] * 10, 1, 1, 10.0),
        ([4, 1, 1, 1, 1], 1, 2, 4.0),
    ],
)
def test_the_least_time_of_a_run(tokens: list[int], replicas: int, slots: int, seconds: float) -> None:
    assert ideal_seconds(tokens, replicas, slots, 1.0) == seconds


def test_an_answer_s_length_depends_on_the_request_alone() -> None:
    assert answer_tokens(b"one") == answer_tokens(b"one")
    assert {answer_tokens(str(number).encode()) for number in range(20_000)} == set(LENGTHS)


def test_the_simulated_engine_answers_every_request_in_no_less_than_the_least_time() -> None:
    options = argparse.Namespace(requests=300, replicas=2, slots=16, no_metrics=False)
    one = simulated.once(options, processes=1, concurrency="auto", step_ms=1.0)
    assert 0 < one.whole <= 1.02


def test_the_clients_are_measured_on_the_same_stub() -> None:
    with running("benchmarks.stub", "--delay-ms", "1") as url:
        figures = measure(url, ["ours", "openai", "bare"], requests=40, in_flight=8, runs=1)
    assert set(figures) == {"ours", "openai", "bare"}
    assert all(row["per_s"] > 0 and row["peak_mib"] > 10 for row in figures.values())


def test_a_killed_run_is_counted() -> None:
    with running("benchmarks.stub", "--delay-ms", "20") as url:
        options = argparse.Namespace(requests=300, power_cuts=0.5, processes=1)
        counts = kills.work(url, options, 3, random.Random(1))
    assert counts["kills"] == 3
    assert [counts[name] for name in ("lost", "duplicated", "missing", "torn")] == [0, 0, 0, 0]


def test_a_lost_answer_would_be_seen(tmp_path: Path) -> None:
    journal = tmp_path / "completions.jsonl"
    journal.write_text('{"id": "a"}\n{"id": "b"}\n{"id": "c')
    assert kills.whole_ids(journal) == {"a", "b"}
    kills.cut(journal, random.Random(3))
    assert kills.whole_ids(journal) <= {"a", "b"}


def test_one_stuck_request_is_the_only_failure() -> None:
    with running("benchmarks.stub", "--stuck", stuck.STUCK, "--delay-ms", "1") as url:
        options = argparse.Namespace(requests=50, in_flight=8, timeout_s=0.3)
        assert stuck.once(url, options, True) > 0


def test_an_endpoint_is_swept(tmp_path: Path) -> None:
    with misbehaving(lambda asked: answer(delay_s=0.01)) as server:  # it does not stream: a whole answer at once
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe_for(server, 5).model_dump(mode="json", exclude={"student"})))
        command = [sys.executable, "-m", "benchmarks.endpoint", str(path), "--levels", "1,4", "--seconds", "0.3"]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "PATH": ""},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert "in flight is enough" in done.stdout
    levels = json.loads((tmp_path / "runs" / "bench" / "endpoint.json").read_text())
    assert [level["concurrency"] for level in levels] == [1, 4]
    assert levels[1]["answers_per_s"] > levels[0]["answers_per_s"]


def test_a_chart_is_well_formed_and_escaped() -> None:
    chart = ElementTree.fromstring(line_chart("a < b", [1, 4, 64], {"x & y": [1.0, 2.0, 4.0], "zero": [0.0, 0.0, 0.0]}))
    texts = [element.text for element in chart.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0] == "a < b"
    assert "x & y" in texts


def test_a_table_is_markdown() -> None:
    assert show([("a", "b"), ("long", "1")]) == "| a    | b |\n|------|--:|\n| long | 1 |"
