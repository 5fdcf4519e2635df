"""One straight line from kept.jsonl to student/: rows, split, checks, SFTTrainer, card, save.

Reads kept.jsonl, lineage.json and the recipe; writes checks.json, held_out.jsonl, student/ (by rename) and the `train`
section of lineage.json. Checkpoints live in training/ until the student is saved: after a kill, the same command goes
on from the last one.
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

from pipeline.errors import RecipeError, UsageError
from pipeline.lineage import read_lineage, record_lineage, versions
from pipeline.recipe import Recipe, TrainConfig
from pipeline.records import Kept
from pipeline.rundir import RunDir
from train.cards import CARD, model_card
from train.checks import settle
from train.data_checks import row_checks, token_checks
from train.pair_checks import pair_checks
from train.rows import Split, read_checked, read_rows, split_from, split_rows, to_examples, write_held_out
from train.student import PRUNE, initial_student

if TYPE_CHECKING:
    from train.trainer import Prepared

TRAINING_LOG = "training_log.json"
FINGERPRINT = "fingerprint"  # in training/: what its checkpoints belong to
SAME_RESULT = {
    "held_out_rows",  # its contents count, not its name
    "checkpoint_steps",
    "gradient_checkpointing",
    "accept",
    "teacher_licence",
}  # settings that change no weight


def train_run(
    recipe: Recipe, run: RunDir, *, again: bool = False, force: bool = False, allow_chain: bool = False
) -> None:
    """Trains the recipe's student on the run's kept rows, and saves it as run.student.

    Returns at once if the student there was trained on these rows with these settings, unless `again`. `force` goes on
    past checks that warn, `allow_chain` with a teacher that was itself distilled.
    Raises RecipeError, DataError or DistillError, each with the mend; nothing is trained on faulty rows.
    """
    if recipe.student is None:
        raise RecipeError("the recipe has no `student` section; name the model that learns: student: {model: …}")
    console = Console(stderr=True, soft_wrap=True)
    rows = read_rows(run)
    split = _split(rows, recipe.train)
    fingerprint = training_fingerprint(recipe, run)
    work = run.path / "training"
    if not again and run.held_out.is_file() and trained_from(run.student) == fingerprint:
        console.print(f"{run.student}: the student is up to date (--again trains it again)")
        shutil.rmtree(work, ignore_errors=True)  # left by a kill right after the student was saved
        return

    prepare, examples = _trainer_parts()
    student = initial_student(recipe, run)
    decide = partial(settle, run=run, console=console, accepted=recipe.train.accept, force=force)
    checks = [*row_checks(rows, split, read_lineage(run)), *pair_checks(recipe, student, rows, allow_chain=allow_chain)]
    if any(check.status == "fail" for check in checks):
        decide(checks)
    checkpoint = _open_work(work, fingerprint, again=again, console=console)
    parts = examples(train=to_examples(split.train), held_out=to_examples(split.held_out))
    prepared: Prepared = prepare(student, parts, recipe.train, work, console)
    checks += token_checks(prepared, split, recipe.train)
    decide(checks)
    train_rows = [split.train[index] for index in prepared.train_rows]
    held_out = [split.held_out[index] for index in prepared.held_out_rows]
    console.print(f"training {recipe.student.model} on {len(train_rows)} rows, {len(held_out)} held out")
    write_held_out(run, held_out)

    prepared.fit(checkpoint)

    log = training_log(prepared, recipe, train_rows=len(train_rows), held_out_rows=len(held_out))
    dropped = len(split.train) + len(split.held_out) - len(train_rows) - len(held_out)
    section = _lineage_section(recipe, fingerprint, log, dropped=dropped)
    section |= {"precision": prepared.precision, "checks": [msgspec.to_builtins(check) for check in checks]}
    record_lineage(run, "train", section)
    _save(prepared, log, recipe, run, work, console)
    print(
        f"{run.student}: trained on {log['train_rows']} rows, {log['tokens']:,} tokens in {log['wall_s']:,.0f} s; "
        f"held-out loss {log['eval'][-1]['loss']:.4f}"
    )


def _split(rows: list[Kept], config: TrainConfig) -> Split:
    if config.held_out_rows is not None:
        return split_from(rows, read_checked(config.held_out_rows))
    return split_rows(rows, share=config.held_out, seed=config.seed)


def training_fingerprint(recipe: Recipe, run: RunDir) -> str:
    """Hash of all that determines the trained student: rows, settings, student, the teacher it is cut from."""
    settings = {
        "train": recipe.train.model_dump(mode="json", exclude=SAME_RESULT),
        "student": recipe.student.model_dump(mode="json") if recipe.student else None,
        "teacher": recipe.teacher.model,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in filter(None, (run.kept, recipe.train.held_out_rows)):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def training_log(prepared: "Prepared", recipe: Recipe, *, train_rows: int, held_out_rows: int) -> dict[str, Any]:
    """The loss curve: mean loss a completion token for each step, held-out loss at each epoch's end; seconds."""
    state = prepared.trainer.state
    entries = state.log_history
    return {
        "loss": [
            {name: entry[name] for name in ("step", "epoch", "loss", "learning_rate")}
            for entry in entries
            if "loss" in entry
        ],
        "eval": [
            {"step": entry["step"], "epoch": entry["epoch"], "loss": entry["eval_loss"]}
            for entry in entries
            if "eval_loss" in entry
        ],
        "train_rows": train_rows,
        "held_out_rows": held_out_rows,
        "tokens": state.num_input_tokens_seen,  # padding not counted
        "wall_s": max((entry.get("elapsed_s", 0.0) for entry in entries), default=0.0),
        "method": recipe.train.method,
        "seed": recipe.train.seed,
    }


