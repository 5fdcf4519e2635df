"""`python -m chain RECIPE`: serve, generate, filter, train, evaluate, in one command and one terminal.

Each stage is the very command a user would type, run as a process of its own; this module only starts them in turn
and keeps the teacher's server up while a stage may ask it. Every stage knows what it has done already, so the same
command goes on after an interrupt.
"""

import time
from argparse import Namespace
from contextlib import ExitStack, nullcontext
from pathlib import Path

from chain.last_words import last_words
from chain.stages import REQUESTS_FAILED, judges, stage, teacher, teaches
from evaluate.figures.accuracy import verify_rules
from evaluate.measure.lm_eval import find_command
from evaluate.measure.pairwise import check_judges
from evaluate.measure.probes import check_category, read_probes
from evaluate.models import check_models, never_asked, weights_elsewhere
from filters.duplicates import dedup_sources
from filters.run import recipe_rules
from generate.prompts import iter_prompts
from generate.run import check_stored, pending
from pipeline.cli import parse_stage, run_stage, stage_parser
from pipeline.errors import RecipeError, RequestsFailed, UsageError
from pipeline.lineage import read_lineage, taught_by
from pipeline.recipe import Recipe
from pipeline.rundir import CHAIN_LOCK, RunDir
from serve.command import check_tools
from serve.machine import detect
from train.checks.before import check_trainable
from train.checks.licences import licence_check, strictest, terms_of
from train.checks.pair import teacher_check


def main(argv: list[str] | None = None) -> None:
    parser = stage_parser("chain", "Runs all stages of a recipe; run again, it goes on where it was.")
    parser.add_argument(
        "--dry-run", action="store_true", help="check the recipe; what would be asked, and its cost; sends nothing"
    )
    recipe, run, options = parse_stage(parser, argv)
    if recipe.student is None:
        raise RecipeError(f"{options.recipe}: student is missing; the chain needs a model to train")
    recipe_rules(recipe, options.recipe)  # a wrong setting is told before the answers are paid for
    verify_rules(recipe, options.recipe)
    check_judges(recipe, run)
    if recipe.evaluate.lm_eval:
        find_command()
    asks = pending(recipe, run) > 0
    check_teachers(recipe, run, asks=asks)
    if asks:
        check_stored(recipe, run)
        check_trainable(recipe, run, gpus=detect().gpus)
        check_files(recipe, run, options.recipe)
        if recipe.evaluate.verify:
            check_category(recipe, iter_prompts(recipe))
    if weights_elsewhere(recipe) and (note := never_asked(recipe)):
        print(note, flush=True)
    if options.dry_run:
        stage("generate", run, options.recipe, [*options.flags, "--dry-run"])
        return
    with run.locked(new=True, name=CHAIN_LOCK):  # before a teacher is started: a second chain is refused at once
        run_stages(recipe, run, options, asks=asks)


def run_stages(recipe: Recipe, run: RunDir, options: Namespace, *, asks: bool) -> None:
    """Runs the stages in turn, with the teacher's server up while a stage may ask it.

    Raises StageFailed if one ends the chain, RequestsFailed at the end if requests failed for good.
    """
    assert recipe.student is not None
    started, before = time.monotonic(), options.recipe.read_bytes()

    def heading(number: int, text: str) -> None:
        print(f"\n── {number}/4 {text}", flush=True)
        if options.recipe.read_bytes() != before:
            print(
                f"note: {options.recipe} has changed since this command began; the stage follows it as it is now",
                flush=True,
            )

    heading(1, f"generate: {recipe.teacher.model} answers")
    # A server takes a minute to start: only where there may be something to ask it.
    asks &= recipe.prompts.answers is None
    with teacher(recipe, run) if asks or judges(recipe) else nullcontext() as keep_up:
        code = stage("generate", run, options.recipe, options.flags, keep_up)
        heading(2, "filters: what is worth learning from")
        judged = stage("filters", run, options.recipe, options.flags, keep_up)
    heading(3, f"train: {recipe.student.model} learns")
    with teacher(recipe, run) if teaches(recipe) else nullcontext() as keep_up:
        stage("train", run, options.recipe, options.flags, keep_up)
    heading(4, "evaluate: what the student became")
    evaluated = stage("evaluate", run, options.recipe, options.flags)

    print("", *last_words(options.recipe, run, options.flags), sep="\n", flush=True)
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    print(f"\nDone in {minutes} min {seconds} s. The report: {run.report_html}", flush=True)
    if code == REQUESTS_FAILED:
        raise RequestsFailed(f"some requests failed for good; see {run.failures}")
    if judged == REQUESTS_FAILED:
        raise RequestsFailed(f"the judge gave no answer about some rows; see {run.dropped}")
    if evaluated == REQUESTS_FAILED:
        raise RequestsFailed(f"some requests of the evaluation failed for good; see {run.report_html}")


def check_files(recipe: Recipe, run: RunDir, recipe_path: Path) -> None:
    """Raises RecipeError or DataError if a file that the filters or the evaluation read cannot be read.

    UsageError, too, if the report's other models are not there, or vLLM would refuse what they are asked.
    """
    check_models(recipe)
    if recipe.filters.dedup:
        with ExitStack() as stack:
            dedup_sources(recipe.filters.dedup, run, recipe_path, stack)
    if recipe.evaluate.probes_file:
        read_probes(recipe)
    check_tools(recipe, iter_prompts(recipe))


def check_teachers(recipe: Recipe, run: RunDir, *, asks: bool) -> None:
    """Raises UsageError where a teacher, or its terms, would stop the training: before further answers are paid for."""
    assert recipe.student is not None
    teacher, stated = recipe.teacher.model, recipe.train.teacher_licence
    taught = taught_by(recipe, read_lineage(run) if run.completions.exists() else {})
    if asks:
        terms = {name: terms_of(name, stated=stated) for name in dict.fromkeys([teacher, *taught])}
        decisive = strictest(terms)
        check = licence_check(decisive, terms[decisive], recipe.student.model)
    elif teacher not in taught:
        check = teacher_check(teacher, taught)
    else:
        return
    if check.stops(recipe.train.accept):
        accept = f", or, if you may learn from it as it is: train.accept: [{check.name}]" * (check.status == "warn")
        raise UsageError(f"check {check.name}: {check.finding}; {check.fix}{accept}; nothing was asked")


if __name__ == "__main__":
    run_stage(main)
