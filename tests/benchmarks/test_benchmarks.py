"""The benchmarks run, at tiny sizes, and compute what they say."""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import urllib.request
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import (
    budget,
    chapter_filter,
    client,
    endpoint,
    kills,
    limits,
    near_duplicates,
    runs,
    scaling,
    simulated,
    training,
    verifiers,
)
from benchmarks.client import body, compare
from benchmarks.endpoint import chart, level_of, tokens_within
from benchmarks.http_server import running
from benchmarks.measure import flags, measured, show, steady_seconds
from benchmarks.simulator import LENGTHS, answer_tokens, ideal_ends
from benchmarks.stories import Writer
from filters.answer import nfc
from generate.concurrency import read_load
from generate.streaming import Streamed
from pipeline.errors import UsageError
from pipeline.rundir import RunDir
from tests.benchmarks.mutations import mutations
from tests.servers.misbehaving_server import MisbehavingServer, answer, error, misbehaving, recipe_for
from tests.tiny_student import make_run, story_rows

ROOT = Path(__file__).parents[2]


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
    assert max(ideal_ends(tokens, replicas, slots, 1.0)) == seconds


def test_each_answer_begins_in_the_first_slot_that_falls_free() -> None:
    assert ideal_ends([4, 1, 2, 3, 1], 1, 2, 0.5) == [2.0, 0.5, 1.5, 3.0, 2.5]


def test_the_steady_part_leaves_out_both_ends() -> None:
    assert steady_seconds([9.0, 1.0, 5.0, 2.0, 4.0, 30.0], 1) == 8.0  # from the first answer to the last but one
    assert steady_seconds([1.0, 2.0, 4.0, 5.0, 9.0, 30.0], 2) == 3.0
    with pytest.raises(UsageError, match="nothing is left of 6 answers"):
        steady_seconds([1.0] * 6, 3)


def test_a_call_is_measured_in_a_process_of_its_own() -> None:
    here = os.getpid()
    pid, seconds, cpu_s, peak_mib = measured(os.getpid)
    assert pid != here
    assert min(seconds, cpu_s) >= 0
    assert peak_mib > 5
    held = bytearray(300 << 20)  # the memory of this process does not count
    more_mib = measured(bytearray, 200 << 20).peak_mib
    assert peak_mib + 190 < more_mib < peak_mib + 250, len(held)
    with pytest.raises(ZeroDivisionError):
        measured(divmod, 1, 0)


def test_flags_have_the_type_of_their_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.touch()
    given = ["bench", "--in-flight", "8", "--no-metrics", "--answers", *map(str, files)]
    monkeypatch.setattr(sys, "argv", given)
    options = flags("", in_flight=64, delay_ms=50.0, no_metrics=False, bind=False, answers=[])
    assert vars(options) == {
        "in_flight": 8,
        "delay_ms": 50.0,
        "no_metrics": True,
        "bind": False,
        "answers": files,
    }


@pytest.mark.parametrize(
    ("module", "given", "said"),
    [
        (client, "--requests 0", "--requests: must be a whole number from 1 on, got '0'"),
        (client, "--in-flight 64,x", "--in-flight: must be a whole number from 1 on, got 'x'"),
        (client, "--clients ours,foo", "--clients: must be one of ours, auto, openai, openai+aiohttp, bare, got 'foo'"),
        (budget, "--usd nan", "--usd: must be a number above 0, got 'nan'"),
        (chapter_filter, "--answers /missing.jsonl", "--answers: must be a file that is there, got '/missing.jsonl'"),
        (endpoint, "recipe.yaml --seconds 0", "--seconds: must be a number above 0, got '0'"),
        (endpoint, "recipe.yaml --levels 1,,2", "--levels: must be a whole number from 1 on, got ''"),
        (kills, "--power-cuts 2", "--power-cuts: must be from 0 to 1, got '2'"),
        (near_duplicates, "--near 2", "--near: must be from 0.5 to 1, got '2'"),
        (scaling, "--ways nosuch", "--ways: must be one of machine, cluster, got 'nosuch'"),
        (simulated, "--concurrency auto,0", "--concurrency: must be auto or a whole number from 1 on, got '0'"),
    ],
)
def test_a_wrong_flag_is_named_before_anything_runs(
    module: Any, given: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", *given.split()])
    with pytest.raises(SystemExit):
        module.main()
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: argument {said}")


def test_the_file_that_is_named_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path, story_rows(3)).kept.rename(tmp_path / "other.jsonl")
    monkeypatch.setattr(sys, "argv", ["training", "--kept", str(tmp_path / "other.jsonl"), "--validation", "3"])
    with pytest.raises(UsageError, match=r"other\.jsonl: 3 rows; more than --validation 3 are needed"):
        training.main()


