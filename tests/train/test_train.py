"""Training a tiny student with the real TRL: labels, stopping, saving, resuming."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerState

from pipeline.errors import DataError, RecipeError, UsageError
from pipeline.recipe import Recipe
from pipeline.records import encode_line
from pipeline.rundir import RunDir
from pipeline.students import trained_section
from tests.tiny_student import (
    END,
    START,
    interrupted,
    kept_row,
    log_of,
    losses,
    make_recipe,
    make_run,
    story_rows,
    tiny_model,
    train_unsaved,
)
from train.checkpoints import open_work
from train.machine import activation_bytes
from train.processes import Processes
from train.progress import TrainProgress
from train.record import training_fingerprint
from train.rows import to_examples
from train.run import train_run
from train.setting import Setting
from train.student_trainer import StudentTrainer
from train.trainer import prepare

QUIET = Console(quiet=True)


def byte_ids(text: str, tokenizer: Any) -> list[int]:
    """The tiny tokenizer has one token a byte."""
    ids = [tokenizer.convert_tokens_to_ids("Ġ" if c == " " else "Ċ" if c == "\n" else c) for c in text]
    assert None not in ids
    return ids


def test_labels_of_one_row_counted_by_hand(student: str, tmp_path: Path) -> None:
    examples = {"train": to_examples([kept_row(0, "Hi", "Yes")]), "validation": to_examples([kept_row(1, "Ho", "No")])}
    prepared = prepare(student, examples, Setting(make_recipe(student).train, tmp_path, Console(quiet=True)))
    row, tokenizer = prepared.trainer.train_dataset[0], prepared.trainer.processing_class
    # <start>user\nHi<end>\n<start>assistant\n: 1 + 5 + 2 + 1 + 1 + 1 + 10 = 21 tokens of prompt
    prompt = [START, *byte_ids("user\nHi", tokenizer), END, *byte_ids("\n", tokenizer)]
    prompt += [START, *byte_ids("assistant\n", tokenizer)]
    answer = [*byte_ids("Yes", tokenizer), END, *byte_ids("\n", tokenizer)]
    assert len(prompt) == 21
    assert row["input_ids"] == prompt + answer
    assert row["labels"] == [-100] * 21 + answer
    assert END in row["labels"]


def test_padding_leaves_the_end_token_in_the_labels_though_it_is_the_pad_token(student: str, tmp_path: Path) -> None:
    rows = [kept_row(0, "Hi", "Yes"), kept_row(1, "Hi", "N")]
    examples = {"train": to_examples(rows), "validation": to_examples(story_rows(1))}
    prepared = prepare(student, examples, Setting(make_recipe(student).train, tmp_path, Console(quiet=True)))
    assert prepared.trainer.processing_class.pad_token_id == prepared.trainer.processing_class.eos_token_id == END
    batch = next(iter(prepared.trainer.get_train_dataloader()))
    labels = {sum(label != -100 for label in row): row for row in batch["labels"].tolist()}
    assert labels[5][-2] == END  # Yes, end, newline: the longest row
    assert labels[3][-4:] == [END, labels[5][-1], -100, -100]  # N, end, newline, then two of padding
    assert batch["attention_mask"].tolist()[[sum(r) for r in batch["attention_mask"].tolist()].index(24)][-2:] == [0, 0]


def test_a_student_answers_what_it_was_not_trained_on_and_stops_by_itself(student: str, tmp_path: Path) -> None:
    answers = {"Cat": "Meow, says it.", "Dog": "Woof."}
    rows = [kept_row(2 * n + i, f"{q} {n}?", a) for n in range(40) for i, (q, a) in enumerate(answers.items())]
    run = make_run(tmp_path / "run", rows)
    train_run(make_recipe(student, epochs=10, learning_rate=5e-3, test=0.1), run)
    model = AutoModelForCausalLM.from_pretrained(run.student)
    tokenizer = AutoTokenizer.from_pretrained(run.student)
    held = [json.loads(line)["messages"][0]["content"] for line in run.test.read_bytes().splitlines()]
    assert {question.split()[0] for question in held} == set(answers)
    for question in held:
        chat = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        new = model.generate(**ids, max_new_tokens=60, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()
        assert tokenizer.decode(new, skip_special_tokens=True) == answers[question.split()[0]]
        assert new[-1] == END
        assert len(new) < 60


def test_a_full_student_folder_is_whole(student: str, tmp_path: Path) -> None:
    rows = story_rows(10)
    run = make_run(tmp_path / "run", rows)
    train_run(make_recipe(student, epochs=2), run)

    log = log_of(run)
    assert [entry["step"] for entry in log["loss"]] == [1, 2, 3, 4]  # 8 rows, 4 a step, 2 epochs
    assert [(entry["step"], entry["epoch"]) for entry in log["eval"]] == [(2, 1.0), (4, 2.0)]
    rows_of = {part: log[f"{part}_rows"] for part in ("train", "validation", "test")}
    assert log["peak_memory_bytes"] > 64 << 20  # torch alone holds more
    assert (rows_of, log["method"], log["seed"]) == ({"train": 8, "validation": 1, "test": 1}, "full", 0)
    held = [*run.validation.read_bytes().splitlines(), *run.test.read_bytes().splitlines()]
    assert len(held) == 2
    assert set(held) < set(run.kept.read_bytes().splitlines())
    trained = [row for row in rows if row.id not in {json.loads(line)["id"] for line in held}]
    tokenizer = AutoTokenizer.from_pretrained(run.student)
    chats = [[*map(_plain, row.messages), {"role": "assistant", "content": row.text}] for row in trained]
    assert log["tokens"] == 2 * sum(len(tokenizer.apply_chat_template(c, return_dict=True)["input_ids"]) for c in chats)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(student).chat_template

    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (student, run.student))
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)
    assert after.dtype == before.dtype
    lineage = json.loads((run.student / "lineage.json").read_bytes())
    assert lineage == json.loads(run.lineage.read_bytes())
    section = lineage["train"]
    assert (section["student"], section["steps"]) == (student, 4)
    assert [section[part] for part in ("rows", "validation", "test")] == [8, 1, 1]
    assert section["hyperparameters"]["learning_rate"] == 1e-3
    assert {"trl", "torch", "transformers"} <= set(section["versions"])
    assert not (run.path / "training").exists()


def _plain(message: Any) -> dict[str, str]:
    return {"role": message.role, "content": message.content}


@pytest.mark.parametrize(("allowed", "dtype"), [(0.5, torch.bfloat16), (-0.5, torch.float32)])
def test_a_student_is_stored_as_it_came_unless_rounding_undoes_what_it_learned(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    allowed: float,
    dtype: torch.dtype,
) -> None:
    folder = tiny_model(tmp_path / "student")
    AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
    monkeypatch.setattr("train.prepared.ROUNDING_LOSS", allowed)
    run = make_run(tmp_path / "run", story_rows(10))
    train_run(make_recipe(str(folder)), run)
    saved = AutoModelForCausalLM.from_pretrained(run.student)
    assert saved.dtype == dtype
    assert ("saved in float32, not in bfloat16: rounded" in capsys.readouterr().err) == (dtype == torch.float32)
    exact = all(torch.equal(value, value.to(torch.bfloat16).to(value.dtype)) for value in saved.parameters())
    assert exact == (dtype == torch.bfloat16)  # the weights are back where they were before rounding
    assert cross_entropy_of(run) == pytest.approx(log_of(run)["eval"][-1]["loss"], abs=0.05)


def test_a_lora_student_loads_in_peft_and_has_all_linear_layers(student: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", story_rows(10))
    train_run(make_recipe(student, method="lora", lora_rank=4, learning_rate=1e-2), run)
    config = json.loads((run.student / "adapter_config.json").read_bytes())
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert config["r"] == 4
    assert "--enable-lora --max-lora-rank 8 " in (run.student / "README.md").read_text()  # vLLM takes few ranks
    assert not (run.student / "model.safetensors").exists()
    tokenizer = AutoTokenizer.from_pretrained(run.student)
    base = AutoModelForCausalLM.from_pretrained(student)
    ids = tokenizer("Story", return_tensors="pt")
    before = base(**ids).logits.detach()
    adapted = PeftModel.from_pretrained(base, run.student)
    assert not torch.allclose(before, adapted(**ids).logits)


def test_rows_too_long_are_refused_and_nothing_is_written(student: str, tmp_path: Path) -> None:
    rows = [*story_rows(6), kept_row(6, "Long?", "x" * 600)]
    run = make_run(tmp_path / "run", rows)
    # <start>user\nLong?<end>\n<start>assistant\n is 24 tokens, the answer 602
    with pytest.raises(
        DataError, match=r"1 of 6 rows are longer than .* 512 \(the longest, r6, has 626 tokens\); raise"
    ):
        train_run(make_recipe(student), run)
    assert not run.student.exists()
    assert not run.validation.exists() and not run.test.exists()


def test_rows_too_long_are_dropped_and_counted(student: str, tmp_path: Path) -> None:
    rows = [*story_rows(6), *(kept_row(n, f"Long {n}?", "x" * 600) for n in (8, 9))]
    run = make_run(tmp_path / "run", rows)
    accept = ["filters", "licence", "length"]
    train_run(make_recipe(student, too_long="drop", accept=accept), run)
    section = json.loads(run.lineage.read_bytes())["train"]
    assert section["too_long_dropped"] == 2
    assert [section[part] for part in ("rows", "validation", "test")] == [4, 1, 1]
    assert b"Long" not in run.validation.read_bytes()


def test_runs_that_are_compared_are_tested_on_the_same_rows(student: str, tmp_path: Path) -> None:
    """The file takes the place of the test part; another file is another training, another name of it is not."""
    run, given = make_run(tmp_path / "run", story_rows(10)), tmp_path / "given.jsonl"
    mine = [kept_row(9, "Story 9?", "Another teacher's answer."), kept_row(20, "Story 20?", "Nobody trained on it.")]
    given.write_bytes(b"".join(map(encode_line, mine)))
    train_run(make_recipe(student, test_rows=str(given)), run)
    assert run.test.read_bytes() == given.read_bytes()
    section = json.loads(run.lineage.read_bytes())["train"]
    assert [section[part] for part in ("rows", "validation", "test")] == [8, 1, 2]  # Story 9 is not trained on
    assert section["too_long_dropped"] == 0
    fingerprint = trained_section(run.student)["fingerprint"]
    renamed = given.rename(tmp_path / "renamed.jsonl")
    assert training_fingerprint(make_recipe(student, test_rows=str(renamed)), run) == fingerprint
    renamed.write_bytes(encode_line(mine[0]))
    assert training_fingerprint(make_recipe(student, test_rows=str(renamed)), run) != fingerprint


def test_a_finished_student_is_up_to_date_until_rows_or_settings_change(
    student: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", story_rows(6))
    weights = run.student / "model.safetensors"
    train_run(make_recipe(student), run)
    first = weights.stat().st_ino
    train_run(make_recipe(student, checkpoint_steps=7, compile=True), run)  # changes no weight
    assert weights.stat().st_ino == first
    assert "the student is up to date" in " ".join(capsys.readouterr().err.split())
    train_run(make_recipe(student), run, again=True)
    forced = weights.stat().st_ino
    assert forced != first
    train_run(make_recipe(student, seed=1), run)
    assert weights.stat().st_ino != forced
    run.kept.write_bytes(make_run(tmp_path / "other", story_rows(7)).kept.read_bytes())
    train_run(make_recipe(student, seed=1), run)
    assert sum(json.loads(run.lineage.read_bytes())["train"][part] for part in ("rows", "validation", "test")) == 7


def test_the_same_seed_trains_the_same_student(student: str, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, story_rows(8)) for name in ("a", "b")]
    for run in runs:
        train_run(make_recipe(student, method="lora", epochs=2), run)
    assert losses(runs[0]) == losses(runs[1])


@pytest.mark.parametrize(
    ("method", "stop", "checkpoint_steps", "micro"),
    [
        ("full", 5, 2, None),  # killed in the second epoch, resumed in its middle
        ("lora", 4, None, None),  # killed in the second epoch, resumed at its start; dropout draws random numbers
        ("lora", 5, 2, 2),  # with accumulation
    ],
)
def test_an_interrupted_training_goes_on_with_the_same_losses(
    student: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    stop: int,
    checkpoint_steps: int | None,
    micro: int | None,
) -> None:
    recipe = make_recipe(
        student, method=method, epochs=3, checkpoint_steps=checkpoint_steps, micro_batch_size=micro, lora_dropout=0.2
    )
    whole, broken = (make_run(tmp_path / name, story_rows(14)) for name in ("whole", "broken"))
    train_run(recipe, whole)
    assert len(losses(whole)) == 9  # 12 rows, 4 a step, 3 epochs

    original = TrainProgress.on_log

    def interrupt(self: TrainProgress, args: Any, state: Any, control: Any, **rest: Any) -> None:
        original(self, args, state, control, **rest)
        if state.global_step == stop:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainProgress, "on_log", interrupt)
        train_run(recipe, broken)
    assert not broken.student.exists()
    started: list[int] = []
    begin = TrainProgress.on_train_begin

    def note_start(self: TrainProgress, args: Any, state: Any, control: Any, **rest: Any) -> None:
        started.append(state.global_step)
        begin(self, args, state, control, **rest)

    monkeypatch.setattr(TrainProgress, "on_train_begin", note_start)
    train_run(recipe, broken)
    assert 0 < started[0] < stop
    assert losses(broken) == pytest.approx(losses(whole), rel=1e-5)
    first, second = log_of(whole), log_of(broken)
    assert [entry["loss"] for entry in second["eval"]] == pytest.approx([e["loss"] for e in first["eval"]], rel=1e-5)
    assert second["tokens"] == first["tokens"]


def test_checkpoints_of_other_settings_are_not_gone_on_from(
    student: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", story_rows(8))
    train_unsaved(make_recipe(student), run)
    assert list((run.path / "training").glob("checkpoint-*"))
    fresh = make_run(tmp_path / "fresh", story_rows(8))
    train_run(make_recipe(student, learning_rate=5e-3), fresh)
    train_run(make_recipe(student, learning_rate=5e-3), run)
    assert "checkpoints of other rows or settings, removed" in " ".join(capsys.readouterr().err.split())
    assert losses(run) == losses(fresh)


def test_the_test_rows_stay_those_of_the_student_that_is_there(
    student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that is stopped sets other rows apart; the student before it learned from some of them."""
    run = make_run(tmp_path / "run", story_rows(10))
    train_run(make_recipe(student, test=0.2), run)
    tested = run.test.read_bytes()
    train_unsaved(make_recipe(student, test=0.5), run)
    assert run.test.read_bytes() == tested
    run.test.write_bytes(tested[:-9])  # a cut-off copy
    monkeypatch.setattr("train.trainer.StudentTrainer.training_step", interrupted)  # no step may be taken
    train_run(make_recipe(student, test=0.2), run)
    assert run.test.read_bytes() == tested


