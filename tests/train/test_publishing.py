"""A student takes the place of another: what is left if that fails, and what the run's lineage then tells."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest

import train.run
from pipeline.errors import UsageError
from pipeline.lineage import read_lineage, record_lineage
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir
from pipeline.students import trained_section
from tests.full_disk import full_disk
from tests.tiny_student import make_recipe, make_run, story_rows
from train.run import _publish, train_run


@pytest.fixture
def run(student: str, tmp_path: Path) -> RunDir:
    """A run with an evaluated student."""
    run = make_run(tmp_path / "run", story_rows(12))
    train_run(make_recipe(student, epochs=1), run)
    record_lineage(run, "evaluate", {"perplexity": {"student_after": 7.0}})
    return run


def other(student: str) -> Recipe:
    return make_recipe(student, epochs=1, learning_rate=2e-3, test=0.4)


def published(run: RunDir) -> dict[str, bytes]:
    """The student, and what tells of it."""
    paths = [run.lineage, run.test, *(path for path in run.student.rglob("*") if path.is_file())]
    return {str(path): path.read_bytes() for path in paths}


@pytest.mark.parametrize("step", ["model_card", "write_jsonl", "sync_tree"])
def test_a_full_disk_at_the_last_step_leaves_the_older_student_and_its_lineage(
    student: str, run: RunDir, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, real = published(run), getattr(train.run, step)

    def full(*given: Any) -> Any:
        if step == "write_jsonl" and given[0].name != "test.jsonl":
            return real(*given)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(train.run, step, full)
        with pytest.raises(OSError, match="No space left"):
            train_run(other(student), run)
    assert published(run) == before and "evaluate" in read_lineage(run)
    train_run(other(student), run)
    section = read_lineage(run)["train"]
    assert section == trained_section(run.student) and section["hyperparameters"]["learning_rate"] == 2e-3


@pytest.mark.parametrize(("room", "file"), [(0, "training_log.json"), (3000, "README.md")])
def test_a_full_disk_names_the_file_of_a_student_that_did_not_fit(
    tmp_path: Path, room: int, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", [])
    (folder := run.path / "training" / "student").mkdir(parents=True)
    monkeypatch.setattr(train.run, "model_card", lambda *_: "x" * 4000)
    with full_disk(room), pytest.raises(OSError, match="File too large") as raised:
        _publish(folder, {}, {}, make_recipe("student"), run, [])
    assert raised.value.filename == str(folder / file)


@pytest.mark.parametrize("name", ["student", "student-sft", "training"])
def test_a_link_in_the_place_of_a_folder_that_is_renamed_is_told_before_the_training(
    student: str, tmp_path: Path, name: str
) -> None:
    run = make_run(tmp_path / "run", story_rows(12))
    (run.path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=rf"run/{name}: a link to .*elsewhere, but .*; remove the link"):
        train_run(make_recipe(student), run)
    assert not (tmp_path / "elsewhere").exists() and not run.checks.exists()


def test_a_new_student_has_no_scores_of_the_one_before_it(student: str, run: RunDir) -> None:
    train_run(other(student), run)
    assert "evaluate" not in read_lineage(run) and "evaluate" not in read_lineage(RunDir(run.student))


def test_the_same_command_mends_a_lineage_that_tells_of_the_student_before(
    student: str, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train.run, "sync_path", killed)
        with pytest.raises(KeyboardInterrupt):
            train_run(other(student), run)
    assert read_lineage(run)["train"] != trained_section(run.student)
    made = (run.student / "model.safetensors").stat().st_ino
    train_run(other(student), run)  # up to date
    assert read_lineage(run) == json.loads((run.student / "lineage.json").read_bytes())
    assert (run.student / "model.safetensors").stat().st_ino == made
