"""What the teacher reads before an answer, where the student reads less: its own instructions and chat template.

A teacher that is told a schema, say, knows nothing without it: its distribution counts only after its own prompt. Pure.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from train.tokens import MASKED, TokenRow, asked_tokens

Told = dict[bytes, list[int]]  # by the student's tokens of a prompt (key_of): the teacher's
Batch = dict[str, torch.Tensor]


def key_of(ids: Sequence[int]) -> bytes:
    """What tokens are found by."""
    return np.asarray(ids, np.int32).tobytes()


def prompt_of(row: TokenRow) -> list[int]:
    """The tokens before the first that carries loss."""
    first = next(place for place, label in enumerate(row["labels"]) if label != MASKED)
    return list(row["input_ids"][:first])


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


def of_teacher(batch: Batch, told: Told, pad: int) -> Batch:
    """A batch padded on the right (`input_ids`, `labels`, `attention_mask`) with the teacher's prompts."""
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
    return {name: torch.tensor(values, device=batch["input_ids"].device) for name, values in columns.items()}


def before_samples(
    ids: torch.Tensor, mask: torch.Tensor, keep: int, told: Told, pad: Callable[..., torch.Tensor], pad_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of prompts padded on the left, before `keep` columns of answers, with the teacher's prompts.

    `pad` is TRL's.
    """
    own = [row[at.bool()].tolist() for row, at in zip(ids[:, :-keep], mask[:, :-keep], strict=True)]
    prompts = [torch.tensor(told.get(key_of(prompt), prompt), device=ids.device) for prompt in own]
    filled = pad(prompts, padding_value=pad_id, padding_side="left")
    ones = pad([torch.ones_like(prompt) for prompt in prompts], padding_value=0, padding_side="left")
    return torch.cat([filled, ids[:, -keep:]], dim=1), torch.cat([ones, mask[:, -keep:]], dim=1)