def test_the_other_clients_send_what_ours_sends(tmp_path: Path) -> None:
    ours = [json.loads(sent) for sent in runs.bodies(runs.recipe_for(tmp_path, "http://127.0.0.1:9/v1", 3))]
    theirs = [body(number) for number in range(3)]
    for sent in (*ours, *theirs):
        del sent["seed"]  # of ours: a hash
    assert ours == theirs


def test_an_answer_s_length_depends_on_the_request_alone() -> None:
    assert answer_tokens(b"one") == answer_tokens(b"one")
    assert {answer_tokens(str(number).encode()) for number in range(20_000)} == set(LENGTHS)


def test_the_simulated_engines_show_their_queue_before_the_first_request() -> None:
    """Else a client would take them for an endpoint that shows none."""
    with (
        running("benchmarks.simulator", "--replicas", "3") as url,
        urllib.request.urlopen(url.removesuffix("/v1") + "/metrics") as reply,
    ):
        load = read_load(reply.read().decode())
    assert load is not None and (load.engines, load.running, load.waiting) == (3, 0, 0)


def test_the_simulated_engine_answers_every_request_in_no_less_than_the_least_time() -> None:
    options = argparse.Namespace(requests=300, replicas=2, slots=16, no_metrics=False)
    one = simulated.once(options, requests=options.requests, processes=1, level="auto", step_ms=1.0)
    assert 0 < one.whole <= 1.02
    assert one.steady > 0


def test_the_clients_are_measured_on_the_same_stub() -> None:
    with running("benchmarks.stub", "--delay-ms", "1") as url:
        figures = compare(url, ["ours", "openai", "bare"], requests=40, in_flight=8, runs=1)
    assert set(figures) == {"ours", "openai", "bare"}
    assert all(row.value > 0 and row.peak_mib > 10 for row in figures.values())


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


def test_a_budget_ends_a_run_before_the_bill_passes_it() -> None:
    stub = ["--vary", "--prompt-tokens", "40", "--completion-tokens", "200", "--delay-ms", "1", "--jitter-ms", "10"]
    with running("benchmarks.stub", *stub) as url:
        options = argparse.Namespace(requests=100, usd=0.002)
        assert budget.once(url, options, in_flight=8, seed=1)
        assert 0.0015 < budget.billed_usd(url) <= 0.002
        assert not budget.once(url, argparse.Namespace(requests=10, usd=1.0), in_flight=8, seed=1)


def test_the_stub_bills_what_it_says() -> None:
    with running("benchmarks.stub", "--vary", "--completion-tokens", "200", "--delay-ms", "0") as url:
        said = []
        for number in range(20):
            request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body(number)).encode())
            with urllib.request.urlopen(request) as reply:
                said.append(json.load(reply)["usage"])
        with urllib.request.urlopen(url.removesuffix("/v1") + "/billed") as reply:
            billed = json.load(reply)
    assert len({usage["completion_tokens"] for usage in said}) > 10
    assert all(1 <= usage["completion_tokens"] <= 200 for usage in said)
    assert billed == {
        "answers": 20,
        "prompt_tokens": sum(usage["prompt_tokens"] for usage in said),
        "completion_tokens": sum(usage["completion_tokens"] for usage in said),
    }


