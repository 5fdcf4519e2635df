"""Checks of tokenised rows: what would teach something else than the answer is refused."""

import pytest
import torch

from pipeline.errors import DataError
from train.tokens import check_batch, check_labels, differing_prompts, fitting

STOP = 2
TEXT = {2: "<end>", 3: "\n", 10: "a", 11: "b", 12: "c"}


def decode(ids: list[int]) -> str:
    return "".join(TEXT.get(i, "?") for i in ids)


def row(ids: list[int], masked: int) -> dict[str, list[int]]:
    return {"input_ids": ids, "labels": [-100] * masked + ids[masked:]}


@pytest.mark.parametrize("ids", [[10, 11, 12, 2], [10, 11, 12, 2, 3], [10, 2, 11, 12, 2]])
def test_an_answer_that_ends_with_the_stop_token_passes(ids: list[int]) -> None:
    check_labels([row(ids, 2)], stops={STOP}, decode=decode)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (row([10, 11, 2], 3), "row 2: no token carries loss"),
        (row([10, 11, 2], 0), "loss falls on the prompt too"),
        (row([10, 11, 12], 1), "does not end with a stop token .*never learn to stop; its end is"),
        (row([10, 11, 2, 12], 1), "does not end with a stop token"),
        ({"input_ids": [10, 11, 2], "labels": [-100, 11, -100]}, "part of the answer carries no loss"),
    ],
)
def test_a_row_that_teaches_something_else_is_named(bad: dict[str, list[int]], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        check_labels([row([10, 11, 2], 1), bad], stops={STOP}, decode=decode)


def test_padding_that_masks_the_end_token_is_refused() -> None:
    rows = [row([10, 11, 12, 2], 1), row([10, 2], 1)]
    check_batch(rows, {"labels": torch.tensor([[-100, 11, 12, 2], [-100, 2, -100, -100]])})
    with pytest.raises(DataError, match="row 2: padding changed its labels"):
        check_batch(rows, {"labels": torch.tensor([[-100, 11, 12, 2], [-100, -100, -100, -100]])})
    with pytest.raises(DataError, match="row 2: padding changed its labels"):
        check_batch(rows, {"labels": torch.tensor([[-100, 11, 12, 2], [-100, 2, 2, 2]])})


def test_long_rows_are_refused_with_the_count_the_longest_and_the_mend() -> None:
    rows = [row([10] * length, 1) for length in (4, 9, 12)]
    with pytest.raises(
        DataError, match=r"2 of 3 training rows are longer than train\.max_length 8 .*12 tokens.*raise it to 12.*drop"
    ):
        fitting(rows, max_length=8, too_long="refuse", part="training")
    assert fitting(rows, max_length=9, too_long="drop", part="training") == [0, 1]
    assert fitting(rows, max_length=12, too_long="refuse", part="training") == [0, 1, 2]


def test_dropping_all_rows_is_an_error() -> None:
    with pytest.raises(DataError, match="none of 1 held-out rows has at most"):
        fitting([row([10] * 9, 1)], max_length=8, too_long="drop", part="held-out")


def test_a_context_unlike_the_one_at_inference_is_counted() -> None:
    rows = [row([10, 11, 12, 2], 2), row([10, 12, 12, 2], 2)]
    examples = [{"prompt": "same"}, {"prompt": "same"}]
    assert differing_prompts(rows, examples, lambda prompt: [10, 11]) == 1
