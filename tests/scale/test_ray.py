"""`generate --cluster` on real Ray nodes: one without the project's code, a worker and the driver killed."""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest

from benchmarks.cluster import Call, counts, kill_actor, kill_driver
from benchmarks.http_server import running
from benchmarks.ray_nodes import ray_cluster
from benchmarks.runs import recipe_for
from pipeline.rundir import RunDir

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra `ray`"),
    pytest.mark.slow,
    pytest.mark.timeout(600),
]
REQUESTS = 600


def test_every_answer_counts_once_whatever_dies(tmp_path: Path) -> None:
    """Without root no node can be made blind: then both see the code."""
    blind = int(os.geteuid() == 0 and shutil.which("unshare") is not None)
    budget = REQUESTS * 400
    with running("benchmarks.stub", "--delay-ms", 300) as url, ray_cluster(2, blind=blind) as (address, nodes):
        sections = {"generate": {"concurrency": 16}, "budget": {"tokens": budget}, "sampling": {"max_tokens": 100}}
        recipe, run = tmp_path / "recipe.yaml", RunDir(tmp_path / "run")
        recipe.write_text(recipe_for(tmp_path, url, REQUESTS, **sections).model_dump_json(exclude_unset=True))
        call = Call(recipe, run, address, lease_s=30)
        call.until_billed(url, 50)
        assert all(node.workers() for node in nodes)
        kill_actor(call, address, nodes, 30)
        call.until_billed(url, 250)
        kill_driver(call, address, nodes, 30)
        assert call.end() == 0
    found = counts(run, REQUESTS, {"answers": 0, "prompt_tokens": 0, "completion_tokens": 0}, budget)
    assert (found["distinct ids"], found["repeated lines"]) == (REQUESTS, 0)
    assert REQUESTS * 140 <= found["tokens counted"] <= budget
