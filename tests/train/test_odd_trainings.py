"""Trainings that are short, diverge, run out of memory, or follow one that must not be lost."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoTokenizer

from pipeline.errors import DistillError, UsageError
from pipeline.lineage import read_lineage
from pipeline.records import Message, Preference, encode_line
from pipeline.rundir import RunDir
from pipeline.students import trained_section
from tests.tiny_student import kept_row, log_of, make_recipe, make_run, story_rows
from train.preferences import start_of
from train.processes import ALONE
from train.progress import Milestones
from train.rates import warmup_steps
from train.record import training_fingerprint
from train.rows import to_examples
from train.run import train_run
from train.setting import Setting
from train.trainer import prepare

QUIET = Console(quiet=True)


def write_pairs(run: RunDir, count: int) -> None:
    better, worse = [Message("assistant", "The cat sat.")], [Message("assistant", "No.")]
    pairs = (
        Preference(id=f"p{n}", prompt=[Message("user", f"Story {n}?")], chosen=better, rejected=worse)
        for n in range(count)
    )
    run.preferences.write_bytes(b"".join(map(encode_line, pairs)))


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([value.flatten().float() for value in load_file(folder / "model.safetensors").values()])


@pytest.mark.parametrize(("rows", "epochs", "steps"), [(8, 1, 0), (152, 1, 0), (160, 1, 1), (161, 2, 2), (80, 8, 4)])
def test_the_warm_up_is_its_share_of_the_steps_rounded_down(rows: int, epochs: float, steps: int) -> None:
    config = make_recipe("student", epochs=epochs, batch_size=8, warmup=0.05).train
    assert warmup_steps(config, rows) == steps


def test_the_warm_up_does_not_count_rows_that_are_left_out(student: str, tmp_path: Path) -> None:
    long = [kept_row(n, f"Long {n}?", "The cat sat. " * 20) for n in range(24)]
    examples = {"train": to_examples([*story_rows(8), *long]), "validation": to_examples(story_rows(1))}
    config = make_recipe(student, epochs=2, warmup=0.5, max_length=200, too_long="drop").train
    trainer = prepare(student, examples, Setting(config, tmp_path, QUIET)).trainer
    assert (len(trainer.train_dataset), trainer.args.warmup_steps) == (8, 2)  # of 4: 2 epochs, 8 rows, 4 a step


@pytest.mark.parametrize(("added", "faulty"), [([], 0), (["<pad>"], 9)])
def test_a_padding_token_that_the_student_does_not_know_is_a_fault_of_every_row(
    added: list[str], faulty: int, student: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(student, tmp_path / "student")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": added[0]} if added else {})  # the first id after the model's last
    tokenizer.save_pretrained(folder)
    examples = {"train": to_examples(story_rows(8)), "validation": to_examples(story_rows(1))}
    faults = prepare(str(folder), examples, Setting(make_recipe(student).train, tmp_path, QUIET)).faults
    assert faults is not None and len(faults.get("vocabulary", [])) == faulty


def test_a_training_of_one_step_learns_something(student: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", story_rows(6))
    train_run(make_recipe(student, batch_size=4), run)
    (step,) = log_of(run)["loss"]
    assert step["learning_rate"] == 1e-3
    assert (weights(run.student) - weights(Path(student))).abs().max() > 1e-4


def test_a_training_that_diverges_at_once_leaves_the_student_before_it(student: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", story_rows(12))
    train_run(make_recipe(student), run)
    before = weights(run.student)
    with pytest.raises(DistillError, match=r"validation loss is nan: the training has diverged; lower train\.learning"):
        train_run(make_recipe(student, learning_rate=1e30), run)
    assert torch.equal(weights(run.student), before)


def test_a_training_that_diverges_later_ends_with_the_weights_before(capsys: pytest.CaptureFixture[str]) -> None:
    milestones = Milestones(make_recipe("student").train, ALONE, Console(stderr=True))
    state = SimpleNamespace(global_step=9, log_history=[{"eval_loss": 2.0}, {"loss": 1.0}, {"eval_loss": float("nan")}])
    control = SimpleNamespace(should_training_stop=False)
    milestones.on_evaluate(None, state, control)
    assert control.should_training_stop
    assert "step 9: the validation loss is nan" in capsys.readouterr().err


def test_a_further_method_that_diverges_names_its_own_learning_rate() -> None:
    milestones = Milestones(make_recipe("student", method="dpo").train, ALONE, Console(quiet=True))
    state = SimpleNamespace(global_step=9, log_history=[{"eval_loss": float("nan")}])
    with pytest.raises(DistillError, match=r"diverged; lower train\.dpo\.learning_rate"):
        milestones.on_evaluate(None, state, SimpleNamespace())


def test_rows_per_forward_pass_make_no_other_training(tmp_path: Path) -> None:
    """What is lowered after a lack of memory, so that the training goes on from its checkpoint."""
    run = make_run(tmp_path / "run", story_rows(4))
    prints = {training_fingerprint(make_recipe("student", micro_batch_size=size), run) for size in (None, 1, 4)}
    assert len(prints) == 1
    assert training_fingerprint(make_recipe("student", batch_size=8), run) not in prints


def test_what_was_checked_before_stays_after_a_further_method(student: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", story_rows(12))
    settings: dict[str, Any] = {"accept": ["filters", "size_ratio"], "dpo": {"weights": "full"}}
    train_run(make_recipe(student, **settings), run)
    first = {check["name"] for check in json.loads(run.checks.read_bytes())["checks"]}
    assert {"licence", "size_ratio", "length"} <= first
    write_pairs(run, 12)
    train_run(make_recipe(student, method="dpo", **settings), run)
    names = [check["name"] for check in json.loads(run.checks.read_bytes())["checks"]]
    assert set(names) == first and len(names) == len(first)
    assert [check["name"] for check in read_lineage(run)["train"]["checks"]] == names


def test_a_student_of_another_further_method_is_not_thrown_away(student: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", story_rows(12))
    train_run(make_recipe(student), run)
    pairs = make_recipe(student, method="dpo", dpo={"weights": "full"})
    assert start_of(pairs, run) == run.student
    write_pairs(run, 12)
    train_run(pairs, run)
    assert trained_section(run.student)["method"] == "dpo" and start_of(pairs, run) == run.student_sft
    with pytest.raises(
        UsageError, match=r"student is of train\.method dpo, and on_policy would begin at the one befor"
    ):
        train_run(make_recipe(student, method="on_policy"), run)
    with pytest.raises(UsageError, match=r"train\.start is .*student, which this training replaces"):
        train_run(make_recipe(student, method="dpo", start=str(run.student)), run)
    moved = run.student.rename(tmp_path / "kept")
    assert start_of(make_recipe(student, method="on_policy", start=str(moved)), run) == moved
