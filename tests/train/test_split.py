"""The held-out split: by prompt, deterministic, never all."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import DataError
from pipeline.records import Kept
from tests.tiny_student import kept_row
from train.rows import split_rows


def rows_of(prompts: int, samples: int = 1) -> list[Kept]:
    return [kept_row(s * prompts + p, f"Question {p}", f"Answer {s}") for s in range(samples) for p in range(prompts)]


def questions(rows: list[Kept]) -> set[str]:
    return {row.messages[-1].content for row in rows}


@pytest.mark.parametrize(
    ("prompts", "share", "held"),
    [(2, 0.01, 1), (2, 0.99, 1), (10, 0.1, 1), (10, 0.11, 2), (30, 0.1, 3), (10, 0.999, 9), (100, 0.55, 55)],
)
def test_the_share_of_distinct_prompts_is_rounded_up_and_never_all(prompts: int, share: float, held: int) -> None:
    split = split_rows(rows_of(prompts, samples=3), share=share, seed=0)
    assert len(questions(split.held_out)) == held
    assert len(split.held_out) == held * 3
    assert len(split.train) == (prompts - held) * 3


@given(
    asked=st.lists(st.integers(0, 12), min_size=2, max_size=60).filter(lambda asked: len(set(asked)) > 1),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 5),
)
def test_no_prompt_is_in_both_and_every_row_is_in_one(asked: list[int], share: float, seed: int) -> None:
    rows = [kept_row(number, f"Question {prompt}", f"Answer {number}") for number, prompt in enumerate(asked)]
    split = split_rows(rows, share=share, seed=seed)
    assert not questions(split.train) & questions(split.held_out)
    assert sorted(row.id for row in split.train + split.held_out) == sorted(row.id for row in rows)
    assert split.train
    assert split.held_out


def test_the_split_does_not_depend_on_the_order_or_the_prompt_id() -> None:
    rows = rows_of(20)
    renamed = [kept_row(int(row.id[1:]), row.messages[0].content, row.text, prompt_id="same") for row in rows]
    first = split_rows(rows, share=0.3, seed=0)
    second = split_rows(renamed[::-1], share=0.3, seed=0)
    assert questions(first.held_out) == questions(second.held_out)


def test_another_seed_holds_out_other_prompts() -> None:
    splits = {frozenset(questions(split_rows(rows_of(20), share=0.3, seed=seed).held_out)) for seed in range(4)}
    assert len(splits) > 1


def test_one_distinct_prompt_cannot_be_split() -> None:
    with pytest.raises(DataError, match="5 kept rows answer 1 distinct prompt; at least 2"):
        split_rows(rows_of(1, samples=5), share=0.1, seed=0)
