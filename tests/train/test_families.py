"""Students of other families than Llama and Qwen2.5: tiny models with random weights, trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.tiny_student import END, START, losses, make_recipe, make_run, story_rows, tiny_tokenizer
from train.run import train_run

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": START,
    "eos_token_id": END,
    "pad_token_id": END,
}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def text_and_images(kind: str, vision: dict[str, Any], **text: Any) -> Any:
    """The configuration of a Gemma that reads images, too: `AutoModelForCausalLM` loads it whole."""
    shape = {**SHAPE, **LAYERS, "vocab_size": len(tiny_tokenizer()), **text}
    return transformers.AutoConfig.for_model(kind, text_config=shape, vision_config={**VISION, **vision})


def gemma3() -> Any:
    return text_and_images("gemma3", {"image_size": 28, "patch_size": 14}, model_type="gemma3_text")


def gemma4() -> Any:
    own = {"hidden_size_per_layer_input": 0, "global_head_dim": 16, "num_kv_shared_layers": 0}
    return text_and_images("gemma4", {"num_key_value_heads": 2, "head_dim": 16}, model_type="gemma4_text", **own)


def saved(config: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("config", [gemma3, gemma4])
def test_the_text_of_a_model_for_images_is_trained(tmp_path: Path, config: Any) -> None:
    run = make_run(tmp_path / "run", story_rows(10))
    train_run(make_recipe(str(saved(config(), tmp_path / "student")), epochs=2), run)
    assert losses(run)[-1] < losses(run)[0]
