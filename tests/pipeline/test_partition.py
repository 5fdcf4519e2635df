"""The part of a prompt: by its own words and the seed, and by nothing else."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import RecipeError
from pipeline.prompts_config import PromptsConfig, UserConfig
from pipeline.recipe import load_recipe
from pipeline.records import Json, Message, Prompt, Slots

PROMPTS = PromptsConfig(template="x", count=1, validation=0.05, test=0.1)
GROUPED = PromptsConfig(file=Path("x.jsonl"), group="function", validation=0.3, test=0.3)


def asked(text: str, *, system: str | None = None, columns: Json | None = None, slots: Slots | None = None) -> Prompt:
    messages = [*([Message("system", system)] if system else []), Message("user", text)]
    return Prompt(id="p", messages=messages, columns=columns or {}, slots=slots or {})


def at(prompt: Prompt, seed: int = 0) -> float:
    return PROMPTS.model_copy(update={"seed": seed}).position_of(prompt)


def test_the_shares_are_what_was_asked_for() -> None:
    parts = Counter(PROMPTS.part_of(asked(f"Question {n}?")) for n in range(20_000))
    # Three standard deviations of 20,000 draws: 127 for test, 92 for validation.
    assert abs(parts["test"] - 2000) < 127 and abs(parts["validation"] - 1000) < 92


@given(text=st.text(st.characters(codec="utf-8"), min_size=1, max_size=30), seed=st.integers(0, 9))
def test_the_same_question_in_other_spacing_or_case_is_in_the_same_part(text: str, seed: int) -> None:
    other = f"  {text.replace(' ', '  ')}\n"
    assert at(asked(text), seed) == at(asked(other), seed)
    prompts = PROMPTS.model_copy(update={"seed": seed})
    assert prompts.part_of(asked(text)) == prompts.part_of(asked(other))
    assert at(asked("A Story"), seed) == at(asked("a story"), seed)


def test_the_system_message_and_the_seed_count() -> None:
    assert at(asked("Hi"), 0) != at(asked("Hi", system="Be kind."), 0) != at(asked("Hi"), 1)


def test_a_part_is_the_same_tomorrow() -> None:
    """Data sets that were published, and runs that are compared, depend on it."""
    assert at(asked("토끼 이야기")) == pytest.approx(0.875381908653349, abs=1e-12)


def test_a_larger_share_takes_no_prompt_out_of_the_test() -> None:
    config, larger = PromptsConfig(template="x", count=1), PromptsConfig(template="x", count=1, test=0.3)
    tested = [n for n in range(500) if config.part_of(asked(f"q{n}")) == "test"]
    assert tested and all(larger.part_of(asked(f"q{n}")) == "test" for n in tested)


def test_prompts_of_one_group_are_in_one_part_and_the_groups_in_all() -> None:
    """Forty functions, each asked for in three ways."""
    functions = [f"f{n}" for n in range(40)]
    parts = {
        name: {
            GROUPED.part_of(asked(f"{ask} {name}", columns={"function": name})) for ask in ("Write", "Give me", "Do")
        }
        for name in functions
    }
    assert all(len(own) == 1 for own in parts.values())
    assert set.union(*parts.values()) == {"train", "validation", "test"}
    alone = PROMPTS.model_copy(update={"validation": 0.3, "test": 0.3})
    assert any(alone.part_of(asked(f"Write {name}")) != alone.part_of(asked(f"Give me {name}")) for name in functions)


def test_a_group_is_any_value_and_a_slot_is_one_too() -> None:
    """As text: a number of Parquet and the same number of CSV are one group."""
    one, other = asked("a", columns={"function": 7}), asked("b", columns={"function": "7"})
    assert GROUPED.position_of(one) == GROUPED.position_of(other)
    assert GROUPED.position_of(asked("a", slots={"function": "7"})) == GROUPED.position_of(one)
    by_list = asked("a", columns={"function": ["x", {"y": 1}]})
    assert GROUPED.position_of(by_list) == GROUPED.position_of(asked("b", columns={"function": ["x", {"y": 1}]}))


def test_chosen_values_are_one_group_in_any_order() -> None:
    config = PromptsConfig(template="{k}", slots={"k": {"choose": 2, "from": ["a", "b", "c"]}}, count=3, group="k")
    one, other = asked("x", slots={"k": ["a", "b"]}), asked("y", slots={"k": ["b", "a"]})
    assert (
        config.position_of(one) == config.position_of(other) != config.position_of(asked("x", slots={"k": ["a", "c"]}))
    )


def test_a_prompt_without_a_group_stands_by_itself() -> None:
    for prompt in (asked("a"), asked("a", columns={"function": None})):
        assert GROUPED.position_of(prompt) == PROMPTS.position_of(asked("a"))


def test_a_group_that_no_slot_has_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("{name: x, teacher: {model: t}, prompts: {template: '{a}', slots: {a: [x]}, count: 1, group: b}}")
    with pytest.raises(RecipeError, match=r"prompts group: the template has no slot 'b'; there are a"):
        load_recipe(path)


def test_shares_that_leave_nothing_to_train_on_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("{name: x, teacher: {model: t}, prompts: {template: Hi, count: 1, validation: 0.5, test: 0.5}}")
    with pytest.raises(RecipeError, match=r"prompts validation 0\.5 and test 0\.5 leave no prompt to train on"):
        load_recipe(path)


def test_a_question_that_no_second_model_continued_is_parted_by_its_own_words() -> None:
    """As rows that people wrote are, and probes; a conversation stays with the question that it began with."""
    talks = PromptsConfig(file=Path("x.jsonl"), user=UserConfig(turns=1))
    turns = [Message("user", "Hi"), Message("assistant", "Hello."), Message("user", "And now?")]
    assert talks.position_of(asked("Hi")) == talks.position_of(Prompt(id="p", messages=turns)) == at(asked("Hi"))
    assert talks.position_of(asked("Hi", system="s")) == at(asked("Hi", system="s")) != talks.position_of(asked("Bye"))
