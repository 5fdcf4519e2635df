"""The models under comparison (teacher, student before and after training, others), and the machine they run on.

Reads the recipe, the run's student/ and student-init/. Writes one thing: a LoRA student merged into an ordinary model
folder (evaluation/<model>-merged), so that the engine runs it at full speed. Scoring and timing are left to
`evaluate.measure.perplexity` and `evaluate.measure.serving`.
"""

import hashlib
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from pipeline.adapters import base_of, digest_files, measure_weights, stamp_files, tokenizer_place, whole_model
from pipeline.address import is_loopback
from pipeline.errors import DistillError
from pipeline.instructions import asked_of_student, told_to_teacher
from pipeline.lineage import read_lineage, taught_by
from pipeline.models import ADAPTER, PREFIX, embedded_folder, explained, is_path, model_folder, tokenizer_from
from pipeline.recipe import Recipe
from pipeline.recipe_sources import expanded
from pipeline.records import Kept, Prompt
from pipeline.resources import GIB, half_dtype, read_or_empty
from pipeline.rundir import RunDir
from pipeline.serve_config import ServeConfig
from pipeline.student_config import BUILT
from pipeline.students import AFTER, BEFORE, TEACHER, before_training, check_parts, check_trained, merged_folder
from serve.command import loaded_dtype
from serve.machine import detect
from serve.model_facts import DTYPE_BYTES, model_facts

FLOAT32_BYTES = 4
MEMORY_SHARE = 0.6  # of all memory, that a model's weights may take

Row = TypeVar("Row", Prompt, Kept)


@dataclass(frozen=True)
class Subject:
    """One model under comparison."""

    key: str  # its name in report.json
    label: str  # its name for people
    reference: str  # as the recipe names it
    folder: Path | None  # weights and tokenizer; None if they are not on this machine
    adapter: Path | None = None  # a PEFT adapter over `folder`
    missing: str = ""  # why there is no folder


def subjects(recipe: Recipe, run: RunDir) -> list[Subject]:
    """Teacher, student before, student after, then `evaluate.models`: the order of the report.

    Raises UsageError if there is no student yet, its files are damaged, or another model is missing.
    """
    reference = check_trained(recipe, run).model
    check_parts(recipe, run.student, "what it would be tested on")
    before = before_training(recipe, run)
    after = (before, run.student) if (run.student / ADAPTER).is_file() else (run.student, None)
    return [
        _teacher(recipe),
        Subject(BEFORE, "student before", reference, before),
        Subject(AFTER, "student after", reference, *after),
        *(_other(f"other_{number}", other) for number, other in enumerate(recipe.evaluate.models, start=1)),
    ]


def as_asked(recipe: Recipe, subject: Subject, asked: Sequence[Row], *, told: bool = False) -> list[Row]:
    """Prompts, or rows, as a model is asked them: the teacher is told what the recipe tells it, a student is not.

    `told`: a student is, too.
    """
    told = told or subject.key == TEACHER
    turns = [
        told_to_teacher(one.messages, recipe.teacher) if told else asked_of_student(one.messages, recipe.student)
        for one in asked
    ]
    return [msgspec.structs.replace(one, messages=own) for one, own in zip(asked, turns, strict=True)]


def check_models(recipe: Recipe) -> None:
    """Raises UsageError or RecipeError if a model of `evaluate.models` is not there; the Hub's are not fetched yet."""
    for reference in recipe.evaluate.models:
        if is_path(reference):
            _other("", reference)
        elif embedded_folder(reference) is None:
            from transformers import AutoConfig

            with explained(f"evaluate.models {reference}: no such folder, and no such model of the Hub"):
                AutoConfig.from_pretrained(reference)


def _other(key: str, reference: str) -> Subject:
    """Another model that the recipe names; the folder of a run stands for its student."""
    path = expanded(reference)
    folder = path / "student" if (path / "student").is_dir() else path
    label = f"student of {folder.parent.name}" if folder.name == "student" and folder.is_dir() else path.name
    base = base_of(folder)
    if base is None:
        return Subject(key, label, reference, model_folder(reference if folder == path else str(folder)))
    made = RunDir(folder.parent).student_init
    if Path(base).name == made.name and made.is_dir():  # the adapter says where it was then
        base = str(made)
    return Subject(key, label, reference, model_folder(base), folder)


def _teacher(recipe: Recipe) -> Subject:
    """The teacher; without a folder if its weights cannot be had here, as those of a paid API."""
    reference, url = recipe.teacher.model, recipe.teacher.url
    folder, missing = None, f"the teacher answers at {urlsplit(url).hostname}; its weights are not on this machine"
    if not weights_elsewhere(recipe):
        try:
            folder, missing = model_folder(reference), ""
        except DistillError as error:
            missing = str(error)
    return Subject(TEACHER, "teacher", reference, folder, missing=missing)


def weights_elsewhere(recipe: Recipe) -> bool:
    """Whether the teacher's weights are not looked for on this machine: it answers elsewhere, and is no folder here."""
    reference = recipe.teacher.model
    return not (is_loopback(recipe.teacher.url) or reference.startswith(PREFIX) or is_path(reference))


