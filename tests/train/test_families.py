"""Students of other families than Llama and Qwen2.5: tiny models with random weights, trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file

from evaluate.models import Subject, load
from pipeline.adapters import load_merged
from pipeline.errors import RecipeError
from pipeline.students import after_training, before_training
from tests.tiny_student import SHAPE, losses, make_recipe, make_run, saved, story_rows, tiny_model, tiny_tokenizer
from train.load import load_start
from train.rows import to_examples
from train.run import train_run
from train.setting import Setting
from train.student import initial_student, layers_kept
from train.trainer import prepare

QUIET = Console(quiet=True)

TEXT = SHAPE | {"head_dim": 16}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def text_and_images(kind: str, vision: dict[str, Any], **text: Any) -> Any:
    """The configuration of a Gemma that reads images, too: `AutoModelForCausalLM` loads it whole."""
    shape = {**TEXT, **LAYERS, **text}
    return transformers.AutoConfig.for_model(kind, text_config=shape, vision_config={**VISION, **vision})


def gemma3() -> Any:
    return text_and_images("gemma3", {"image_size": 28, "patch_size": 14}, model_type="gemma3_text")


def gemma4() -> Any:
    own = {"hidden_size_per_layer_input": 0, "global_head_dim": 16, "num_kv_shared_layers": 0}
    return text_and_images("gemma4", {"num_key_value_heads": 2, "head_dim": 16}, model_type="gemma4_text", **own)


def falcon_h1() -> Any:
    mamba = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128, "mamba_d_state": 16, "mamba_n_groups": 1}
    return transformers.FalconH1Config(**TEXT, **mamba)


@pytest.mark.parametrize(("method", "template"), [("full", None), ("lora", "chatml")])
def test_a_student_for_images_is_saved_with_what_prepares_them(
    tmp_path: Path, method: str, template: str | None
) -> None:
    base, run = saved(gemma3(), tmp_path / "base"), make_run(tmp_path / "run", story_rows(10))
    (base / "processor_config.json").write_text('{"processor_class": "Gemma3Processor"}')
    recipe = make_recipe(str(base), method=method)
    assert recipe.student
    recipe = recipe.model_copy(update={"student": recipe.student.model_copy(update={"chat_template": template})})
    train_run(recipe, run)
    served = {before_training(recipe, run), after_training(recipe, run)}
    assert len(served) == 2
    for folder in served:
        assert (folder / "processor_config.json").read_text() == (base / "processor_config.json").read_text()


@pytest.mark.parametrize("config", [gemma3, gemma4])
def test_the_text_of_a_model_for_images_is_trained(tmp_path: Path, config: Any) -> None:
    run = make_run(tmp_path / "run", story_rows(10))
    train_run(make_recipe(str(saved(config(), tmp_path / "student")), epochs=2), run)
    assert losses(run)[-1] < losses(run)[0]


def test_adapters_of_a_mixture_are_on_its_experts_too(tmp_path: Path) -> None:
    student = tiny_model(tmp_path / "student", architecture="mixtral")
    run = make_run(tmp_path / "run", story_rows(10))
    with pytest.raises(RecipeError, match=r"train\.dora true: PEFT has no such adapters for the experts"):
        train_run(make_recipe(str(student), method="lora", dora=True), run)
    train_run(make_recipe(str(student), method="lora", learning_rate=1e-2, epochs=2), run)
    assert losses(run)[-1] < losses(run)[0]
    (before, _), (after, _) = load_merged(student, None), load_merged(student, run.student)
    moved = {name for name, value in after.named_parameters() if not torch.equal(value, before.get_parameter(name))}
    assert {"model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.self_attn.q_proj.weight"} <= moved


def test_adapters_leave_out_what_mamba_layers_read_past_them(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", story_rows(10))
    train_run(make_recipe(str(saved(falcon_h1(), tmp_path / "student")), method="lora", learning_rate=1e-2), run)
    assert losses(run)[-1] < losses(run)[0]
    adapted = {name.split(".")[-3] for name in load_file(run.student / "adapter_model.safetensors")}
    assert adapted >= {"in_proj", "q_proj", "down_proj"} and "out_proj" not in adapted


def test_a_mistral_with_two_tokenizers_has_the_one_with_a_chat_template(tmp_path: Path) -> None:
    student = saved(transformers.MistralConfig(**TEXT), tmp_path / "student")
    # Mistral's own, which transformers reads where mistral-common is installed.
    (student / "tekken.json").write_text("{}")
    run, recipe = make_run(tmp_path / "run", story_rows(10)), make_recipe(str(student))
    train_run(recipe, run)
    before = Subject("student_before", "before", "", student)
    assert load(before, dtype="float32", device="cpu")[1].chat_template == tiny_tokenizer().chat_template


def smollm3() -> Any:
    return transformers.SmolLM3Config(**SHAPE | {"num_hidden_layers": 4})  # the last one has no rotary embedding


@pytest.mark.parametrize(("config", "k"), [(gemma3, 1), (falcon_h1, 1), (smollm3, 2)])
def test_layers_of_a_teacher_answer_as_they_do_in_it(tmp_path: Path, config: Any, k: int) -> None:
    teacher_folder, run = saved(config(), tmp_path / "teacher"), make_run(tmp_path / "run", [])
    folder = initial_student(make_recipe(f"prune:{k}", str(teacher_folder)), run)
    student, teacher = map(transformers.AutoModelForCausalLM.from_pretrained, (folder, teacher_folder))
    decoder, total = teacher.get_decoder(), teacher.config.get_text_config().num_hidden_layers
    decoder.layers = torch.nn.ModuleList(decoder.layers[index] for index in layers_kept(total, k))
    decoder.config.num_hidden_layers = k
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        found, expected = (model(input_ids=ids, use_cache=False).logits for model in (student, teacher))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_reads_images_is_not_trained(tmp_path: Path, method: str) -> None:
    """With several processes DDP would wait for gradients that never come."""
    rows = {part: to_examples(story_rows(4)) for part in ("train", "validation")}
    config = make_recipe("x", method=method).train
    model = prepare(str(saved(gemma3(), tmp_path / "student")), rows, Setting(config, tmp_path, QUIET)).trainer.model
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained and all(".language_model." in name for name in trained)


def test_what_reads_images_is_not_trained_either_where_a_student_is_trained_further(tmp_path: Path) -> None:
    model, _ = load_start(saved(gemma3(), tmp_path / "student"), torch.float32)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained and all(".language_model." in name for name in trained)
