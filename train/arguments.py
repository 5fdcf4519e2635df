"""What the trainers and PEFT are told, by the recipe: the same for all methods."""

import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

from pipeline.errors import RecipeError
from pipeline.train_config import TrainConfig
from train.machine import autocast
from train.progress import NEVER
from train.rates import epochs_of

# Their Mamba layers read the weights of `out_proj` past any adapter, and PEFT refuses one there.
MAMBA = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}


def lora_config(config: TrainConfig, model: Any) -> LoraConfig:
    """The adapter that the recipe asks for: on every linear layer but the output head (Dettmers et al. 2023).

    A mixture's experts are parameters of their own, whose adapters have no dropout in PEFT, so none has. Nor can they
    be DoRA: RecipeError.
    """
    size = {"r": config.lora_rank, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
    kind = {"use_rslora": config.rslora, "use_dora": config.dora}
    left_out = ["out_proj"] if model.config.model_type in MAMBA else freeze_images(model) or None
    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", exclude_modules=left_out, **size, **kind)
    convert_peft_config_for_transformers(adapter, model, None)  # names the experts, as PEFT does when it adds adapters
    if adapter.target_parameters:
        if config.dora:
            raise RecipeError(
                "train.dora true: PEFT has no such adapters for the experts of this student; leave it out"
            )
        adapter.lora_dropout = 0
    return adapter


def freeze_images(model: Any) -> list[str]:
    """Leaves out of the training what a model of text and images has beside its language model.

    No loss reaches it, and several processes would wait for its gradients. Returns the names of its layers.
    """
    if model.config.get_text_config() is model.config:
        return []
    text = [part for part in (model.get_decoder(), model.get_output_embeddings()) if part is not None]
    weights = {id(weight) for part in text for weight in part.parameters()}
    for weight in model.parameters():
        if id(weight) not in weights:
            weight.requires_grad_(False)
    layers = {id(layer) for part in text for layer in part.modules()}
    return [name for name, layer in model.named_modules() if id(layer) not in layers and not [*layer.children()]]


def training_arguments(config: TrainConfig, folder: Path, *, checkpointing: bool) -> dict[str, Any]:
    """What the trainers of all methods are told, as SFTConfig and DPOConfig take it, but for the warm-up."""
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder.parent / "tensorboard"))  # else beside checkpoints
    own_rate = config.learning_rate is None  # as a further method has
    return {
        **({} if own_rate else {"learning_rate": config.learning_rate}),
        "output_dir": str(folder.resolve()),  # the best checkpoint is found again from any folder
        "num_train_epochs": epochs_of(config),
        "lr_scheduler_type": "cosine",
        "gradient_checkpointing": checkpointing,
        "neftune_noise_alpha": config.neftune_alpha,
        "max_length": None,  # nothing is cut: rows that are too long are refused or dropped before
        "seed": config.seed,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": autocast(config.weights) is torch.bfloat16,
        "fp16": autocast(config.weights) is torch.float16,
        "save_strategy": "steps",
        "save_steps": NEVER,  # Milestones decides
        "eval_strategy": "steps",
        "eval_steps": NEVER,
        "save_total_limit": 2,  # the last and the best; with 1 the last would go when training ends
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would show NaN as 0
        "include_num_input_tokens_seen": "non_padding",
        "ddp_find_unused_parameters": False,  # all that is trained is used
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": True,
        "report_to": config.report_to or "none",
    }
