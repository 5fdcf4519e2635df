"""`train --again`, cut short: the training goes on where it stopped, whichever way it is called next."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.recipe import Recipe
from pipeline.rundir import RunDir
from tests.tiny_student import make_recipe, make_run, story_rows
from train.progress import TrainProgress
from train.run import train_run


@pytest.fixture(scope="module")
def recipe(student: str) -> Recipe:
    return make_recipe(student, epochs=2)


def started_at(recipe: Recipe, run: RunDir, *, again: bool, stop: int | None = None) -> int | None:
    """Trains; interrupted after step `stop`. Returns the step that the training began at, None if there was none."""
    steps: list[int] = []
    begin, log = TrainProgress.on_train_begin, TrainProgress.on_log

    def note(self: TrainProgress, args: Any, state: Any, control: Any, **rest: Any) -> None:
        steps.append(state.global_step)
        begin(self, args, state, control, **rest)

    def interrupt(self: TrainProgress, args: Any, state: Any, control: Any, **rest: Any) -> None:
        log(self, args, state, control, **rest)
        if state.global_step == stop:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainProgress, "on_train_begin", note)
        patch.setattr(TrainProgress, "on_log", interrupt)
        if stop is None:
            train_run(recipe, run, again=again)
        else:
            with pytest.raises(KeyboardInterrupt):
                train_run(recipe, run, again=again)
    return steps[0] if steps else None


@pytest.mark.parametrize("again", [True, False])
def test_an_interrupted_again_goes_on_from_its_checkpoint(recipe: Recipe, tmp_path: Path, again: bool) -> None:
    run = make_run(tmp_path / "run", story_rows(8))
    train_run(recipe, run)
    first = (run.student / "model.safetensors").stat().st_ino
    assert started_at(recipe, run, again=True, stop=3) == 0
    assert started_at(recipe, run, again=again) == 2
    assert (run.student / "model.safetensors").stat().st_ino != first
    assert not (run.path / "training").exists() and not run.student_sft.exists()
    assert started_at(recipe, run, again=False) is None  # up to date
    assert started_at(recipe, run, again=True) == 0


def test_again_does_not_go_on_from_a_training_that_was_not_begun_with_it(recipe: Recipe, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", story_rows(8))
    assert started_at(recipe, run, again=False, stop=3) == 0
    assert started_at(recipe, run, again=True, stop=3) == 0
    assert started_at(recipe, run, again=True) == 2


def test_an_interrupted_again_of_other_settings_is_not_gone_on_from(recipe: Recipe, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", story_rows(8))
    assert started_at(recipe, run, again=True, stop=3) == 0
    other = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": 1})})
    assert started_at(other, run, again=True) == 0
