"""The teacher's own prompts: it may be told more than the student is asked, for example a schema.

What the teacher says of an answer counts only after its own prompt, in its own chat template. Reads and writes no file.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from transformers import DynamicCache

from train.tokens import MASKED, Batch, TokenRow, asked_tokens, key_of, prompt_of

Told = dict[bytes, list[int]]  # by the student's tokens of a prompt (key_of): the teacher's


def told_prompts(rows: Sequence[TokenRow], examples: Sequence[Mapping[str, Any]], tokenizer: Any) -> Told:
    """The teacher's prompt of each row, by its `tokenizer`; none that is the student's own.

    `examples` are the rows' texts, with `told`: the teacher's messages.
    """
    told: Told = {}
    for row, example in zip(rows, examples, strict=True):
        ids = asked_tokens(example.get("told", example["prompt"]), example.get("tools"), tokenizer)
        if ids != (own := prompt_of(row)):
            told[key_of(own)] = ids
    return told


class SharedStart:
    """The tokens that all of a teacher's prompts begin with, and their keys and values, which are computed once.

    A schema or examples are most of such a prompt, and the teacher's weights do not change. `own`: the student's tokens
    of each prompt. If the teacher is told nothing of its own, there is no shared start.
    """

    def __init__(self, told: Told, own: Iterable[Sequence[int]]) -> None:
        prompts = [told.get(key_of(ids), ids)[:-1] for ids in own] if told else []  # the last token predicts the answer
        same = takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False))
        self.ids = [column[0] for column in same]
        self._cache: DynamicCache | None = None

    def of(self, teacher: Any, rows: int) -> DynamicCache | None:
        """A copy of the keys and values for a batch of `rows` rows; a forward pass of the teacher adds to it."""
        if not self.ids:
            return None
        if self._cache is None:
            ids = torch.tensor([self.ids], device=teacher.device)
            self._cache = teacher(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(rows)
        return cache


def of_teacher(batch: Batch, told: Told, pad: int, start: int) -> Batch:
    """A batch padded on the right (`input_ids`, `labels`, `attention_mask`) with the teacher's prompts.

    The first `start` tokens of each row are left out of ids and labels; the mask still has them.
    """
    if not told:
        return batch
    rows = []
    for ids, labels, length in zip(
        batch["input_ids"].tolist(), batch["labels"].tolist(), batch["attention_mask"].sum(dim=1).tolist(), strict=True
    ):
        own = prompt_of({"input_ids": ids, "labels": labels})
        prompt, first = told.get(key_of(own), own), len(own)
        rows.append((prompt + ids[first:length], [MASKED] * len(prompt) + labels[first:length]))
    longest = max(len(ids) for ids, _ in rows)
    blanks = [longest - len(ids) for ids, _ in rows]
    columns = {
        "input_ids": [ids + [pad] * blank for (ids, _), blank in zip(rows, blanks, strict=True)],
        "labels": [labels + [MASKED] * blank for (_, labels), blank in zip(rows, blanks, strict=True)],
        "attention_mask": [[1] * (longest - blank) + [0] * blank for blank in blanks],
    }
    full = {name: torch.tensor(values, device=batch["input_ids"].device) for name, values in columns.items()}
    return {name: values if name == "attention_mask" else values[:, start:] for name, values in full.items()}


def before_samples(
    ids: torch.Tensor,
    mask: torch.Tensor,
    keep: int,
    told: Told,
    pad: Callable[..., torch.Tensor],
    pad_id: int,
    start: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of prompts padded on the left, before `keep` columns of answers, with the teacher's prompts.

    `pad` is TRL's. The ids are without the first `start` tokens of each prompt; in the mask these come first.
    """
    own = [row[at.bool()].tolist() for row, at in zip(ids[:, :-keep], mask[:, :-keep], strict=True)]
    prompts = [torch.tensor(told.get(key_of(prompt), prompt)[start:], device=ids.device) for prompt in own]
    filled = pad(prompts, padding_value=pad_id, padding_side="left")
    ones = pad([torch.ones_like(prompt) for prompt in prompts], padding_value=0, padding_side="left")
    before = mask.new_ones(len(mask), start)
    return torch.cat([filled, ids[:, -keep:]], dim=1), torch.cat([before, ones, mask[:, -keep:]], dim=1)
