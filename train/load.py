"""The student's weights and tokenizer in memory, in the format that it is trained in.

Importing this module imports torch, transformers, peft and trl.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from peft import prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import get_training_chat_template
from trl.chat_template_utils import is_chat_template_stop_token_trained

from pipeline.adapters import base_of, load_merged
from pipeline.errors import RecipeError
from pipeline.models import explained
from pipeline.train_config import TrainConfig
from train.arguments import freeze_images
from train.machine import flash_attention, weights_dtype
from train.student import load_tokenizer


def load_start(start: Path, dtype: torch.dtype) -> tuple[Any, torch.dtype]:
    """A student of ours as a whole model, and the dtype that it is stored in: an adapter is merged into its base.

    Raises UsageError if it cannot be loaded.
    """
    base = base_of(start)
    model, stored = load_merged(base or start, start if base else None)
    freeze_images(model.requires_grad_(True))  # PEFT froze all of the base
    return model.to(dtype), stored


def load_student(student: str, config: TrainConfig) -> tuple[Any, Any, torch.dtype]:
    """The model, its tokenizer, and the dtype that it is stored in. Raises RecipeError if it cannot be trained so."""
    tokenizer = load_tokenizer(student)
    if config.further:
        model, stored = load_start(Path(student), weights_dtype(config.weights))
        return model, tokenizer, stored
    if config.loss_on == "all":
        check_marks(tokenizer)
    dtype = weights_dtype(config.weights)
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )  # Dettmers et al. 2023
    quantised = {"quantization_config": four_bits} if config.weights == "qlora" else {}
    attention = {"attn_implementation": "flash_attention_2"} if flash_attention() else {}
    with explained(f"student.model: cannot load {student}"):
        stored = transformers.AutoConfig.from_pretrained(student).dtype or torch.float32
        model = AutoModelForCausalLM.from_pretrained(student, dtype=dtype, **quantised, **attention)
    if quantised:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    freeze_images(model)
    return model, tokenizer, stored


def check_marks(tokenizer: Any) -> None:
    """Raises RecipeError if neither the template nor TRL's version of it marks what the assistant says."""
    try:
        template = None if "generation %}" in tokenizer.chat_template else get_training_chat_template(tokenizer)
    except ValueError:
        template = ""
    if template == "" or not is_chat_template_stop_token_trained(tokenizer, template):
        raise RecipeError(
            "train.loss_on all: the student's chat template does not mark what the assistant says ({% generation %}), "
            "and TRL knows no version of it that does; use train.loss_on: last, or another student"
        )
