"""The settings: every key has a meaning, docs/settings.md is true, and `--help` shows them all at once and fast."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.recipe import Recipe, load_recipe
from pipeline.settings_page import groups, help_text, page

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "trl", "openai", "aiohttp"}


def test_the_page_is_what_the_models_say() -> None:
    assert (ROOT / "docs/settings.md").read_text(encoding="utf-8") == page(), (
        "run `python -m pipeline.settings_page > docs/settings.md`"
    )


def test_every_key_has_a_meaning_and_a_type() -> None:
    keys = [setting for group in groups() for setting in group.keys]
    assert [setting.key for setting in keys if not setting.meaning.endswith((".", "…"))] == []
    assert len({setting.key for setting in keys}) == len(keys) > 80
    known = {setting.key: setting for setting in keys}
    assert known["sampling.top_p"][1:3] == ("number", "0.9")
    assert known["teacher.model"].default == "required"
    assert known["generate.concurrency"][1:3] == ("auto or integer", "auto")
    assert known["filters.judge.schema"].default == "true"  # by the name that a recipe uses
    assert known["train.eval_steps"].default == "null"


def test_every_key_of_the_recipes_that_ship_is_listed() -> None:
    known = {group.name for group in groups()} | {setting.key for group in groups() for setting in group.keys}
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        recipe = load_recipe(path)
        for section, value in recipe:
            keys = getattr(value, "model_fields_set", set()) if section != "name" else set()
            assert {f"{section}.{key}" for key in keys} <= known, path
    assert {f"{name}" for name in Recipe.model_fields} <= known


@pytest.mark.parametrize("stage", ["generate", "filters", "train", "evaluate", "serve", "chain"])
def test_help_lists_every_key_with_its_default_and_meaning(stage: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", stage, "--help"], capture_output=True, text=True, check=True, cwd=ROOT, timeout=60
    )
    assert done.stdout.endswith(help_text())
    assert "--run RUN" in done.stdout
    assert "--sampling.top_p  (number; 0.9)" in done.stdout


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, pipeline.cli, pipeline.settings_page; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not {name.split(".")[0] for name in done.stdout.split()} & HEAVY
