"""Files that a power cut has damaged, checkpoints and students, and a full disk."""

import errno
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from evaluate.models import subjects
from pipeline.adapters import torn_file
from pipeline.errors import UsageError
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir
from pipeline.students import check_trained
from tests.full_disk import full_disk
from tests.tiny_student import make_recipe, make_run, story_rows, train_unsaved
from train.checkpoints import open_work
from train.load import load_start
from train.preferences import start_of
from train.publish.export import export_model
from train.run import train_run


@pytest.fixture(scope="module")
def recipe(student: str) -> Recipe:
    return make_recipe(student, epochs=2)


@pytest.fixture(scope="module")
def trained(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = make_run(tmp_path_factory.mktemp("runs") / "run", story_rows(8))
    train_run(recipe, run)
    return run


def stopped(recipe: Recipe, path: Path) -> RunDir:
    """A run whose training was stopped before the student was saved."""
    run = make_run(path, story_rows(8))
    train_unsaved(recipe, run)
    assert sorted(path.name for path in (run.path / "training").glob("*-*")) == ["checkpoint-2", "checkpoint-4"]
    return run


@pytest.mark.parametrize(
    ("checkpoint", "file", "goes_on"),
    [
        (4, "optimizer.pt", True),
        (4, "model.safetensors", True),
        (4, "rng_state.pth", True),
        (0, "config.json", False),  # in both checkpoints
    ],
)
def test_a_damaged_checkpoint_is_removed_and_the_training_goes_on_from_the_one_before(
    recipe: Recipe, tmp_path: Path, checkpoint: int, file: str, goes_on: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run = stopped(recipe, tmp_path / "run")
    for step in (2, 4):
        if checkpoint in (step, 0):
            (run.path / f"training/checkpoint-{step}" / file).write_bytes(b"")
    capsys.readouterr()
    train_run(recipe, run)
    told = capsys.readouterr().err
    assert f"{file} is empty or cut off, as after a power cut; this checkpoint is removed" in told
    assert ("resuming from step 2 of 4" in told) == goes_on
    assert torn_file(run.student) is None and not (run.path / "training").exists()


def test_a_checkpoint_whose_best_one_is_damaged_is_of_no_use(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = stopped(recipe, tmp_path / "run")
    state = run.path / "training/checkpoint-4/trainer_state.json"
    best = str(run.path / "training/checkpoint-2")
    state.write_text(json.dumps(json.loads(state.read_bytes()) | {"best_model_checkpoint": best}))
    weights = run.path / "training/checkpoint-2/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    capsys.readouterr()
    train_run(recipe, run)
    told = capsys.readouterr().err
    assert "checkpoint-4: it needs one that is gone; this checkpoint is removed" in told and "resuming" not in told


@pytest.mark.parametrize(
    ("file", "left"),
    [
        ("model.safetensors", 0),
        ("model.safetensors", 40),
        ("config.json", 0),
        ("lineage.json", 0),
        ("tokenizer_config.json", 40),
        ("chat_template.jinja", 0),
    ],
)
def test_a_damaged_student_is_named_with_its_fix(recipe: Recipe, trained: RunDir, file: str, left: int) -> None:
    path = trained.student / file
    whole = path.read_bytes()
    path.write_bytes(whole[:left])
    try:
        for use in (train_run, export_model, subjects):
            with pytest.raises(UsageError, match=rf"student/{file}: {left} bytes, empty or cut off.*--again\)"):
                use(recipe, trained)
        assert not (trained.path / "export").exists()
    finally:
        path.write_bytes(whole)


def test_a_student_without_its_weights_is_named_with_its_fix(recipe: Recipe, trained: RunDir) -> None:
    weights, elsewhere = trained.student / "model.safetensors", trained.path / "elsewhere"
    weights.rename(elsewhere)  # as a copy that leaves large files out
    try:
        for use in (train_run, export_model, subjects):
            with pytest.raises(UsageError, match=r"student/model\.safetensors: is not there; copy it .*--again\)"):
                use(recipe, trained)
        assert not (trained.path / "export").exists()
    finally:
        elsewhere.rename(weights)


def test_a_model_that_no_training_wrote_may_have_weights_of_another_name(recipe: Recipe, tmp_path: Path) -> None:
    run, model = RunDir(tmp_path / "run"), tmp_path / "run" / "student"
    model.mkdir(parents=True)
    for name in ("config.json", "pytorch_model.bin"):
        (model / name).write_text("{}")
    check_trained(recipe, run)
    dpo = recipe.train.model_copy(update={"method": "dpo", "start": model})
    with pytest.raises(UsageError, match=r"run/student: no student to start from; train\.method dpo follows another"):
        start_of(recipe.model_copy(update={"train": dpo}), run)


def test_a_damaged_student_to_start_from_is_named(recipe: Recipe, trained: RunDir) -> None:
    path = trained.student / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(b"")
    try:
        with pytest.raises(UsageError, match=r"student/model\.safetensors: 0 bytes, empty or cut off"):
            start_of(recipe.model_copy(update={"train": recipe.train.model_copy(update={"method": "dpo"})}), trained)
    finally:
        path.write_bytes(whole)


def test_a_damaged_student_is_trained_again(recipe: Recipe, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", story_rows(8))
    train_run(recipe, run)
    for file in ("lineage.json", "model.safetensors"):
        (run.student / file).write_bytes(b"")
        train_run(recipe, run, again=True)
        assert torn_file(run.student) is None
    assert not (run.path / "training").exists()


def test_a_full_disk_is_named_while_the_rows_are_tokenised(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")  # as pyarrow says it, without a file

    monkeypatch.setattr("train.trainer.stored_rows", full)
    run = make_run(tmp_path / "run", story_rows(8))
    with pytest.raises(OSError, match="No space left on device") as raised:
        train_run(recipe, run)
    assert raised.value.filename == str(run.path / "training-rows")


def test_a_full_disk_is_named_where_the_folder_of_checkpoints_begins(tmp_path: Path) -> None:
    with full_disk(), pytest.raises(OSError, match="File too large") as raised:
        open_work(tmp_path / "training", "a fingerprint", again=False, console=Console())
    assert raised.value.filename == str(tmp_path / "training" / "fingerprint")


def test_an_adapter_that_names_no_base_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(
        UsageError, match=r"adapter_config\.json: .*`base_model_name_or_path`; train that student again"
    ):
        load_start(tmp_path, torch.float32)
