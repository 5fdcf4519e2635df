"""The three parts of the kept rows: by prompt, none empty, and independent of what the filters kept."""

import random
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import DataError
from pipeline.prompts_config import PromptsConfig
from pipeline.records import Kept
from tests.tiny_student import ONE, kept_row, make_recipe, make_run
from train.record import training_fingerprint
from train.rows import Parts, part_rows, read_parts


def rows_of(prompts: int, samples: int = 1) -> list[Kept]:
    return [kept_row(s * prompts + p, f"Question {p}", f"Answer {s}") for s in range(samples) for p in range(prompts)]


def shares(validation: float = 0.05, test: float = 0.1, seed: int = 0) -> PromptsConfig:
    return PromptsConfig(template="Hi", count=1, seed=seed, validation=validation, test=test)


def questions(rows: list[Kept]) -> set[str]:
    return {row.messages[-1].content for row in rows}


def of(parts: Parts) -> tuple[set[str], set[str], set[str]]:
    return questions(parts.train), questions(parts.validation), questions(parts.test)


@given(
    asked=st.lists(st.integers(0, 12), min_size=3, max_size=60).filter(lambda asked: len(set(asked)) > 2),
    seed=st.integers(0, 5),
)
def test_no_prompt_is_in_two_parts_every_row_is_in_one_and_none_is_empty(asked: list[int], seed: int) -> None:
    rows = [kept_row(number, f"Question {prompt}", f"Answer {number}") for number, prompt in enumerate(asked)]
    parts = part_rows(rows, shares(seed=seed, validation=ONE, test=ONE))
    train, validation, test = of(parts)
    assert train and validation and test
    assert not train & validation and not train & test and not validation & test
    assert sorted(row.id for row in parts.all) == sorted(row.id for row in rows)


def test_what_the_filters_keep_moves_no_prompt_to_another_part() -> None:
    """Test prompts are set apart before anything is filtered: whichever answers are dropped, the others stay put."""
    rows = rows_of(300, samples=2)
    whole = of(part_rows(rows, shares()))
    for seed in range(5):
        some = random.Random(seed).sample(rows, 200)
        assert all(own <= before for own, before in zip(of(part_rows(some, shares())), whole, strict=True))


def test_a_run_that_grows_keeps_its_parts() -> None:
    small, large = of(part_rows(rows_of(300), shares())), of(part_rows(rows_of(900), shares()))
    assert all(before <= after for before, after in zip(small, large, strict=True))


def test_the_parts_do_not_depend_on_the_order_or_the_prompt_id() -> None:
    rows = rows_of(4, samples=2)
    renamed = [kept_row(int(row.id[1:]), row.messages[0].content, row.text, prompt_id="same") for row in rows]
    assert of(part_rows(rows, shares(ONE, ONE))) == of(part_rows(renamed[::-1], shares(ONE, ONE)))


def test_another_seed_sets_other_prompts_apart() -> None:
    assert len({frozenset(questions(part_rows(rows_of(60), shares(seed=seed)).test)) for seed in range(4)}) == 4


def test_a_part_without_a_row_takes_the_training_prompt_of_the_lowest_hash() -> None:
    """All its samples go along. A larger share would have taken the same prompt."""
    rows = rows_of(5, samples=2)
    parts = part_rows(rows, shares(ONE, ONE))
    assert [len(part) for part in (parts.train, parts.validation, parts.test)] == [6, 2, 2]
    first = min(questions(rows), key=lambda text: next(n for n in range(1, 100) if is_tested(text, n / 100)))
    assert questions(parts.test) == {first}


def is_tested(text: str, share: float) -> bool:
    return shares(ONE, share).part_of(kept_row(0, text, "")) == "test"


def test_fewer_than_three_prompts_cannot_be_parted() -> None:
    with pytest.raises(
        DataError, match=r"10 kept rows answer 2 distinct prompts; no row is left for validation: generate more prompts"
    ):
        part_rows(rows_of(2, samples=5), shares(ONE, ONE))


