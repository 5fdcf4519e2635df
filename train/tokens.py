"""What the student is really shown: checks of the tokenised rows that the trainer will use.

Takes rows as TRL tokenised them: `input_ids`, and `labels` with -100 where no loss falls. Reads and writes no file.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import repeat, takewhile
from typing import Any

import numpy as np
import torch

MASKED = -100
Batch = dict[str, torch.Tensor]
TokenRow = Mapping[str, Any]  # "input_ids" and "labels": list[int] of one length


def label_faults(
    rows: Iterable[TokenRow],
    *,
    stops: set[int],
    decode: Callable[[list[int]], str],
    known: int,
    prompts: Iterable[Sequence[int]] = repeat(()),
    questions: Iterable[int] = repeat(0),
) -> dict[str, list[str]]:
    """The rows whose labels teach more than their answer, or less: by kind of fault, what is wrong with each.

    `known`: how many tokens the model has embeddings of. `prompts`: what the last answer of each row is asked with, if
    loss falls on earlier turns of the assistant too. `questions`: of each row, how many tokens are no answer for sure.
    """
    faults: dict[str, list[str]] = {}
    for number, (row, prompt, question) in enumerate(zip(rows, prompts, questions, strict=False), start=1):
        if found := label_fault(row, stops=stops, decode=decode, known=known, prompt=prompt, question=question):
            kind, reason = found
            faults.setdefault(kind, []).append(f"row {number}: {reason}")
    return faults


def label_fault(
    row: TokenRow,
    *,
    stops: set[int],
    decode: Callable[[list[int]], str],
    known: int,
    prompt: Sequence[int] = (),
    question: int = 0,
) -> tuple[str, str] | None:
    """The kind of a row's fault (vocabulary, eos, masked or labels) and what is wrong; None if it has none.

    Loss must fall on the whole answer with its EOS, and on nothing else. After the EOS a template may add blanks.
    """
    ids, labels = row["input_ids"], row["labels"]
    if (highest := max(ids)) >= known:
        return "vocabulary", f"token {decode([highest])!r} has the id {highest}, the model knows {known:,} tokens"
    learned = [index for index, label in enumerate(labels) if label != MASKED]
    if not learned:
        return "masked", "no token carries loss; the chat template leaves the answer out"
    first, end = learned[0], learned[-1] + 1
    if first == 0:
        return "labels", "loss falls on the prompt too; the chat template renders no prompt before it"
    if first < question:
        otherwise = "the chat template renders an answered prompt otherwise"
        return "labels", f"loss falls on the prompt too: on {decode(ids[first : first + 8])!r}; {otherwise}"
    if prompt and ids[: len(prompt)] == prompt and labels[len(prompt) - 1] != MASKED:
        return "labels", f"loss falls on the prompt too: on its end, {decode(ids[len(prompt) - 1 : len(prompt)])!r}"
    if decode(ids[end:]).strip() or (MASKED in labels[first:end] and not prompt):
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


def asked_tokens(messages: Sequence[Any], tools: str | None, tokenizer: Any, **options: Any) -> list[int]:
    """A prompt by the chat template, up to where the answer begins. `tools`: as JSON; `options`: for the template."""
    return _by_template(messages, tools, tokenizer, add_generation_prompt=True, **options)


def shared_start(rows: Iterable[Sequence[int]]) -> list[int]:
    """The tokens that all rows begin with."""
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))]


def question_tokens(messages: Sequence[Any], tools: str | None, tokenizer: Any, **options: Any) -> int:
    """How many of a prompt's tokens (`asked_tokens`) stand before the header of its answer."""
    asked = asked_tokens(messages, tools, tokenizer, **options)
    return len(shared_start([asked, _by_template(messages, tools, tokenizer, **options)]))


def answered_row(example: Mapping[str, Any], answer: Any, tokenizer: Any) -> dict[str, list[int]]:
    """A prompt with an answer's turn as TRL makes a row of them: loss falls from where the prompt alone is another."""
    ids = _by_template([*example["prompt"], answer], example["tools"], tokenizer)
    begin = len(shared_start([asked_tokens(example["prompt"], example["tools"], tokenizer), ids]))
    return {"input_ids": ids, "labels": [MASKED] * begin + ids[begin:]}


def answer_header(tokenizer: Any, **options: Any) -> list[int]:
    """What the chat template adds to a conversation before it is answered, as `<|im_start|>assistant` and a newline."""
    turns = [{"role": "user", "content": "question"}]
    return asked_tokens(turns, None, tokenizer, **options)[question_tokens(turns, None, tokenizer, **options) :]


def without_header(row: TokenRow, header: list[int]) -> dict[str, list[int]]:
    """The row's labels, without loss on the `header` of an answer: some templates mark its end as the assistant's."""
    ids, labels, size = row["input_ids"], [*row["labels"]], len(header)
    for place in range(len(ids) - size + 1):
        if MASKED in labels[max(place - 1, 0) : place + 1] and ids[place : place + size] == header:
            labels[place : place + size] = [MASKED] * size
    return {"labels": labels}


def example_length(example: Mapping[str, Any], tokenizer: Any) -> int:
    """Tokens of a prompt and its answer by the chat template, as TRL makes a row of them."""
    return len(_by_template([*example["prompt"], *example["completion"]], example["tools"], tokenizer))


def _by_template(messages: Sequence[Any], tools: str | None, tokenizer: Any, **options: Any) -> list[int]:
    given = json.loads(tools) if tools else None
    ids: list[int] = tokenizer.apply_chat_template(messages, tools=given, return_dict=True, **options)["input_ids"]
    return ids


def key_of(ids: Sequence[int]) -> bytes:
    """What tokens are found by."""
    return np.asarray(ids, np.int32).tobytes()


def prompt_of(row: TokenRow) -> list[int]:
    """The tokens before the first that carries loss."""
    first = next(place for place, label in enumerate(row["labels"]) if label != MASKED)
    return list(row["input_ids"][:first])


def row_lengths(rows: Any) -> list[int]:
    """Tokens of each row; of a pair, with the longer of its answers."""
    if "input_ids" in rows.column_names:
        return [len(ids) for ids in rows["input_ids"]]
    columns = (rows[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    return [len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in zip(*columns, strict=True)]
