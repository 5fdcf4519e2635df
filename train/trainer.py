"""From rows to a trained model: TRL's SFTTrainer, set up for this machine and this recipe.

Reads a model and rows; keeps checkpoints in the folder it is given. train.run decides what becomes of the model.
Importing this module imports torch, transformers, peft and trl.
"""

import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from peft import prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PrinterCallback, TrainerState
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, get_training_chat_template
from trl.chat_template_utils import is_chat_template_stop_token_trained

from pipeline.adapters import base_of, copy_processor, load_merged
from pipeline.errors import DistillError, RecipeError, UsageError
from pipeline.loaded_model import context_of, stop_tokens
from pipeline.models import explained
from pipeline.train_config import TrainConfig
from train.arguments import freeze_images, lora_config, training_arguments
from train.lazy import Lazy, stored_rows
from train.machine import (
    GPU_WIDTH,
    autocast,
    check_machine,
    compile_layers,
    flash_attention,
    free_beside,
    micro_tokens,
    plain_attention,
    precision,
    trained_in_float32,
    wants_checkpointing,
    wants_compiling,
    weights_dtype,
)
from train.progress import Milestones, TrainProgress, is_ended
from train.rates import FULL_STEPS, warmup_steps
from train.setting import Setting
from train.soft import KdTrainer, TopKTrainer, load_teacher
from train.student import load_tokenizer
from train.student_trainer import StudentTrainer
from train.teacher import known_files, tokenizer_of
from train.tokens import (
    answer_header,
    asked_tokens,
    differing_prompts,
    label_faults,
    prompt_of,
    question_tokens,
    row_lengths,
    without_header,
)
from train.told import TeacherPrompts, told_prompts
from train.top_k import ask_endpoint, read_stored

ROUNDING_LOSS = 0.01  # nats per token, 1% of perplexity: what storing a model in its own dtype may cost
COMPARED_TEXTS = 50  # answers that both tokenizers must split alike

# Train and validation: prompt-completion rows (train.rows.to_examples). Where the student follows a teacher, those of
# train have more: what train.run._of_teacher adds.
Examples = Mapping[str, Sequence[dict[str, Any]]]


