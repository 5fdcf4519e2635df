"""One straight line from kept.jsonl to student/: rows, parts, checks, SFTTrainer, card, save.

Reads kept.jsonl, lineage.json and the recipe. Writes checks.json, validation.jsonl, test.jsonl, student/ (by rename)
and the `train` section of lineage.json. Checkpoints are in training/ until the student is saved: after a kill, the same
command continues from the last one.
"""

import hashlib
import json
import shutil
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from rich.console import Console

from pipeline.errors import UsageError
from pipeline.lineage import read_lineage, record_lineage, versions
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir, write_jsonl
from train.checks.data import row_checks, token_checks
from train.checks.pair import pair_checks
from train.checks.run import settle
from train.processes import ALONE, Processes
from train.publish.cards import CARD, model_card
from train.rows import read_parts, reasoning_form, to_examples
from train.student import PRUNE, initial_student, load_tokenizer

if TYPE_CHECKING:
    from train.trainer import Prepared

TRAINING_LOG = "training_log.json"
FINGERPRINT = "fingerprint"  # in training/: which training its checkpoints belong to
# Settings that change no weight.
SAME_RESULT = {"test_rows", "checkpoint_steps", "gradient_checkpointing", "report_to", "accept", "teacher_licence"}


def train_run(
    recipe: Recipe,
    run: RunDir,
    *,
    again: bool = False,
    force: bool = False,
    allow_chain: bool = False,
    processes: Processes = ALONE,
) -> None:
    """Trains the recipe's student on the run's kept rows, and saves it as run.student.

    Returns at once if the student there was trained on these rows with these settings, unless `again`. `force`
    continues past checks that warn, `allow_chain` with a teacher that was itself distilled. Of several `processes` that
    train together one writes and prints.
    Raises RecipeError, DataError or DistillError, each with the fix; nothing is trained on faulty rows.
    """
    console = Console(stderr=True, soft_wrap=True, quiet=not processes.lead)
    parts = read_parts(recipe, run)
    fingerprint, work = training_fingerprint(recipe, run), run.path / "training"
    if not again and run.test.is_file() and trained_from(run.student) == fingerprint:
        console.print(f"{run.student}: the student is up to date (--again trains it again)")
        shutil.rmtree(work, ignore_errors=True)  # left by a kill right after the student was saved
        return
    try:
        from train.trainer import prepare
    except ImportError as error:
        raise UsageError(f"training needs the `train` extra: {error}; run `make train`, which installs it") from None

    with processes.lead_first():
        student = initial_student(recipe, run)
    decide = partial(settle, run=run, console=console, accepted=recipe.train.accept, force=force, write=processes.lead)
    tokenizer = load_tokenizer(student)
    checks = [*row_checks(parts, read_lineage(run), recipe.train)]
    checks += pair_checks(recipe, student, tokenizer, parts.all, allow_chain=allow_chain)
    decide(checks)
    with processes.lead_first():
        if processes.lead:
            _open_work(work, fingerprint, again=again, console=console)
    shape = partial(to_examples, student=recipe.student, reasoning=reasoning_form(recipe.train, tokenizer))
    examples = {"train": shape(parts.train), "validation": shape(parts.validation)}
    prepared = prepare(student, examples, recipe.train, work, console, recipe.teacher.model, processes)
    of_tokens = list(token_checks(prepared, parts, recipe.train))
    decide(of_tokens, earlier=checks)
    validation = [parts.validation[index] for index in prepared.rows["validation"]]
    rows = {"train": len(prepared.rows["train"]), "validation": len(validation), "test": len(parts.test)}
    console.print(f"training on {rows['train']} rows; {len(validation)} validate, {len(parts.test)} test")
    if processes.lead:
        write_jsonl(run.validation, validation)
        write_jsonl(run.test, parts.test)

    prepared.fit()
    prepared.save(work / "student", console, write=processes.lead)
    if processes.lead:
        log = training_log(prepared, recipe, rows)
        section = _lineage_section(recipe, log) | {"precision": prepared.precision, "processes": processes.count}
        section |= {"fingerprint": fingerprint, "too_long_dropped": len(parts.all) - sum(rows.values())}
        record_lineage(run, "train", {**section, "checks": msgspec.to_builtins([*checks, *of_tokens])})
        _publish(work / "student", log, recipe, run)
        print(
            f"{run.student}: trained on {rows['train']} rows, {log['tokens']:,} tokens in {log['wall_s']:,.0f} s; "
            f"validation loss {section['validation_loss']:.4f}, at step {log['saved_step']} of {section['steps']}"
        )


