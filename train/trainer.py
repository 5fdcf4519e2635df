"""From rows to a trained model: TRL's SFTTrainer, set up for this machine and this recipe.

Reads a model and rows; keeps checkpoints in the folder it is given. What becomes of the trained model is train.run's
business. Importing this module imports torch, transformers, peft and trl.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import psutil
import torch
import transformers
from peft import LoraConfig
from rich.console import Console
from transformers import AutoModelForCausalLM, PrinterCallback
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices
from trl import SFTConfig, SFTTrainer

from pipeline.errors import DistillError, RecipeError, first_line
from pipeline.recipe import TrainConfig
from train.progress import Milestones, TrainProgress
from train.student import load_tokenizer
from train.tokens import LabelFaults, check_batch, count_faults, differing_prompts, stop_tokens

LORA_TARGETS = "all-linear"  # every linear layer but the output head (Dettmers et al. 2023)
ADAMW_BYTES = 12  # a trained parameter: gradient and two moments, in float32
GIB = 1 << 30
ROUNDING_LOSS = 0.01  # nats a token: 1% of perplexity, that storing a model in its own dtype may cost


class EpochSampler(LengthGroupedSampler):
    """Rows of about one length side by side, shuffled by the seed and the epoch alone.

    The library's sampler draws from torch's global generator, whose state at the start of an epoch is gone when a
    training resumes in its middle: the rest of the epoch would then repeat some rows and miss others.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


class StudentTrainer(SFTTrainer):
    """SFTTrainer with a data order that survives a resume."""

    def _get_train_sampler(self, train_dataset: datasets.Dataset | None = None) -> EpochSampler:
        rows = self.train_dataset if train_dataset is None else train_dataset
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return EpochSampler(step, [len(ids) for ids in rows["input_ids"]], self.args.seed)


@dataclass(frozen=True)
class Examples:
    """Prompt-completion rows (train.rows.to_examples) by what they are for."""

    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]


@dataclass(frozen=True)
class Prepared:
    """A trainer whose rows are tokenised, and what their tokens say."""

    trainer: StudentTrainer
    tokenizer: Any
    train_rows: list[int]  # indices into Examples.train that are not too long
    held_out_rows: list[int]
    lengths: dict[str, list[int]]  # tokens of every row, the too long ones too; keys: train, held_out
    faults: LabelFaults  # of the rows that are not too long
    differing: int  # training rows whose context is not the one that is asked for
    dtype: torch.dtype  # the student's own, as it was stored
    precision: str  # that of the training, for the lineage

    def fit(self, checkpoint: Path | None) -> None:
        """Trains, or goes on from a checkpoint. Raises DistillError when memory runs out."""
        progress = next(c for c in self.trainer.callback_handler.callbacks if isinstance(c, TrainProgress))
        try:
            with _quiet():
                self.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
                raise DistillError(
                    "out of memory while training; lower train.micro_batch_size, set train.gradient_checkpointing: "
                    "true, or use train.method: lora; the same command goes on from the last checkpoint"
                ) from None
            raise
        finally:
            progress.close()

    def save(self, folder: Path, console: Console) -> None:
        """Writes the model (full) or the adapter (lora), the tokenizer and the chat template.

        A model is stored in the dtype it came in, so that before and after are of one size; unless rounding to it
        would undo what was learned, which happens where few steps of a low learning rate moved the weights too little.
        """
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        with _quiet():
            if (
                not hasattr(model, "peft_config")
                and self.dtype != model.dtype
                and self._survives_rounding(model, console)
            ):
                model = model.to(self.dtype)
            model.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's card of blanks, with a path of this machine
        self.tokenizer.save_pretrained(folder)

    def _survives_rounding(self, model: Any, console: Console) -> bool:
        """Rounds the weights and scores the held-out rows again; puts the weights back if that cost too much."""
        exact = [parameter.detach().clone() for parameter in model.parameters()]
        with torch.no_grad():
            before = self.trainer.evaluate(metric_key_prefix="exact")["exact_loss"]
            for parameter in model.parameters():
                parameter.copy_(parameter.to(self.dtype))
            after = self.trainer.evaluate(metric_key_prefix="rounded")["rounded_loss"]
            if after - before <= ROUNDING_LOSS:
                return True
            for parameter, value in zip(model.parameters(), exact, strict=True):
                parameter.copy_(value)
        console.print(
            f"saved in {model.dtype}, not in {self.dtype}: rounded, its held-out loss would be {after:.4f} and not "
            f"{before:.4f}; a higher train.learning_rate or more rows move the weights further".replace("torch.", "")
        )
        return False