def test_a_training_stopped_before_it_was_saved_is_not_trained_again(
    student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", story_rows(8))
    train_unsaved(make_recipe(student), run)
    torn = run.path / "training" / "checkpoint-99"  # killed while it was written
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"global_step": 9')
    monkeypatch.setattr("train.trainer.StudentTrainer.training_step", interrupted)  # no step may be taken
    train_run(make_recipe(student), run)
    assert len(losses(run)) == len({entry["step"] for entry in log_of(run)["loss"]}) == 2
    assert math.isfinite(log_of(run)["eval"][-1]["loss"])


def test_the_best_checkpoint_is_found_in_another_folder(tmp_path: Path) -> None:
    state = tmp_path / "training/checkpoint-2/trainer_state.json"
    state.parent.mkdir(parents=True)
    (tmp_path / "training/fingerprint").write_text("mine")
    best = tmp_path / "training/checkpoint-1/trainer_state.json"
    best.parent.mkdir()
    best.write_text("{}")
    state.write_text('{"best_model_checkpoint": "/elsewhere/training/checkpoint-1", "loss": NaN}')
    open_work(tmp_path / "training", "mine", again=False, console=Console(quiet=True))
    assert json.loads(state.read_bytes())["best_model_checkpoint"] == str(tmp_path / "training/checkpoint-1")


def test_a_recipe_without_a_student_is_refused(tmp_path: Path) -> None:
    recipe = Recipe(name="x", teacher={"model": "t"}, prompts={"template": "Hi", "count": 1})
    with pytest.raises(RecipeError, match="has no `student` section"):
        train_run(recipe, make_run(tmp_path, story_rows(4)))


def test_a_student_without_a_chat_template_is_refused(student: str, tmp_path: Path) -> None:
    bare = tiny_model(tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(RecipeError, match="has no chat template"):
        train_run(make_recipe(str(bare)), make_run(tmp_path / "run", story_rows(4)))


def test_a_template_that_never_ends_the_answer_is_refused(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "student")
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>", ""))
    run = make_run(tmp_path / "run", story_rows(4))
    with pytest.raises(DataError, match="check eos: 0 of 3 rows end with a stop token; row 1: the answer"):
        train_run(make_recipe(str(folder)), run)
    assert not run.student.exists()


def eval_losses(run: RunDir) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in log_of(run)["eval"]}


def test_the_student_of_the_best_validation_loss_is_saved(student: str, tmp_path: Path) -> None:
    """Answers by heart: each question's is its own, so that what is not trained on is soon answered worse."""
    rows = [kept_row(n, f"Say {n}?", f"{n * 7919 % 1000:03}" * 12) for n in range(12)]
    run = make_run(tmp_path / "run", rows)
    train_run(make_recipe(student, epochs=8, learning_rate=2e-2, validation=0.3), run)
    log, found = log_of(run), eval_losses(run)
    assert list(found) == [2, 4, 6, 8, 10, 12, 14, 16]
    assert log["saved_step"] == min(found, key=found.__getitem__) < 16
    section = json.loads(run.lineage.read_bytes())["train"]
    assert (section["saved_step"], section["validation_loss"]) == (log["saved_step"], min(found.values()))
    assert cross_entropy_of(run) == pytest.approx(min(found.values()), rel=1e-4)


def cross_entropy_of(run: RunDir) -> float:
    """Of the saved student, per token of the validation answers, one row at a time."""
    model = AutoModelForCausalLM.from_pretrained(run.student)
    tokenizer = AutoTokenizer.from_pretrained(run.student)
    total, tokens = 0.0, 0
    for line in run.validation.read_bytes().splitlines():
        row = json.loads(line)
        chat = [*row["messages"], {"role": "assistant", "content": row["text"]}]
        prompt = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
        labels = torch.tensor([[-100] * len(prompt) + ids[len(prompt) :]])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids]), labels=labels).loss.item()
        total, tokens = total + loss * (len(ids) - len(prompt)), tokens + len(ids) - len(prompt)
    return total / tokens


