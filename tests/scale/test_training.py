"""What `train --cluster` does when a training is cut off, without Ray. The real one is in test_ray.py."""

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from pipeline.errors import DistillError, UsageError
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir
from scale import run_lease, training
from scale.cluster import Cluster
from scale.run_lease import TakenOver
from scale.storage import open_store
from scale.sync import StoreState, names_in
from scale.training import MOST_LOSSES, Training, _train_here, reason_of, train_on_cluster
from tests.tiny_student import make_recipe
from train.processes import OWN_FOLDER, launched


class FakeCluster:
    def __init__(self, *args: object, **flags: object) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Training:
    monkeypatch.setattr(training, "Cluster", FakeCluster)
    recipe = Recipe(name="t", teacher={"model": "m"}, prompts={"template": "x", "count": 1})  # type: ignore[arg-type]
    return Training(recipe, RunDir(tmp_path), {})


def cut_off(run: RunDir, checkpoints: list[int]) -> Callable[..., str | None]:
    """A training that is cut off after each of these checkpoints, and then ends."""
    left = list(checkpoints)

    def fit(cluster: FakeCluster, training: Training) -> str | None:
        if not left:
            return None
        (run.path / "training" / f"checkpoint-{left.pop(0)}").mkdir(parents=True, exist_ok=True)
        (run.path / "training-ray").mkdir(exist_ok=True)
        return "process 1: it died"

    return fit


def test_it_goes_on_while_there_are_new_checkpoints(
    told: Training, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "_fit", cut_off(told.run, [1, 2, 3, 4, 5, 5, 5]))
    train_on_cluster("auto", told)
    assert capsys.readouterr().err.count("warning: process 1: it died; going on from the last checkpoint") == 7
    assert not (told.run.path / "training-ray").exists()