def test_memory_is_measured_fresh_and_resumed() -> None:
    command = [sys.executable, "-m", "benchmarks.memory", "--requests", "100,400", "--in-flight", "8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.search(r"^fresh: [+-]\d+\.\d MiB from 100 to 400 requests$", done.stdout, re.M)
    assert re.search(r"^resumed: [+-]\d+\.\d MiB from 100 to 400 requests$", done.stdout, re.M)
    assert "200 requests" not in done.stdout
    assert "cut off a torn last line" in done.stderr


def test_both_sides_of_the_verifier_benchmark_keep_the_right_answers(tmp_path: Path) -> None:
    table = verifiers.compare(RunDir(tmp_path), argparse.Namespace(answers=40))
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in table.splitlines()[2:]]
    assert rows == [["filters", "30"], ["bare", "30"]]  # every fourth is wrong


def test_an_endpoint_is_swept(tmp_path: Path) -> None:
    with misbehaving(lambda asked: answer(delay_s=0.1)) as server:  # it does not stream: a whole answer at once
        done = sweep(tmp_path, server)
    assert done.returncode == 0, done.stderr
    assert "in flight is enough" in done.stdout
    levels = json.loads((tmp_path / "runs" / "bench" / "endpoint.json").read_text())
    assert [level["concurrency"] for level in levels] == [1, 4]
    assert levels[1]["answers_per_s"] > levels[0]["answers_per_s"]


def test_an_endpoint_that_refuses_a_level_keeps_what_was_measured(tmp_path: Path) -> None:
    with misbehaving(lambda asked: error(429, "too fast") if server.at_once > 1 else answer(delay_s=0.05)) as server:
        done = sweep(tmp_path, server)
    assert done.returncode == 0, done.stderr
    assert "4 in flight: " in done.stderr
    assert "too fast" in done.stderr
    levels = json.loads((tmp_path / "runs" / "bench" / "endpoint.json").read_text())
    assert [level["concurrency"] for level in levels] == [1]


def test_an_interrupted_sweep_keeps_what_was_measured(tmp_path: Path) -> None:
    with (
        misbehaving(lambda asked: answer(delay_s=60 if server.at_once > 1 else 0.05)) as server,
        subprocess.Popen(**sweep_of(tmp_path, server), stderr=subprocess.PIPE, text=True) as process,
    ):
        assert process.stderr is not None and process.stderr.readline().startswith("1 in flight: ")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    levels = json.loads((tmp_path / "runs" / "bench" / "endpoint.json").read_text())
    assert [level["concurrency"] for level in levels] == [1]


def test_an_endpoint_that_refuses_all_is_one_line(tmp_path: Path) -> None:
    with misbehaving(lambda asked: error(500, "out of order")) as server:
        done = sweep(tmp_path, server)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: 1 in flight: ")
    assert "Traceback" not in done.stderr


def sweep_of(folder: Path, server: MisbehavingServer) -> dict[str, Any]:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_for(server, 5).model_dump(mode="json", exclude={"student"})))
    command = [sys.executable, "-m", "benchmarks.endpoint", str(path), "--levels", "1,4", "--seconds", "0.3"]
    return {"args": command, "cwd": folder, "env": {"PYTHONPATH": str(ROOT), "PATH": ""}}


def sweep(folder: Path, server: MisbehavingServer) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(**sweep_of(folder, server), capture_output=True, text=True, check=False)


def test_an_answer_counts_for_the_time_that_it_came_in() -> None:
    one = Streamed(begin=0.0, first=2.0, end=6.0, tokens=40)
    assert tokens_within(one, 0.0, 10.0) == 40
    assert tokens_within(one, 3.0, 5.0) == 20
    assert tokens_within(one, 5.0, 9.0) == 10
    assert tokens_within(one, 6.5, 9.0) == 0
    whole = Streamed(begin=0.0, first=6.0, end=6.0, tokens=40)  # an endpoint that does not stream
    assert (tokens_within(whole, 5.0, 7.0), tokens_within(whole, 0.0, 6.0)) == (40, 0)


