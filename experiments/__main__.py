"""`python -m experiments NAME RECIPE [--run DIR]`: an experiment on a run, in one command that can be resumed.

Makes the rows of its arms (experiments.arms), trains and evaluates each with the stages that `chain` runs, and
compares them (experiments.results). Everything is under experiments/NAME/ in the run directory: a run directory
for each arm, results.md, results.svg. `train` returns at once if an arm is trained; `evaluate` measures what it lacks.
"""

import os
import shutil
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from evaluate.figures.accuracy import verify_rules
from evaluate.measure.lm_eval import find_command
from evaluate.measure.pairwise import check_judges
from evaluate.measure.probes import choose_probes, choose_questions, read_probes
from evaluate.measure.results import ASKED_TEACHER, COMPARED, FOLDER, SCORED
from evaluate.measure.serving import speed_prompts
from evaluate.models import check_models
from evaluate.run import say
from experiments.arms import EXPERIMENTS
from experiments.results import as_markdown, compare, write_results
from experiments.runs import Arm, Design, Setup
from filters.run import recipe_rules
from pipeline.cli import parse_stage, run_stage, stage_parser
from pipeline.errors import RecipeError, RequestsFailed, UsageError
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir
from pipeline.students import BEFORE, TEACHER
from serve.command import check_tools


def main(argv: list[str] | None = None) -> None:
    parser = stage_parser("experiments", "Compares trainings on one run: its table and its plot.", kinds=EXPERIMENTS)
    parser.add_argument("--match", choices=["steps", "epochs"], default="steps", help="keep-rate: what is equal")
    parser.add_argument("--shares", default="30,50,80", help="keep-rate: percents of all answers")
    parser.add_argument("--b-model", help="teachers: the other teacher")
    parser.add_argument("--b-url", help="teachers: where it answers, if not where the first one does")
    parser.add_argument(
        "--b-price", help='teachers: its price, {"input": 0.15, "output": 0.6} in USD per million tokens'
    )
    parser.add_argument("--b-key-env", help="teachers: the variable that holds its key")
    parser.add_argument("--human", type=Path, help="human: JSONL of rows with prompt and completion, or messages")
    parser.add_argument("--seeds", type=int, default=3, help="seeds: how many trainings")
    parser.add_argument("--no-speed", action="store_true", help="start no server: no probes and no speed either")
    recipe, run, options = parse_stage(parser, argv)
    experiment = EXPERIMENTS[options.kind]
    if recipe.student is None:
        raise RecipeError(f"{options.recipe}: student is missing; an experiment needs a model to train")
    if recipe.train.method == "dpo" and options.kind in ("keep-rate", "human"):
        raise UsageError(f"{options.kind}: train.method dpo learns from pairs, and its arms have none; choose another")
    for option, wanted in experiment.needs.items():
        if getattr(options, option) is None:
            raise UsageError(f"{options.kind} needs {wanted}")
    check_settings(recipe, run, options.recipe, served=not options.no_speed)
    folder = run.path / "experiments" / options.kind
    no_speed = ["--no-speed"] if options.no_speed else []
    setup = Setup(recipe, options.recipe, options.flags, run, folder, options, options.recipe.read_bytes())

    say(f"{options.kind}: {experiment.question}")
    with RunDir(folder).locked(new=True):
        design = experiment.prepare(setup)
        check_asked(setup, design, served=not options.no_speed)
        failed = False
        for number, arm in enumerate(design.arms, start=1):
            say(f"\n── {number}/{len(design.arms)} {arm.name}")
            arm.run.save_recipe(setup.recipe_of(arm))
            setup.stage("train", arm.run, *arm.flags)
            share_measurements(setup, arm, design.arms)
            share_answers(setup, arm)
            failed |= setup.stage("evaluate", arm.run, *arm.flags, *no_speed) != 0
        results = compare(setup, design)
        write_results(results, folder)
    Console().print(Markdown(as_markdown(results)))
    print(f"\n{folder / 'results.md'}", flush=True)
    if failed:
        raise RequestsFailed("some requests of the evaluations failed for good; the same command makes them again")


def check_settings(recipe: Recipe, run: RunDir, path: Path, *, served: bool) -> None:
    """Raises what the filters and the evaluations would raise of the recipe, before anything is paid for."""
    recipe_rules(recipe, path)
    verify_rules(recipe, path)
    check_judges(recipe, run)
    check_models(recipe)
    if recipe.evaluate.probes_file:
        read_probes(recipe)
    if recipe.evaluate.lm_eval and served:
        find_command()


def check_asked(setup: Setup, design: Design, *, served: bool) -> None:
    """Raises what the evaluations would raise of the prompts that they ask, before the first arm is trained."""
    test = [row for rows in design.sources.values() for row in rows]
    for arm in design.arms:
        recipe = setup.recipe_of(arm)
        asked = [*choose_probes(recipe, arm.run, test).all, *choose_questions(recipe, arm.run).all]
        if served:
            check_tools(recipe, [*speed_prompts(recipe, arm.run, test), *asked])


def share_measurements(setup: Setup, arm: Arm, arms: list[Arm]) -> None:
    """Copies what other arms measured of the models that all share, where it is newer than what is here.

    Each file says what it was measured on. An arm of another teacher keeps its own, and the student that was made of
    it. So does each arm where training makes a new student: its first weights depend on the seed.
    """
    target, teacher, student = arm.run.path / FOLDER, setup.recipe_of(arm).teacher, setup.recipe.student
    assert student is not None
    target.mkdir(exist_ok=True)
    for other in arms:
        same = setup.recipe_of(other).teacher == teacher
        keys = [TEACHER] * same + [BEFORE] * (not (student.new if same else student.made))
        for key in keys:
            for path in (other.run.path / FOLDER).glob(f"*-{key}.json"):
                own = target / path.name
                if not own.exists() or own.stat().st_mtime_ns < path.stat().st_mtime_ns:
                    shutil.copy2(path, own)


def share_answers(setup: Setup, arm: Arm) -> None:
    """Lets all arms keep what a judge, and a teacher elsewhere, have answered in one folder: nothing is paid for twice.

    Answers and verdicts are found by what was asked, so no arm takes another's. An arm with another teacher keeps that
    teacher's answers in its own folder. Folders that an arm has already stay as they are.
    """
    target = arm.run.path / FOLDER
    target.mkdir(exist_ok=True)
    own_teacher = setup.recipe_of(arm).teacher == setup.recipe.teacher
    for name in (SCORED, COMPARED, *([ASKED_TEACHER] if own_teacher else [])):
        shared = setup.folder / "asked" / name
        shared.mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(target / name):
            (target / name).symlink_to(os.path.relpath(shared, target))


if __name__ == "__main__":
    run_stage(main)
