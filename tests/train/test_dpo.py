"""Preferences after answers: what is read, where it starts, what is learned, and going on after an interrupt."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.errors import DataError, UsageError
from pipeline.records import Message, Preference, encode_line
from pipeline.rundir import RunDir
from pipeline.students import trained_section
from tests.tiny_student import kept_row, log_of, make_recipe, make_run, story_rows, tiny_model
from train.load import load_start
from train.preferences import read_pairs, start_of
from train.record import training_fingerprint
from train.rows import read_parts
from train.run import train_run


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Stored in bfloat16, as most are."""
    folder = tiny_model(tmp_path_factory.mktemp("models") / "student")
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return str(folder)


def recipe(student: str, **train: Any) -> Any:
    dpo = {"learning_rate": 5e-3, "epochs": 2, "beta": 0.5} | train.pop("dpo", {})
    return make_recipe(student, dpo=dpo, **{"max_length": 128, **train})


def write_pairs(run: RunDir, count: int) -> None:
    """To each story's question, an answer that barks is better than one that meows."""
    turns = [
        {"prompt": [Message("user", f"Story {n}?")], "chosen": [Message("assistant", f"The dog barks {n}.")],
         "rejected": [Message("assistant", f"The cat meows {n}.")]}
        for n in range(count)
    ]  # fmt: skip
    run.preferences.write_bytes(b"".join(encode_line(Preference(id=f"p{n}", **own)) for n, own in enumerate(turns)))


@pytest.fixture
def run(student: str, tmp_path: Path) -> RunDir:
    """A run with a student that learned from answers, and with preferences."""
    found = make_run(tmp_path / "run", story_rows(12))
    train_run(recipe(student, method="full", learning_rate=1e-2), found)
    write_pairs(found, 12)
    return found


def preference(folder: Path, run: RunDir) -> float:
    """How much likelier the better answer is than the worse, in nats, over all pairs."""
    model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    model = model.float()
    total = 0.0
    for line in run.preferences.read_bytes().splitlines():
        pair = json.loads(line)
        for name, sign in (("chosen", 1), ("rejected", -1)):
            ids = tokenizer.apply_chat_template([*pair["prompt"], *pair[name]], return_tensors="pt", return_dict=True)
            with torch.no_grad():
                scores = model(**ids).logits[0, :-1].log_softmax(-1)
            total += sign * scores.gather(1, ids["input_ids"][0, 1:, None]).sum().item()
    return total


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_the_student_comes_to_prefer_the_better_answers(student: str, run: RunDir, weights: str) -> None:
    train_run(recipe(student, method="dpo", dpo={"weights": weights}), run)
    log = log_of(run)
    assert log["loss"][0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # ln 2: the student is the reference
    assert log["loss"][-1]["loss"] < 0.6 and 0 < log["margin"][0] < log["margin"][-1]
    assert preference(run.student, run) > preference(run.student_sft, run) + 5
    assert not (run.student / "adapter_config.json").exists()  # a whole model, with or without adapters in training
    before, after = (json.loads((f / "config.json").read_bytes())["dtype"] for f in (run.student_sft, run.student))
    assert before == after == "bfloat16"
    section = trained_section(run.student)
    assert (section["method"], section["weights"], section["start"]["method"]) == ("dpo", "full", "full")
    assert section["start"]["rows"] == 10
    card = (run.student / "README.md").read_text()
    assert "| method | dpo |" in card and "'beta': 0.5" in card and "base_model_relation: finetune" in card


def test_an_adapter_is_merged_and_the_start_is_found_again(student: str, tmp_path: Path, capsys: Any) -> None:
    run = make_run(tmp_path / "run", story_rows(8))
    answers = recipe(student, method="lora", learning_rate=2e-2)
    pairs = recipe(student, method="dpo", dpo={"weights": "full"})
    train_run(answers, run)
    taught = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32), run.student)
    start, _ = load_start(run.student, torch.float32)
    with torch.no_grad():
        of_start, of_taught = (model.eval()(torch.arange(3, 40)[None]).logits for model in (start, taught))
        torch.testing.assert_close(of_start, of_taught, rtol=1e-4, atol=1e-4)
        with taught.disable_adapter():
            assert not torch.allclose(taught(torch.arange(3, 40)[None]).logits, of_taught, atol=1e-2)
    write_pairs(run, 8)
    train_run(pairs, run)
    assert (run.student_sft / "adapter_config.json").exists() and (run.student / "model.safetensors").exists()
    log = log_of(run)
    assert log["loss"][0]["loss"] == pytest.approx(0.6931472, abs=1e-5)  # the reference is the base with its adapter
    train_run(pairs, run)
    assert "the student is up to date" in " ".join(capsys.readouterr().err.split())
    write_pairs(run, 7)
    train_run(pairs, run)  # from student-sft again, not from the student that has the preferences
    assert trained_section(run.student)["start"] == trained_section(run.student_sft)
    assert training_fingerprint(pairs, run, run.student) != training_fingerprint(pairs, run, run.student_sft)
    train_run(answers, run)
    assert not run.student_sft.exists() and start_of(pairs, run) == run.student


