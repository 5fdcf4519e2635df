"""Asks a teacher the prompts of a recipe. Light: no torch, no transformers, no vllm.

    from generate import generate, agenerate

    summary = generate("recipes/mine.yaml")
    summary = await agenerate(recipe, run="runs/mine")   # in a notebook, or any running event loop

Importing this package imports nothing else: each function imports what it needs when it is called.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from generate.run import Summary
    from pipeline.recipe import Recipe
    from pipeline.rundir import RunDir

__all__ = ["agenerate", "generate"]


def generate(
    recipe: "Recipe | Path | str",
    run: "RunDir | Path | str | None" = None,
    *,
    quiet: bool = False,
    retry_failures: bool = False,
) -> "Summary":
    """Asks everything that the run has no answer to, as `python -m generate` does, and returns the counts.

    `recipe`: a Recipe, taken as it is, or the path of one, which `DISTILL_*` variables override. `run`: its folder;
    `runs/<name of the recipe>` without one. The run is locked meanwhile. `quiet`: no progress. `retry_failures`: asks
    again what failed for good earlier. Raises DistillError when it cannot go on (what was answered is kept, and the
    next call goes on from there), KeyboardInterrupt after Ctrl-C. Failed requests raise nothing: `Summary.failed`.
    """
    from generate.run import generate as generate_locked

    recipe, run = _resolved(recipe, run)
    with run.locked(new=True):
        return generate_locked(recipe, run, quiet=quiet, retry_failures=retry_failures)


async def agenerate(
    recipe: "Recipe | Path | str",
    run: "RunDir | Path | str | None" = None,
    *,
    quiet: bool = False,
    retry_failures: bool = False,
) -> "Summary":
    """As `generate`, in the running event loop. Leaves signals alone: cancel the task to stop it.

    A cancelled call abandons the requests in flight; what was answered is kept.
    """
    from generate.run import agenerate as agenerate_locked

    recipe, run = _resolved(recipe, run)
    with run.locked(new=True):
        return await agenerate_locked(recipe, run, quiet=quiet, retry_failures=retry_failures)


def _resolved(recipe: "Recipe | Path | str", run: "RunDir | Path | str | None") -> "tuple[Recipe, RunDir]":
    from pipeline.recipe import Recipe, load_recipe
    from pipeline.rundir import RunDir

    if not isinstance(recipe, Recipe):
        recipe = load_recipe(Path(recipe))
    if not isinstance(run, RunDir):
        run = RunDir(Path(run) if run is not None else Path("runs") / recipe.name)
    return recipe, run
