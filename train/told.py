"""The teacher's own prompts: it may be told more than the student is asked, for example a schema.

What the teacher says of an answer counts only after its own prompt, in its own chat template. Reads and writes no file.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from train.tokens import MASKED, Batch, TokenRow, answer_header, asked_tokens, key_of, prompt_of, shared_start

Told = dict[bytes, list[int]]  # by the student's tokens of a prompt (key_of): the teacher's


def told_prompts(rows: Sequence[TokenRow], examples: Sequence[Mapping[str, Any]], tokenizer: Any) -> Told:
    """The teacher's prompt of each row, by its `tokenizer`; none that is the student's own.

    `examples` are the rows' texts, with `told`: the teacher's messages, and `template`: options of its chat template.
    """
    told: Told = {}
    begun = begun_by_options(examples, tokenizer)
    for row, example in zip(rows, examples, strict=True):
        told_messages, options = example.get("told", example["prompt"]), example.get("template", {})
        ids = asked_tokens(told_messages, example.get("tools"), tokenizer, **options)
        own = prompt_of(row)
        if begun and ids[-len(begun) :] == begun == row["input_ids"][len(own) :][: len(begun)]:
            ids = ids[: -len(begun)]  # it stands in the answer
        if ids != own:
            told[key_of(own)] = ids
    return told


def begun_by_options(examples: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[int]:
    """What the options of the teacher's template begin each answer with, as `enable_thinking: false` an empty thought.

    A student with such a template has it in its answers, and the teacher must not read it twice.
    """
    if not (options := examples[0].get("template") if examples else None):
        return []
    plain, header = answer_header(tokenizer), answer_header(tokenizer, **options)
    return header[len(plain) :] if header[: len(plain)] == plain else []


def reads_over_gaps(model: Any) -> bool:
    """Whether padding between tokens changes nothing: each layer looks at all earlier tokens that are no padding.

    A sliding window is narrower by the padding in it. Linear attention, Mamba and convolutions read the padding.
    """
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


class TeacherPrompts:
    """The teacher's prompts, and the tokens that all of them begin with, whose keys and values are computed once.

    A schema or examples are most of such a prompt, and the teacher's weights do not change. `own`: the student's tokens
    of each prompt. If the teacher is told nothing of its own, or `shared` is False, there is no shared start.
    """

    def __init__(self, told: Told, own: Iterable[list[int]], *, shared: bool = True) -> None:
        self.told = told
        prompts = [self.of(ids)[:-1] for ids in own] if told and shared else []  # the last token predicts the answer
        self.start = shared_start(prompts)
        self._states: DynamicCache | None = None

    def of(self, own: list[int]) -> list[int]:
        """The teacher's prompt in place of the student's."""
        return self.told.get(key_of(own), own)

    def start_states(self, teacher: Any, rows: int) -> DynamicCache | None:
        """A copy of the start's keys and values for a batch of so many rows; the teacher's forward pass adds to it."""
        if not self.start:
            return None
        if self._states is None:
            ids = torch.tensor([self.start], device=teacher.device)
            self._states = teacher(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        states = copy.deepcopy(self._states)
        states.reorder_cache(torch.zeros(rows, dtype=torch.long))  # row 0 so often
        return states

    def in_batch(self, batch: Batch, pad: int) -> Batch:
        """A batch padded on the right (`input_ids`, `labels`, `attention_mask`) with the teacher's prompts.

        Ids and labels are without the shared start; in the mask it comes first. `pad`: the id that fills rows.
        """
        if not self.told:
            return batch
        rows, row_labels, start = list[torch.Tensor](), list[torch.Tensor](), len(self.start)
        lengths, device = batch["attention_mask"].sum(dim=1).tolist(), batch["input_ids"].device
        for ids, labels, length in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), lengths, strict=True):
            own = prompt_of({"input_ids": ids, "labels": labels})
            prompt, first = self.of(own), len(own)
            rows.append(torch.tensor(prompt + ids[first:length], device=device))
            row_labels.append(torch.tensor([MASKED] * len(prompt) + labels[first:length], device=device))
        return {
            "input_ids": pad_sequence(rows, batch_first=True, padding_value=pad)[:, start:],
            "labels": pad_sequence(row_labels, batch_first=True, padding_value=MASKED)[:, start:],
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        }

    def before_samples(
        self, ids: torch.Tensor, mask: torch.Tensor, keep: int, pad: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask of prompts padded on the left, before `keep` columns of answers, with the teacher's prompts.

        The ids are without the shared start; in the mask it comes first.
        """
        start = len(self.start)
        own = [row[at.bool()].tolist() for row, at in zip(ids[:, :-keep], mask[:, :-keep], strict=True)]
        prompts = [torch.tensor(self.of(prompt)[start:], device=ids.device) for prompt in own]
        filled = pad_sequence(prompts, batch_first=True, padding_value=pad, padding_side="left")
        ones = pad_sequence([torch.ones_like(prompt) for prompt in prompts], batch_first=True, padding_side="left")
        before = mask.new_ones(len(mask), start)
        return torch.cat([filled, ids[:, -keep:]], dim=1), torch.cat([before, ones, mask[:, -keep:]], dim=1)
