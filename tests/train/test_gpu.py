"""What training does on a GPU, as far as a machine without one can show it: plans, number formats, the fused head."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from evaluate.models import choose_precision
from pipeline.resources import half_dtype
from tests.tiny_student import make_recipe, story_rows, tiny_model
from train.arguments import training_arguments
from train.batches import end_to_end, split
from train.machine import (
    GPU_TOKENS,
    activation_bytes,
    autocast,
    flash_attention,
    free_beside,
    free_memory,
    micro_tokens,
    optimizer_bytes,
    peak_memory,
    precision,
    tokens_within,
    trained_in_float32,
    wants_compiling,
    weights_dtype,
)
from train.processes import ALONE, Processes
from train.rows import to_examples
from train.setting import Setting
from train.student_trainer import text_loss
from train.trainer import prepare

GIB = 1 << 30
# Per token: 2 bytes * (8 * 64 + 4 * 2 * 16 + 5 * 128) + 16 * 64 = 3,584 bytes a layer of all weights.
SHAPE = SimpleNamespace(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=1000,
)


def model(shape: Any = SHAPE, parameters: int = 1000) -> Any:
    config = SimpleNamespace(get_text_config=lambda: shape)
    tensors = [torch.zeros(parameters)]
    return SimpleNamespace(config=config, num_parameters=lambda: parameters, parameters=lambda: tensors)


def as_card(patch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    patch.setattr("torch.cuda.is_available", lambda: True)
    native = capability >= (8, 0)
    patch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    patch.setattr("torch.cuda.get_device_capability", lambda: capability)


def test_a_forward_pass_takes_the_tokens_that_its_room_holds() -> None:
    assert activation_bytes(SHAPE, 1, width=2, adapters=False, logits=0) == 2 * 3584
    assert tokens_within(10 * 7168 + 1, 7168) == 10
    assert tokens_within(-5, 7168) == 1  # one row is tried in any case
    assert tokens_within(1e15, 7168) == GPU_TOKENS


@pytest.mark.parametrize(
    ("train", "tokens"),
    [
        # 80% of 2 GiB, less 1 GiB for the head's tiles: 644,245,094 bytes
        ({"method": "full"}, (644_245_094 - 14 * 60_000_000 // 2) // 7168),  # 14 bytes for each of 30 million weights
        ({"method": "lora"}, 644_245_094 // (7168 + 2 * 6 * (6 * 64 + 128))),  # inputs of adapters, again
        ({"method": "kd"}, 644_245_094 // (7168 + 2 * 6 * (6 * 64 + 128) + 6 * 4 * 1000)),  # six times the logits
    ],
)
def test_a_gpu_is_planned_from_the_memory_that_is_free(
    monkeypatch: pytest.MonkeyPatch, train: dict[str, Any], tokens: int
) -> None:
    as_card(monkeypatch, (9, 0))
    monkeypatch.setattr("train.machine.GPU_TOKENS", 1_000_000)
    config = make_recipe("x/y", **train).train
    assert micro_tokens(model(parameters=30_000_000), config, 2 * GIB) == tokens


def test_a_cpu_is_planned_as_it_was() -> None:
    for vocabulary, method, tokens in ((49_152, "lora", 512), (151_936, "lora", 512), (151_936, "kd", 441)):
        shape = SimpleNamespace(vocab_size=vocabulary)
        assert micro_tokens(model(shape), make_recipe("x/y", method=method).train, 1 << 50) == tokens


def test_a_gpu_with_a_student_of_unknown_shape_is_planned_by_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    as_card(monkeypatch, (9, 0))
    tokens = micro_tokens(model(SimpleNamespace(vocab_size=151_936)), make_recipe("x/y", method="kd").train, 1 << 50)
    assert tokens == 441  # 1 GiB of them


def test_a_containers_limit_is_all_the_memory_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.machine.free_bytes", lambda root: 7, raising=False)
    assert free_memory() == 7


def test_models_that_wait_to_be_moved_are_not_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.machine.free_memory", lambda: 100_000)
    assert free_beside(model(), model(parameters=500)) == 100_000
    as_card(monkeypatch, (9, 0))
    assert free_beside(model(), model(parameters=500)) == 100_000 - 4 * 1500
    assert free_beside(model(), shards=4) == 100_000 - 1000


@pytest.mark.parametrize(("flag", "stored"), [("bf16", torch.bfloat16), ("asimd", torch.float32)])
def test_a_base_on_an_arm_cpu_is_in_bfloat16_if_the_cpu_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, flag: str, stored: torch.dtype
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("pipeline.resources.read_or_empty", lambda path: f"Features\t: fp {flag}\n")
    assert weights_dtype("lora") is stored


@pytest.mark.parametrize(
    ("capability", "method", "stored", "cast", "said"),
    [
        ((9, 0), "full", torch.float32, torch.bfloat16, "float32 weights, bfloat16 autocast"),
        ((8, 0), "lora", torch.bfloat16, torch.bfloat16, "bfloat16 weights, bfloat16 autocast"),
        ((7, 5), "full", torch.float32, torch.float16, "float32 weights, float16 autocast with loss scaling"),
        ((7, 5), "qlora", torch.float16, torch.float16, "float16 weights, float16 autocast with loss scaling"),
    ],
)
def test_a_card_without_bfloat16_trains_in_float16_with_loss_scaling(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capability: tuple[int, int],
    method: str,
    stored: torch.dtype,
    cast: torch.dtype,
    said: str,
) -> None:
    as_card(monkeypatch, capability)
    config = make_recipe("x/y", method=method).train
    assert (weights_dtype(config.weights), autocast(config.weights), precision(config.weights)) == (stored, cast, said)
    assert half_dtype() == cast  # of a teacher, too
    assert choose_precision([]) == (str(cast).removeprefix("torch."), "cuda")  # of the evaluation, too
    told = training_arguments(config, tmp_path, checkpointing=False)
    assert (told["fp16"], told["bf16"]) == (cast is torch.float16, cast is torch.bfloat16)
    assert optimizer_bytes(model(), config) == (14_000 if method == "full" else 0)


def test_what_float16_trains_is_kept_in_float32() -> None:
    adapter, frozen = (
        torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16), requires_grad=on) for on in (True, False)
    )
    trained_in_float32(SimpleNamespace(parameters=lambda: [adapter, frozen]))
    assert (adapter.dtype, frozen.dtype) == (torch.float32, torch.bfloat16)


def test_flash_attention_is_for_cards_that_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.machine.find_spec", lambda name: object())
    assert not flash_attention()
    as_card(monkeypatch, (7, 5))
    assert not flash_attention()
    as_card(monkeypatch, (8, 0))
    assert flash_attention()
    monkeypatch.setattr("train.machine.find_spec", lambda name: None)
    assert not flash_attention()


def test_peak_memory_is_the_gpus_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_memory() > 64 << 20  # torch alone
    as_card(monkeypatch, (9, 0))
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: 12_345)
    assert peak_memory() == 12_345


def test_a_long_training_on_a_gpu_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def wants(rows: int, processes: Processes = ALONE, **train: object) -> bool:
        return wants_compiling(make_recipe("student", batch_size=4, epochs=2, **train).train, rows, processes)

    assert not wants(10_000) and wants(1, compile=True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert wants(2000) and not wants(1999)  # 1,000 steps of 4 rows, in two epochs
    assert wants(2000, method="full") and not wants(2000, compile=False)
    assert not wants(2000, method="qlora") and not wants(2000, method="on_policy")
    assert not wants(2000, Processes(rank=0, count=2, sharded=True))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_compiled_layers_have_the_loss_and_gradients_of_plain_ones(tmp_path: Path, method: str) -> None:
    student = str(tiny_model(tmp_path / "student", layers=2))
    examples = {"train": to_examples(story_rows(6)[2:]), "validation": to_examples(story_rows(2))}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = []
    for compile in (False, True):
        config = make_recipe(student, method=method, lora_dropout=0, compile=compile).train
        trainer = prepare(
            student, examples, Setting(config, tmp_path / "work", Console(stderr=True, quiet=True))
        ).trainer
        batch = next(iter(trainer.get_train_dataloader()))
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=(batch["labels"] != -100).sum())
        loss.backward()
        trained = [weights.grad.flatten().float() for weights in trainer.model.parameters() if weights.requires_grad]
        found.append((loss.item(), torch.cat(trained), trainer.evaluate()["eval_loss"]))
    (loss, gradient, scored), (compiled_loss, compiled_gradient, compiled_scored) = found
    assert (compiled_loss, compiled_scored) == pytest.approx((loss, scored), rel=1e-2)  # 16 bits round in another order
    assert torch.nn.functional.cosine_similarity(gradient, compiled_gradient, dim=0) > 0.99
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 2  # one to train and one to score: the layers share them, the first of an adapter's too


@pytest.mark.parametrize(("architecture", "masked"), [("llama", False), ("mixtral", True)])
def test_attention_needs_no_mask_for_padding_on_the_right(tmp_path: Path, architecture: str, masked: bool) -> None:
    """Each row has the loss that it has alone. A router would count the padding, so it is masked."""
    student = str(tiny_model(tmp_path / "student", layers=2, architecture=architecture))
    examples = {"train": to_examples(story_rows(6)[2:]), "validation": to_examples(story_rows(2))}
    torch.backends.cuda.enable_cudnn_sdp(True)
    config = make_recipe(student, method="full").train
    trainer = prepare(student, examples, Setting(config, tmp_path, Console(quiet=True))).trainer
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    batch, model = next(iter(trainer.get_train_dataloader())), trainer.model.eval()
    assert not batch["attention_mask"].all()
    given: list[bool] = []
    model.register_forward_pre_hook(lambda _, __, named: given.append("attention_mask" in named), with_kwargs=True)
    with torch.no_grad():
        together, tokens, _ = text_loss(model, batch)
        alone = [text_loss(model, row)[:2] for row in split(batch, tokens=1)]
    assert together.item() == pytest.approx(sum(loss.item() for loss, _ in alone), rel=1e-5)
    assert tokens == sum(count for _, count in alone)
    assert given == [masked] * (1 + len(alone))


@pytest.mark.parametrize(
    ("architecture", "method", "flat"),
    [("llama", "full", False), ("qwen2", "lora", False), ("mixtral", "full", False), ("llama", "full", True)],
)
def test_the_fused_head_has_the_losses_and_gradients_of_the_plain_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    architecture: str,
    method: str,
    flat: bool,
) -> None:
    student = str(tiny_model(tmp_path / "student", layers=1, architecture=architecture))
    examples = {"train": to_examples(story_rows(6)[2:]), "validation": to_examples(story_rows(2))}
    config = make_recipe(student, method=method, lora_dropout=0).train
    monkeypatch.setattr("train.machine.half_dtype", lambda: None)  # float32: nothing is rounded
    trainer = prepare(
        student, examples, Setting(config, tmp_path / "work", Console(stderr=True, soft_wrap=True))
    ).trainer
    assert "float32 weights; attention: sdpa; 512 tokens per forward pass, at most\n" in capsys.readouterr().err
    batch = next(iter(trainer.get_train_dataloader()))
    batch = end_to_end(batch) if flat else batch
    tokens = (batch["labels"] != -100).sum()
    calls, original = [], trainer.model.get_output_embeddings().forward
    monkeypatch.setattr(trainer.model.get_output_embeddings(), "forward", lambda x: calls.append(1) or original(x))
    found = []
    for fused in (False, True):
        monkeypatch.setattr("train.student_trainer.has_fused_head", lambda device, fused=fused: fused)
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=tokens)
        loss.backward()
        trained = [weights.grad.flatten() for weights in trainer.model.parameters() if weights.requires_grad]
        found.append((loss.item(), torch.cat(trained), trainer.evaluate()["eval_loss"]))
    (loss, gradient, scored), (fused_loss, fused_gradient, fused_scored) = found
    assert (fused_loss, fused_scored) == pytest.approx((loss, scored), rel=1e-5)
    assert gradient.abs().max() > 0
    torch.testing.assert_close(fused_gradient, gradient, rtol=1e-4, atol=1e-6)
    assert len(calls) == 2  # the plain head, in training and in evaluation: the fused one uses its weights alone
