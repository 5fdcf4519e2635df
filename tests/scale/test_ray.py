"""`generate`, `serve` and `train` on real Ray nodes: one does not see the project's code; processes are killed."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from benchmarks.cluster import Call, counts, kill_actor, kill_driver
from benchmarks.http_server import running
from benchmarks.ray_nodes import ROOT, RayNode, ray_cluster
from benchmarks.runs import recipe_for
from generate import generate
from pipeline.rundir import RunDir
from scale.storage import Store, open_store
from tests.servers import misbehaving_server
from tests.servers.object_storage import object_storage
from tests.servers.serve_process import command_of, empty_model, processes_with, server_at, stand_in, wait_until
from tests.tiny_student import log_of, make_recipe, make_run, story_rows, tiny_model
from tests.train.conftest import one_thread as one_thread
from train.run import train_run

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra `ray`"),
    pytest.mark.slow,
    pytest.mark.timeout(600),
]
REQUESTS = 600
BLIND = int(os.geteuid() == 0 and shutil.which("unshare") is not None)  # without root every node sees the code


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("real", [False, True], ids=["stand-in", "vLLM"])
def test_servers_come_back_and_nothing_is_left_of_them(
    real: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = stand_in(tmp_path / "packages") | {"STUB_STUCK": "1"}
    for name in ("STUB_MARK",) if real else variables:
        monkeypatch.setenv(name, variables[name])
    model = "embedded:smollm2-135m" if real else empty_model(tmp_path / "model")
    count = 60 if real else 1000
    teacher = {"model": model, "base_url": "http://cluster/v1", "urls_file": tmp_path / "urls.txt"}
    sections = {"sampling": {"max_tokens": 8}, "serve": {"kv_cache_gib": 0.5}}
    sections |= {"generate": {"concurrency": 2, "request_timeout_s": 300, "max_attempts": 5}}
    recipe, run = misbehaving_server.recipe_for("x", count, teacher=teacher, **sections), RunDir(tmp_path / "run")
    (tmp_path / "recipe.yaml").write_text(recipe.model_dump_json(exclude_unset=True))
    with ray_cluster(2, blind=BLIND) as (address, _):
        with serving(tmp_path, address) as process:
            wait_until(lambda: published(tmp_path, 2) or process.poll() is not None)
            first = published(tmp_path, 2)
            generating = threading.Thread(target=generate, args=(recipe, run), kwargs={"quiet": True})
            generating.start()
            wait_until(lambda: run.completions.exists() and run.completions.read_bytes().count(b"\n") > count // 10)
            killed = misbehaving_server.completions(run)[0].endpoint
            server_at(vllm(variables), killed).kill()
            second = wait_until(lambda: killed not in (urls := published(tmp_path, 2)) and urls)
            generating.join()
            process.send_signal(signal.SIGTERM)
            assert process.wait() == 130
            assert vllm(variables) == []
        found = misbehaving_server.completions(run)
        assert len({record.id for record in found}) == len(found) == count
        assert {killed} < {record.endpoint for record in found} <= first | second
        if not real:
            with serving(tmp_path, address) as process:
                wait_until(lambda: published(tmp_path, 2))
                process.kill()
                wait_until(lambda: vllm(variables) == [], every_s=0.5)


@contextmanager
def serving(tmp_path: Path, address: str) -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, "-m", "serve", str(tmp_path / "recipe.yaml"), "--cluster", address]
    process = subprocess.Popen([*command, "--run", str(tmp_path / "run")], cwd=ROOT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def published(tmp_path: Path, count: int) -> set[str]:
    """The URLs in the file, if there are so many."""
    file = tmp_path / "urls.txt"
    urls = set(file.read_text().split()) if file.exists() else set()
    return urls if len(urls) == count else set()


def vllm(variables: dict[str, str]) -> list[psutil.Process]:
    """The servers, their guards and their engines."""
    return [one for one in processes_with(variables) if "vllm" in command_of(one).lower()]


class Cluster(NamedTuple):
    """Two nodes. One does not see the project's code, nor the folder `hidden`."""

    address: str
    nodes: list[RayNode]
    hidden: Path


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One for all tests that can share it."""
    hidden = tmp_path_factory.mktemp("hidden")
    with ray_cluster(2, blind=BLIND, hidden=[hidden]) as (address, nodes):
        yield Cluster(address, nodes, hidden)


def test_every_answer_counts_once_whatever_dies(cluster: Cluster, tmp_path: Path) -> None:
    budget, (address, nodes, _) = REQUESTS * 400, cluster
    with running("benchmarks.stub", "--delay-ms", 300) as url:
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


@pytest.mark.timeout(1800)
def test_a_training_on_two_nodes_is_that_of_one_process_though_one_is_killed(cluster: Cluster, tmp_path: Path) -> None:
    student = str(tiny_model(tmp_path / "student"))
    recipe = make_recipe(student, epochs=30, lora_dropout=0, learning_rate=2e-4)
    (tmp_path / "recipe.yaml").write_text(recipe.model_dump_json(exclude_unset=True))
    alone, together = (make_run(tmp_path / name, story_rows(21)) for name in ("alone", "together"))
    command = [sys.executable, "-m", "train", str(tmp_path / "recipe.yaml"), "--force", "--run"]
    train_run(recipe, alone, force=True)
    told = tmp_path / "told.txt"
    with told.open("wb") as file:
        process = subprocess.Popen(
            [*command, str(together.path), "--cluster", cluster.address],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    # A checkpoint is whole when the next one has begun.
    wait_until(lambda: len([*together.path.glob("training/checkpoint-*")]) > 1 or process.poll() is not None)
    for worker in cluster.nodes[1].workers("RayTrainWorker"):
        worker.kill()
    assert process.wait() == 0, told.read_text()
    said = told.read_text()
    assert "going on from the last checkpoint" in said and "resuming from step" in said
    assert "trained on 19 rows" in said and "LOAD_FAST" not in said
    assert_same_losses(alone, together)
    assert json.loads(together.lineage.read_bytes())["train"]["processes"] == 2
    assert not [*together.path.glob("training*")]


def assert_same_losses(*runs: RunDir) -> None:
    logs = [log_of(run) for run in runs]
    for part in ("loss", "eval"):
        first, second = ([entry["loss"] for entry in log[part]] for log in logs)
        assert second == pytest.approx(first, rel=1e-3)


@pytest.mark.timeout(1800)
def test_nodes_that_share_no_folder_train_a_run_in_a_store(cluster: Cluster, tmp_path: Path) -> None:
    """One does not see the driver's folder. A process is killed when the store has a checkpoint."""
    recipe = make_recipe(str(tiny_model(tmp_path / "student")), epochs=20, learning_rate=2e-4)
    (tmp_path / "recipe.yaml").write_text(recipe.model_dump_json(exclude_unset=True))
    (driver := cluster.hidden / "driver").mkdir()
    alone, temporary = make_run(tmp_path / "alone", story_rows(81)), Path(tempfile.gettempdir())
    train = [sys.executable, "-m", "train", str(tmp_path / "recipe.yaml"), "--force", "--run"]
    train_run(recipe, alone, force=True)
    with object_storage():
        store, told = open_store("s3://bucket/stories"), tmp_path / "told.txt"
        store.put("kept.jsonl", alone.kept)
        store.put("lineage.json", b'{"name": "stories", "review": {"rows": 81}}')
        with told.open("wb") as file:
            process = subprocess.Popen(
                [*train, store.url, "--cluster", cluster.address],
                cwd=driver,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        wait_until(lambda: checkpoints(store) or process.poll() is not None, every_s=0.5)
        for worker in cluster.nodes[1].workers("RayTrainWorker"):
            worker.kill()
        assert process.wait() == 0, told.read_text()
        together = RunDir(next(driver.glob("runs/stored/*/stories")))
        for name in [file.name for file in together.student.iterdir()]:
            assert store.get(f"student/{name}") == (together.student / name).read_bytes()
        assert store.get("lineage.json") == together.lineage.read_bytes()
        assert store.names("training") == []
    said = told.read_text()
    assert "going on from the last checkpoint" in said and "resuming from step" in said
    assert_same_losses(alone, together)
    lineage = json.loads(together.lineage.read_bytes())
    assert (lineage["train"]["processes"], lineage["review"]) == (2, {"rows": 81})
    assert not [*temporary.glob(f"distillate-{together.path.parent.name}-*")]


def checkpoints(store: Store) -> list[str]:
    return [name for name in store.names("training") if name.endswith("trainer_state.json")]