def test_a_level_is_of_its_time_alone() -> None:
    early, inside, late = Streamed(0.0, 1.0, 3.0, 20), Streamed(2.5, 3.0, 4.0, 10), Streamed(3.0, 5.0, 7.0, 20)
    level = level_of([early, inside, late], 3, 2.0, 6.0)
    assert (level.answers, level.answers_per_s) == (2, 0.5)
    assert level.tokens_per_s == (10 + 10 + 10) / 4
    assert level.first_token[0] == (0.5 + 2.0) / 2  # of the two that began in it
    assert level.latency[0] == (1.5 + 4.0) / 2


def test_a_chart_is_well_formed_and_escaped() -> None:
    levels = [level_of([Streamed(1.0, 1.5, 2.0, tokens)], at, 0.0, 10.0) for at, tokens in ((1, 0), (4, 20), (64, 0))]
    svg = ElementTree.fromstring(chart("a < b & c", levels))
    texts = [element.text for element in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0] == "a < b & c"
    assert texts.count("64 in flight") == 3  # a dot per level in each of the three panels
    assert [texts[texts.index("Tokens per second") + 3], texts.count("0.50")] == ["0.00", 3]


def test_a_table_is_markdown() -> None:
    assert show([("a", "b"), ("long", "1")]) == "| a    | b |\n|------|--:|\n| long | 1 |"


def test_the_reference_rules_and_ours_decide_alike() -> None:
    """On texts around every threshold; some of each side, else the agreement says nothing."""
    made = [(story.text, chapter_filter.PROMPT) for story in Writer(1).stories(200, 0.0)]
    texts = list(mutations(made, 3000, seed=1))
    said = chapter_filter.agreement(texts, 0)
    assert said.endswith(": 0 decided otherwise")
    assert 500 < sum(chapter_filter.chapter_reason(nfc(prompt), nfc(text)) is None for text, prompt in texts) < 2500


def test_a_fleet_of_engines_is_asked_and_its_cpu_told_apart() -> None:
    options = argparse.Namespace(requests=200, replicas=1, slots=64, step_ms=2.0)
    found = scaling.once("machine", 2, options)
    assert found["full slots, answers/s"] > 0
    assert found["R steady"] > 0
    assert found["client CPU s per 1,000"] == found["of it the driver"]


def test_cpu_between_two_times_is_of_the_answers_between_them() -> None:
    samples: list[scaling.Sample] = [
        (0.0, {"all": 0.0}),
        (10.0, {"all": 8.0, "driver": 1.0, "workers": 1.0, "simulators": 2.0}),
        (20.0, {"all": 26.0, "driver": 2.0, "workers": 4.0, "simulators": 7.0, "Ray": 1.0}),
    ]
    assert scaling.cpu(samples, 10.0, 20.0, 2000) == {
        "client CPU s per 1,000": 2.0,
        "of it the driver": 0.5,
        "simulators, cores": 0.5,
        "Ray, cores": 0.1,
        "rest, cores": 0.8,
    }


def test_the_limits_of_a_driver_are_those_of_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "IDS", 20_000)
    found = limits.lease_table(20, 2) | limits.driver(2000) | limits.ids(10**6)
    assert min(found.values()) > 0
    fleet = argparse.Namespace(workers=10, gpus=100, tokens_per_s=3000.0, answer_tokens=300, answers=10**6)
    answers, *_, puts, _ = limits.arithmetic(fleet, found)[1:]
    assert (answers[1], puts[1]) == ("1,000/s, 0.0 days", "2 and 4/s")
    found |= {"journal read at a start, us": 0.0, "id added, us": 0.0, "prompt looked at twice at a start, us": 7200.0}
    assert ("a start after a kill", "1,000,000 rows", "2.0 hours") in limits.arithmetic(fleet, found)