def training_fingerprint(recipe: Recipe, run: RunDir) -> str:
    """Hash of all that determines the trained student: rows, parts, settings, student, the teacher it is cut from."""
    unused = set() if recipe.train.soft else {"kd"}
    settings = {
        "train": recipe.train.model_dump(mode="json", exclude=SAME_RESULT | unused),
        "parts": recipe.prompts.model_dump(mode="json", include={"seed", "validation", "test"}),
        "student": recipe.student.model_dump(mode="json") if recipe.student else None,
        "teacher": recipe.teacher.model,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in filter(None, (run.kept, recipe.train.test_rows)):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def trained_from(student: Path) -> str | None:
    """The fingerprint of the training that a saved student came from; None if there is none."""
    fingerprint: str | None = read_lineage(RunDir(student)).get("train", {}).get("fingerprint")
    return fingerprint


def training_log(prepared: "Prepared", recipe: Recipe, rows: dict[str, int]) -> dict[str, Any]:
    """The loss curves and what they cost. `rows`: how many there are in each part.

    `loss`: what is minimised, a mean over the completion tokens of each step. `eval`: the cross-entropy per token
    of the validation answers, in nats, which can be compared between methods. `saved_step`: the step of the weights
    that were kept.
    """
    state = prepared.trainer.state
    steps = [entry for entry in state.log_history if "loss" in entry]
    evaluations = [entry for entry in state.log_history if "eval_loss" in entry]
    return {
        "loss": [{name: entry[name] for name in ("step", "epoch", "loss", "learning_rate")} for entry in steps],
        "eval": [{"step": entry["step"], "epoch": entry["epoch"], "loss": entry["eval_loss"]} for entry in evaluations],
        **{f"{part}_rows": count for part, count in rows.items()},
        "saved_step": prepared.saved_step,
        "tokens": state.num_input_tokens_seen,  # padding not counted
        "wall_s": max((entry.get("elapsed_s", 0.0) for entry in state.log_history), default=0.0),
        **{name: getattr(recipe.train, name) for name in ("method", "weights", "seed")},
    }


def _lineage_section(recipe: Recipe, log: dict[str, Any]) -> dict[str, Any]:
    assert recipe.student is not None
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "student": recipe.student.model,
        "teacher": recipe.teacher.model,
        "initialised_from": recipe.teacher.model if recipe.student.model.startswith(PRUNE) else recipe.student.model,
        "hyperparameters": recipe.train.model_dump(mode="json"),
        **{name: log[name] for name in ("method", "weights", "seed", "saved_step")},
        "rows": log["train_rows"],
        "validation": log["validation_rows"],
        "test": log["test_rows"],
        "steps": log["loss"][-1]["step"],
        "loss": log["loss"][-1]["loss"],
        "validation_loss": next(entry["loss"] for entry in log["eval"] if entry["step"] == log["saved_step"]),
        "versions": versions("accelerate", "datasets", "peft", "torch", "transformers", "trl"),
    }


def _open_work(work: Path, fingerprint: str, *, again: bool, console: Console) -> None:
    """Prepares the folder of checkpoints: only whole ones of this very training stay."""
    mark = work / FINGERPRINT
    if work.is_dir() and (again or not mark.is_file() or mark.read_text() != fingerprint):
        if not again:
            console.print(f"{work}: checkpoints of other rows or settings, removed")
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    mark.write_text(fingerprint)
    for folder in work.glob("checkpoint-*"):
        try:
            json.loads((folder / "trainer_state.json").read_bytes())  # written last: it closes a checkpoint
        except (FileNotFoundError, ValueError):
            shutil.rmtree(folder)  # cut off while it was written


def _publish(folder: Path, log: dict[str, Any], recipe: Recipe, run: RunDir) -> None:
    """The whole student folder appears at once, by rename; then the checkpoints beside it have no more use."""
    (folder / TRAINING_LOG).write_text(json.dumps(log, indent=1) + "\n")
    shutil.copyfile(run.lineage, folder / run.lineage.name)
    (folder / CARD).write_text(model_card(recipe, read_lineage(run)), encoding="utf-8")
    work = folder.parent
    if run.student.exists():
        run.student.rename(work / "old-student")
    folder.rename(run.student)
    shutil.rmtree(work)
