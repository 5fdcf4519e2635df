"""Perplexity of held-out teacher answers under a model, teacher-forced.

Reads held-out rows and a loaded model; gives one score a row and their sums. Writes nothing.

A row is the prompt in that model's own chat template, then the answer's tokens, then the token that ends a turn.
Loss counts on the answer and on its end only. Perplexity is exp(sum of NLL / sum of tokens) over all rows: every
token weighs the same, not every row. Models with different tokenizers cut the same answer into different numbers of
tokens; bits per character compares them fairly.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from evaluate.statistics import SEED, Figure, draw
from pipeline.records import Kept, Message

LOGITS_BYTES = 512 << 20  # logits of one batch, at 4 bytes a value
CHUNK = 256  # positions whose logits are held in float32 at once


class RowScore(msgspec.Struct, frozen=True):
    """How surprised a model was by one answer."""

    id: str
    prompt_id: str
    nll_nats: float  # sum over the answer's tokens and the end of the turn
    tokens: int
    characters: int  # Unicode code points of the answer


@dataclass(frozen=True)
class Encoded:
    """Token ids of one row."""

    prompt: list[int]
    completion: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


def choose_rows(rows: Sequence[Kept], limit: int) -> list[Kept]:
    """At most `limit` rows, the same ones whatever order the file has them in."""
    ordered = sorted(rows, key=lambda row: row.id)
    return ordered if len(ordered) <= limit else sorted(random.Random(SEED).sample(ordered, limit), key=lambda r: r.id)


def encode_row(tokenizer: Any, row: Kept, end: int) -> Encoded:
    """The row's token ids; an answer that was cut off (`finish_reason` is not stop) has no end to predict."""
    prompt = tokenizer.apply_chat_template(_turns(row.messages), add_generation_prompt=True, return_dict=False)
    completion = tokenizer.encode(row.text, add_special_tokens=False)
    return Encoded(prompt, [*completion, end] if row.finish_reason == "stop" or not completion else completion)


def end_of_turn(tokenizer: Any) -> int:
    """The token that follows an answer in the chat template: what a model must say to stop.

    Not always `eos_token`: Gemma's is <eos>, and its turns end with <end_of_turn>.
    """
    answer = "word"
    turns = _turns([Message("user", "question"), Message("assistant", answer)])
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    tail = tokenizer.encode(text[text.rindex(answer) + len(answer) :], add_special_tokens=False)
    return next((token for token in tail if token in tokenizer.all_special_ids), tokenizer.eos_token_id)


def _turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def score_rows(
    model: Any, tokenizer: Any, rows: Sequence[Kept], *, progress: Callable[[int], None] | None = None
) -> list[RowScore]:
    """Scores every row that fits the model's context; `progress` hears how many rows each batch had.

    Rows of like length share a batch, so that little is padding. Only the answers' logits are computed.
    """
    import torch

    end = end_of_turn(tokenizer)
    encoded = [encode_row(tokenizer, row, end) for row in rows]
    context = getattr(model.config, "max_position_embeddings", None) or math.inf
    fitting = [index for index in range(len(rows)) if len(encoded[index]) <= context]
    scores: dict[int, RowScore] = {}
    with torch.inference_mode():
        for batch in _batches(encoded, fitting, model.config.get_text_config().vocab_size):
            sums = _batch_nll(model, [encoded[index] for index in batch])
            for index, nll in zip(batch, sums, strict=True):
                row = rows[index]
                tokens = len(encoded[index].completion)
                scores[index] = RowScore(row.id, row.prompt_id, nll, tokens, len(row.text))
            if progress:
                progress(len(batch))
    return [scores[index] for index in sorted(scores)]


def _batches(encoded: Sequence[Encoded], indices: list[int], vocabulary: int) -> Iterator[list[int]]:
    """Longest first (memory runs out at once or never), as many rows as LOGITS_BYTES allows."""
    batch: list[int] = []
    first = last = 0
    for index in sorted(indices, key=lambda i: (-len(encoded[i]), i)):
        row = encoded[index]
        start, stop = (min(first, len(row.prompt)), max(last, len(row))) if batch else (len(row.prompt), len(row))
        if batch and (len(batch) + 1) * (stop - start) * vocabulary * 4 > LOGITS_BYTES:
            yield batch
            batch, start, stop = [], len(row.prompt), len(row)
        batch.append(index)
        first, last = start, stop
    if batch:
        yield batch


def _batch_nll(model: Any, batch: Sequence[Encoded]) -> list[float]:
    """Sum of the negative log-likelihood (nats) of each row's completion."""
    import torch
    from torch.nn.functional import cross_entropy

    length = max(map(len, batch))
    ids = torch.zeros(len(batch), length, dtype=torch.long)
    mask = torch.zeros(len(batch), length, dtype=torch.long)
    for number, row in enumerate(batch):
        ids[number, : len(row)] = torch.tensor(row.prompt + row.completion)
        mask[number, : len(row)] = 1
    first = min(len(row.prompt) for row in batch) - 1  # the position that predicts a completion's first token
    positions = torch.arange(first, length - 1, device=model.device)
    ids = ids.to(model.device)
    logits = model(
        input_ids=ids, attention_mask=mask.to(model.device), use_cache=False, logits_to_keep=positions
    ).logits
    sums = []
    for number, row in enumerate(batch):
        start = len(row.prompt) - 1 - first
        total = 0.0
        for begin in range(start, start + len(row.completion), CHUNK):
            stop = min(begin + CHUNK, start + len(row.completion))
            wanted = ids[number, first + 1 + begin : first + 1 + stop]
            total += cross_entropy(logits[number, begin:stop].float(), wanted, reduction="sum").item()
        sums.append(total)
    return sums


def perplexity(scores: Sequence[RowScore]) -> float:
    """exp(NLL a token), over all tokens of all rows."""
    return math.exp(sum(s.nll_nats for s in scores) / sum(s.tokens for s in scores))


def bits_per_character(scores: Sequence[RowScore]) -> float:
    """NLL in bits over the answers' characters; the end of a turn is paid for, and is no character."""
    return sum(s.nll_nats for s in scores) / math.log(2) / max(1, sum(s.characters for s in scores))


def bootstrap(scores: Sequence[Sequence[RowScore]]) -> list[tuple[Figure, Figure]]:
    """Every model's perplexity and bits per character, on resamples of the same prompts.

    Every model must have scored the same rows.
    """
    import numpy as np

    prompts = sorted({score.prompt_id for score in scores[0]})
    place = {prompt: number for number, prompt in enumerate(prompts)}
    counts = draw(len(prompts))
    figures = []
    for rows in scores:
        sums = np.zeros((len(prompts), 3))  # NLL, tokens, characters of each prompt
        for score in rows:
            sums[place[score.prompt_id]] += (score.nll_nats, score.tokens, score.characters)
        nll, tokens, characters = (counts @ sums).T
        bits = nll / math.log(2) / np.maximum(characters, 1)
        figures.append((Figure(perplexity(rows), np.exp(nll / tokens)), Figure(bits_per_character(rows), bits)))
    return figures
