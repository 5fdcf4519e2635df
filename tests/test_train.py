"""Training a tiny student with the real TRL: labels, stopping, saving, resuming."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from rich.console import Console
from tiny_student import END, START, kept_row, make_recipe, make_run, story_rows, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.errors import DataError, RecipeError
from pipeline.recipe import Recipe
from pipeline.records import encode_line
from pipeline.rundir import RunDir
from train.progress import TrainProgress
from train.rows import to_examples
from train.run import train_run, trained_from, training_fingerprint
from train.trainer import Examples, prepare


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model(tmp_path_factory.mktemp("student") / "model"))


def log_of(run: RunDir) -> dict[str, Any]:
    return json.loads((run.student / "training_log.json").read_bytes())


def losses(run: RunDir) -> list[float]:
    return [entry["loss"] for entry in log_of(run)["loss"]]


def byte_ids(text: str, tokenizer: Any) -> list[int]:
    """The tiny tokenizer has one token a byte."""
    ids = [tokenizer.convert_tokens_to_ids("Ġ" if c == " " else "Ċ" if c == "\n" else c) for c in text]
    assert None not in ids
    return ids


def test_labels_of_one_row_counted_by_hand(student: str, tmp_path: Path) -> None:
    examples = Examples(to_examples([kept_row(0, "Hi", "Yes")]), to_examples([kept_row(1, "Ho", "No")]))
    prepared = prepare(student, examples, make_recipe(student).train, tmp_path, Console(quiet=True))
    row = prepared.trainer.train_dataset[0]
    # <start>user\nHi<end>\n<start>assistant\n: 1 + 5 + 2 + 1 + 1 + 1 + 10 = 21 tokens of prompt
    prompt = [START, *byte_ids("user\nHi", prepared.tokenizer), END, *byte_ids("\n", prepared.tokenizer)]
    prompt += [START, *byte_ids("assistant\n", prepared.tokenizer)]
    answer = [*byte_ids("Yes", prepared.tokenizer), END, *byte_ids("\n", prepared.tokenizer)]
    assert len(prompt) == 21
    assert row["input_ids"] == prompt + answer
    assert row["labels"] == [-100] * 21 + answer
    assert END in row["labels"]


def test_padding_leaves_the_end_token_in_the_labels_though_it_is_the_pad_token(student: str, tmp_path: Path) -> None:
    examples = Examples(to_examples([kept_row(0, "Hi", "Yes"), kept_row(1, "Hi", "N")]), to_examples(story_rows(1)))
    prepared = prepare(student, examples, make_recipe(student).train, tmp_path, Console(quiet=True))
    assert prepared.tokenizer.pad_token_id == prepared.tokenizer.eos_token_id == END
    batch = next(iter(prepared.trainer.get_train_dataloader()))
    labels = {sum(label != -100 for label in row): row for row in batch["labels"].tolist()}
    assert labels[5][-2] == END  # Yes, end, newline: the longest row
    assert labels[3][-4:] == [END, labels[5][-1], -100, -100]  # N, end, newline, then two of padding
    assert batch["attention_mask"].tolist()[[sum(r) for r in batch["attention_mask"].tolist()].index(24)][-2:] == [0, 0]


def test_a_student_answers_what_it_was_not_trained_on_and_stops_by_itself(student: str, tmp_path: Path) -> None:
    answers = {"Cat": "Meow, says it.", "Dog": "Woof."}
    rows = [kept_row(2 * n + i, f"{q} {n}?", a) for n in range(40) for i, (q, a) in enumerate(answers.items())]
    run = make_run(tmp_path / "run", rows)
    train_run(make_recipe(student, epochs=3, learning_rate=1e-2, batch_size=4), run)
    model = AutoModelForCausalLM.from_pretrained(run.student)
    tokenizer = AutoTokenizer.from_pretrained(run.student)
    held = [json.loads(line)["messages"][0]["content"] for line in run.held_out.read_bytes().splitlines()]
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
    train_run(make_recipe(student, epochs=2, held_out=0.2), run)

    log = log_of(run)
    assert [entry["step"] for entry in log["loss"]] == [1, 2, 3, 4]  # 8 rows, 4 a step, 2 epochs
    assert [(entry["step"], entry["epoch"]) for entry in log["eval"]] == [(2, 1.0), (4, 2.0)]
    assert (log["train_rows"], log["held_out_rows"], log["method"], log["seed"]) == (8, 2, "full", 0)
    held = run.held_out.read_bytes().splitlines()
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
    assert (section["student"], section["rows"], section["held_out"], section["steps"]) == (student, 8, 2, 4)
    assert section["hyperparameters"]["learning_rate"] == 1e-3
    assert {"trl", "torch", "transformers"} <= set(section["versions"])
    assert not (run.path / "training").exists()


def _plain(message: Any) -> dict[str, str]:
    return {"role": message.role, "content": message.content}


def test_a_lora_student_loads_in_peft_and_has_all_linear_layers(student: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", story_rows(10))
    train_run(make_recipe(student, method="lora", lora_rank=4, learning_rate=1e-2), run)
    config = json.loads((run.student / "adapter_config.json").read_bytes())
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert config["r"] == 4
    assert not (run.student / "model.safetensors").exists()
    tokenizer = AutoTokenizer.from_pretrained(run.student)
    base = AutoModelForCausalLM.from_pretrained(student)
    ids = tokenizer("Story", return_tensors="pt")
    before = base(**ids).logits.detach()
    adapted = PeftModel.from_pretrained(base, run.student)
    assert not torch.allclose(before, adapted(**ids).logits)


def test_a_pruned_student_is_trained_from_the_teachers_layers(tmp_path: Path) -> None:
    teacher = str(tiny_model(tmp_path / "teacher", layers=4))
    run = make_run(tmp_path / "run", story_rows(6))
    train_run(make_recipe("prune:2", teacher), run)
    assert AutoModelForCausalLM.from_pretrained(run.student).config.num_hidden_layers == 2
    assert AutoModelForCausalLM.from_pretrained(run.student_init).config.num_hidden_layers == 2
    assert json.loads(run.lineage.read_bytes())["train"]["initialised_from"] == teacher


def test_rows_too_long_are_refused_and_nothing_is_written(student: str, tmp_path: Path) -> None:
    rows = [*story_rows(6), kept_row(6, "Long?", "x" * 600)]
    run = make_run(tmp_path / "run", rows)
    # <start>user\nLong?<end>\n<start>assistant\n is 24 tokens, the answer 602
    with pytest.raises(
        DataError, match=r"1 of 7 rows are longer than .* 512 \(the longest, r6, has 626 tokens\); raise"
    ):
        train_run(make_recipe(student), run)
    assert not run.student.exists()
    assert not run.held_out.exists()


def test_rows_too_long_are_dropped_and_counted(student: str, tmp_path: Path) -> None:
    rows = [*story_rows(6), *(kept_row(n, f"Long {n}?", "x" * 600) for n in (6, 7))]
    run = make_run(tmp_path / "run", rows)
    accept = ["filters", "licence", "length"]
    train_run(make_recipe(student, too_long="drop", held_out=0.4, accept=accept), run)
    section = json.loads(run.lineage.read_bytes())["train"]
    assert section["too_long_dropped"] == 2
    assert section["rows"] + section["held_out"] == 6
    assert b"Long" not in run.held_out.read_bytes()


def test_runs_that_are_compared_hold_the_same_rows_out(student: str, tmp_path: Path) -> None:
    """The file takes the place of the share; another file is another training, the same one under another name not."""
    run, held_out = make_run(tmp_path / "run", story_rows(10)), tmp_path / "held.jsonl"
    mine = [kept_row(9, "Story 9?", "Another teacher's answer."), kept_row(20, "Story 20?", "Nobody trained on it.")]
    held_out.write_bytes(b"".join(map(encode_line, mine)))
    train_run(make_recipe(student, held_out_rows=str(held_out)), run)
    assert run.held_out.read_bytes() == held_out.read_bytes()
    section = json.loads(run.lineage.read_bytes())["train"]
    assert (section["rows"], section["held_out"], section["too_long_dropped"]) == (9, 2, 0)  # Story 9 is not trained on
    fingerprint = trained_from(run.student)
    renamed = held_out.rename(tmp_path / "renamed.jsonl")
    assert training_fingerprint(make_recipe(student, held_out_rows=str(renamed)), run) == fingerprint
    renamed.write_bytes(encode_line(mine[0]))
    assert training_fingerprint(make_recipe(student, held_out_rows=str(renamed)), run) != fingerprint


def test_a_finished_student_is_up_to_date_until_rows_or_settings_change(
    student: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", story_rows(6))
    weights = run.student / "model.safetensors"
    train_run(make_recipe(student), run)
    first = weights.stat().st_ino
    train_run(make_recipe(student, checkpoint_steps=7), run)  # changes no weight
    assert weights.stat().st_ino == first
    assert "the student is up to date" in " ".join(capsys.readouterr().err.split())
    train_run(make_recipe(student), run, again=True)
    forced = weights.stat().st_ino
    assert forced != first
    train_run(make_recipe(student, seed=1), run)
    assert weights.stat().st_ino != forced
    run.kept.write_bytes(make_run(tmp_path / "other", story_rows(7)).kept.read_bytes())
    train_run(make_recipe(student, seed=1), run)
    assert sum(json.loads(run.lineage.read_bytes())["train"][part] for part in ("rows", "held_out")) == 7


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
    student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", story_rows(8))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("train.trainer.Prepared.save", _interrupted)
        train_run(make_recipe(student), run)
    assert list((run.path / "training").glob("checkpoint-*"))
    fresh = make_run(tmp_path / "fresh", story_rows(8))
    train_run(make_recipe(student, learning_rate=5e-3), fresh)
    train_run(make_recipe(student, learning_rate=5e-3), run)
    assert "checkpoints of other rows or settings, removed" in " ".join(capsys.readouterr().err.split())
    assert losses(run) == losses(fresh)


def _interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_a_training_stopped_before_it_was_saved_is_not_trained_again(
    student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", story_rows(8))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("train.trainer.Prepared.save", _interrupted)
        train_run(make_recipe(student), run)
    torn = run.path / "training" / "checkpoint-99"  # killed while it was written
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"global_step": 9')
    monkeypatch.setattr("train.trainer.StudentTrainer.training_step", _interrupted)  # no step may be taken
    train_run(make_recipe(student), run)
    assert len(losses(run)) == len({entry["step"] for entry in log_of(run)["loss"]}) == 2
    assert math.isfinite(log_of(run)["eval"][-1]["loss"])


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
    with pytest.raises(DataError, match="check eos: 0 of 4 rows end with a stop token; row 1: the answer"):
        train_run(make_recipe(str(folder)), run)
    assert not run.student.exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_training_goes_on_where_it_was(student: str, tmp_path: Path) -> None:
    whole, killed = (make_run(tmp_path / name, story_rows(24)) for name in ("whole", "killed"))
    recipe = make_recipe(student, epochs=40, checkpoint_steps=4)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_defaults=True)))
    command = [sys.executable, "-m", "train", str(file), "--run"]
    subprocess.run([*command, str(whole.path)], check=True, capture_output=True)

    process = subprocess.Popen([*command, str(killed.path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list((killed.path / "training").glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not killed.student.exists()
    done = subprocess.run([*command, str(killed.path)], check=True, capture_output=True, text=True)
    assert "going on from step" in done.stderr
    assert losses(killed) == pytest.approx(losses(whole), rel=1e-5)
