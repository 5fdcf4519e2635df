"""`generate --cluster` and `serve --cluster` on real Ray nodes: one without the project's code; processes killed."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.cluster import Call, counts, kill_actor, kill_driver
from benchmarks.http_server import running
from benchmarks.ray_nodes import ROOT, ray_cluster
from benchmarks.runs import recipe_for
from generate import generate
from pipeline.rundir import RunDir
from tests.servers import misbehaving_server
from tests.servers.serve_process import empty_model, processes_with, read_until, stand_in, wait_until

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra `ray`"),
    pytest.mark.slow,
    pytest.mark.timeout(600),
]
REQUESTS = 600
BLIND = int(os.geteuid() == 0 and shutil.which("unshare") is not None)  # without root every node sees the code


def test_every_answer_counts_once_whatever_dies(tmp_path: Path) -> None:
    budget = REQUESTS * 400
    with running("benchmarks.stub", "--delay-ms", 300) as url, ray_cluster(2, blind=BLIND) as (address, nodes):
        sections = {"generate": {"concurrency": 16}, "budget": {"tokens": budget}, "sampling": {"max_tokens": 100}}
        recipe, run = tmp_path / "recipe.yaml", RunDir(tmp_path / "run")
        recipe.write_text(recipe_for(tmp_path, url, REQUESTS, **sections).model_dump_json(exclude_unset=True))
        call = Call(recipe, run, address, lease_s=30)
        call.until_answered(50)
        assert all(node.workers() for node in nodes)
        kill_actor(call, address, nodes, 30)
        call.until_answered(250)
        kill_driver(call, address, nodes, 30)
        assert call.end() == 0
    found = counts(run, REQUESTS, {"answers": 0, "prompt_tokens": 0, "completion_tokens": 0}, budget)
    assert (found["distinct ids"], found["repeated lines"]) == (REQUESTS, 0)
    assert REQUESTS * 140 <= found["tokens counted"] <= budget


def test_servers_on_nodes_come_back_and_nothing_of_them_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = stand_in(tmp_path / "packages")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    model = empty_model(tmp_path / "model")
    with ray_cluster(2, blind=BLIND) as (address, _):
        of_ray = len(processes_with(variables))
        serving_and_killed(tmp_path, model, address, requests=2000)
        wait_until(lambda: len(servers(variables)) == 0)
        process, file = serve(tmp_path, model, address)
        wait_until(lambda: len(published(file)) == 2)
        process.kill()
        process.communicate()
        wait_until(lambda: len(servers(variables)) == 0)
    assert of_ray
