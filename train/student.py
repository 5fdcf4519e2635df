"""The student before training: a model reference resolved, or `prune:<k>` built from the teacher.

Reads the recipe's `student.model` and `teacher.model`; for `prune:<k>` writes the run's student-init folder.
"""

import json
from pathlib import Path
from typing import Any

from pipeline.errors import RecipeError, first_line
from pipeline.models import resolve_model
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir, replacing_folder

PRUNE = "prune:"
PRUNED = "pruned.json"  # in student-init: what it was built from


def initial_student(recipe: Recipe, run: RunDir) -> str:
    """A folder or a Hub id of the student before training; `prune:<k>` is built first.

    Raises RecipeError if `prune:<k>` asks for more layers than there are, or if adapters would have to fix a student
    that layers were cut out of.
    """
    assert recipe.student is not None
    reference = recipe.student.model
    if not reference.startswith(PRUNE):
        return resolve_model(reference)
    if recipe.train.soft and recipe.train.weights != "full":
        raise RecipeError(
            f"student.model {reference}: layers were cut out of it, which adapters cannot fix; "
            f"set train.kd.weights: full, got {recipe.train.weights!r}"
        )
    count = reference.removeprefix(PRUNE)
    if not count.isdecimal() or int(count) < 1:
        raise RecipeError(f"student.model {reference}: give a number of layers, at least 1, as in prune:8")
    mark = run.student_init / PRUNED  # it appears with the folder, by rename
    origin = {"teacher": recipe.teacher.model, "prune": int(count)}
    if not (mark.is_file() and origin.items() <= json.loads(mark.read_bytes()).items()):
        _prune(recipe.teacher.model, int(count), run.student_init)
    return str(run.student_init.resolve())  # absolute: an adapter's base is found from any folder


def load_tokenizer(student: str) -> Any:
    """The student's tokenizer. Raises RecipeError if it cannot be loaded, or has no chat template."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(student)
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(f"student.model: cannot load {student}: {first_line(error)}") from None
    if not tokenizer.chat_template:
        raise RecipeError(f"student.model: {student} has no chat template; choose an instruction-tuned model")
    return tokenizer


def layers_kept(total: int, k: int) -> list[int]:
    """Indices of k layers out of `total`, evenly spaced from the first to the last.

    For 6 of 12 these are 0, 2, 4, 7, 9 and 11, which is how DistilBERT was initialised (Sanh et al. 2019).
    """
    if k == 1:
        return [0]
    return [(2 * i * (total - 1) + k - 1) // (2 * (k - 1)) for i in range(k)]  # rounded, halves up


def _prune(teacher: str, k: int, folder: Path) -> None:
    """Writes a model folder with k of the teacher's layers, its tokenizer and chat template; appears by rename."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = resolve_model(teacher)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    except OSError as error:
        raise RecipeError(
            f"student.model {PRUNE}{k} needs the teacher's weights, and {teacher} has none here ({first_line(error)}); "
            "name a student model, or a teacher that is a folder or on the Hub"
        ) from None
    layers = getattr(model.base_model, "layers", None)
    total = model.config.num_hidden_layers
    if layers is None or len(layers) != total:
        raise RecipeError(f"student.model {PRUNE}{k}: cannot tell the layers of {type(model).__name__}; name a student")
    if k >= total:
        raise RecipeError(f"student.model {PRUNE}{k}: {teacher} has {total} layers; choose 1 to {total - 1}")
    chosen = layers_kept(total, k)
    model.base_model.layers = type(layers)([layers[index] for index in chosen])
    model.config.num_hidden_layers = k
    for name in ("layer_types", "mlp_layer_types"):  # one entry per layer, if the architecture has them
        if types := getattr(model.config, name, None):
            setattr(model.config, name, [types[index] for index in chosen])

    with replacing_folder(folder) as building:
        model.save_pretrained(building)
        tokenizer.save_pretrained(building)
        (building / PRUNED).write_text(json.dumps({"teacher": teacher, "prune": k, "layers": chosen}) + "\n")
