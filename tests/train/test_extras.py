"""Keys that are passed on to PEFT and TRL, rows without padding, and the learning rate if the recipe gives none."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pydantic import ValidationError
from rich.console import Console
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from pipeline.errors import RecipeError
from tests.tiny_student import log_of, make_recipe, make_run, story_rows
from train.batches import end_to_end
from train.machine import check_machine
from train.processes import ALONE
from train.rates import with_learning_rate
from train.rows import to_examples
from train.run import train_run
from train.setting import Setting
from train.student_trainer import check_rows_apart, completion_logits
from train.trainer import prepare

QUIET = Console(quiet=True)


@pytest.mark.parametrize(
    ("model", "train", "case", "rate"),
    [
        ("x/y", {"method": "lora"}, "adapters", 2e-4),
        ("x/y", {"method": "kd", "kd": {"weights": "qlora"}}, "adapters", 2e-4),
        ("x/y", {"method": "full"}, "all weights of a pretrained student", 2e-5),
        ("prune:4", {"method": "full"}, "all weights of a new or pruned student", 1e-3),
        ("new:30m", {"method": "full"}, "all weights of a new or pruned student", 1e-3),
        ("prune:4", {"method": "lora"}, "adapters", 2e-4),
        ("x/y", {"method": "full", "learning_rate": 5e-4}, None, 5e-4),
        ("x/y", {"method": "dpo"}, None, None),  # train.dpo has its own
    ],
)
def test_the_learning_rate_depends_on_method_and_student(
    model: str, train: dict[str, Any], case: str | None, rate: float | None
) -> None:
    recipe, found = with_learning_rate(make_recipe(model, **{"learning_rate": None} | train))
    assert (found, recipe.train.learning_rate) == (case, rate)


def test_the_log_and_the_lineage_say_which_default_was_used(student: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", story_rows(8))
    train_run(make_recipe(student, learning_rate=None, warmup=0), run)
    section, log = (json.loads(path.read_bytes()) for path in (run.lineage, run.student / "training_log.json"))
    assert log["loss"][0]["learning_rate"] == 2e-5 == section["train"]["hyperparameters"]["learning_rate"]
    assert log["learning_rate_default"] == "all weights of a pretrained student"
    assert section["train"]["learning_rate_default"] == log["learning_rate_default"]


def test_adapters_are_of_the_kind_that_the_recipe_names(student: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", story_rows(8))
    train_run(make_recipe(student, method="lora", lora_rank=4, rslora=True, dora=True, neftune_alpha=5), run)
    adapter = json.loads((run.student / "adapter_config.json").read_bytes())
    assert adapter["use_rslora"] and adapter["use_dora"]
    card = (run.student / "README.md").read_text()
    assert "| dora | True |" in card and "--enable-lora" not in card  # vLLM serves no such adapter


def test_neftune_makes_noise_while_training_only(student: str, tmp_path: Path) -> None:
    losses = {}
    for alpha in (None, 50):
        run = make_run(tmp_path / str(alpha), story_rows(8))
        train_run(make_recipe(student, neftune_alpha=alpha, learning_rate=1e-9), run)
        log = log_of(run)
        losses[alpha] = (log["loss"][0]["loss"], log["eval"][0]["loss"])
    assert abs(losses[50][0] - losses[None][0]) > 1e-3
    assert losses[50][1] == pytest.approx(losses[None][1], abs=1e-5)


def test_rows_end_to_end_have_the_losses_of_rows_with_padding(student: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(student)
    generator = torch.Generator().manual_seed(0)
    lengths = [9, 7, 4]
    batch = {name: torch.full((3, 9), fill) for name, fill in (("input_ids", 2), ("labels", -100))}
    batch["attention_mask"] = torch.zeros(3, 9, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids = torch.randint(3, 200, (length,), generator=generator)
        batch["input_ids"][row, :length], batch["attention_mask"][row, :length] = ids, 1
        batch["labels"][row, 2:length] = ids[2:]
    batch["labels"][2, :4] = batch["input_ids"][2, :4]  # a row that carries loss from its first token on
    flat = end_to_end(batch)
    assert flat["input_ids"].shape == (1, 20)
    assert flat["position_ids"].tolist() == [[*range(9), *range(7), *range(4)]]
    batch["labels"][:, 0] = -100  # no token before it predicts it
    losses = []
    for inputs in (batch, flat):
        logits, targets, _ = completion_logits(model, inputs)
        losses.append(cross_entropy(logits.float(), targets, reduction="sum").item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_trainer_lays_rows_end_to_end_if_it_is_told(
    student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = {"train": to_examples(story_rows(4)), "validation": to_examples(story_rows(1))}
    prepared = prepare(student, examples, Setting(make_recipe(student).train, tmp_path / "work", QUIET))
    trainer, losses = prepared.trainer, []
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    for flat in (False, True):
        trainer.end_to_end = flat
        losses.append(trainer.training_step(trainer.model, batch, (batch["labels"] != -100).sum()).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    trainer.apart = False  # as before the first step
    monkeypatch.setattr("train.student_trainer.ROUNDING", -1)  # no model keeps rows apart
    with pytest.raises(RecipeError, match=r"train\.padding_free true"):
        trainer.training_step(trainer.model, batch, 1)


TINY = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64} | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 16,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MAMBA = {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "config", "own", "apart"),
    [
        ("Llama", "LlamaConfig", {}, True),
        ("Mistral", "MistralConfig", {"sliding_window": 8}, True),
        ("Qwen3Moe", "Qwen3MoeConfig", {"head_dim": 16, **EXPERTS}, True),
        ("Qwen3_5", "Qwen3_5TextConfig", LINEAR, False),
        ("Bamba", "BambaConfig", MAMBA, False),
    ],
)
def test_a_student_that_mixes_rows_end_to_end_is_refused(
    name: str, config: str, own: dict[str, Any], apart: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    shape = getattr(transformers, config)(**TINY, num_hidden_layers=2, **own)
    model = getattr(transformers, f"{name}ForCausalLM")(shape).to(dtype).eval()
    refused = pytest.raises(
        RecipeError, match=r"train\.padding_free true: .* read on from one row into the next; leave"
    )
    with torch.no_grad(), nullcontext() if apart else refused:
        check_rows_apart(model, model.device)


def test_padding_free_needs_flash_attention() -> None:
    with pytest.raises(
        RecipeError, match=r"train.padding_free needs a GPU \(Ampere or newer\) and FlashAttention .*; leave it out"
    ):
        check_machine(make_recipe("x/y", padding_free=True).train, ALONE)


@pytest.mark.parametrize(
    ("train", "reason"),
    [
        ({"method": "kd", "padding_free": True}, "padding_free is not for method kd"),
        ({"padding_free": True, "neftune_alpha": 5}, "neftune_alpha would be weaker with padding_free"),
        ({"method": "full", "dora": True}, "rslora and dora are about adapters, and all weights are trained"),
        ({"method": "full", "neftune_alpha": 0}, "greater than 0"),
    ],
)
def test_keys_that_do_not_fit_are_refused(train: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        make_recipe("x/y", **train)
