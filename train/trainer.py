"""From rows to a trained model: TRL's SFTTrainer, set up for this machine and this recipe.

Reads a model and rows; keeps checkpoints in the folder it is given. train.run decides what becomes of the model.
Importing this module imports torch, transformers, peft and trl.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, repeat
from typing import Any

import torch
from trl import SFTConfig

from pipeline.loaded_model import stop_tokens
from train.arguments import lora_config, training_arguments
from train.lazy import Lazy, stored_rows
from train.load import load_student
from train.machine import (
    GPU_WIDTH,
    autocast,
    check_machine,
    compile_layers,
    free_beside,
    micro_tokens,
    plain_attention,
    precision,
    trained_in_float32,
    wants_checkpointing,
    wants_compiling,
)
from train.prepared import Prepared, quiet, ready, with_callbacks
from train.setting import Setting
from train.soft import KdTrainer, TopKTrainer, load_teacher
from train.student_trainer import StudentTrainer
from train.teacher import known_files, tokenizer_of
from train.tokens import (
    answer_header,
    asked_tokens,
    differing_prompts,
    label_faults,
    prompt_of,
    question_tokens,
    without_header,
)
from train.told import TeacherPrompts, told_prompts
from train.top_k import ask_endpoint, read_stored

COMPARED_TEXTS = 50  # answers that both tokenizers must split alike

# Train and validation: prompt-completion rows (train.rows.to_examples). Where the student follows a teacher, those of
# train have more: what train.run._of_teacher adds.
Examples = Mapping[str, Sequence[dict[str, Any]]]


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
        model, tokenizer, dtype = load_student(student, config)
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
