"""One straight line from kept.jsonl to student/: rows, parts, checks, TRL's trainer, card, save.

Reads kept.jsonl, preferences.jsonl (method dpo), lineage.json and the recipe. Writes checks.json, validation.jsonl,
test.jsonl, student/ (by rename) and the `train` section of lineage.json. Checkpoints are in training/ until the student
is saved: after a kill, the same command continues from the last one.
"""

import json
import os
import shutil
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from rich.console import Console

from pipeline.adapters import check_whole
from pipeline.checks import Check
from pipeline.errors import RecipeError
from pipeline.instructions import told_to_teacher
from pipeline.lineage import read_lineage, with_section, write_lineage
from pipeline.loaded_model import context_of
from pipeline.progress import reporting, reporting_time
from pipeline.reasoning import reasoning_form
from pipeline.recipe import Recipe
from pipeline.records import Kept
from pipeline.resources import GIB
from pipeline.rundir import RunDir, share_files, sync_path, sync_tree, write_file, write_jsonl, writing_weights
from pipeline.students import origin_of, trained_section
from pipeline.turns_and_tools import template_turns
from train.checkpoints import AGAIN, FINGERPRINT, check_no_link, open_work, training_in
from train.checks.before import check_on_policy, extra_needed
from train.checks.data import row_checks, token_checks
from train.checks.pair import pair_checks
from train.checks.run import settle
from train.lazy import Lazy, joined, rows_folder
from train.preferences import Pairs, check_start, checks_of, learned, learned_from_answers, read_pairs, start_of
from train.processes import ALONE, Processes, launched
from train.publish.cards import CARD, model_card
from train.rates import with_learning_rate
from train.record import initialised_from, lineage_section, template_options, training_fingerprint, training_log
from train.rows import Parts, read_parts, to_examples
from train.setting import Setting
from train.student import initial_student, load_tokenizer
from train.teacher import earlier_teachers

if TYPE_CHECKING:
    from train.prepared import Prepared

TRAINING_LOG = "training_log.json"


def train_run(
    recipe: Recipe,
    run: RunDir,
    *,
    again: bool = False,
    force: bool = False,
    allow_chain: bool = False,
    processes: Processes = ALONE,
) -> None:
    """Trains the recipe's student on the run's kept rows, or then on its preferences, and saves it as run.student.

    Returns at once if the student there was trained on these rows with these settings, unless `again`. `force`
    continues past checks that warn, `allow_chain` with a distilled teacher. One of the `processes` writes and prints.
    Raises RecipeError, DataError or DistillError, each with the fix; nothing is trained on faulty rows.
    """
    student = recipe.student
    if student is None:
        raise RecipeError("the recipe has no `student` section; name the model that learns: student: {model: …}")
    processes.check(recipe.train)
    console = Console(stderr=True, soft_wrap=True, markup=False, quiet=not processes.lead)
    recipe, rate = with_learning_rate(recipe)
    parts = read_parts(recipe, run)
    check_start(recipe, run)
    if first := first_training(recipe, run):
        check_on_policy(recipe, run, parts.train, processes)
        console.print(f"first a student learns from these answers ({first.train.method}): on_policy starts from it")
        train_run(first, run, force=force, allow_chain=allow_chain, processes=processes)
        with processes.lead_first():
            pass  # the others wait until the leading process has published that student
    start = start_of(recipe, run) if recipe.train.further else None
    pairs = read_pairs(recipe, run, parts) if recipe.train.method == "dpo" else None
    fingerprint, work = training_fingerprint(recipe, run, start), run.path / "training"
    if not again and _is_trained(run, work, fingerprint):
        console.print(f"{run.student}: the student is up to date (--again trains it again)")
        if processes.lead_in_folder:
            _complete(recipe, run, work, parts)
        return
    check_no_link(run.student, run.student_sft, work)
    earlier = earlier_teachers(str(start) if start else initialised_from(recipe))
    logprobs = run.logprobs if recipe.train.kd.teacher == "stored" else run.teacher_logprobs
    setting = Setting(recipe.train, work, console, processes, recipe.teacher, logprobs)
    with extra_needed():
        if start and pairs is not None:
            prepared, checks = _on_pairs(start, pairs, recipe, run, setting, force=force)
        else:
            prepared, checks = _on_rows(parts, start, recipe, run, setting, force=force, allow_chain=allow_chain)
    rows = {part: len(own) for part, own in prepared.rows.items()} | {"test": len(parts.test)}
    console.print(f"training on {prepared.seen} rows; {rows['validation']} validate, {rows['test']} test")
    with processes.lead_first():
        if processes.lead_in_folder:
            open_work(work, fingerprint, again=again, console=console)
    _learn(prepared, work)
    if processes.lead:
        log = training_log(prepared, recipe, rows) | {"learning_rate_default": rate}
        section = lineage_section(recipe, log, parts.train, earlier) | {"precision": prepared.precision}
        section |= {"processes": processes.count, "fingerprint": fingerprint, "too_long_dropped": prepared.too_long}
        section["built" if student.built else "base"] = origin_of(student, run)
        section |= {"weights": "full", "start": trained_section(start)} if start else {}  # a whole model is saved
        _publish(work / "student", log, {**section, "checks": msgspec.to_builtins(checks)}, recipe, run, parts.test)
        _print_result(run, prepared.seen, log, section)