def _trainer_parts() -> tuple[Any, Any]:
    try:
        from train.trainer import Examples, prepare
    except ImportError as error:
        raise UsageError(f"training needs the `train` extra: {error}; run `make train`, which installs it") from None
    return prepare, Examples


def trained_from(student: Path) -> str | None:
    """The fingerprint of the training that a saved student came from."""
    try:
        lineage = json.loads((student / "lineage.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return lineage.get("train", {}).get("fingerprint")


def _open_work(work: Path, fingerprint: str, *, again: bool, console: Console) -> Path | None:
    """Prepares the folder of checkpoints; the last whole checkpoint of this very training, if there is one."""
    mark = work / FINGERPRINT
    if work.is_dir() and (again or not mark.is_file() or mark.read_text() != fingerprint):
        if not again:
            console.print(f"{work}: checkpoints of other rows or settings, removed")
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    mark.write_text(fingerprint)
    checkpoints = {int(folder.name.rpartition("-")[2]): folder for folder in work.glob("checkpoint-*")}
    for step in sorted(checkpoints, reverse=True):
        if _is_whole(checkpoints[step]):
            return checkpoints[step]
        shutil.rmtree(checkpoints[step])  # cut off while it was written
    return None


def _is_whole(checkpoint: Path) -> bool:
    """The trainer writes its state last; a state that reads as JSON closes a checkpoint."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return False
    return True


def _save(prepared: "Prepared", log: dict[str, Any], recipe: Recipe, run: RunDir, work: Path, console: Console) -> None:
    """The whole student folder at once, by rename; the checkpoints are then of no more use."""
    folder = work / "student"
    shutil.rmtree(folder, ignore_errors=True)
    prepared.save(folder, console)
    (folder / TRAINING_LOG).write_text(json.dumps(log, indent=1) + "\n")
    shutil.copyfile(run.lineage, folder / run.lineage.name)
    (folder / CARD).write_text(model_card(recipe, read_lineage(run)), encoding="utf-8")
    old = work / "old-student"
    if run.student.exists():
        run.student.rename(old)
    folder.rename(run.student)
    shutil.rmtree(work)


def _lineage_section(recipe: Recipe, fingerprint: str, log: dict[str, Any], *, dropped: int) -> dict[str, Any]:
    assert recipe.student is not None
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "student": recipe.student.model,
        "teacher": recipe.teacher.model,
        "initialised_from": recipe.teacher.model if recipe.student.model.startswith(PRUNE) else recipe.student.model,
        "method": recipe.train.method,
        "hyperparameters": recipe.train.model_dump(mode="json"),
        "rows": log["train_rows"],
        "held_out": log["held_out_rows"],
        "too_long_dropped": dropped,
        "steps": log["loss"][-1]["step"],
        "loss": log["loss"][-1]["loss"],
        "held_out_loss": log["eval"][-1]["loss"],
        "seed": recipe.train.seed,
        "fingerprint": fingerprint,
        "versions": versions("accelerate", "datasets", "peft", "torch", "transformers", "trl"),
    }
