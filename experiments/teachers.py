"""The second teacher of the experiment `teachers`: its values, and what would make the two hard to compare."""

from argparse import Namespace

from generate.run import unasked
from pipeline.errors import UsageError
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir
from pipeline.teacher_config import TeacherConfig


def second_teacher(first: TeacherConfig, options: Namespace) -> list[str]:
    """The flags of the second teacher: at a URL of its own without the first one's key and other servers.

    Raises UsageError if the first one's headers would be sent there.
    """
    if options.b_url and (first.headers or first.query):
        raise UsageError(
            f"--b-url {options.b_url}: teacher.headers and teacher.query are the first teacher's, and would be sent "
            "there, too; take them out of the recipe"
        )
    if options.b_model == first.model and options.b_url in (None, first.url):
        raise UsageError(f"--b-model {options.b_model}: this is the recipe's own teacher; name another one")
    flags = ["--teacher.model", options.b_model, "--teacher.price", options.b_price or "null"]
    if options.b_url:
        flags += ["--teacher.base_url", options.b_url, "--teacher.urls_file", "null"]
    if options.b_url or options.b_key_env:
        flags += ["--teacher.api_key_env", options.b_key_env or TeacherConfig.model_fields["api_key_env"].default]
    return flags


def check_judges(first: Recipe, second: Recipe) -> None:
    """Raises UsageError if the recipes of two teachers have different judges, whose scores cannot be compared."""
    for section in ("filters", "evaluate"):
        if config := getattr(first, section).judge:
            name = f"{section}.judge"
            judges = [recipe.teacher.another(config, name) for recipe in (first, second)]
            one, other = (f"{judge.model} at {judge.url}" for judge in judges)
            if one != other:
                raise UsageError(
                    f"{name}: the answers of one teacher would be judged by {one}, those of the other by {other}; "
                    f"set {name}.model and {name}.base_url"
                )


def check_all_asked(recipe: Recipe, run: RunDir, fix: str) -> None:
    """Raises UsageError if a teacher's run has answers that the recipe does not ask for: the other's run lacks them."""
    if more := unasked(recipe, run):
        raise UsageError(
            f"{run.path}: the recipe does not ask for {more:,} of its answers (other prompts, sampling or URL), "
            f"so the teachers' prompts would differ; give the values that it was made with, or {fix}"
        )