def test_an_interrupted_training_goes_on_with_the_same_losses(
    student: str, run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = {"start": str(run.student), "method": "dpo", "checkpoint_steps": 1}
    whole, broken = (make_run(tmp_path / name, story_rows(12)) for name in ("whole", "broken"))
    for each in (whole, broken):
        write_pairs(each, 12)
    train_run(recipe(student, **start), whole)

    from trl import DPOTrainer

    steps, step = [], DPOTrainer.training_step

    def stopping(self: Any, *given: Any, **more: Any) -> Any:
        steps.append(self.state.global_step)
        if len(steps) == 8:  # two of these make a step
            raise KeyboardInterrupt
        return step(self, *given, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DPOTrainer, "training_step", stopping)
        train_run(recipe(student, **start), broken)
    train_run(recipe(student, **start), broken)
    assert steps[-1] > 0
    first, second = (log_of(each) for each in (whole, broken))
    for name in ("loss", "eval"):
        found = [[entry["loss"] for entry in log[name]] for log in (first, second)]
        assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_pairs_of_test_prompts_are_left_out_and_validation_prompts_validate(student: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", story_rows(30))
    write_pairs(run, 30)
    recipe_ = recipe(student, method="dpo", validation=0.2, test=0.3)
    parts = read_parts(recipe_, run)
    pairs = read_pairs(recipe_, run, parts)
    for part in ("train", "validation"):
        rows = getattr(parts, part)
        assert {pair.prompt[0].content for pair in pairs[part]} == {row.messages[0].content for row in rows}
    few = recipe(student, method="dpo")  # one prompt validates: without a pair of its own, another takes its place
    parts = read_parts(few, run)
    pairs = read_pairs(few, run, parts)
    assert [len(pairs[part]) for part in ("train", "validation")] == [28, 1]
    assert pairs["validation"][0].prompt == parts.validation[0].messages
    assert parts.test[0].messages not in [pair.prompt for pair in pairs["train"]]
    run.preferences.write_bytes(b"".join(run.preferences.read_bytes().splitlines(keepends=True)[:4]))
    pairs = read_pairs(few, run, parts)
    assert len(pairs["validation"]) == 1 and len(pairs["train"]) in (2, 3)


def test_pairs_of_a_group_stay_together(student: str, tmp_path: Path) -> None:
    """Thirty prompts of six groups; no pair is of the validation part, so a whole group moves there."""
    rows = [msgspec.structs.replace(row, columns={"kind": n % 6}) for n, row in enumerate(story_rows(30))]
    run = make_run(tmp_path / "run", rows)
    write_pairs(run, 30)
    few = recipe(student, method="dpo")
    few = few.model_copy(update={"prompts": few.prompts.model_copy(update={"file": Path("x.jsonl"), "group": "kind"})})
    parts = read_parts(few, run)
    kinds = {row.messages[0].content: row.columns["kind"] for row in rows}
    validated = {row.messages[0].content for row in parts.validation}
    lines = run.preferences.read_bytes().splitlines(keepends=True)
    run.preferences.write_bytes(b"".join(line for line in lines if not any(t in line.decode() for t in validated)))
    pairs = read_pairs(few, run, parts)
    found = {part: {kinds[pair.prompt[0].content] for pair in pairs[part]} for part in ("train", "validation")}
    assert len(found["validation"]) == 1 and len(found["train"]) == 3 and not found["train"] & found["validation"]
    assert len(pairs["validation"]) == 5


def test_pairs_of_a_group_that_is_tested_on_are_left_out(student: str, tmp_path: Path) -> None:
    rows = [msgspec.structs.replace(row, columns={"kind": n % 6}) for n, row in enumerate(story_rows(30))]
    run = make_run(tmp_path / "run", rows)
    write_pairs(run, 30)
    given = tmp_path / "given.jsonl"
    given.write_bytes(encode_line(msgspec.structs.replace(kept_row(99, "Another way", "x"), columns={"kind": 3})))
    few = recipe(student, method="dpo", test_rows=str(given))
    few = few.model_copy(update={"prompts": few.prompts.model_copy(update={"file": Path("x.jsonl"), "group": "kind"})})
    pairs = read_pairs(few, run, read_parts(few, run))
    asked = {pair.prompt[0].content for part in pairs.values() for pair in part}
    assert len(asked) >= 20 and not asked & {row.messages[0].content for row in rows if row.columns["kind"] == 3}


def test_what_is_missing_or_does_not_fit_is_named(student: str, tmp_path: Path) -> None:
    run, dpo = make_run(tmp_path / "run", story_rows(6)), recipe(student, method="dpo")
    with pytest.raises(UsageError, match=r"student-sft: no student to start from; train.method dpo follows another"):
        train_run(dpo, run)
    train_run(recipe(student, method="full"), run)
    with pytest.raises(
        DataError, match=r"preferences\.jsonl: no such file; .* set filters.preferences, which is 0, to 1"
    ):
        train_run(dpo, run)
    run.preferences.write_bytes(b"")
    with pytest.raises(DataError, match="no pair is left to train on: sample more answers"):
        train_run(dpo, run)
    write_pairs(run, 6)
    with pytest.raises(DataError, match=r"check length: 5 of 5 rows are longer than train.max_length 8"):
        train_run(recipe(student, method="dpo", max_length=8), run)
    for setting in ({"loss_on": "all"}, {"reasoning": "keep"}):
        with pytest.raises(ValueError, match="is not for method dpo"):
            recipe(student, method="dpo", **setting)
    (run.student / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"run/student: cannot load "):
        train_run(dpo, run)
