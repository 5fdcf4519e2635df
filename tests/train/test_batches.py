"""Which rows a step takes: each once an epoch, in one process or several, in an order that survives a resume."""

import random
from itertools import chain, pairwise

import pytest
import torch

from train.batches import StepSampler, micro_batches, split


def sampler(rows: int, step_rows: int = 4, **place: int) -> StepSampler:
    lengths = [random.Random(row).randint(10, 99) for row in range(rows)]
    return StepSampler(lengths, step_rows, seed=3, **place)


def test_the_epochs_order_depends_on_seed_and_epoch_alone() -> None:
    steps = sampler(42)
    first = list(steps)
    torch.rand(5)
    assert list(steps) == first
    steps.set_epoch(1)
    second = list(steps)
    assert second != first
    assert sorted(chain.from_iterable(second)) == list(range(42))
    assert len(steps) == len(second) == 11


@pytest.mark.parametrize(
    ("rows", "steps"),
    [(16, 4), (17, 4), (18, 4), (19, 5), (20, 5), (3, 1)],  # of 4 rows; a last step under 3 rows joins the one before
)
def test_every_row_is_seen_once_an_epoch_over_all_processes(rows: int, steps: int) -> None:
    parts = [sampler(rows, rank=rank, processes=3) for rank in range(3)]
    taken = [list(part) for part in parts]
    assert [len(part) for part in taken] == [len(part) for part in parts] == [steps] * 3
    assert all(row for part in taken for row in part)
    assert sorted(row for part in taken for step in part for row in step) == list(range(rows))
    alone = [sorted(step) for step in sampler(rows, processes=3).steps()]
    assert [sorted(chain.from_iterable(step)) for step in zip(*taken, strict=True)] == alone


def test_a_steps_rows_are_of_about_one_length_and_steps_come_in_no_order_of_length() -> None:
    steps = sampler(400, 8)
    longest = [max(steps.lengths[row] for row in step) for step in steps.steps()]
    assert longest[0] == max(steps.lengths)  # if memory is too small, it shows at once
    spread = [max(found) - min(found) for step in steps.steps() if (found := [steps.lengths[row] for row in step])]
    assert sorted(spread)[len(spread) // 2] < 15  # of 90; drawn at random it would be about 70
    falls = sum(after < before for before, after in pairwise(longest))
    assert 15 < falls < 35  # of 49


def test_micro_batches_hold_so_many_tokens_with_their_padding() -> None:
    #        40 40 | 30 30 20 | 10
    assert micro_batches([30, 40, 10, 30, 40, 20], tokens=90) == [[1, 4], [0, 3, 5], [2]]
    assert micro_batches([30, 40, 10, 30, 40, 20], tokens=90, rows=1) == [[1], [4], [0], [3], [5], [2]]
    assert micro_batches([200, 10], tokens=90) == [[0], [1]]  # a row alone may be longer


def test_a_batch_is_split_without_losing_a_token_and_cut_to_its_longest_row() -> None:
    lengths = [3, 5, 1, 4]
    ids = torch.arange(1, 21).view(4, 5)
    mask = torch.tensor([[int(place < length) for place in range(5)] for length in lengths])
    parts = split({"input_ids": ids * mask, "attention_mask": mask}, tokens=10)
    assert [part["input_ids"].shape for part in parts] == [(2, 5), (2, 3)]
    assert [part["attention_mask"].sum().item() for part in parts] == [9, 4]
    kept = sorted(value for part in parts for value in part["input_ids"].flatten().tolist() if value)
    assert kept == sorted(ids[mask.bool()].tolist())
    wide = split({"input_ids": ids * mask, "attention_mask": mask}, tokens=10, multiple=4)
    assert [part["input_ids"].shape for part in wide] == [(2, 5), (2, 4)]  # 5 is all there is
