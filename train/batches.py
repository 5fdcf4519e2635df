"""Which rows a step takes, and which of them pass the student at once.

A step takes rows of about one length. Its micro-batches hold rows of nearly one length and a bounded number of tokens,
so that little of what is computed is padding. Pure: no row is read, only lengths.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DataLoader, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from train.tokens import MASKED


class StepSampler(Sampler[list[int]]):
    """The rows of each step, in this process; over all processes every row once an epoch.

    The order depends on the seed and the epoch alone. The library's samplers draw from torch's global generator, whose
    state at the start of an epoch is lost when a training resumes in its middle. They also give some rows twice if the
    processes do not divide the rows. Here a last step with fewer rows than processes joins the one before it.
    """

    def __init__(self, lengths: Sequence[int], step_rows: int, *, seed: int, rank: int = 0, processes: int = 1) -> None:
        self.lengths = list(lengths)
        self.step_rows = step_rows
        self.seed = seed
        self.rank, self.processes = rank, processes
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(len(self.lengths), self.step_rows)
        return max(1, whole + (rest >= self.processes))

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self.steps():
            yield rows[self.rank :: self.processes]

    def steps(self) -> list[list[int]]:
        """The rows of each step, its longest first; the first step holds the longest row of all."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = get_length_grouped_indices(self.lengths, self.step_rows, generator=generator)
        steps = [order[start : start + self.step_rows] for start in range(0, len(order), self.step_rows)]
        if len(steps) > 1 and len(steps[-1]) < self.processes:
            steps[-2:] = [steps[-2] + steps[-1]]
        # Without this, lengths would fall from step to step.
        shuffled = [0, *(1 + torch.randperm(len(steps) - 1, generator=generator)).tolist()]
        return [sorted(steps[index], key=lambda row: -self.lengths[row]) for index in shuffled]


class StepLoader(DataLoader[dict[str, torch.Tensor]]):
    """A loader whose sampler is told the epoch."""

    def set_epoch(self, epoch: int) -> None:
        assert isinstance(self.batch_sampler, StepSampler)
        self.batch_sampler.set_epoch(epoch)


def micro_batches(lengths: Sequence[int], *, tokens: int, rows: int | None = None) -> list[list[int]]:
    """Splits rows into groups of at most `tokens`, padding counted, and at most `rows`; longest first.

    A row that is longer than `tokens` is a group of its own.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        group = groups[-1] if groups else []
        if group and (len(group) + 1) * lengths[group[0]] <= tokens and len(group) != rows:
            group.append(index)
        else:
            groups.append([index])
    return groups


def split(
    batch: dict[str, torch.Tensor], *, tokens: int, rows: int | None = None, multiple: int = 1
) -> list[dict[str, torch.Tensor]]:
    """A collated batch (rows, longest), padded on the right, as micro-batches.

    Each is cut to its longest row, and stays as wide as the next `multiple` of so many tokens.
    """
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    groups = micro_batches(lengths, tokens=tokens, rows=rows)
    widths = [math.ceil(lengths[group[0]] / multiple) * multiple for group in groups]
    return [
        {name: value[group, :width] for name, value in batch.items()}
        for group, width in zip(groups, widths, strict=True)
    ]


def end_to_end(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A micro-batch as one row without padding (1, tokens).

    `position_ids` begin anew with each row: by them attention keeps rows apart. No row predicts the first token of the
    next.
    """
    tokens = batch["attention_mask"].bool()
    places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    labels = batch["labels"].masked_fill(places == 0, MASKED)
    return {
        "input_ids": batch["input_ids"][tokens][None],
        "labels": labels[tokens][None],
        "position_ids": places[tokens][None],
    }
