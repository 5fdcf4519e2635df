"""What would stop a training, told before the work that it needs: the teacher's answers, or a first student.

Looks at settings, small files and this machine; a served teacher is asked once. No model is loaded.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

from msgspec.structs import replace

from generate.prompts import iter_prompts
from pipeline.checks import Check
from pipeline.errors import RecipeError, UsageError
from pipeline.instructions import asked_of_student
from pipeline.loaded_model import stop_tokens, without_weights
from pipeline.models import embedded_folder, explained, resolve_model, tokenizer_from
from pipeline.reasoning import MADE_UP, reasoning_form
from pipeline.recipe import Recipe
from pipeline.records import Kept, Prompt
from pipeline.rundir import RunDir
from pipeline.turns_and_tools import template_turns
from train.checks.data import context_check, label_checks
from train.checks.pair import template_check, thoughts_check, tools_check
from train.new_student import apply_template
from train.preferences import check_start, start_of
from train.processes import ALONE, Processes
from train.rows import read_test_rows, tools_text
from train.student import check_layers, initial_student, load_tokenizer, read_tokenizer, teacher_to_prune
from train.teacher import check_same_tokens, followed_files, known_files, tokenizer_of

PROBED = 100  # prompts that the student's template is tried on


@contextmanager
def extra_needed() -> Iterator[None]:
    """Raises UsageError where a package of the `train` extra is missing."""
    try:
        yield
    except ImportError as error:
        raise UsageError(f"training needs the `train` extra: {error}; run `make train`, which installs it") from None


@extra_needed()
def check_trainable(recipe: Recipe, run: RunDir, gpus: int = 0) -> None:
    """Raises UsageError if a training would lack its teacher, its student, its test rows, a GPU or a package.

    `gpus`: how many are visible. A training in one process refuses several.
    """
    config = recipe.train
    check_start(recipe, run)
    if config.further and (config.start or config.method == "dpo"):  # otherwise a first student is trained then
        start_of(recipe, run)
    else:
        check_student(recipe)
    read_test_rows(config)
    check_followed(recipe)
    on_gpu = config.weights == "qlora" or config.padding_free or config.on_policy.rollouts == "vllm"
    if on_gpu or gpus > 1 or config.report_to:
        from train.machine import check_machine  # here: torch takes time and memory

        check_machine(config, ALONE)


def check_student(recipe: Recipe) -> None:
    """Raises UsageError if the student, or the model that it is made of, cannot be read, or has no fit template.

    Of a model on the Hub only the tokenizer and the configuration are fetched, or the latter alone if layers are taken
    of it; an embedded model is not fetched.
    """
    student = recipe.student
    assert student is not None
    source = student.tokenizer if student.new else recipe.teacher.model if student.pruned else student.model
    if source is None or ((embedded := embedded_folder(source)) and not embedded.is_dir()):
        return
    resolved = resolve_model(source)
    if student.pruned:
        from transformers import AutoConfig

        with teacher_to_prune(student.pruned, source):
            config = AutoConfig.from_pretrained(known_files(source) or resolved)
        check_layers(student.pruned, config.get_text_config().num_hidden_layers, source)
    elif student.new:
        read_tokenizer(resolved)
    else:
        if student.chat_template is None:
            tokenizer = load_tokenizer(resolved)
        else:
            tokenizer = read_tokenizer(resolved)
            apply_template(tokenizer, student.chat_template)
        if recipe.train.loss_on == "all":
            from train.load import check_marks  # here: torch and TRL are slow to import

            check_marks(tokenizer)
        check_template(recipe, tokenizer, stop_tokens(tokenizer, read_student(source, resolved)))


def read_student(reference: str, resolved: str) -> Any:
    """The student without its weights. Raises RecipeError if it is of no kind that is trained here."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    with explained(f"student.model: cannot load {reference}"):
        model = without_weights(resolved)
    if (kind := model.config.model_type) not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise RecipeError(
            f"student.model: {reference} is of the kind {kind}, which transformers does not load as a language model "
            "(AutoModelForCausalLM); choose another student"
        )
    return model