def test_rows_to_test_on_are_trained_on_by_none() -> None:
    """Whoever answered: a question that is tested is not trained on, in other spacing and case either."""
    rows = [kept_row(0, "Held?", "Yes."), kept_row(1, " held?\n", "Yes, yes."), *rows_of(40)]
    test_rows = [kept_row(99, "Held?", "From another run.")]
    parts = part_rows(rows, shares(), test_rows)
    own = questions(part_rows(rows_of(40), shares()).test)
    assert parts.test == test_rows and own  # the run's own test prompts are not trained on either
    assert questions(parts.train) | questions(parts.validation) == questions(rows_of(40)) - own
    with pytest.raises(DataError, match=r"without the questions of train.test_rows \(1\); no row is left for train"):
        part_rows(rows[:2], shares(), test_rows)


def grouped(prompts: int, groups: int) -> list[Kept]:
    return [
        msgspec.structs.replace(row, columns={"function": number % groups})
        for number, row in enumerate(rows_of(prompts))
    ]


def test_groups_stay_together_in_a_small_run_too() -> None:
    """Where a part is empty, a whole group moves there."""
    config = shares(ONE, ONE).model_copy(update={"group": "function"})
    rows = grouped(30, 5)
    parts = part_rows(rows, config)
    own = [{row.columns["function"] for row in part} for part in (parts.train, parts.validation, parts.test)]
    assert [len(groups) for groups in own] == [3, 1, 1] and len(set.union(*own)) == 5
    assert [len(part) for part in (parts.train, parts.validation, parts.test)] == [18, 6, 6]
    with pytest.raises(DataError, match=r"8 kept rows answer 8 distinct prompts of 2 groups; no row is left for valid"):
        part_rows(grouped(8, 2), config)


def test_rows_without_the_column_of_the_group_are_refused(tmp_path: Path) -> None:
    """As before the filters joined a new column, or after a slip of the pen; null is no group, and is said."""
    recipe = make_recipe("student", validation=0.2, test=0.2)
    recipe = recipe.model_copy(update={"prompts": recipe.prompts.model_copy(update={"group": "function"})})
    rows = [*grouped(30, 10), msgspec.structs.replace(kept_row(99, "Alone", "x"), columns={"function": None})]
    rows.append(msgspec.structs.replace(kept_row(97, "By slot", "x"), slots={"function": "f"}))
    assert len(read_parts(recipe, make_run(tmp_path / "run", rows)).all) == 32
    run = make_run(tmp_path / "other", [*rows, kept_row(98, "Without", "x")])
    with pytest.raises(DataError, match=r"kept\.jsonl: row r98 has no column 'function', which prompts\.group names"):
        read_parts(recipe, run)


def test_groups_of_rows_to_test_on_are_trained_on_by_none() -> None:
    config = shares().model_copy(update={"group": "function"})
    rows = grouped(60, 20)
    parts = part_rows(
        rows, config, [msgspec.structs.replace(kept_row(99, "Another way to ask", "x"), columns={"function": 3})]
    )
    assert 3 not in {row.columns["function"] for row in (*parts.train, *parts.validation)}
    assert {row.columns["function"] for row in parts.train} > {4, 5}


def test_a_question_to_test_on_may_have_no_group() -> None:
    """As a row that a person wrote: its question is trained on by none, whatever group it has elsewhere."""
    config = shares().model_copy(update={"group": "function"})
    parts = part_rows(grouped(60, 20), config, [kept_row(99, "Question 7", "By a person.")])
    assert "Question 7" not in questions(parts.train) | questions(parts.validation)
    assert questions(parts.train) > {"Question 8", "Question 27"}


def test_parts_by_group_are_another_training(tmp_path: Path) -> None:
    run, recipe = make_run(tmp_path, grouped(30, 5)), make_recipe("student")
    prompts = recipe.prompts.model_copy(update={"group": "function"})
    other = recipe.model_copy(update={"prompts": prompts})
    assert training_fingerprint(other, run) != training_fingerprint(recipe, run)