@dataclass(frozen=True)
class Prepared:
    """A trainer whose rows are tokenised, and what their tokens say. Keys of the dicts: train, validation."""

    trainer: Any  # a StudentTrainer or TRL's DPOTrainer
    setting: Setting
    rows: dict[str, list[int]]  # indices into Examples: rows that are not too long
    lengths: dict[str, list[int]]  # tokens of every row, the too long ones too
    dtype: torch.dtype  # the student's own, as it was stored
    precision: str  # that of the training, for the lineage
    milestones: Milestones
    progress: TrainProgress
    faults: dict[str, list[str]] | None = None  # by kind, of the rows that are not too long (train.tokens)
    differing: int = 0  # training rows whose context is not the one that the student will be asked with

    def fit(self) -> None:
        """Trains, from the last checkpoint if there is one; then holds the weights of the best validation loss.

        Raises DistillError when memory runs out, and KeyboardInterrupt when interrupted, with a checkpoint saved.
        """
        checkpoint = get_last_checkpoint(self.trainer.args.output_dir)
        try:
            with quiet(), self.milestones.interruptible():
                state = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json") if checkpoint else None
                if state and is_ended(state, self.setting.config.early_stop):
                    self.trainer.state = state
                    self.trainer._load_best_model()
                else:
                    self.trainer.train(resume_from_checkpoint=checkpoint)
                self.setting.processes.share_weights(self.trainer.model)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
                raise DistillError(
                    "out of memory while training; lower train.micro_batch_size or set train.gradient_checkpointing: "
                    "true, and the command continues from the last checkpoint; or train adapters (train.method: lora)"
                ) from None
            raise
        finally:
            self.progress.bar.stop()  # leaves the terminal as it was; also after an interrupt

    @property
    def too_long(self) -> int:
        return sum(len(lengths) - len(self.rows[part]) for part, lengths in self.lengths.items())

    @property
    def seen(self) -> str:
        """How many rows an epoch trains on."""
        rows, args = len(self.rows["train"]), self.trainer.args
        full = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        left = rows % full if self.setting.config.method in FULL_STEPS else 0
        return f"{rows - left} of {rows}" if left else f"{rows}"

    @property
    def context(self) -> int:
        """Tokens that the student reads at once."""
        return context_of(self.trainer.model.config)

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest training prompt."""
        return max(len(prompt_of(row)) for row in self.trainer.train_dataset)

    @property
    def saved_step(self) -> int:
        """The step whose weights are kept: that of the best validation loss."""
        state: TrainerState = self.trainer.state
        return state.best_global_step or state.global_step

    def save(self, folder: Path) -> None:
        """Writes the model (full, dpo) or the adapter (lora), the tokenizer and the chat template.

        A model is stored in the dtype it came in, so that before and after are of one size, unless rounding to it
        undoes what was learned: a few steps of a low learning rate move the weights too little for bfloat16.
        All processes take part; one writes.
        """
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        adapter = hasattr(model, "peft_config")
        with quiet():
            if adapter and self.setting.config.further:  # an adapter over a student that nobody else has
                model = self.trainer.model = model.to(torch.float32).merge_and_unload()
                adapter = False
            if not adapter and self.dtype != model.dtype and self._survives_rounding(model):
                model = model.to(self.dtype)
            state = self.trainer.accelerator.get_state_dict(model) if self.trainer.is_fsdp_enabled else None
            if self.setting.processes.lead:
                model.save_pretrained(folder, state_dict=state)
                if not adapter:
                    copy_processor(model, folder)
                (folder / "README.md").unlink(missing_ok=True)  # PEFT's card of blanks, with a path of this machine
                self.trainer.processing_class.save_pretrained(folder)

    def _survives_rounding(self, model: Any) -> bool:
        """Rounds the weights and scores the validation rows again; puts the weights back if that cost too much."""
        exact = {name: value.clone() for name, value in model.state_dict().items()}
        before = float(self.trainer.state.best_metric)
        model.load_state_dict({name: value.to(self.dtype) for name, value in exact.items()})
        after = self.trainer.evaluate(metric_key_prefix="rounded")["rounded_loss"]
        if after - before <= ROUNDING_LOSS:
            return True
        model.load_state_dict(exact)
        self.setting.console.print(
            f"saved in {model.dtype}, not in {self.dtype}: rounded, its validation loss would be {after:.4f} instead "
            f"of {before:.4f}; a higher train.learning_rate or more rows move the weights further".replace("torch.", "")
        )
        return False


def prepare(student: str, examples: Examples, setting: Setting) -> Prepared:
    """Loads the student, tokenises the rows by its chat template and looks at what the trainer will use.

    No row is cut, since its EOS would go with the end: rows over `max_length`, or over what the student reads at once,
    are left out. train.checks.data decides whether training may start. A student that a further method starts from is
    loaded as a whole model.
    Raises RecipeError if the student cannot be loaded or has no chat template, or the recipe asks for what is not
    there; UsageError if there are fewer rows than processes; DistillError if memory is too small.
    """
    config = setting.config
    check_machine(config, setting.processes)
    plain_attention()
    with quiet():
        model, tokenizer, dtype = _load(student, config)
        trainer = _trainer(model, tokenizer, examples, setting)
        if config.loss_on == "all" and (header := answer_header(tokenizer)):
            trainer.train_dataset = trainer.train_dataset.map(without_header, fn_kwargs={"header": header})
            trainer.eval_dataset = trainer.eval_dataset.map(without_header, fn_kwargs={"header": header})
        prepared = ready(trainer, dtype, setting)
        shown = Lazy(prepared.rows["train"], examples["train"].__getitem__)
        differing = differing_prompts(trainer.train_dataset, shown, tokenizer)
        faults = _faults(prepared, examples, tokenizer, differing)
        following = _with_teacher(prepared, shown) if shown and config.soft else trainer
    return replace(prepared, trainer=following, faults=faults, differing=differing)


def _faults(prepared: Prepared, examples: Examples, tokenizer: Any, differing: int) -> dict[str, list[str]]:
    """What is wrong with the tokens of the rows that are not too long, or with what they are padded with.

    `differing`: how many rows have another prompt than they are asked with.
    """
    trainer = prepared.trainer
    known, pad = trainer.model.get_input_embeddings().weight.shape[0], trainer.processing_class.pad_token_id
    if pad >= known:
        every = sum(map(len, prepared.rows.values()))
        return {"vocabulary": [f"the padding token has the id {pad}, the model knows {known:,} tokens"] * every}
    seen, stops = chain(trainer.train_dataset, trainer.eval_dataset), stop_tokens(tokenizer, trainer.model)
    prompts: Iterator[Sequence[int]] = repeat(())
    questions: Iterator[int] = repeat(0)
    texts = (examples[part][index] for part, rows in prepared.rows.items() for index in rows)
    if prepared.setting.config.loss_on == "all":
        prompts = (asked_tokens(text["prompt"], text["tools"], tokenizer) for text in texts)
    elif differing:
        questions = (question_tokens(text["prompt"], text["tools"], tokenizer) for text in texts)
    return label_faults(seen, stops=stops, decode=tokenizer.decode, known=known, prompts=prompts, questions=questions)


def ready(trainer: Any, dtype: torch.dtype, setting: Setting) -> Prepared:
    """A trainer with its callbacks, and without the rows that are too long.

    Raises UsageError if there are fewer rows than processes.
    """
    config, processes = setting.config, setting.processes
    milestones, progress = Milestones(config, processes, setting.console), TrainProgress(setting.console)
    with_callbacks(trainer, milestones, progress)
    parts = {"train": trainer.train_dataset, "validation": trainer.eval_dataset}
    lengths = {part: row_lengths(rows) for part, rows in parts.items()}
    longest = min(config.max_length, context_of(trainer.model.config))
    kept = {part: [i for i, n in enumerate(of) if n <= longest] for part, of in lengths.items()}
    trainer.train_dataset = trainer.train_dataset.select(kept["train"])
    trainer.eval_dataset = trainer.eval_dataset.select(kept["validation"])
    trainer.args.warmup_steps = warmup_steps(config, len(kept["train"]))
    if 0 < len(kept["train"]) < processes.count:
        raise UsageError(
            f"{len(kept['train'])} rows to train on are fewer than {processes.count} processes; start at most "
            f"{len(kept['train'])} (--num_processes), or generate more prompts"
        )
    return Prepared(trainer, setting, kept, lengths, dtype, precision(config.weights), milestones, progress)


def _with_teacher(prepared: Prepared, shown: Sequence[dict[str, Any]]) -> Any:
    """The trainer that follows the teacher, which reads its own prompts; `shown` are the texts of the training rows."""
    trainer, setting = prepared.trainer, prepared.setting
    config, teacher = setting.config, setting.teacher
    assert teacher is not None
    arguments = training_arguments(config, setting.folder, checkpointing=trainer.args.gradient_checkpointing)
    arguments["warmup_steps"] = trainer.args.warmup_steps
    if config.method == "gold":
        from train.gold import gold_trainer  # here: TRL warns when it is imported

        return with_callbacks(gold_trainer(trainer, shown, arguments, setting), prepared.milestones, prepared.progress)
    rows, tokenizer = [*trainer.train_dataset], trainer.processing_class
    stored = config.kd.teacher == "stored"
    told = {} if stored else told_prompts(rows, shown, tokenizer_of(known_files(teacher.model)) or tokenizer)
    if config.method == "on_policy":
        from train.on_policy import on_policy_trainer  # here: TRL warns when it is imported

        drawing = on_policy_trainer(trainer, arguments, told, setting)
        return with_callbacks(drawing, prepared.milestones, prepared.progress)
    if stored:
        assert setting.logprobs is not None
        trainer.known = read_stored(setting.logprobs, shown, rows, tokenizer, setting.console)
    elif config.kd.teacher == "served":
        trainer.known = ask_endpoint(setting, rows, tokenizer, told)
    else:
        trainer.teacher_prompts = TeacherPrompts(told, map(prompt_of, rows))
    return trainer


def with_callbacks(trainer: Any, *callbacks: Any) -> Any:
    """The trainer, with callbacks of ours in place of the one that prints."""
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.remove_callback(PrinterCallback)
    return trainer


def load_start(start: Path, dtype: torch.dtype) -> tuple[Any, torch.dtype]:
    """A student of ours as a whole model, and the dtype that it is stored in: an adapter is merged into its base.

    Raises UsageError if it cannot be loaded.
    """
    base = base_of(start)
    model, stored = load_merged(base or start, start if base else None)
    freeze_images(model.requires_grad_(True))  # PEFT froze all of the base
    return model.to(dtype), stored


def _load(student: str, config: TrainConfig) -> tuple[Any, Any, torch.dtype]:
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


def _trainer(model: Any, tokenizer: Any, examples: Examples, setting: Setting) -> StudentTrainer:
    """The trainer of lora, qlora, full and kd; for gold and on_policy, whose student and tokenised rows theirs takes.

    Says what memory a teacher takes, and whether checkpointing saves some.
    """
    config, folder, processes, teacher = setting.config, setting.folder, setting.processes, setting.teacher
    followed = []  # the teacher, if it is beside the student
    if config.method == "kd" and config.kd.teacher == "local":
        assert teacher is not None
        texts = [row["completion"][0]["content"] for row in examples["train"][:COMPARED_TEXTS]]
        followed = [load_teacher(teacher.model, tokenizer, texts, setting.console)]
    free = free_beside(model, *followed, shards=processes.shards)
    tokens = micro_tokens(model, config, free, processes.shards)
    most = min(max(tokens, config.max_length), (config.micro_batch_size or config.batch_size) * config.max_length)
    checkpointing = wants_checkpointing(model, config, most, free, setting.console, processes.shards)
    attention = getattr(model.config, "_attn_implementation", None)
    compiling = wants_compiling(config, len(examples["train"]), processes)
    setting.console.print(
        f"{precision(config.weights)}; attention: {attention}; {most:,} tokens per forward pass, at most"
        + ("; layers compiled in the first steps" if compiling else "")
    )
    read = Lazy(examples["train"], lambda row: {name: row[name] for name in ("prompt", "completion", "tools")})
    settings: dict[str, Any] = {
        "model": model,
        "args": SFTConfig(
            **training_arguments(config, folder, checkpointing=checkpointing),
            fsdp=processes.sharded,
            pad_to_multiple_of=GPU_WIDTH if torch.cuda.is_available() else None,
            packing=False,  # train.padding_free does without padding, and keeps rows apart
            completion_only_loss=config.loss_on == "last",
            assistant_only_loss=config.loss_on == "all",
        ),
        "train_dataset": stored_rows(read, folder, "train"),
        "eval_dataset": stored_rows(examples["validation"], folder, "validation"),
        "processing_class": tokenizer,
        "peft_config": None if config.weights == "full" else lora_config(config, model),
        "step_rows": config.batch_size,
        "micro_tokens": tokens if config.micro_batch_size is None else sys.maxsize,
        "micro_rows": config.micro_batch_size,
        "padding_free": config.padding_free,
    }
    kind: type[StudentTrainer] = StudentTrainer
    if followed:
        settings, kind = settings | {"teacher": followed[0], "soft": config.kd}, KdTrainer
    elif config.method == "kd":
        settings, kind = settings | {"soft": config.kd}, TopKTrainer
    processes.shard_on_cpu()
    trainer = kind(**settings)
    if autocast(config.weights) is torch.float16:
        trained_in_float32(trainer.model)
    if compiling:
        compile_layers(trainer.model, adapters=config.weights != "full")
    return trainer


@contextmanager
def quiet() -> Iterator[None]:
    """Mutes the libraries' bars and warnings; ours say what matters. Errors still show."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