def prepare(student: str, examples: Examples, config: TrainConfig, folder: Path, console: Console) -> Prepared:
    """Loads the student, tokenises the rows by its chat template and looks at what the trainer will use.

    No row is cut, since its EOS would go with the end: those over `max_length` are left out. Whether training may go
    on is train.data_checks' business. Raises RecipeError if the student cannot be loaded or has no chat template,
    DataError if padding would change what a row teaches, DistillError if memory is too small.
    """
    with _quiet():
        model, tokenizer, dtype = _load(student, config)
        rows = {part: datasets.Dataset.from_list(getattr(examples, part)) for part in ("train", "held_out")}
        trainer = StudentTrainer(
            model=model,
            args=_arguments(config, folder),
            train_dataset=rows["train"],
            eval_dataset=rows["held_out"],
            processing_class=tokenizer,
            peft_config=_lora(config) if config.method == "lora" else None,
            callbacks=[Milestones(config.checkpoint_steps), TrainProgress(console)],
        )
        trainer.remove_callback(PrinterCallback)
        tokenised = {"train": trainer.train_dataset, "held_out": trainer.eval_dataset}
        lengths = {part: [len(ids) for ids in rows["input_ids"]] for part, rows in tokenised.items()}
        kept = {part: [i for i, n in enumerate(of) if n <= config.max_length] for part, of in lengths.items()}
        trainer.train_dataset = trainer.train_dataset.select(kept["train"])
        trainer.eval_dataset = trainer.eval_dataset.select(kept["held_out"])
        _check_padding(trainer)
        faults = count_faults(
            (trainer.train_dataset, trainer.eval_dataset),
            stops=stop_tokens(tokenizer, trainer.model),
            decode=tokenizer.decode,
        )
        differing = _differing(trainer, tokenizer, [examples.train[index] for index in kept["train"]])
    return Prepared(
        trainer=trainer,
        tokenizer=tokenizer,
        train_rows=kept["train"],
        held_out_rows=kept["held_out"],
        lengths=lengths,
        faults=faults,
        differing=differing,
        dtype=dtype,
        precision=precision(config.method),
    )


def _load(student: str, config: TrainConfig) -> tuple[Any, Any, torch.dtype]:
    tokenizer = load_tokenizer(student)
    try:
        stored = transformers.AutoConfig.from_pretrained(student).dtype or torch.float32
        model = AutoModelForCausalLM.from_pretrained(student, dtype=weights_dtype(config.method))
    except (OSError, ValueError) as error:
        raise RecipeError(f"student.model: cannot load {student}: {first_line(error)}") from None
    if config.method == "full" and not torch.cuda.is_available():
        needed = model.num_parameters() * ADAMW_BYTES
        free = psutil.virtual_memory().available
        if needed > free:
            raise DistillError(
                f"training all of {student} needs {needed / GIB:.1f} GiB more than its weights, {free / GIB:.1f} GiB "
                "are free; use train.method: lora, or a smaller student"
            )
    return model, tokenizer, stored


def _lora(config: TrainConfig) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=LORA_TARGETS,
    )


def _arguments(config: TrainConfig, folder: Path) -> SFTConfig:
    rows = config.rows_at_once
    return SFTConfig(
        output_dir=str(folder),
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup,
        max_grad_norm=1.0,
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=rows,
        gradient_accumulation_steps=config.batch_size // rows,
        gradient_checkpointing=config.gradient_checkpointing,
        max_length=None,  # nothing is cut: too long rows are refused or dropped before
        packing=False,  # without FlashAttention it mixes rows
        completion_only_loss=True,
        train_sampling_strategy="group_by_length",
        seed=config.seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=autocast(config.method),
        save_strategy="no",  # Milestones decides
        eval_strategy="no",
        save_total_limit=1,
        logging_steps=1,
        include_num_input_tokens_seen="non_padding",
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",
    )


def _check_padding(trainer: StudentTrainer) -> None:
    for part in (trainer.train_dataset, trainer.eval_dataset):
        some = [part[index] for index in range(min(len(part), trainer.args.train_batch_size))]
        if some:
            inputs = [{name: row[name] for name in ("input_ids", "labels")} for row in some]
            check_batch(some, trainer.data_collator(inputs))


def _differing(trainer: StudentTrainer, tokenizer: Any, examples: list[dict[str, Any]]) -> int:
    return differing_prompts(
        trainer.train_dataset,
        examples,
        lambda prompt: tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"],
    )


def precision(method: str) -> str:
    """In words: the weights' dtype, and autocast if there is any."""
    return f"{weights_dtype(method)} weights".removeprefix("torch.") + (
        ", bfloat16 autocast" if autocast(method) else ""
    )


def weights_dtype(method: str) -> torch.dtype:
    """The dtype that a student is loaded in for training, by method and machine.

    `full`: float32 always. In bfloat16 weights an update below half a unit in the last place is lost, and most are:
    after 6 steps of a learning rate of 1e-5 SmolLM2-135M had a held-out loss of 0.848 in float32 and of 1.225 in
    bfloat16, where it had started. `lora`: the base is frozen, so it stays in bfloat16 where that is native; PEFT
    keeps the adapter in float32.
    """
    return torch.bfloat16 if method == "lora" and _native_bf16() else torch.float32


def autocast(method: str) -> bool:
    """Whether forward passes run in bfloat16: wherever that is native, but for `full` on a CPU.

    There, autocast was 17% faster on 2 cores with avx512_bf16 (147 tokens/s against 126) but rounds the weights that
    each step is computed with, so small updates stay unseen: 1.173 in the comparison above, against 0.848.
    """
    return _native_bf16() and (method == "lora" or torch.cuda.is_available())


def _native_bf16() -> bool:
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


@contextmanager
def _quiet() -> Iterator[None]:
    """Mutes the libraries' bars and warnings; ours say what matters. Errors still show."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
