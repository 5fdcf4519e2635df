"""The student before training: a model reference resolved, or made first: layers of the teacher, or a new model.

Reads the recipe's `student` and `teacher.model`; a student that is made first is the run's student-init folder.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pipeline.adapters import copy_processor, torn_file
from pipeline.errors import RecipeError, first_line
from pipeline.instructions import asked_of_student
from pipeline.models import explained, resolve_model, tokenizer_from
from pipeline.recipe import Recipe
from pipeline.records import Kept
from pipeline.rundir import RunDir, replacing_folder
from pipeline.student_config import BUILT, CHATML, PRUNE
from train.new_student import CONTEXT, apply_template, random_model, train_tokenizer, vocabulary_of

# What a configuration has one entry of per layer, if the architecture has it.
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")


def initial_student(recipe: Recipe, run: RunDir, rows: Sequence[Kept] = ()) -> str:
    """A folder or a Hub id of the student before training; one that has to be made is made first, once.

    `rows`: what it will be trained on, for the tokenizer of a new student. Raises RecipeError if `prune:<k>` asks for
    more layers than there are, or if a new student's vocabulary is too large for it.
    """
    assert recipe.student is not None
    if not recipe.student.built:
        return resolve_model(recipe.student.model)
    origin, mark = _origin(recipe, rows), run.student_init / BUILT  # it appears with the folder, by rename
    whole = mark.is_file() and torn_file(run.student_init) is None
    if not (whole and origin.items() <= json.loads(mark.read_bytes()).items()):
        from transformers.utils import logging

        logging.disable_progress_bar()
        with replacing_folder(run.student_init) as building:
            model, tokenizer, facts = _built(recipe, rows)
            model.save_pretrained(building)
            copy_processor(model, building)
            tokenizer.save_pretrained(building)
            (building / BUILT).write_text(json.dumps({**origin, **facts}, ensure_ascii=False) + "\n")
    return str(run.student_init.resolve())  # absolute: an adapter's base is found from any folder


def _origin(recipe: Recipe, rows: Sequence[Kept]) -> dict[str, Any]:
    """All that determines a student that is made first."""
    assert recipe.student is not None
    origin: dict[str, Any] = recipe.student.model_dump(mode="json", include={"model", "tokenizer", "chat_template"})
    if recipe.student.new is None:
        return origin | {"teacher": recipe.teacher.model}
    digest = hashlib.sha256()
    if recipe.student.tokenizer is None:
        for text in _texts(recipe, rows):
            digest.update(text.encode() + b"\0")
    context = max(CONTEXT, recipe.train.max_length)
    return origin | {"seed": recipe.train.seed, "texts": digest.hexdigest(), "context": context}


def _texts(recipe: Recipe, rows: Sequence[Kept]) -> Iterator[str]:
    """What the student reads and writes: the turns that it is asked, and the answers."""
    for row in rows:
        yield from (message.content for message in asked_of_student(row.messages, recipe.student))
        yield row.text
        if recipe.train.reasoning == "keep" and row.reasoning:
            yield row.reasoning


def _built(recipe: Recipe, rows: Sequence[Kept]) -> tuple[Any, Any, dict[str, Any]]:
    """The model, its tokenizer, and what there is to say of how they were made."""
    assert recipe.student is not None
    student, template = recipe.student, recipe.student.chat_template
    if student.new:
        return _new(recipe, student.new, rows)
    if student.pruned:
        model, tokenizer, facts = _pruned(recipe.teacher.model, student.pruned)
    else:
        model, tokenizer, facts = _loaded(student.model), read_tokenizer(resolve_model(student.model)), {}
    if template is not None:
        apply_template(tokenizer, template)
        model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer, facts


def _new(recipe: Recipe, parameters: int, rows: Sequence[Kept]) -> tuple[Any, Any, dict[str, Any]]:
    """A student with random weights; its tokenizer is trained on the rows, unless the recipe names one."""
    assert recipe.student is not None
    if recipe.student.tokenizer is not None:
        tokenizer = read_tokenizer(resolve_model(recipe.student.tokenizer))
    else:
        tokenizer = train_tokenizer(_texts(recipe, rows), vocabulary_of(parameters))
    if recipe.student.chat_template is not None or not tokenizer.chat_template:
        apply_template(tokenizer, recipe.student.chat_template or CHATML)
    model = random_model(parameters, tokenizer, seed=recipe.train.seed, context=recipe.train.max_length)
    facts = {"vocabulary": len(tokenizer), "layers": model.config.num_hidden_layers}
    return model, tokenizer, facts | {"width": model.config.hidden_size, "parameters": model.num_parameters()}


def load_tokenizer(student: str) -> Any:
    """The student's tokenizer. Raises RecipeError if it cannot be loaded, or has no chat template."""
    tokenizer = read_tokenizer(student)
    if not tokenizer.chat_template:
        raise RecipeError(
            f"student.model: {student} has no chat template; name one in student.chat_template, or choose an "
            "instruction-tuned model"
        )
    return tokenizer


def read_tokenizer(student: str) -> Any:
    """A tokenizer, with a chat template or without. Raises RecipeError if it cannot be loaded."""
    with explained(f"student: cannot load the tokenizer of {student}"):
        return tokenizer_from(student)


def layers_kept(total: int, k: int) -> list[int]:
    """Indices of k layers out of `total`, evenly spaced from the first to the last.

    For 6 of 12 these are 0, 2, 4, 7, 9 and 11, which is how DistilBERT was initialised (Sanh et al. 2019).
    """
    if k == 1:
        return [0]
    return [(2 * i * (total - 1) + k - 1) // (2 * (k - 1)) for i in range(k)]  # rounded, halves up


def _loaded(reference: str) -> Any:
    from transformers import AutoModelForCausalLM

    with explained(f"student.model: cannot load {reference}"):
        return AutoModelForCausalLM.from_pretrained(resolve_model(reference), dtype="auto")


def check_layers(k: int, total: int, teacher: str) -> None:
    """Raises RecipeError if a student of k layers cannot be cut out of a teacher of `total`."""
    if k >= total:
        raise RecipeError(f"student.model {PRUNE}{k}: {teacher} has {total} layers; choose 1 to {total - 1}")


@contextmanager
def teacher_to_prune(k: int, teacher: str) -> Iterator[None]:
    """Raises RecipeError where a teacher cannot be read that k layers are taken of."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"student.model {PRUNE}{k} needs the teacher's weights, and {teacher} has none here ({first_line(error)}); "
            "name a student model, or a teacher that is a folder or on the Hub"
        ) from None


def _pruned(teacher: str, k: int) -> tuple[Any, Any, dict[str, Any]]:
    """The teacher with k of its layers."""
    from transformers import AutoModelForCausalLM

    source = resolve_model(teacher)
    with teacher_to_prune(k, teacher):
        tokenizer = tokenizer_from(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    decoder, config = model.get_decoder(), model.config.get_text_config()
    layers, total = getattr(decoder, "layers", None), config.num_hidden_layers
    if layers is None or len(layers) != total:
        raise RecipeError(f"student.model {PRUNE}{k}: cannot tell the layers of {type(model).__name__}; name a student")
    check_layers(k, total, teacher)
    chosen = layers_kept(total, k)
    decoder.layers = type(layers)([layers[index] for index in chosen])
    of_layers = {name: types for name in PER_LAYER if (types := getattr(config, name, None))}
    config.num_hidden_layers = k
    for name, types in of_layers.items():
        if len(getattr(config, name)) == total:  # some follow the number of layers by themselves
            setattr(config, name, [types[index] for index in chosen])
    return model, tokenizer, {"layers": chosen}
