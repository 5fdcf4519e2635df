"""`python -m experiments NAME RECIPE [--run DIR]`: an experiment on a run, in one command that can be resumed.

Makes the rows of its arms (experiments.arms), trains and evaluates each with the stages that `chain` runs, and
compares them (experiments.results). Everything is under experiments/NAME/ in the run directory: a run directory
for each arm, results.md, results.svg. An arm that is finished is not done again.
"""

import hashlib
import shutil
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from evaluate.run import say
from experiments.arms import EXPERIMENTS, Arm, Setup
from experiments.results import as_markdown, compare, write_results
from pipeline.cli import parse_stage, run_stage, stage_parser
from pipeline.errors import RecipeError, UsageError
from pipeline.recipe import load_recipe
from pipeline.rundir import RunDir, write_file
from pipeline.students import BEFORE, TEACHER

SHARED = (TEACHER, BEFORE)  # models that are measured once for all arms
FINISHED = "finished"  # in an arm: what its report was made of


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
    for option, wanted in experiment.needs.items():
        if getattr(options, option) is None:
            raise UsageError(f"{options.kind} needs {wanted}")
    folder = run.path / "experiments" / options.kind
    setup = Setup(recipe, options.recipe, options.flags, run, folder, options, options.recipe.read_bytes())

    say(f"{options.kind}: {experiment.question}")
    with RunDir(folder).locked(new=True):
        design = experiment.prepare(setup)
        for number, arm in enumerate(design.arms, start=1):
            say(f"\n── {number}/{len(design.arms)} {arm.name}")
            finish(setup, arm, design.arms)
        results = compare(setup, design)
        write_results(results, folder)
    Console().print(Markdown(as_markdown(results)))
    print(f"\n{folder / 'results.md'}", flush=True)


def finish(setup: Setup, arm: Arm, arms: list[Arm]) -> None:
    """Trains and evaluates an arm, unless just that was done before."""
    state, mark = fingerprint(setup, arm), arm.run.path / FINISHED
    if mark.is_file() and mark.read_text() == state and arm.run.report.is_file():
        say(f"{arm.run.path}: finished")
        return
    arm.run.save_recipe(load_recipe(setup.path, [*setup.flags, *arm.flags]))
    setup.stage("train", arm.run, *arm.flags)
    share_measurements(arm, arms)
    setup.stage("evaluate", arm.run, *arm.flags, *(["--no-speed"] if setup.options.no_speed else []))
    write_file(mark, state.encode())


def fingerprint(setup: Setup, arm: Arm) -> str:
    """Changes with all that an arm's report depends on: recipe, rows, test rows, whether servers are started."""
    recipe = load_recipe(setup.path, [*setup.flags, *arm.flags])
    digest = hashlib.sha256(f"{recipe.model_dump_json()}{setup.options.no_speed}".encode())
    for path in (arm.run.kept, setup.folder / "test.jsonl", arm.run.preferences):
        if path.is_file():
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def share_measurements(arm: Arm, arms: list[Arm]) -> None:
    """Copies what other arms measured of the models that all share; each file says what it was measured on."""
    target = arm.run.path / "evaluation"
    target.mkdir(exist_ok=True)
    for other in arms:
        for key in SHARED:
            for path in (other.run.path / "evaluation").glob(f"*-{key}.json"):
                if not (target / path.name).exists():
                    shutil.copyfile(path, target / path.name)


if __name__ == "__main__":
    run_stage(main)