def train_launched(recipe: Recipe, run: RunDir, flags: dict[str, bool]) -> None:
    """Trains, as one of the processes that the launcher has started. The first holds the run's lock."""
    # The launcher's "true" makes from_pretrained leave every model but the first process's empty: the teacher too.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    processes = launched()
    with run.locked() if processes.lead else nullcontext():
        train_run(recipe, run, **flags, processes=processes)


def _learn(prepared: "Prepared", work: Path) -> None:
    """Trains, from the last checkpoint in `work` if there is one, and saves the student there."""
    with writing_weights(work):
        prepared.fit()
        prepared.save(work / "student")


def _print_result(run: RunDir, rows: str, log: dict[str, Any], section: dict[str, Any]) -> None:
    print(
        f"{run.student}: trained on {rows} rows, {log['tokens']:,} tokens in {log['wall_s']:,.0f} s, "
        f"{log['peak_memory_bytes'] / GIB:.1f} GiB of memory at most; validation loss "
        f"{section['validation_loss']:.4f}, at step {log['saved_step']} of {section['steps']}"
    )


def rows_to_train(recipe: Recipe, run: RunDir) -> int:
    """How many of a run's kept rows a training learns from: those of its part that are not too long.

    A student that is made first is made now. Raises RecipeError, UsageError or DataError as train_run does.
    """
    rows = read_parts(recipe, run).train
    with extra_needed():
        from transformers import AutoConfig

        from train.tokens import example_length

        tokenizer = load_tokenizer(student := initial_student(recipe, run, rows))
        longest = min(recipe.train.max_length, context_of(AutoConfig.from_pretrained(student)))
    examples = to_examples(rows, recipe.student, reasoning_form(recipe.train, tokenizer))
    measured = reporting(examples, f"{{:,}} of {len(examples):,} rows measured so far".format)
    return sum(example_length(example, tokenizer) <= longest for example in measured)


def first_training(recipe: Recipe, run: RunDir) -> Recipe | None:
    """The training of the student on answers that on_policy starts from, by train.kd.weights; None if it is there.

    It is not there if the rows or the settings have changed since. A student of another method is taken as it is.
    """
    if recipe.train.method != "on_policy" or recipe.train.start is not None:
        return None
    config = recipe.train.model_copy(update={"method": recipe.train.kd.weights})
    first, _ = with_learning_rate(recipe.model_copy(update={"train": config}))
    made = trained_section(learned(run))
    current = made and (made["method"] != config.method or made.get("fingerprint") == training_fingerprint(first, run))
    return None if current else first


def _on_rows(
    parts: Parts,
    start: Path | None,
    recipe: Recipe,
    run: RunDir,
    setting: Setting,
    *,
    force: bool,
    allow_chain: bool,
) -> tuple["Prepared", list[Check]]:
    """All before the first step on kept rows: the student, the checks, the tokens. Writes validation.jsonl.

    Of a student that the training starts from (`start`), the rows and the pair were checked before.
    """
    from train.trainer import prepare

    config, processes, checks = setting.config, setting.processes, checks_of(start)
    with processes.lead_first():
        student = str(start) if start else initial_student(recipe, run, parts.train)
    tokenizer = load_tokenizer(student)
    if start is None:
        lineage = read_lineage(run)
        checks += row_checks(parts, lineage, recipe)
        checks += pair_checks(recipe, student, tokenizer, parts.all, lineage, allow_chain=allow_chain)
        settle(checks, run, setting, force=force)
    shape = partial(to_examples, student=recipe.student, reasoning=reasoning_form(config, tokenizer))
    examples = {"train": shape(parts.train), "validation": shape(parts.validation)}
    if config.soft:
        examples["train"] = Lazy(parts.train, lambda row: shape([row])[0] | _of_teacher(row, recipe))
    what = f"tokenising {len(parts.train) + len(parts.validation):,} rows and checking their tokens"
    with writing_weights(rows_folder(setting.folder)), reporting_time(what, setting.console.print):
        prepared = prepare(student, examples, setting)
    ids = (row.id for row in joined(parts.train, parts.validation))
    of_tokens = list(token_checks(prepared, ids, config))
    checks = settle(of_tokens, run, setting, force=force, earlier=checks)
    if processes.lead:
        write_jsonl(run.validation, (parts.validation[index] for index in prepared.rows["validation"]))
    return prepared, checks


