"""`benchmarks.gpu`, at tiny sizes on a CPU: rows, skipped and failed steps, what a share of the peak is."""

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, gpu_steps
from benchmarks.gpu_models import SHAPES, filled_tokenizer
from pipeline.errors import UsageError


def options(folder: Path, **changes: object) -> argparse.Namespace:
    given = {"out": str(folder), "work": str(folder), "small": True, "count": 2, "smollm2": "", "limit_s": 300}
    return argparse.Namespace(**given | changes)


def rows_of(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_each_step_leaves_its_rows_and_a_failed_one_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(gpu.STEPS, "unknown", iter)  # the process of the step does not know it
    monkeypatch.setattr("sys.argv", ["gpu", "--out", str(tmp_path), "--small", "--steps", "unknown,smollm2"])
    gpu.main()
    machine, failed, skipped = rows_of(tmp_path)
    assert machine["step"] == "machine" and machine["torch"] == version("torch")
    assert failed == {"step": "unknown", "error": "status 1: KeyError: 'unknown'"}
    assert skipped == {"step": "smollm2", "skipped": "--smollm2 FOLDER was not given"}
    assert "smollm2: --smollm2 FOLDER was not given" in capsys.readouterr().out.split("| step")[1]


def test_a_step_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    assert gpu.run_apart("card", options(tmp_path, limit_s=0.01), str(tmp_path), tmp_path) == "more than 0.01 s"


@pytest.mark.timeout(300)
def test_training_is_compared_with_sft_trainer(tmp_path: Path) -> None:
    gpu.run_step("full", options(tmp_path), tmp_path / "results.jsonl")
    ours, ratio, theirs, compiled, _ = rows_of(tmp_path)
    assert (ours["what"], theirs["what"], compiled["what"]) == ("ours", "SFTTrainer", "ours, compiled")
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.05)
    assert ours["loss"] == pytest.approx(compiled["loss"], rel=1e-3)
    assert f"{ours['tokens_per_s'] / theirs['tokens_per_s']:.2f} times" in ratio["note"]
    assert "| full SFTTrainer " in gpu.table(tmp_path / "results.jsonl")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_made_up_weights_are_served_and_timed(tmp_path: Path) -> None:
    for step in ("serving", "bench"):
        gpu.run_step(step, options(tmp_path), tmp_path / "results.jsonl")
    ours, vllms = rows_of(tmp_path)
    for case in ("8 tokens, seeds none", "8 tokens, seeds sent", "2 tokens, seeds none", "2 tokens, seeds sent"):
        assert f"{case}\n| side" in str(ours["note"])
    assert str(ours["note"]).count("client, auto") == 4
    assert "requests/s" in str(vllms["note"])


def test_an_unknown_step_and_a_missing_folder_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for given, message in (
        ([], "--out is missing"),
        (["--out", str(tmp_path), "--steps", "x"], "--steps x: there are"),
    ):
        monkeypatch.setattr("sys.argv", ["gpu", *given])
        with pytest.raises(UsageError, match=message):
            gpu.main()


def test_the_work_of_a_token_by_hand() -> None:
    weights = {
        "model.embed_tokens.weight": torch.zeros(10, 4),
        "model.layers.0.up.weight": torch.zeros(8, 4),
        "model.layers.0.up.lora_A.weight": torch.zeros(1, 4),
        "model.layers.0.norm.weight": torch.zeros(4),
    }
    model = SimpleNamespace(
        config=SimpleNamespace(vocab_size=10, hidden_size=4, num_hidden_layers=1), named_parameters=weights.items
    )
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}, {"input_ids": [1], "completion_mask": [1]}]
    trainer = SimpleNamespace(model=model, train_dataset=rows)
    # 4 tokens pass 32 weights, 2 completion tokens a head of 40; attention: 6 * 1 * 4 * (9 + 1)
    assert gpu_steps.flops_per_token(trainer, "full") == (6 * (4 * 32 + 2 * 40) + 240) / 4
    assert gpu_steps.flops_per_token(trainer, "lora") == (4 * (4 * 32 + 2 * 40) + 240) / 4


def test_the_peak_is_the_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_steps.peak_flops() is None
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert gpu_steps.peak_flops() == 989e12


def test_a_tokenizer_is_as_large_as_the_shape_says() -> None:
    tokenizer = filled_tokenizer(SHAPES["small"]["vocab_size"])
    assert len(tokenizer) == 2048
    assert len(tokenizer(" Toby the rabbit")["input_ids"]) == 3
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Toby"}], tokenize=False)
    assert chat == "<|im_start|>user\nToby<|im_end|>\n"


def test_published_shapes_have_the_published_parameters() -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with torch.device("meta"):
        found = [Qwen2ForCausalLM(Qwen2Config(**SHAPES[name])).num_parameters() for name in ("0.5b", "1.5b")]
    assert found == [494_032_768, 1_543_714_304]
