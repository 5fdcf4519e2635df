"""Distillation between two tokenizers by TRL's GOLDTrainer, on the kept answers.

    Patiño et al. 2025, https://huggingface.co/spaces/HuggingFaceH4/general-on-policy-logit-distillation

Both models read the same answer, each after its own prompt and by its own tokens. Their distributions are compared
where both have the end of a token: tokens of one spelling one by one, the rest by rank. Takes a student and rows as
StudentTrainer tokenised them. Ours are the teacher's prompt in its own template (TRL gives it the student's text), an
order of rows that survives a resume, and the validation loss.
"""

import json
import tempfile
from collections.abc import Sequence
from typing import Any

import datasets
from trl.experimental.gold import GOLDConfig, GOLDTrainer
from trl.experimental.utils import is_byte_level_tokenizer

from pipeline.errors import RecipeError
from pipeline.models import resolve_model, tokenizer_from
from pipeline.reasoning import MADE_UP
from train.machine import free_beside, micro_rows, micro_tokens
from train.on_policy import SameEveryEpoch
from train.setting import Setting
from train.soft import load_model
from train.student_trainer import ScoredOnText, StudentTrainer
from train.teacher import FIX
from train.told import begun_by_options

Example = dict[str, Any]  # train.rows.to_examples, and `told` and `template`: what the teacher is asked, and how


class GoldTrainer(ScoredOnText, SameEveryEpoch, GOLDTrainer):
    """GOLDTrainer with a student and rows as the other methods have them."""

    loss_is_scaled_for_ga = False  # its loss is a mean of each forward pass, which TRL leaves unsaid

    def __init__(self, *, tokenised: StudentTrainer, examples: Sequence[Example], **settings: Any) -> None:
        self.micro, self.collate = tokenised.micro, tokenised.collate
        student = tokenised.processing_class
        rows = [_texts(example, student) for example in examples]
        super().__init__(
            model=tokenised.model,
            train_dataset=datasets.Dataset.from_list(rows),
            eval_dataset=datasets.Dataset.from_list(rows[:1]),
            processing_class=student,
            **settings,
        )
        begun = self.teacher_tokenizer.decode(begun_by_options(examples, self.teacher_tokenizer))
        prompts = [
            asked.removesuffix(begun) if row["completion"].startswith(begun) else asked
            for row, asked in zip(rows, (_asked(example, self.teacher_tokenizer) for example in examples), strict=True)
        ]
        rows_of_text: Any = self.train_dataset
        self.train_dataset: Any = rows_of_text.remove_columns("original_prompt_text").add_column(
            "original_prompt_text", prompts
        )
        self.eval_dataset = tokenised.eval_dataset

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Counts the tokens of this forward pass: TRL's loader gives it the rows of the whole step."""
        place = (self._step - 1) % self.args.gradient_accumulation_steps
        super()._track_num_input_tokens(self._buffered_inputs[place])


def gold_trainer(
    tokenised: StudentTrainer, examples: Sequence[Example], arguments: dict[str, Any], setting: Setting
) -> GoldTrainer:
    """The trainer of the recipe. `tokenised` has the student and the rows, which `examples` are the texts of.

    Raises RecipeError or DistillError if the teacher cannot be had, or a tokenizer is not of bytes.
    """
    config, teacher = setting.config, setting.teacher
    assert teacher is not None
    loaded = load_model(teacher.model, setting.console)
    loaded.register_forward_hook(_in_float32)
    tokenizer = tokenizer_from(resolve_model(teacher.model))
    check_aligned(tokenizer, tokenised.processing_class)
    models = (tokenised.model, loaded)
    largest = max(models, key=lambda model: model.config.get_text_config().vocab_size)  # both models' logits are kept
    longest = max(map(len, tokenised.train_dataset["input_ids"]))
    tokens = micro_tokens(largest, config, free_beside(*models))
    micro, passes = micro_rows(config, len(examples), tokens, longest, setting.processes)
    settings: dict[str, Any] = dict(
        **arguments,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=passes,
        lmbda=0,  # on the kept answers
        disable_dropout=False,
        use_uld_loss=True,
        uld_use_hybrid_loss=True,
        uld_token_merge_strategy="bayesian",  # by the chain rule
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        uld_crossentropy_weight=1 - config.kd.alpha,
        uld_distillation_weight=config.kd.alpha,
        uld_student_temperature=config.kd.temperature,
        uld_teacher_temperature=config.kd.temperature,
    )
    with tempfile.TemporaryDirectory() as folder:  # of the teacher's own TRL could read Mistral's tekken.json
        tokenizer.save_pretrained(folder)
        args = GOLDConfig(**settings, teacher_tokenizer_name_or_path=folder)
        return GoldTrainer(tokenised=tokenised, examples=examples, teacher_model=loaded, args=args)


def check_aligned(teacher: Any, student: Any | None) -> None:
    """Raises RecipeError if these tokenizers cannot be aligned; `student`: None if it is not known yet."""
    for name, tokenizer in (("teacher", teacher), ("student", student)):
        if tokenizer is not None and not tokenizer.chat_template:
            raise RecipeError(f"method gold needs two chat templates, and the {name} has none; {FIX}")
        if tokenizer is not None and not is_byte_level_tokenizer(tokenizer.backend_tokenizer):
            raise RecipeError(f"method gold aligns tokenizers of bytes, and the {name}'s is another kind; {FIX}")
    if student is not None:
        _texts(
            {"prompt": [{"role": "user", "content": "question"}], "completion": [MADE_UP[None]], "tools": None}, student
        )


def _in_float32(model: Any, given: Any, output: Any) -> Any:
    """TRL takes the softmax in the logits' own dtype, and in bfloat16 it keeps two digits."""
    output.logits = output.logits.float()
    return output


def _rendered(messages: Any, tools: str | None, tokenizer: Any, *, prompt: bool = True, **options: Any) -> str:
    options |= {"tools": json.loads(tools) if tools else None, "tokenize": False, "add_generation_prompt": prompt}
    text: str = tokenizer.apply_chat_template(messages, **options)
    return text


def _asked(example: Example, teacher: Any) -> str:
    """The teacher's prompt without its first token, if TRL's tokenising puts that there."""
    options, bos = example.get("template", {}), teacher.bos_token
    text = _rendered(example["told"], example["tools"], teacher, **options)
    return text.removeprefix(bos) if bos and teacher("x").input_ids[0] == teacher.bos_token_id else text


def _texts(example: Example, student: Any) -> dict[str, str]:
    """The prompt as the student's template has it, and the answer as it has that, without its EOS, which TRL adds."""
    prompt = _rendered(example["prompt"], example["tools"], student)
    whole = _rendered(example["prompt"] + example["completion"], example["tools"], student, prompt=False)
    if not whole.startswith(prompt):
        raise RecipeError(
            f"method gold: the student's chat template renders a prompt otherwise before an answer; {FIX}"
        )
    answer, end, rest = whole.removeprefix(prompt).rpartition(student.eos_token)
    if not end or rest.strip():
        raise RecipeError(
            f"method gold: the student's chat template does not end an answer with {student.eos_token}; {FIX}"
        )
    return {"prompt": prompt, "completion": answer}