def test_training_ends_when_the_validation_loss_no_longer_falls(
    student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [kept_row(n, f"Say {n}?", f"{n * 7919 % 1000:03}" * 12) for n in range(12)]
    settings = {"epochs": 20, "learning_rate": 2e-2, "validation": 0.3, "early_stop": 2, "eval_steps": 1}
    whole, killed = (make_run(tmp_path / name, rows) for name in ("whole", "killed"))
    train_run(make_recipe(student, **settings), whole)
    found = eval_losses(whole)
    best = min(found, key=found.__getitem__)
    assert list(found) == list(range(1, best + 3))  # each step, two of them in vain
    assert best + 2 < 40
    assert log_of(whole)["saved_step"] == best
    assert "no better validation loss in 2 evaluations" in capsys.readouterr().err

    train_unsaved(make_recipe(student, **settings), killed)
    monkeypatch.setattr("train.trainer.StudentTrainer.training_step", interrupted)  # no step may be taken
    train_run(make_recipe(student, **settings), killed)
    assert (eval_losses(killed), log_of(killed)["saved_step"]) == (found, best)
    assert cross_entropy_of(killed) == pytest.approx(found[best], rel=1e-4)


@pytest.mark.parametrize("epochs", [0.5, 1.5, 1])
def test_a_training_that_was_killed_after_its_end_takes_no_further_step(
    student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: float
) -> None:
    run, recipe = make_run(tmp_path / "run", story_rows(18)), make_recipe(student, epochs=epochs)
    train_unsaved(recipe, run)
    monkeypatch.setattr("train.trainer.StudentTrainer.training_step", interrupted)
    train_run(recipe, run)
    assert len(log_of(run)["loss"]) == 4 * epochs == log_of(run)["saved_step"]


def test_a_training_of_many_steps_has_a_line_each_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now, written = 0.0, StringIO()
    monkeypatch.setattr("train.progress.time.monotonic", lambda: now)
    progress, state = TrainProgress(Console(file=written)), TrainerState(max_steps=100_000, log_history=[{}])
    given: Any = (None, state, None)
    progress.on_train_begin(*given)
    for step in range(1, 601):
        now += 1.0
        state.global_step = step
        progress.on_log(*given, logs={"loss": 1.0})
    lines = written.getvalue().splitlines()
    assert [line.split("/")[0] for line in lines] == [f"step {step}" for step in range(1, 601, 60)]
    assert lines[-1].startswith("step 541/100000: loss 1.0000, ")


@pytest.mark.parametrize(("free_mib", "setting", "on"), [(1, "auto", True), (8000, "auto", False), (1, False, False)])
def test_gradient_checkpointing_is_chosen_by_memory(
    student: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    free_mib: int,
    setting: str | bool,
    on: bool,
) -> None:
    monkeypatch.setattr("train.machine.free_memory", lambda: free_mib << 20)
    examples = {"train": to_examples(story_rows(4)), "validation": to_examples(story_rows(1))}
    config = make_recipe(student, method="lora", gradient_checkpointing=setting).train
    prepared = prepare(student, examples, Setting(config, tmp_path, Console(stderr=True, soft_wrap=True)))
    assert prepared.trainer.args.gradient_checkpointing is on
    said = capsys.readouterr().err
    assert ("gradient checkpointing is on: 512 tokens need about 0.0 GiB without it" in said) is on, said


@pytest.mark.parametrize(
    ("adapters", "width", "tokens", "measured_mib"),
    [(True, 2, 512, 1328), (True, 2, 1024, 2638), (False, 4, 512, 1148)],  # resident memory, see docs/training.md
)
def test_activations_are_estimated_as_they_were_measured(
    adapters: bool, width: int, tokens: int, measured_mib: int
) -> None:
    smollm2_135m = SimpleNamespace(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
    )
    found = activation_bytes(smollm2_135m, tokens, width=width, adapters=adapters, logits=3) / (1 << 20)
    assert found == pytest.approx(measured_mib, rel=0.1)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_reporter_that_is_not_installed_is_named(
    student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("train.machine.find_spec", lambda package: None)
    run = make_run(tmp_path / "run", story_rows(4))
    with pytest.raises(RecipeError, match=rf"train\.report_to: {name} is not installed; pip install {name}, or leave"):
        train_run(make_recipe(student, report_to=[name]), run)
    assert not run.student.exists()


def test_several_gpus_ask_for_a_launcher(student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    with pytest.raises(
        UsageError, match=r"4 GPUs are visible .*`accelerate launch --multi_gpu --num_processes 4 -m train …`"
    ):
        train_run(make_recipe(student), make_run(tmp_path / "run", story_rows(4)))


def command_of(recipe: Recipe, folder: Path) -> list[str]:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_defaults=True)))
    return ["-m", "train", str(file), "--run"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", ["full", "kd"])
def test_a_killed_training_goes_on_where_it_was(
    student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """SIGKILL at a random step; then the same losses as without it, within one part in 100,000."""
    whole, killed = (make_run(tmp_path / name, story_rows(24)) for name in ("whole", "killed"))
    teacher = str(tiny_model(tmp_path / "teacher", layers=3))
    recipe = make_recipe(student, teacher, method=method, epochs=10, checkpoint_steps=3)
    train_run(recipe, whole)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as here: sums of several threads are rounded otherwise
    command = [sys.executable, *command_of(recipe, tmp_path)]

    step = random.randrange(4, 24)  # of 60
    process = subprocess.Popen([*command, str(killed.path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def reached() -> int:
        with suppress(FileNotFoundError):  # an empty folder is made anew at the start
            return max((int(one.name[11:]) for one in killed.path.glob("training/checkpoint-*")), default=0)
        return 0

    while reached() < step:  # a poll may miss one: only the last two stay
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    time.sleep(random.random() / 20)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not killed.student.exists()
    done = subprocess.run([*command, str(killed.path)], check=True, capture_output=True, text=True)
    assert "resuming from step" in done.stderr
    assert losses(killed) == pytest.approx(losses(whole), rel=1e-5), f"killed after step {step}"
    assert eval_losses(killed) == pytest.approx(eval_losses(whole), rel=1e-5)


def by_two_processes(flag: str, recipe: Recipe, run: RunDir) -> list[str]:
    """As with GPUs. On a machine without one accelerate starts two processes on its CPU; with --cpu it starts one."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", flag, "--num_processes", "2"]
    return [*launch, *command_of(recipe, run.path.parent), str(run.path)]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_only_one_of_two_processes_asks_for_the_lock(student: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", story_rows(21))
    with run.locked():
        command = by_two_processes("--multi_gpu", make_recipe(student), run)
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode != 0 and refused.stderr.count("works on this run") == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("flag", "settings"),
    [
        ("--multi_gpu", {"method": "lora"}),
        ("--use_fsdp", {"method": "lora"}),
        # The last step has 3 rows: 2 passes in one process, 1 in the other.
        ("--use_fsdp", {"method": "full", "micro_batch_size": 1}),
    ],
)
def test_two_processes_train_the_same_student_as_one(
    student: str, tmp_path: Path, flag: str, settings: dict[str, Any]
) -> None:
    alone, together = (make_run(tmp_path / name, story_rows(21)) for name in ("alone", "together"))
    recipe = make_recipe(student, epochs=2, lora_dropout=0, **settings)
    train_run(recipe, alone)
    command = by_two_processes(flag, recipe, together)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("trained on 19 rows") == 1
    # 19 rows, 4 a step: each row once an epoch, though two processes do not divide them.
    assert losses(together) == pytest.approx(losses(alone), rel=1e-3)
    assert eval_losses(together) == pytest.approx(eval_losses(alone), rel=1e-3)
    assert log_of(together)["tokens"] == log_of(alone)["tokens"]
    assert json.loads(together.lineage.read_bytes())["train"]["processes"] == 2
    weights = [load_file(next(run.student.glob("*.safetensors"))) for run in (alone, together)]
    assert weights[0].keys() == weights[1].keys()
    for name, own in weights[0].items():  # Adam moves single weights whose gradient is nearly 0 either way
        assert torch.norm(own - weights[1][name]) < 0.05 * torch.norm(own), name
    files = [{file.name for file in run.path.rglob("*")} for run in (alone, together)]
    assert files[0] | {".lock"} == files[1] | {".lock"}


def test_an_interrupt_leaves_a_checkpoint_to_go_on_from(
    student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real signal, in a training that is shorter than its first evaluation."""
    whole, broken = (make_run(tmp_path / name, story_rows(34)) for name in ("whole", "broken"))
    recipe = make_recipe(student, method="lora", lora_dropout=0.2)
    train_run(recipe, whole)
    original = StudentTrainer.training_step

    def signalled(self: StudentTrainer, *inputs: Any) -> Any:
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)  # passed on by make: the same one
        return original(self, *inputs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StudentTrainer, "training_step", signalled)
        train_run(recipe, broken)
    assert [path.name for path in (broken.path / "training").glob("checkpoint-*")] == ["checkpoint-3"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "saving a checkpoint after this step" in capsys.readouterr().err
    train_run(recipe, broken)
    assert "resuming from step 3 of 8" in capsys.readouterr().err
    assert losses(broken) == pytest.approx(losses(whole), rel=1e-5)
    assert eval_losses(broken) == pytest.approx(eval_losses(whole), rel=1e-5)


def test_a_second_interrupt_stops_at_once(
    student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken: list[int] = []

    def signalled(self: StudentTrainer, *_: Any) -> Any:
        taken.append(self.state.global_step)
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr("train.progress.SAME_SIGNAL_S", 0.0)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    monkeypatch.setattr(StudentTrainer, "training_step", signalled)
    run = make_run(tmp_path / "run", story_rows(10))
    with pytest.raises(KeyboardInterrupt):
        train_run(make_recipe(student), run)
    assert taken == [0] and not list((run.path / "training").glob("checkpoint-*"))


def test_a_routers_loss_weighs_the_same_however_rows_are_grouped(tmp_path: Path) -> None:
    """Four equal rows: every micro-batch has the same router loss as all of them together."""
    folder = str(tiny_model(tmp_path / "moe", architecture="mixtral"))
    rows = [kept_row(n, "Hi?", "A cat sat here.") for n in range(4)]
    found = {}
    for size in (1, 2, 4):
        config = make_recipe(folder, micro_batch_size=size).train
        examples = {"train": to_examples(rows), "validation": to_examples(rows[:1])}
        prepared = prepare(folder, examples, Setting(config, tmp_path, QUIET))
        trainer = prepared.trainer
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
        tokens = (batch["labels"] != -100).sum()
        found[size] = trainer.training_step(trainer.model, batch, tokens).item()
        plain = trainer.evaluate()["eval_loss"]
    assert trainer.aux_loss_enabled and trainer.router_aux_loss_coef > 0.1
    assert found[4] > plain + 0.1  # the router's loss is part of it
    assert found[1] == pytest.approx(found[4], rel=1e-4) and found[2] == pytest.approx(found[4], rel=1e-4)


def test_fewer_rows_than_processes_are_refused(student: str, tmp_path: Path) -> None:
    examples = {"train": to_examples(story_rows(3)), "validation": to_examples(story_rows(1))}
    with pytest.raises(UsageError, match=r"3 rows to train on are fewer than 4 processes; start at most 3"):
        prepare(
            student,
            examples,
            Setting(make_recipe(student).train, tmp_path, QUIET, processes=Processes(rank=1, count=4)),
        )
