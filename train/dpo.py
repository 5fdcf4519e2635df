"""Direct preference optimisation of a student that learned from answers, by TRL's DPOTrainer.

    Rafailov et al. 2023, https://arxiv.org/abs/2305.18290

Reads the student's folder and pairs; keeps checkpoints in the folder it is given. The reference is the student as it
was at the start. Importing this module imports torch, transformers, peft and trl.
"""

import os
from pathlib import Path

import datasets
from trl import DPOConfig, DPOTrainer

from pipeline.recipe import Recipe
from train.arguments import lora_config, training_arguments
from train.load import load_start
from train.machine import (
    check_machine,
    free_beside,
    micro_rows,
    micro_tokens,
    plain_attention,
    wants_checkpointing,
    weights_dtype,
)
from train.preferences import Pairs, to_pair
from train.prepared import Prepared, quiet, ready
from train.setting import Setting
from train.student import load_tokenizer


def prepare_dpo(start: Path, pairs: Pairs, recipe: Recipe, setting: Setting) -> Prepared:
    """Loads the student that the training starts from, and tokenises the pairs by its chat template.

    An adapter is merged into its base: what is trained, and saved, is a whole model. Pairs of which an answer is longer
    than `max_length` are left out. Raises RecipeError, UsageError or DistillError, as train.trainer.prepare does.
    """
    config, processes = setting.config, setting.processes
    os.environ.setdefault("TQDM_DISABLE", "1")
    check_machine(config, processes)
    plain_attention()
    with quiet():
        tokenizer = load_tokenizer(str(start))
        model, dtype = load_start(start, weights_dtype(config.weights))
        free = free_beside(model)
        tokens, longest = micro_tokens(model, config, free), 2 * config.max_length
        micro, passes = micro_rows(config, len(pairs["train"]), tokens, longest, processes)  # pairs
        checkpointing = wants_checkpointing(model, config, micro * longest, free, setting.console)
        arguments = training_arguments(config, setting.folder, checkpointing=checkpointing) | {
            "learning_rate": config.dpo.learning_rate,
            "per_device_train_batch_size": micro,
            "per_device_eval_batch_size": micro,
            "gradient_accumulation_steps": passes,
            "data_seed": config.seed,  # the order of the pairs: the same after an interrupt
        }
        shaped = {part: [to_pair(pair, recipe) for pair in own] for part, own in pairs.items()}
        trainer = DPOTrainer(
            model=model,
            args=DPOConfig(**arguments, beta=config.dpo.beta, precompute_ref_log_probs=True),  # no second model stays
            train_dataset=datasets.Dataset.from_list(shaped["train"], on_mixed_types="use_json"),
            eval_dataset=datasets.Dataset.from_list(shaped["validation"], on_mixed_types="use_json"),
            processing_class=tokenizer,
            peft_config=None if config.weights == "full" else lora_config(config, model),
        )
    return ready(trainer, dtype, setting)
