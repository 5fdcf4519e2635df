"""What `train --cluster` does when a training is cut off, without Ray. The real one is in test_ray.py."""

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import DistillError, UsageError
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir
from scale import run_in_store, training
from scale.storage import open_store
from scale.sync import Mirror, State
from scale.training import MOST_LOSSES, Training, _train_here, reason_of, train_on_cluster
from tests.servers.object_storage import object_storage


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


def write_checkpoint(folder: Path) -> None:
    """As Trainer does: trainer_state.json closes it."""
    folder.mkdir(parents=True)
    (folder.parent / "fingerprint").write_text("mine")
    (folder / "model").write_text("weights")
    (folder / "trainer_state.json").write_text("{}")


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
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        ended.wait()

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


def test_wrong_usage_is_refused(told: Training) -> None:
    with pytest.raises(UsageError, match="ray://h:1: train on a machine of the cluster, with host:port or auto"):
        train_on_cluster("ray://h:1", told)
    with pytest.raises(UsageError, match="no such run"):
        train_on_cluster("auto", told._replace(run=RunDir(told.run.path / "none")))


def test_a_run_in_a_store_needs_no_folder_that_all_nodes_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each process has a folder of its own; the first attempt is lost after its first checkpoint."""
    monkeypatch.setattr(training, "Cluster", FakeCluster)
    monkeypatch.setattr(run_in_store, "TICK_S", 0.05)
    folders = list[Path]()

    def learn(recipe: Recipe, run: RunDir, flags: dict[str, bool]) -> None:
        folders.append(run.path)
        assert (run.kept.read_text(), flags) == ("rows", {"again": True})
        assert not run.completions.exists()
        work = run.path / "training"
        if len(folders) == 1:
            assert not work.exists()
            write_checkpoint(work / "checkpoint-2")
            while not store.get("training/checkpoint-2/trainer_state.json"):
                time.sleep(0.02)
            raise KeyError("lost")
        assert (work / "fingerprint").exists()
        assert (work / "checkpoint-2/model").read_text() == "weights"
        shutil.rmtree(work)
        (run.student / "old").rename(run.student / "new")

    def fit(cluster: FakeCluster, told: Training) -> str | None:
        try:
            _train_here(told, {})
        except KeyError as error:
            return str(error)
        return None

    monkeypatch.setattr("train.__main__.train_launched", learn)
    monkeypatch.setattr(training, "_fit", fit)
    with object_storage():
        store, run = open_store("s3://bucket/stories"), RunDir(tmp_path / "run")
        run.student.mkdir(parents=True)
        run.kept.write_text("rows")
        (run.student / "old").write_text("old")
        state = State("one", url=store.url, lease="lease/000001.json")
        Mirror(store, run.path, state).push()
        state.save(run.path)
        recipe = Recipe(name="t", teacher={"model": "m"}, prompts={"template": "x", "count": 1})  # type: ignore[arg-type]
        write_checkpoint(run.path / "training/checkpoint-1")  # of an earlier training
        train_on_cluster("auto", Training(recipe, run, {"again": True}))
        assert store.names("training") == []
        assert store.names("student") == ["student/new"]
    assert "lost'; going on from the last checkpoint" in capsys.readouterr().err
    assert len(set(folders)) == 2
    assert not any(folder.exists() for folder in folders)
    assert [path.name for path in (*run.path.glob("training/*/*"), *run.student.iterdir())] == ["new"]
    assert State.read(run.path).lease == "lease/000001.json"
