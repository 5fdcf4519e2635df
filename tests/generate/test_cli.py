"""`python -m generate` as a user runs it: exit codes, what it prints, Ctrl-C, and kills at any moment."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from generate.jobs import build_jobs
from generate.prompts import iter_prompts
from pipeline.records import Completion, read_jsonl
from pipeline.rundir import RunDir
from tests.servers.fake_batch_api import line
from tests.servers.misbehaving_server import (
    Asked,
    Behaviour,
    MisbehavingServer,
    answer,
    completions,
    error,
    failures,
    held_until,
    misbehaving,
    one_bad,
    recipe_for,
    reply,
)

ROOT = Path(__file__).parents[2]


def start(server: MisbehavingServer | str, run: RunDir, count: int, *flags: str) -> subprocess.Popen[str]:
    """Starts the command on a recipe for the server."""
    recipe = recipe_for(server, count).model_dump(mode="json", exclude={"student"})
    path = run.path.with_name("recipe.yaml")
    path.write_text(yaml.safe_dump(recipe))
    environment = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    return subprocess.Popen(
        [sys.executable, "-m", "generate", str(path), "--run", str(run.path), *flags],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    return process.returncode, out, err


def until_answered(run: RunDir, lines: int) -> None:
    """Waits until the journal has so many lines."""
    deadline = time.monotonic() + 30
    while not run.completions.exists() or run.completions.read_bytes().count(b"\n") < lines:
        assert time.monotonic() < deadline, "nothing was answered"
        time.sleep(0.01)


def test_a_whole_run_ends_with_0_and_its_counts_on_stdout(run: RunDir) -> None:
    with misbehaving() as server:
        code, out, _ = finish(start(server, run, 20, "--quiet"))
        assert (code, "20 requests, 20 answered (20 now, 0 earlier), 0 failed" in out) == (0, True)
        assert "140 prompt tokens · 100 completion tokens" in out
        code, out, _ = finish(start(server, run, 20))
        assert (code, "20 answered (0 now, 20 earlier)" in out, len(server.asked)) == (0, True, 20)


def test_failures_end_it_with_4_and_can_be_asked_again(run: RunDir) -> None:
    with misbehaving(one_bad(error(400, "no"), times=1)) as server:
        code, out, err = finish(start(server, run, 10))
        assert (code, "1 failed" in out) == (4, True)
        assert "1 of 10 requests failed for good (now: 1 bad_request)" in err
        assert str(run.failures) in err
        assert finish(start(server, run, 10))[0] == 4
        assert finish(start(server, run, 10, "--retry-failures"))[0] == 0


def test_failures_that_were_collected_can_be_collected_again_without_asking(run: RunDir) -> None:
    nowhere, output = "http://127.0.0.1:9/v1", run.path.with_name("out.jsonl")
    recipe = recipe_for(nowhere, 2)
    ids = [job.request.id for job in build_jobs(iter_prompts(recipe), recipe)]
    for text, ends in (("", 4), ("filled in", 0)):
        output.write_text("".join(json.dumps(line(id_, body=reply(text))) + "\n" for id_ in ids))
        code, _, err = finish(start(nowhere, run, 2, "--collect", str(output)))
        assert (code, "--collect can bring their answers later" in err) == (ends, ends == 4)


def test_the_first_failure_of_each_kind_is_told_in_the_servers_words(run: RunDir) -> None:
    long = "the prompt is too long: " + "x" * 900

    def reply(_: Asked) -> Behaviour:
        return answer() if len(server.asked) == 1 else error(400, long) if len(server.asked) % 2 else answer("")

    with misbehaving(reply) as server:
        code, _, err = finish(start(server, run, 9, "--generate.concurrency", "1"))
    told = [line for line in err.splitlines() if "first request that failed for good" in line]
    assert (code, len(told)) == (4, 2)
    assert any("with empty_answer: the answer has no text" in line for line in told)
    assert any("with bad_request: " in line and "the prompt is too long: xxx" in line for line in told)
    assert max(map(len, told)) < 400


def test_wrong_usage_ends_with_2_and_no_endpoint_with_1(run: RunDir) -> None:
    with misbehaving() as server:
        url = server.url
        assert finish(start(server, run, 3, "--generate.concurrency", "0"))[0] == 2
        assert not server.asked
    code, out, err = finish(start(url, run, 3))
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert "make serve" in err


def test_a_store_for_a_cluster_without_a_cluster_is_refused(run: RunDir) -> None:
    with misbehaving() as server:
        code, out, err = finish(start(server, run, 3, "--cluster-store", "s3://bucket/x"))
        assert (code, out, server.asked) == (2, "", [])
    assert "--cluster-store s3://bucket/x is for a cluster: add --cluster auto, or leave it out" in err
    assert not run.completions.exists()


def test_a_second_process_is_refused(run: RunDir) -> None:
    refused = threading.Event()
    with misbehaving(lambda asked: answer() if len(server.asked) == 1 else held_until(refused)) as server:
        first = start(server, run, 100, "--generate.request_timeout_s", "100")
        until_answered(run, 1)
        code, _, err = finish(start(server, run, 100))
        assert (code, "another process" in err) == (2, True)
        refused.set()
        assert finish(first)[0] == 0
        assert len(server.asked) == 100


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_lets_what_is_in_flight_end_and_the_next_call_goes_on(run: RunDir, number: int) -> None:
    with misbehaving(lambda asked: answer(delay_s=0.3)) as server:
        process = start(server, run, 100)
        until_answered(run, 8)
        process.send_signal(number)
        code, _, err = finish(process)
        assert (code, "still to ask" in err, "interrupted" in err) == (130, True, True)
        assert len(completions(run)) == len(server.asked) < 100  # nothing that was asked is lost
        assert finish(start(server, run, 100))[0] == 0
        assert len(server.asked) == 100
    assert len({record.id for record in completions(run)}) == 100


@pytest.mark.timeout(300)
def test_killed_at_any_moment_every_request_is_answered_once(run: RunDir) -> None:
    """SIGKILL at random points of a run that also fails and heals; the seed is fixed, the moments are not."""
    chance = random.Random(20)

    def script(asked: object) -> object:
        return error(500) if chance.random() < 0.05 else answer(delay_s=chance.uniform(0, 0.02))

    with misbehaving(script) as server:  # type: ignore[arg-type]
        seen, kills = 0, 0
        while seen < 500:
            process = start(server, run, 600, "--quiet", "--generate.max_attempts", "20")
            until_answered(run, min(seen + chance.randint(1, 120), 600))
            time.sleep(chance.uniform(0, 0.05))
            process.kill()
            process.communicate()
            kills += 1
            whole = run.completions.read_bytes().split(b"\n")[:-1]
            assert len(whole) >= seen  # what was there stays there
            seen = len(whole)
        code, out, _ = finish(start(server, run, 600, "--generate.max_attempts", "20"))
    assert kills >= 4
    assert (code, "600 requests, 600 answered" in out) == (0, True)
    ids = [record.id for record in read_jsonl(run.completions, Completion)]
    assert len(ids) == len(set(ids)) == 600
    assert not failures(run)
