"""What `train --cluster` does when a training is cut off, without Ray. The real one is in test_ray.py."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import DistillError, UsageError
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir
from scale import training
from scale.sync import State
from scale.training import MOST_LOSSES, Training, reason_of, train_on_cluster


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
    State("one", url="s3://bucket/t").save(told.run.path)
    with pytest.raises(UsageError, match="make fetch RUN=s3://bucket/t, and give its copy"):
        train_on_cluster("auto", told)
    with pytest.raises(UsageError, match="no such run"):
        train_on_cluster("auto", told._replace(run=RunDir(told.run.path / "none")))
