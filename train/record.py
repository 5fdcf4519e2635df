"""What a training says of itself: its fingerprint, its log, and its section of the lineage."""

import hashlib
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from math import isfinite, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.instructions import shared_system, system_of_student
from pipeline.lineage import versions
from pipeline.recipe import Recipe
from pipeline.records import Kept
from pipeline.rundir import RunDir
from pipeline.students import origin_of, trained_section
from pipeline.train_config import FURTHER

if TYPE_CHECKING:
    from train.prepared import Prepared

MARGIN = "eval_rewards/margins"  # TRL's name
# Settings that change no weight, but for rounding. train.micro_batch_size is treated so, too: with gold it changes
# weights a little (the loss is a mean of each pass), but a training that ran out of memory must go on with less.
SAME_RESULT = {
    "test_rows",
    "checkpoint_steps",
    "gradient_checkpointing",
    "compile",
    "report_to",
    "accept",
    "teacher_licence",
}


def template_options(recipe: Recipe) -> dict[str, Any]:
    """What the teacher's chat template is given at its endpoint, as `enable_thinking: false`."""
    options: dict[str, Any] = recipe.sampling.extra.get("chat_template_kwargs") or {}
    return options


def training_fingerprint(recipe: Recipe, run: RunDir, start: Path | None = None) -> str:
    """Hash of all that determines the trained student: rows, parts, settings, student, the teacher it is cut from.

    In soft methods also what the teacher is told, unless its answers are stored.
    `start`: the student that a further method starts from.
    """
    config = recipe.train
    unused = {"start"} | {name for name in FURTHER if name != config.method}
    unused |= set() if config.soft else {"kd"}
    settings = {
        "train": config.model_dump(mode="json", exclude=SAME_RESULT | unused) | {"micro_batch_size": None},
        "parts": recipe.prompts.parted_by,
        "student": recipe.student.model_dump(mode="json") if recipe.student else None,
        "teacher": recipe.teacher.model,
    }
    if config.soft and config.kd.teacher != "stored":
        settings |= recipe.teacher.model_dump(mode="json", include={"system", "examples"}, exclude_defaults=True)
        settings |= {"template": options} if (options := template_options(recipe)) else {}
    if recipe.student and not recipe.student.built and (base := origin_of(recipe.student, run)):
        settings["base"] = base
    if start:
        settings["start"] = trained_section(start).get("fingerprint")
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    own = {"dpo": run.preferences, "kd": run.logprobs if config.kd.teacher == "stored" else None}.get(config.method)
    for path in filter(None, (run.kept, config.test_rows, own if own and own.is_file() else None)):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def training_log(prepared: "Prepared", recipe: Recipe, rows: dict[str, int]) -> dict[str, Any]:
    """The loss curves and what they cost. `rows`: how many there are in each part.

    `loss`: what is minimised, a mean over the completion tokens of each step. `eval`: the cross-entropy per token
    of the validation answers, in nats, which can be compared between methods. `saved_step`: the step of the weights
    that were kept. `margin`: of preferences, the mean reward of the better answer over the worse, at each evaluation.
    `peak_memory_bytes`: what this process held at once, of the GPU's memory or else of the machine's.
    """
    from train.machine import peak_memory

    state = prepared.trainer.state
    # A training that diverged ends with NaN.
    steps = [entry for entry in state.log_history if isfinite(entry.get("loss", nan))]
    evaluations = [entry for entry in state.log_history if isfinite(entry.get("eval_loss", nan))]
    return {
        "loss": [{name: entry[name] for name in ("step", "epoch", "loss", "learning_rate")} for entry in steps],
        "eval": [{"step": entry["step"], "epoch": entry["epoch"], "loss": entry["eval_loss"]} for entry in evaluations],
        "margin": [entry[MARGIN] for entry in evaluations if MARGIN in entry],
        **{f"{part}_rows": count for part, count in rows.items()},
        "saved_step": prepared.saved_step,
        "tokens": state.num_input_tokens_seen,  # padding not counted
        "peak_memory_bytes": peak_memory(),
        "wall_s": max((entry.get("elapsed_s", 0.0) for entry in state.log_history), default=0.0),
        **{name: getattr(recipe.train, name) for name in ("method", "weights", "seed")},
    }


def lineage_section(recipe: Recipe, log: dict[str, Any], rows: Iterable[Kept], earlier: list[str]) -> dict[str, Any]:
    assert recipe.student is not None
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "student": recipe.student.model,
        "system": system_of_student(recipe),
        "system_of_rows": shared_system(row.messages for row in rows),
        "teacher": recipe.teacher.model,
        "initialised_from": initialised_from(recipe),
        "earlier_teachers": earlier,
        "parts": recipe.prompts.parted_by,
        "hyperparameters": recipe.train.model_dump(mode="json"),
        **{name: log[name] for name in ("method", "weights", "seed", "saved_step", "learning_rate_default")},
        "rows": log["train_rows"],
        "validation": log["validation_rows"],
        "test": log["test_rows"],
        "steps": log["loss"][-1]["step"],
        "loss": log["loss"][-1]["loss"],
        "peak_memory_bytes": log["peak_memory_bytes"],
        "validation_loss": next(entry["loss"] for entry in log["eval"] if entry["step"] == log["saved_step"]),
        "versions": versions("accelerate", "datasets", "peft", "torch", "transformers", "trl"),
    }


def initialised_from(recipe: Recipe) -> str | None:
    """The model whose weights the student began with; None of a new one."""
    assert recipe.student is not None
    if recipe.student.new:
        return None
    return recipe.teacher.model if recipe.student.made else recipe.student.model