def test_it_gives_up_without_a_new_checkpoint(told: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_fit", cut_off(told.run, [1] * 9))
    with pytest.raises(DistillError, match=f"cut off {MOST_LOSSES + 1} times without a new checkpoint: process 1"):
        train_on_cluster("auto", told)


def test_ctrl_c_ends_this_process_and_waits_for_nothing(
    told: Training, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = threading.Event()

    def fit(cluster: FakeCluster, training: Training) -> None:
        (training.run.path / "training-ray").mkdir()
        while not ended.is_set():  # Python loses an interrupt that comes while a callback of the collector runs
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            ended.wait(20)

    def leave(code: int) -> None:
        ended.set()
        sys.exit(code)

    monkeypatch.setattr(training, "_fit", fit)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit, match="130"):
        train_on_cluster("auto", told)
    assert capsys.readouterr().err == "interrupted: run the same command again to go on\n"
    assert not (told.run.path / "training-ray").exists()


def test_an_error_of_ours_is_raised_and_others_are_the_reason() -> None:
    class Wrapped(Exception):
        _base_exc = UsageError("no such run")

    lost = RuntimeError("connection closed\nby peer")
    assert reason_of({1: lost, 0: ValueError("x")}) == "process 0: x; process 1: connection closed"
    with pytest.raises(UsageError, match="no such run"):
        reason_of({0: lost, 1: Wrapped("a traceback")})


def test_without_a_node_that_can_work_the_same_command_goes_on(told: Training) -> None:
    none = cast("Cluster", SimpleNamespace(nodes=list))
    with pytest.raises(DistillError, match=r"no node of the cluster can work yet .* the same command goes on"):
        training._fit(none, told)


def test_wrong_usage_is_refused(told: Training) -> None:
    with pytest.raises(UsageError, match="ray://h:1: train on a machine of the cluster, with host:port or auto"):
        train_on_cluster("ray://h:1", told)
    with pytest.raises(UsageError, match="no such run"):
        train_on_cluster("auto", told._replace(run=RunDir(told.run.path / "none")))


def test_what_a_run_in_a_store_cannot_do_is_refused(told: Training) -> None:
    StoreState("one", url="s3://bucket/t").save(told.run.path)
    with pytest.raises(UsageError, match="a run in a store; train on a cluster with --run s3://bucket/t"):
        train_on_cluster("auto", told)
    with run_lease.held(told.run.path):
        with pytest.raises(UsageError, match="prune:1: it is made first, and adapters would name the folder of a node"):
            train_on_cluster("auto", told._replace(recipe=make_recipe("prune:1", method="lora")))
        with pytest.raises(
            UsageError, match=r"none of these rows and settings: train it by the same .* --train\.method full fi"
        ):
            train_on_cluster("auto", told._replace(recipe=make_recipe("m", method="on_policy", kd={"weights": "full"})))


def test_a_student_that_is_made_first_is_in_the_store_before_the_nodes_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(_: object, run: RunDir, rows: list[int]) -> None:
        run.student_init.mkdir()
        (run.student_init / "config.json").write_text(str(rows))

    monkeypatch.setattr(training, "initial_student", make)
    monkeypatch.setattr(training, "read_parts", lambda *_: SimpleNamespace(train=[1]))
    store = open_store((tmp_path / "store").as_uri())
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    for student, names in (("base", []), ("prune:1", ["student-init/config.json"])):
        training._make_student(Training(make_recipe(student, method="full"), run, {}, store.url))
        assert store.names() == names


def test_a_node_works_in_a_folder_of_its_own_and_goes_on_from_the_store(
    told: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first attempt is lost after its first checkpoint."""
    store, folder, attempts = open_store(tmp_path / "store"), tmp_path / "node" / "stories", []
    for name in ("kept.jsonl", "completions.jsonl", "student/old", "lineage.json", "lease/000001.json"):
        store.put(name, name.encode())
    for name, value in ((OWN_FOLDER, "false"), ("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(run_lease, "TICK_S", 0.05)
    monkeypatch.setattr("train.processes.Processes.lead_first", lambda _: nullcontext())
    monkeypatch.setattr(training, "_check_stored", lambda _: None)
    monkeypatch.setattr(training, "_folder_of_node", lambda _: folder)
    StoreState("one", url=store.url).save(told.run.path)

    def learn(recipe: Recipe, run: RunDir, flags: dict[str, bool]) -> None:
        attempts.append(1)
        work = run.path / "training"
        assert (run.path, launched().local_rank) == (folder, 0)
        assert run.kept.read_text() == "kept.jsonl" and not run.completions.exists()
        if len(attempts) == 1:
            (work / "checkpoint-2").mkdir(parents=True)
            for name in ("fingerprint", "checkpoint-2/model", "checkpoint-2/trainer_state.json"):
                (work / name).write_text("mine")
            end = time.monotonic() + 60
            while not store.get("training/checkpoint-2/trainer_state.json"):
                assert time.monotonic() < end
                time.sleep(0.02)
            raise KeyError("lost")
        if len(attempts) == 3:
            store.put("lease/000002.json", b"")  # another machine has taken the run over
            (run.student / "new").unlink()
            return
        assert (work / "checkpoint-2/model").read_text() == (work / "fingerprint").read_text() == "mine"
        shutil.rmtree(work)
        (run.student / "old").rename(run.student / "new")

    def fit(cluster: FakeCluster, training: Training) -> str | None:
        try:
            _train_here(training, names_in(store, ["kept.jsonl", "lineage.json", "student", "training"]), {})
        except KeyError as error:
            return str(error)
        return None

    monkeypatch.setattr("train.run.train_launched", learn)
    monkeypatch.setattr(training, "_fit", fit)
    train_on_cluster("auto", told)
    assert "lost'; going on from the last checkpoint" in capsys.readouterr().err
    assert store.names() == ["completions.jsonl", "kept.jsonl", "lease/000001.json", "lineage.json", "student/new"]
    assert not folder.parent.exists()
    before = store.names()
    monkeypatch.setattr(run_lease, "TICK_S", 1000.0)
    with pytest.raises(TakenOver, match="another machine has taken this run over"):
        train_on_cluster("auto", told)
    assert store.names() == sorted([*before, "lease/000002.json"])
