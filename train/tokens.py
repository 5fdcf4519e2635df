"""What the student is really shown: checks of the tokenised rows that the trainer will use.

Takes rows as TRL tokenised them: `input_ids`, and `labels` with -100 where no loss falls. Reads and writes no file.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

MASKED = -100
TokenRow = Mapping[str, Any]  # "input_ids" and "labels": list[int] of one length


@dataclass(frozen=True)
class LabelFaults:
    """Rows that would teach something else than their answer, by kind of fault."""

    counts: dict[str, int]
    first: dict[str, str]  # the first row of each kind, and what is wrong with it


def count_faults(
    parts: Iterable[Iterable[TokenRow]], *, stops: set[int], decode: Callable[[list[int]], str]
) -> LabelFaults:
    """Counts the rows whose labels teach more than their answer, or less."""
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for number, row in enumerate(chain.from_iterable(parts), start=1):
        if found := label_fault(row, stops=stops, decode=decode):
            kind, reason = found
            counts[kind] += 1
            first.setdefault(kind, f"row {number}: {reason}")
    return LabelFaults(dict(counts), first)


def label_fault(row: TokenRow, *, stops: set[int], decode: Callable[[list[int]], str]) -> tuple[str, str] | None:
    """The kind of a row's fault (eos, masked or labels) and what is wrong; None if it has none.

    Loss must fall on the whole answer with its EOS, and on nothing else. After the EOS a template may add blanks.
    """
    labels: list[int] = row["labels"]
    learned = [index for index, label in enumerate(labels) if label != MASKED]
    if not learned:
        return "masked", "no token carries loss; the chat template leaves the answer out"
    first = learned[0]
    if first == 0:
        return "labels", "loss falls on the prompt too; the chat template renders no prompt before it"
    if labels[first:] != row["input_ids"][first:]:
        return "labels", f"part of the answer carries no loss: {decode(row['input_ids'][first:])!r}"
    last = max((index for index in learned if labels[index] in stops), default=None)
    if last is None or decode(labels[last + 1 :]).strip():
        return "eos", (
            f"the answer does not end with a stop token ({decode(sorted(stops))!r}); its end is {decode(labels[-8:])!r}"
        )
    return None


def differing_prompts(rows: Iterable[TokenRow], examples: Iterable[Mapping[str, Any]], tokenizer: Any) -> int:
    """How many rows have a context that is not what the student is given when it answers (template or token merges)."""
    differing = 0
    known: dict[str, list[int]] = {}
    for row, example in zip(rows, examples, strict=True):
        key = repr(example["prompt"])
        if key not in known:
            chat = tokenizer.apply_chat_template(example["prompt"], add_generation_prompt=True, return_dict=True)
            known[key] = chat["input_ids"]
        masked = sum(label == MASKED for label in row["labels"])
        differing += row["input_ids"][:masked] != known[key]
    return differing
