"""What the student is really shown, and the teacher: checks of the tokenised rows that the trainer will use.

Takes rows as TRL tokenised them: `input_ids`, and `labels` with -100 where no loss falls. Reads and writes no file.
The teacher may be told more than the student before an answer, a schema say, in its own chat template: its distribution
counts only after its own prompt (Told).
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

MASKED = -100
Batch = dict[str, torch.Tensor]
Told = dict[bytes, list[int]]  # by the student's tokens of a prompt (key_of): the teacher's
TokenRow = Mapping[str, Any]  # "input_ids" and "labels": list[int] of one length


def label_faults(
    rows: Iterable[TokenRow], *, stops: set[int], decode: Callable[[list[int]], str], every_turn: bool = False
) -> dict[str, list[str]]:
    """The rows whose labels teach more than their answer, or less: by kind of fault, what is wrong with each.

    `every_turn`: loss falls on earlier turns of the assistant too.
    """
    faults: dict[str, list[str]] = {}
    for number, row in enumerate(rows, start=1):
        if found := label_fault(row, stops=stops, decode=decode, every_turn=every_turn):
            kind, reason = found
            faults.setdefault(kind, []).append(f"row {number}: {reason}")
    return faults


def label_fault(
    row: TokenRow, *, stops: set[int], decode: Callable[[list[int]], str], every_turn: bool
) -> tuple[str, str] | None:
    """The kind of a row's fault (eos, masked or labels) and what is wrong; None if it has none.

    Loss must fall on the whole answer with its EOS, and on nothing else. After the EOS a template may add blanks.
    """
    ids, labels = row["input_ids"], row["labels"]
    learned = [index for index, label in enumerate(labels) if label != MASKED]
    if not learned:
        return "masked", "no token carries loss; the chat template leaves the answer out"
    first, end = learned[0], learned[-1] + 1
    if first == 0:
        return "labels", "loss falls on the prompt too; the chat template renders no prompt before it"
    if decode(ids[end:]).strip() or (MASKED in labels[first:end] and not every_turn):
        return "labels", f"part of the answer carries no loss: {decode(ids[first:])!r}"
    last = max((index for index in learned if labels[index] in stops), default=None)
    if last is None or decode(ids[last + 1 :]).strip():
        tail = f"its end is {decode(ids[-8:])!r}"
        return "eos", f"the answer does not end with a stop token ({decode(sorted(stops))!r}); {tail}"
    return None


def differing_prompts(rows: Iterable[TokenRow], examples: Iterable[Mapping[str, Any]], tokenizer: Any) -> int:
    """How many rows have a context that is not what the student is given when it answers (template or token merges)."""
    differing = 0
    for row, example in zip(rows, examples, strict=True):
        asked = asked_tokens(example["prompt"], example.get("tools"), tokenizer)
        differing += row["input_ids"][: len(asked)] != asked
    return differing


def asked_tokens(messages: Sequence[Any], tools: str | None, tokenizer: Any) -> list[int]:
    """A prompt by the chat template, up to where the answer begins. `tools`: as JSON."""
    given = json.loads(tools) if tools else None
    chat = {"tools": given, "add_generation_prompt": True, "return_dict": True}
    ids: list[int] = tokenizer.apply_chat_template(messages, **chat)["input_ids"]
    return ids


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
