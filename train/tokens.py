"""What the student is really shown: checks of the tokenised rows that the trainer will use.

Takes rows as TRL tokenised them (`input_ids`, and `labels` with -100 where no loss falls) and the batches its collator
makes of them. Reads and writes no file.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from pipeline.errors import DataError

MASKED = -100
TokenRow = Mapping[str, Any]  # "input_ids" and "labels": list[int] of one length


def stop_tokens(tokenizer: Any, model: Any) -> set[int]:
    """Ids that end an answer: the tokenizer's EOS and all that generation stops at (an end-of-turn token is one)."""
    found: set[int] = set()
    for value in (tokenizer.eos_token_id, model.generation_config.eos_token_id, model.config.eos_token_id):
        found.update(value if isinstance(value, list | tuple) else [] if value is None else [value])
    return found


def fitting(rows: Sequence[TokenRow], *, max_length: int, too_long: Literal["refuse", "drop"], part: str) -> list[int]:
    """Indices of the rows of at most `max_length` tokens. A row is never cut: its EOS would go with the end.

    Raises DataError if there are longer ones and they are to be refused, or if none is left.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    kept = [index for index, length in enumerate(lengths) if length <= max_length]
    over = len(lengths) - len(kept)
    longest = max(lengths, default=0)
    if over and too_long == "refuse":
        raise DataError(
            f"{over} of {len(lengths)} {part} rows are longer than train.max_length {max_length} (the longest has "
            f"{longest} tokens); raise it to {longest}, or leave such rows out with train.too_long: drop"
        )
    if not kept:
        raise DataError(
            f"none of {len(lengths)} {part} rows has at most train.max_length {max_length} tokens (the longest has "
            f"{longest}); raise train.max_length"
        )
    return kept


def check_labels(rows: Iterable[TokenRow], *, stops: set[int], decode: Callable[[list[int]], str]) -> None:
    """Checks every row: loss on something, on nothing of the prompt, and on the EOS at the end of the answer.

    Raises DataError naming the first row that would teach something else. After the EOS a template may add blanks.
    """
    for number, row in enumerate(rows, start=1):
        labels: list[int] = row["labels"]
        learned = [index for index, label in enumerate(labels) if label != MASKED]
        if not learned:
            raise DataError(f"row {number}: no token carries loss; the chat template leaves the answer out")
        first = learned[0]
        if first == 0:
            raise DataError(
                f"row {number}: loss falls on the prompt too; the chat template renders no prompt before it"
            )
        if labels[first:] != row["input_ids"][first:]:
            raise DataError(f"row {number}: part of the answer carries no loss: {decode(row['input_ids'][first:])!r}")
        last = max((index for index in learned if labels[index] in stops), default=None)
        if last is None or decode(labels[last + 1 :]).strip():
            raise DataError(
                f"row {number}: the answer does not end with a stop token ({decode(sorted(stops))!r}), so the student "
                f"would never learn to stop; its end is {decode(labels[-8:])!r}: mend the student's chat template"
            )


def check_batch(rows: Sequence[TokenRow], batch: Mapping[str, Any]) -> None:
    """Checks that collating kept the labels: a pad token that is also the EOS must not take the EOS with it.

    `batch["labels"]` is a (rows, longest) tensor. Raises DataError if a row's labels are not those it had.
    """
    for number, (row, collated) in enumerate(zip(rows, batch["labels"].tolist(), strict=True), start=1):
        labels = row["labels"]
        if collated[: len(labels)] != labels or any(label != MASKED for label in collated[len(labels) :]):
            raise DataError(f"row {number}: padding changed its labels; the pad token may mask the EOS")


def differing_prompts(
    rows: Iterable[TokenRow], examples: Iterable[Mapping[str, Any]], prompt_ids: Callable[[Any], list[int]]
) -> int:
    """How many rows have a context that is not what the student is given when it answers (template or token merges)."""
    differing = 0
    known: dict[str, list[int]] = {}
    for row, example in zip(rows, examples, strict=True):
        key = repr(example["prompt"])
        if key not in known:
            known[key] = prompt_ids(example["prompt"])
        masked = sum(label == MASKED for label in row["labels"])
        differing += row["input_ids"][:masked] != known[key]
    return differing
