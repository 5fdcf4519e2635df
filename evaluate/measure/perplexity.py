"""How well a model predicts the teacher's answers, teacher-forced: one score per row.

Reads rows and a model; writes nothing. `evaluate.figures.quality` computes perplexity and bits per character.

A row is the conversation with its answer in that model's own chat template, as training has it. Loss counts on the
answer and on the token that ends it only: what a template writes before any answer, as Qwen3's does an empty thought,
is context. So is an answer's reasoning where the student learned it: every model is given it.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from evaluate.measure.results import PerplexityResult, RowScore
from evaluate.models import Subject, load
from pipeline.errors import DistillError
from pipeline.loaded_model import context_of, end_of_turn, stop_tokens
from pipeline.reasoning import Reasoning, answer_turn, reasoning_form
from pipeline.records import Kept, said
from pipeline.train_config import TrainConfig
from pipeline.turns_and_tools import template_turns

SEED = 0  # of the choice of rows
LOGITS_BYTES = 512 << 20  # logits of one batch, at 4 bytes a value
CHUNK = 256  # positions whose logits are held in float32 at once


@dataclass(frozen=True)
class Encoded:
    """Token ids of one row."""

    prompt: list[int]  # all that stands before the answer
    completion: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


def choose_rows(rows: Sequence[Kept], limit: int) -> list[Kept]:
    """At most `limit` rows; the choice does not depend on their order."""
    ordered = sorted(rows, key=lambda row: row.id)
    chosen = random.Random(SEED).sample(ordered, min(limit, len(ordered)))
    return sorted(chosen, key=lambda row: row.id)


def encode_row(tokenizer: Any, row: Kept, end: int, reasoning: Reasoning | None = None) -> Encoded:
    """The row's token ids; an answer that was cut off (`finish_reason` is not stop) has no end to predict.

    What stands before the answer is what other answers share with it. Tool calls are in the form of the model's
    template; one that has no form for them sees the text alone.
    """
    asked = template_turns(row.messages)

    def tokens(answer: Kept) -> list[int]:
        turns = [*asked, answer_turn(answer, reasoning)]
        ids: list[int] = tokenizer.apply_chat_template(turns, tools=row.tools or None, return_dict=False)
        return ids

    # Two other answers that begin with different tokens.
    whole, others = tokens(row), [tokens(msgspec.structs.replace(row, text=text, tool_calls=[])) for text in "0a"]
    places = zip(whole, *others, strict=False)
    begin = next((place for place, ids in enumerate(places) if len({*ids}) > 1), len(whole))
    completion = whole[begin:]
    if end in completion:
        completion = completion[: completion.index(end)]
    cut_off = completion and row.finish_reason != "stop" and not row.tool_calls
    return Encoded(whole[:begin], completion if cut_off else [*completion, end])


def measure_perplexity(
    subject: Subject, rows: Sequence[Kept], config: TrainConfig, *, dtype: str, device: str
) -> PerplexityResult:
    """Loads the model and scores the rows, with their reasoning if the student was trained on it.

    Raises DistillError if no row fits its context, or a loss is not finite.
    """
    import torch
    import transformers
    from rich.console import Console
    from rich.progress import Progress

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = load(subject, dtype=dtype, device=device)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(subject.label, total=len(rows))
        form = reasoning_form(config, tokenizer)
        scores = score_rows(model, tokenizer, rows, form, progress=lambda done: bar.advance(task, done))
    del model
    if device == "cuda":
        torch.cuda.empty_cache()
    if not scores:
        raise DistillError(f"{subject.label}: no test row fits its context; use shorter prompts or another student")
    if broken := sum(not math.isfinite(score.nll_nats) for score in scores):
        raise DistillError(
            f"{subject.label}: the loss of {broken:,} of {len(scores):,} answers is NaN or infinite (in {dtype}), so "
            f"its weights are broken or too large ({subject.adapter or subject.folder}); train it again with a lower "
            "train.learning_rate, or take another model"
        )
    return PerplexityResult(dtype=dtype, device=device, scores=scores)


def score_rows(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Kept],
    reasoning: Reasoning | None = None,
    *,
    progress: Callable[[int], None] | None = None,
) -> list[RowScore]:
    """Scores every row that fits the model's context; `progress` is told how many rows each batch had.

    Rows of similar length share a batch, so that little is padding. Only the answers' logits are computed.
    """
    import torch

    end = end_of_turn(tokenizer, stop_tokens(tokenizer, model))
    encoded = [encode_row(tokenizer, row, end, reasoning) for row in rows]
    context = context_of(model.config)
    fitting = [index for index in range(len(rows)) if len(encoded[index]) <= context]
    scores: dict[int, RowScore] = {}
    with torch.inference_mode():
        for batch in _batches(encoded, fitting, model.config.get_text_config().vocab_size):
            sums = _batch_nll(model, [encoded[index] for index in batch])
            for index, nll in zip(batch, sums, strict=True):
                row = rows[index]
                tokens = len(encoded[index].completion)
                scores[index] = RowScore(row.id, row.prompt_id, nll, tokens, len(said(row)))
            if progress:
                progress(len(batch))
    return [scores[index] for index in sorted(scores)]


def _batches(encoded: Sequence[Encoded], indices: list[int], vocabulary: int) -> Iterator[list[int]]:
    """Longest first (memory runs out at once or never), as many rows as LOGITS_BYTES allows."""
    batch: list[int] = []
    for index in sorted(indices, key=lambda i: (-len(encoded[i]), i)):
        wider = [*batch, index]
        positions = max(len(encoded[i]) for i in wider) - min(len(encoded[i].prompt) for i in wider)
        if batch and len(wider) * positions * vocabulary * 4 > LOGITS_BYTES:
            yield batch
            wider = [index]
        batch = wider
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
