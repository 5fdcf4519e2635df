"""The part of a prompt: by its own words and the seed, and by nothing else."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import RecipeError
from pipeline.partition import position
from pipeline.recipe import PromptsConfig, load_recipe
from pipeline.records import Message

PROMPTS = PromptsConfig(template="x", count=1, validation=0.05, test=0.1)


def asked(text: str, *, system: str | None = None) -> list[Message]:
    return [*([Message("system", system)] if system else []), Message("user", text)]


def test_the_shares_are_what_was_asked_for() -> None:
    parts = Counter(PROMPTS.part_of(asked(f"Question {n}?")) for n in range(20_000))
    # Three standard deviations of 20,000 draws: 127 for test, 92 for validation.
    assert abs(parts["test"] - 2000) < 127 and abs(parts["validation"] - 1000) < 92


@given(text=st.text(st.characters(codec="utf-8"), min_size=1, max_size=30), seed=st.integers(0, 9))
def test_the_same_question_in_other_spacing_or_case_is_in_the_same_part(text: str, seed: int) -> None:
    other = f"  {text.replace(' ', '  ')}\n"
    assert position(asked(text), seed) == position(asked(other), seed)
    prompts = PROMPTS.model_copy(update={"seed": seed})
    assert prompts.part_of(asked(text)) == prompts.part_of(asked(other))
    assert position(asked("A Story"), seed) == position(asked("a story"), seed)


def test_the_system_message_and_the_seed_count() -> None:
    assert position(asked("Hi"), 0) != position(asked("Hi", system="Be kind."), 0) != position(asked("Hi"), 1)


def test_a_part_is_the_same_tomorrow() -> None:
    """Data sets that were published, and runs that are compared, depend on it."""
    assert position(asked("토끼 이야기"), 0) == pytest.approx(0.875381908653349, abs=1e-12)


def test_a_larger_share_takes_no_prompt_out_of_the_test() -> None:
    config, larger = PromptsConfig(template="x", count=1), PromptsConfig(template="x", count=1, test=0.3)
    tested = [n for n in range(500) if config.part_of(asked(f"q{n}")) == "test"]
    assert tested and all(larger.part_of(asked(f"q{n}")) == "test" for n in tested)


def test_shares_that_leave_nothing_to_train_on_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("{name: x, teacher: {model: t}, prompts: {template: Hi, count: 1, validation: 0.5, test: 0.5}}")
    with pytest.raises(RecipeError, match=r"prompts validation 0\.5 and test 0\.5 leave no prompt to train on"):
        load_recipe(path)