def never_asked(recipe: Recipe) -> str:
    """That the report will lack a teacher whose weights are elsewhere; empty if the recipe lets it answer there."""
    config = recipe.evaluate
    if config.ask_teacher or not (config.verify or config.probes):
        return ""
    return (
        "note: the report will have nothing of the teacher, whose weights are not here; evaluate.ask_teacher: true "
        "asks it the report's prompts where it answers, which may cost money"
    )


def other_teacher(recipe: Recipe, run: RunDir) -> str:
    """That another model than the recipe's teacher taught the student; empty if that teacher did."""
    taught = taught_by(recipe, read_lineage(RunDir(run.student)))
    if recipe.teacher.model in taught:
        return ""
    return f"{' and '.join(taught)} taught the student, but the teacher here is the recipe's, {recipe.teacher.model}"


def student_lineage(run: RunDir) -> dict[str, Any]:
    """Where the student that is measured comes from. If it has no lineage of its own, the run's.

    A stage that ran again after the training has changed the run's.
    """
    found = read_lineage(RunDir(run.student)) or read_lineage(run)
    return {name: section for name, section in found.items() if name != "evaluate"}


def digest_subject(subject: Subject) -> str:
    """What identifies the weights: of a student the contents; of the teacher and a base the files' names and sizes, and
    in a folder of the user's own also the times of change.
    """
    if subject.folder is None:
        return digest(subject.reference, subject.missing)
    trained = subject.adapter or (None if subject.key in (TEACHER, BEFORE) else subject.folder)
    parts = [subject.reference] + ([_digest_folder(trained, *stamp_files(trained))] if trained else [])
    if (subject.folder / BUILT).is_file():
        parts.append((subject.folder / BUILT).read_text())
    if trained != subject.folder:
        parts += stamp_files(subject.folder, times=is_path(subject.reference))
    return digest(*parts)


@lru_cache
def _digest_folder(folder: Path, *_stamps: str) -> str:
    """digest_files; what has the same stamps is not read again."""
    return digest_files(folder)


def digest(*parts: str) -> str:
    """SHA-256 over several texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def load(subject: Subject, *, dtype: str, device: str) -> tuple[Any, Any]:
    """The model (eval mode, on the device) and its tokenizer; an adapter is laid over its base, not merged.

    Raises RecipeError if it cannot be loaded, as a quantised one without the package that reads it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if subject.folder is None:
        raise DistillError(subject.missing)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each length of a row (train.machine)
    with explained(f"cannot load {subject.folder}"):
        model = AutoModelForCausalLM.from_pretrained(subject.folder, dtype=getattr(torch, dtype))
        if subject.adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, subject.adapter)
        tokenizer = tokenizer_from(tokenizer_place(subject.folder, subject.adapter))
        return model.to(device).eval(), tokenizer


def engine_folder(subject: Subject, run: RunDir) -> Path:
    """A folder the engine serves: the model's own, or the adapter merged into its base (made once, by rename)."""
    if subject.folder is None:
        raise DistillError(subject.missing)
    return whole_model(subject.adapter or subject.folder, subject.folder, merged_folder(run, subject.key))


def choose_precision(models: Sequence[Subject]) -> tuple[str, str]:
    """The dtype and the device that all models are scored with.

    Half precision on a GPU, and on a CPU that multiplies bfloat16 in hardware: SmolLM2-135M took 7.2 and 7.7 s there
    where float32 took 17.1 and 15.9 (32 rows, 2 shared cores). It moved the perplexity by +0.2%, Qwen2.5-Coder-0.5B's
    by -0.06%. Other CPUs emulate bfloat16, slowly: float32, unless the largest model would not fit.
    """
    import psutil
    import torch

    half = half_dtype()
    if torch.cuda.is_available():
        return str(half).removeprefix("torch."), "cuda"
    weights = [measure_weights(subject.folder) for subject in models if subject.folder is not None]
    largest = max((w.parameters or 0 for w in weights if w), default=0)
    fits = largest * FLOAT32_BYTES < psutil.virtual_memory().total * MEMORY_SHARE
    return ("float32" if fits and half is None else "bfloat16"), "cpu"


def kv_bytes_per_token(folder: Path, config: ServeConfig) -> int | None:
    """The bytes of KV cache that a token takes in the dtype that the engine computes in; None if they are not known.

    2 (keys and values) · layers · KV heads · head size · bytes of the dtype, from the model's config.json.
    """
    facts = model_facts(str(folder), ask_hub=False)
    size = DTYPE_BYTES.get(loaded_dtype(config, detect()) or facts.dtype or "")
    return facts.kv_values_per_token * size if facts.kv_values_per_token and size else None


def describe_machine() -> dict[str, str]:
    """What the figures were measured on; nothing that names the machine or its owner."""
    import psutil
    import torch

    cpu = re.search(r"^model name\s*:\s*(.*)$", read_or_empty(Path("/proc/cpuinfo")), re.MULTILINE)
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu[1] if cpu else platform.processor() or "unknown",
        "cores": str(os.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / GIB:.0f} GiB",
        "python": platform.python_version(),
    } | ({"gpu": ", ".join(gpus)} if gpus else {})


def name_machine() -> str:
    """What decides how fast a model runs here: `AMD EPYC 7B13, 8 cores`, and the GPUs if there are any."""
    about = describe_machine()
    return ", ".join(filter(None, [about["cpu"], f"{about['cores']} cores", about.get("gpu")]))
