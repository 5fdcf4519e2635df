"""The completions of a chunk of completions.jsonl, checked, to be judged together. Writes nothing.

A line is checked in full but not decoded in full: texts stay JSON until a rule wants to read one, and prompts and slots
that come again are decoded once. Whatever does not fit that is decoded line by line, which also says what is wrong.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import TypeVar

import msgspec
import numpy as np

from filters.answer import Answer, instruction_of, last_user_message, nfc
from filters.chunks import LONGEST_LINE, Chunk
from filters.texts import Counts, Flags, Texts, positions
from pipeline.records import Completion, Message, Slots

Value = TypeVar("Value")


class _Row(Completion, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A completion and nothing else: a field that is not ours means another version's file, or one filtered already."""


class _Line(_Row, frozen=True, kw_only=True, gc=False):
    """The same, what is large or comes again left in JSON: its syntax is checked, its types and its UTF-8 are not.

    Of a field that is given twice only the last is kept, and checked.
    """

    messages: msgspec.Raw  # type: ignore[assignment]
    slots: msgspec.Raw = msgspec.Raw(b"{}")  # type: ignore[assignment]
    text: msgspec.Raw  # type: ignore[assignment]


_decode_row = msgspec.json.Decoder(_Row).decode
_decode_lines = msgspec.json.Decoder(_Line).decode_lines
_decode_messages = msgspec.json.Decoder(list[list[Message]]).decode
_decode_slots = msgspec.json.Decoder(list[Slots]).decode
_NEWLINE, _OPEN, _CLOSE = b"\n{}"


class Batch:
    """Completions, one a line. Raises one of NOT_PLAIN where the lines may be anything else."""

    def __init__(self, data: bytes) -> None:
        """`data`: lines, each with its newline."""
        self._data = data
        raw = np.frombuffer(data, np.uint8)
        self._ends = positions(raw == _NEWLINE)
        self._starts = np.concatenate([[0], self._ends[:-1] + 1])[: len(self._ends)]
        # An object that went over a line's end would have `}` and `{` with nothing but a newline between them.
        if data and (
            data[-1] != _NEWLINE or (raw[self._starts] != _OPEN).any() or (raw[self._ends - 1] != _CLOSE).any()
        ):
            raise ValueError("not one object a line")
        self._rows: list[_Line] = _decode_lines(data)
        if len(self._rows) != len(self._ends):
            raise ValueError("not one object a line")
        self._slots = self._json("slots")
        self._messages = self._json("messages")
        self._known_slots = _decoded(self._slots, _decode_slots)
        self._known_messages = _decoded(self._messages, _decode_messages)
        self.texts = Texts(list(map(attrgetter("text"), self._rows)))
        if not self.texts.all_strings():
            raise ValueError("a text is no string")
        self.unsure = self._unsure()
        self._answers: dict[int, Answer] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def _json(self, field: str) -> list[bytes]:
        """A field as it stands in each line."""
        return b"\n".join(map(attrgetter(field), self._rows)).split(b"\n") if self._rows else []

    def id(self, index: int) -> str:
        return self._rows[index].id

    @cached_property
    def opened(self) -> list[memoryview]:
        """The lines without their last braces."""
        view = memoryview(self._data)
        return [view[start:end] for start, end in zip(self._starts.tolist(), (self._ends - 1).tolist(), strict=True)]

    @property
    def finish_reasons(self) -> list[str]:
        return list(map(attrgetter("finish_reason"), self._rows))

    def beginnings(self, chars: int) -> set[str]:
        """The first characters of the rows' instructions, as they were asked (not in NFC): each that differs, once."""
        return {last_user_message(messages)[:chars] for messages in self._known_messages.values()}

    def answer(self, index: int) -> Answer:
        """A row's answer, as `as_answer` makes it of a completion."""
        answer = self._answers.get(index)
        if answer is None:
            text = self.texts[index]
            answer = self._answers[index] = Answer(
                nfc(text) if self.unsure[index] else text,
                instruction_of(self._known_messages[self._messages[index]]),
                self._rows[index].finish_reason,
                self._known_slots[self._slots[index]],
            )
        return answer

    def lengths(self) -> Counts:
        """Characters of each row's text, in NFC."""
        lengths = self.texts.sizes.copy()
        for index in np.flatnonzero(self.unsure).tolist():
            lengths[index] = len(self.answer(index).text)
        return lengths

    def slots(self, indices: Iterable[int]) -> list[tuple[Slots, int]]:
        """The rows' slots: each that differs once, with the number of rows that have it."""
        counts = Counter(map(self._slots.__getitem__, indices))
        return [(self._known_slots[raw], count) for raw, count in counts.items()]

    def _unsure(self) -> Flags:
        """Rows whose text may be another than it looks in JSON: not in NFC, or escaped in an unusual way."""
        unsure = self.texts.irregular.copy()
        for index in np.flatnonzero(self.texts.maybe_not_nfc & ~unsure).tolist():
            text = self.texts[index]
            unsure[index] = nfc(text) != text
        return unsure


def _decoded(values: Iterable[bytes], decode: Callable[[bytes], list[Value]]) -> dict[bytes, Value]:
    """Each value that differs, decoded once."""
    distinct = dict.fromkeys(values)
    return dict(zip(distinct, decode(b"[" + b",".join(distinct) + b"]"), strict=True))


NOT_PLAIN = (ValueError, msgspec.DecodeError)  # UnicodeDecodeError is a ValueError


@dataclass(frozen=True)
class Lines:
    """What a chunk's lines are."""

    batch: Batch  # the completions
    count: int  # of all lines
    bad: list[tuple[int, str]]  # each line, numbered from 1 in the chunk, and what is wrong with it
    torn: bool  # the last line is cut off


def read_batch(chunk: Chunk) -> Lines:
    """Checks a chunk's lines. Blank ones are passed over."""
    if len(chunk.data) <= LONGEST_LINE:
        try:
            batch = Batch(chunk.data)
            return Lines(batch, len(batch), [], torn=False)
        except NOT_PLAIN:
            pass  # some line is bad, or only unusual
    good, bad, torn = list[bytes](), list[tuple[int, str]](), False
    last = len(chunk.lines)
    for number, line in enumerate(chunk.lines, start=1):
        if line is None:
            bad.append((number, f"over {LONGEST_LINE >> 20} MiB in one line: no answer is so long"))
            continue
        if not line or line.isspace():
            continue
        try:
            _decode_row(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            if number == last and chunk.torn and not isinstance(error, msgspec.ValidationError):
                torn = True
            else:
                bad.append((number, str(error)))
        else:
            good.append(line.strip() + b"\n")
    return Lines(Batch(b"".join(good)), last, bad, torn)