def _of_teacher(row: Kept, recipe: Recipe) -> dict[str, Any]:
    """What the teacher is `told` before the first turn that the student learns, and facts of its answer."""
    before = row.messages
    if recipe.train.loss_on == "all":
        before = [*takewhile(lambda turn: turn.role != "assistant", before)]
    told = template_turns(told_to_teacher(before, recipe.teacher))
    stripped = bool(row.reasoning) and recipe.train.reasoning == "strip"
    return {"id": row.id, "told": told, "template": template_options(recipe), "stripped": stripped}


def _on_pairs(
    start: Path, pairs: Pairs, recipe: Recipe, run: RunDir, setting: Setting, *, force: bool
) -> tuple["Prepared", list[Check]]:
    """All before the first step on preferences; what was checked before the training on rows is not checked again."""
    from train.dpo import prepare_dpo

    prepared = prepare_dpo(start, pairs, recipe, setting)
    of_tokens = list(token_checks(prepared, [pair.id for part in pairs for pair in pairs[part]], recipe.train))
    return prepared, settle(of_tokens, run, setting, force=force, earlier=checks_of(start))


def _is_trained(run: RunDir, work: Path, fingerprint: str) -> bool:
    """Whether the student is of this very training, and no further one that --again began was cut short.

    Raises UsageError if its files are damaged.
    """
    check_whole(run.student)
    return trained_section(run.student).get("fingerprint") == fingerprint and training_in(work) != fingerprint + AGAIN


def _with_training(run: RunDir, section: dict[str, Any]) -> dict[str, Any]:
    """The run's lineage with this training, and without the scores of the student before it."""
    return {stage: own for stage, own in with_section(run, "train", section).items() if stage != "evaluate"}


def _complete(recipe: Recipe, run: RunDir, work: Path, parts: Parts) -> None:
    """Does what is left to do after the student was saved: a kill or a full disk may have come between.

    A training that came to nothing may have replaced what the student was made from: that is made again.
    """
    if recipe.student and recipe.student.built:
        initial_student(recipe, run, parts.train)
    write_jsonl(run.test, parts.test)
    if read_lineage(run).get("train") != (section := trained_section(run.student)):
        write_lineage(run, _with_training(run, section))
    for left in (work, rows_folder(work)):
        shutil.rmtree(left, ignore_errors=True)


def _publish(
    folder: Path, log: dict[str, Any], section: dict[str, Any], recipe: Recipe, run: RunDir, test: Iterable[Kept]
) -> None:
    """The whole student folder appears at once, by rename, and its `test` rows and its lineage with it.

    Then the checkpoints beside it have no more use. `section`: `train` of the lineage.
    """
    work, lineage = folder.parent, _with_training(run, section)
    write_file(folder / TRAINING_LOG, f"{json.dumps(log, indent=1)}\n".encode())
    write_lineage(RunDir(folder), lineage)
    write_file(folder / CARD, model_card(recipe, lineage).encode())
    write_jsonl(work / run.test.name, test)
    share_files(folder)
    sync_tree(folder)  # an older student and the checkpoints go only when this one is on disk
    further, of_answers = recipe.train.further, learned_from_answers(run.student)
    if of_answers or not further:
        shutil.rmtree(run.student_sft, ignore_errors=True)  # of an earlier student
    if run.student.exists():
        run.student.rename(run.student_sft if of_answers and further else work / "old-student")
    (work / run.test.name).rename(run.test)  # not before: the older student was tested on others
    folder.rename(run.student)
    sync_path(run.path)
    write_lineage(run, lineage)
    (work / FINGERPRINT).unlink()  # first: what a kill leaves of the folder is not gone on from
    shutil.rmtree(work)
    shutil.rmtree(rows_folder(work), ignore_errors=True)  # preferences have none