def check_template(recipe: Recipe, tokenizer: Any, stops: set[int]) -> None:
    """Raises UsageError if the student's template cannot have what its rows will have, or would teach something else.

    That is prompts with their system messages and tools, thoughts to learn, an answer that ends, and a prompt that is
    the same before and after it is answered. `stops`: the ids that end an answer.
    """
    first = islice(iter_prompts(recipe), PROBED)
    prompts = [replace(prompt, messages=asked_of_student(prompt.messages, recipe.student)) for prompt in first]
    checks = [tools_check(tokenizer, ())] if any(prompt.tools for prompt in iter_prompts(recipe)) else []
    checks += [thoughts_check(tokenizer, recipe.train)] if recipe.train.reasoning == "keep" else []
    checks += [template_check(tokenizer, None, prompts)]
    for check in chain(checks, answer_checks(recipe, tokenizer, stops, prompts)):
        if check.stops(recipe.train.accept):
            accept = f", or train.accept: [{check.name}]" * (check.status == "warn")
            raise UsageError(f"check {check.name}: {check.finding}; {check.fix}{accept}; nothing was asked")


def answer_checks(recipe: Recipe, tokenizer: Any, stops: set[int], prompts: Sequence[Prompt]) -> Iterator[Check]:
    """What these prompts show with a made-up answer; all rows are looked at before the first step.

    With `loss_on: all` rows may be made by a template of TRL's, and these are not.
    """
    if recipe.train.loss_on == "all":
        return
    from train.tokens import answered_row, differing_prompts, label_faults, question_tokens  # here: torch is slow

    examples: list[dict[str, Any]] = [
        {"prompt": template_turns(prompt.messages), "tools": tools_text(prompt.tools)} for prompt in prompts
    ]
    answer = MADE_UP[reasoning_form(recipe.train, tokenizer)]
    rows = [answered_row(example, answer, tokenizer) for example in examples]
    questions = [question_tokens(example["prompt"], example["tools"], tokenizer) for example in examples]
    faults = label_faults(rows, stops=stops, decode=tokenizer.decode, known=sys.maxsize, questions=questions)
    yield from label_checks(faults, len(rows))
    yield context_check(differing_prompts(rows, examples, tokenizer), len(rows))


@extra_needed()
def check_followed(recipe: Recipe) -> None:
    """Raises RecipeError if a soft method could not follow a teacher beside the student: no weights, or unfit tokens.

    The tokens of a student that training makes first may not be known yet: they are not looked at.
    """
    config, student = recipe.train, recipe.student
    if not (config.soft and config.kd.teacher == "local"):
        return
    assert student is not None
    teacher = followed_files(recipe.teacher.model)
    reference = student.tokenizer if student.built else student.model
    if config.further and config.start:
        reference = str(config.start)
    tokenizer = tokenizer_of(known_files(reference)) if reference else None
    if config.method == "gold":
        from train.prepared import quiet  # here: trainers are slow to import

        with quiet(), explained(f"teacher.model: cannot load {recipe.teacher.model}"):
            from train.gold import check_aligned

            check_aligned(tokenizer_from(teacher), tokenizer)
    elif tokenizer is not None:
        check_same_tokens(recipe.teacher.model, tokenizer)


@extra_needed()
def check_on_policy(recipe: Recipe, run: RunDir, rows: Sequence[Kept], processes: Processes) -> None:
    """Raises RecipeError or DistillError if on_policy could not follow its teacher after a first student's training.

    `rows`: what that student will be trained on.
    """
    from train.machine import check_machine
    from train.prepared import quiet
    from train.top_k import COMPARED_ROWS, check_tokens, endpoint_client

    check_machine(recipe.train, processes)
    with processes.lead_first():
        tokenizer = load_tokenizer(initial_student(recipe, run, rows))
    texts = [row.text for row in rows[:COMPARED_ROWS]]
    if recipe.train.kd.teacher == "local":
        check_same_tokens(recipe.teacher.model, tokenizer, texts)
    else:
        with quiet():
            check_tokens(endpoint_client(recipe.teacher, {}), [tokenizer(texts[0])], tokenizer)
