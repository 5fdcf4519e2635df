"""Rows to learn from: kept.jsonl to prompt/completion rows, split by prompt into training and held-out.

Reads kept.jsonl, writes held_out.jsonl. Tokens, lengths and labels are train.tokens' business.
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from pipeline.errors import DataError
from pipeline.records import Completion, Kept, Message, question_text, read_jsonl
from pipeline.rundir import RunDir, write_jsonl

ROLES = ("system", "developer", "user", "assistant")


@dataclass(frozen=True)
class Split:
    """Kept rows by what they are for; no prompt is in both."""

    train: list[Kept]
    held_out: list[Kept]


def read_rows(run: RunDir) -> list[Kept]:
    """All kept rows, each one checked. Raises DataError as read_checked does, and where no answer was kept."""
    rows = read_checked(run.kept)
    if not rows:
        raise DataError(f"{run.kept}: no rows; no answer passed the filters: see {run.filter_report.name} for why")
    return rows


def read_checked(path: Path) -> list[Kept]:
    """The rows of a file like kept.jsonl.

    Raises DataError if the file is missing, a line is not a kept row (a content that is not text, an image
    for one), an answer is empty, a role is unknown, or a conversation does not end with the user's turn.
    """
    try:
        rows = list(read_jsonl(path, Kept))
    except DataError as error:
        if not path.is_file():
            raise
        wanted = "a row is an answer as filters keeps it: id, messages of role and content, text, all of it plain text"
        raise DataError(f"{error}; {wanted}; filter again") from None
    for number, row in enumerate(rows, start=1):
        if fault := _fault(row):
            raise DataError(f"{path}: row {number} (id {row.id}): {fault}; remove it, or filter again")
    return rows


def split_rows(rows: list[Kept], *, share: float, seed: int) -> Split:
    """Splits by prompt, so that no question of the held-out rows was trained on, in other spacing or case either.

    Distinct prompts are sorted by a hash of their messages and the seed; the first `share` of them, at least one and
    never all, is held out. The same rows and seed give the same split, in whatever order the rows come.
    Raises DataError if there are fewer than two distinct prompts.
    """
    keys: dict[str, str] = {}
    for row in rows:
        text, key = prompt_text(row), _prompt_key(row.messages, seed)
        keys[text] = min(keys.get(text, key), key)
    order = sorted(keys.values())
    if len(order) < 2:
        raise DataError(
            f"{len(rows)} kept rows answer {len(order)} distinct prompt; at least 2 are needed, one to train on and "
            "one to hold out: generate more prompts"
        )
    count = min(max(1, math.ceil(round(share * len(order), 9))), len(order) - 1)
    held = set(order[:count])
    parts: dict[bool, list[Kept]] = {False: [], True: []}
    for row in rows:
        parts[keys[prompt_text(row)] in held].append(row)
    return Split(train=parts[False], held_out=parts[True])


def split_from(rows: list[Kept], held_out: list[Kept]) -> Split:
    """The rows whose question is none of the held-out ones, and those. Raises DataError where either is empty."""
    questions = {prompt_text(row) for row in held_out}
    train = [row for row in rows if prompt_text(row) not in questions]
    if not train or not held_out:
        raise DataError(
            f"train.held_out_rows leaves {len(train)} of {len(rows)} rows to train on and {len(held_out)} held out; "
            "both are needed"
        )
    return Split(train=train, held_out=held_out)


def prompt_text(row: Completion) -> str:
    """A conversation up to the answer, without what makes it no other question."""
    return question_text(row.messages)


def to_examples(rows: Iterable[Kept]) -> list[dict[str, Any]]:
    """TRL's conversational prompt-completion shape: loss falls on the completion only."""
    return [
        {
            "prompt": [{"role": message.role, "content": message.content} for message in row.messages],
            "completion": [{"role": "assistant", "content": row.text}],
        }
        for row in rows
    ]


def write_held_out(run: RunDir, rows: Iterable[Kept]) -> None:
    """Writes the rows that training never sees, as they were in kept.jsonl."""
    write_jsonl(run.held_out, rows)


def _fault(row: Kept) -> str | None:
    if not row.text.strip():
        return "the answer is empty"
    if unknown := [message.role for message in row.messages if message.role not in ROLES]:
        return f"no role {unknown[0]!r} is known; there are {', '.join(ROLES)}"
    if not row.messages or row.messages[-1].role != "user":
        last = row.messages[-1].role if row.messages else "none"
        return f"the conversation must end with a user message, the last one is {last!r}"
    if not row.messages[-1].content.strip():
        return "the question is empty"
    return None


def _prompt_key(messages: list[Message], seed: int) -> str:
    return hashlib.sha256(msgspec.json.encode([seed, messages])).hexdigest()
