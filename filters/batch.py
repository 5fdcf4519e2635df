"""The completions of a chunk of completions.jsonl, checked, to be judged together. Writes nothing.

A line is checked in full but not decoded in full: of the lines of one shape one is decoded, texts stay JSON until a
rule wants to read one, and prompts and slots that come again are decoded once. Where a line is bad, or only unusual,
the lines are decoded one by one, which also says what is wrong.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

import msgspec
import numpy as np

from filters.answer import Answer, instruction_of, last_user_message, nfc
from filters.compiled import Places
from filters.lines import count_lines, first_alike, join_pairs, read_lines
from filters.stream import LONGEST_LINE, Chunk
from filters.texts import Counts, Flags, Texts
from pipeline.records import Completion, Message, Slots, encode_line

Value = TypeVar("Value")


class _Row(Completion, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A completion and nothing else: a field that is not ours means another version's file, or one filtered already."""


_decode_row = msgspec.json.Decoder(_Row).decode
_decode_messages = msgspec.json.Decoder(list[list[Message]]).decode
_decode_slots = msgspec.json.Decoder(list[Slots]).decode
_decode_finish_reasons = msgspec.json.Decoder(list[str]).decode
_FIELDS = ("id", "messages", "slots", "text", "finish_reason")  # whose values are wanted
_keys = [msgspec.json.encode(name) for name in _FIELDS]
_KEYS = np.frombuffer(b"".join(_keys), np.uint8)
_KEY_ENDS = np.cumsum(list(map(len, _keys)))


class Batch:
    """Completions, one a line. Raises one of NOT_PLAIN where the lines may be anything else."""

    def __init__(self, data: bytes) -> None:
        """`data`: lines, each with its newline."""
        self._data = data
        self._bytes = np.frombuffer(data, np.uint8)
        rows = count_lines(self._bytes)
        if rows < 0:
            raise ValueError("not lines of UTF-8")
        lines, spans = np.empty(rows + 1, np.int64), np.full((rows, len(_FIELDS), 2), -1)
        unlike = np.empty(rows, np.int64)
        found = read_lines(self._bytes, _KEYS, _KEY_ENDS, lines, spans, unlike)
        if found < 0:
            raise ValueError("not one object a line")
        for index in unlike[:found].tolist():
            _decode_row(data[lines[index] : lines[index + 1]])
        self._starts, self._ends = lines[:-1], lines[1:]
        starts, ends = np.ascontiguousarray(spans[..., 0].T), np.ascontiguousarray(spans[..., 1].T)
        values = dict(zip(_FIELDS, zip(starts, ends, strict=True), strict=True))
        self._ids = values["id"]
        self._messages = _Values(data, *values["messages"], _decode_messages)
        self._slots = _Values(data, *values["slots"], _decode_slots)
        self._finish_reasons = _Values(data, *values["finish_reason"], _decode_finish_reasons)
        self.texts = Texts(data, *values["text"])
        self.unsure = self._unsure()
        self._answers: dict[int, Answer] = {}
        self._instructions: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._starts)

    def id(self, index: int) -> str:
        starts, ends = self._ids
        found: str = msgspec.json.decode(self._data[starts[index] : ends[index]])
        return found

    def written(self, indices: Places, tails: list[bytes]) -> memoryview:
        """Lines one after another, a tail in the place of each one's last brace and newline."""
        tail_ends = np.cumsum(np.fromiter(map(len, tails), np.int64, len(tails)))
        starts, ends = self._starts[indices], self._ends[indices] - 2
        joined_tails = np.frombuffer(b"".join(tails), np.uint8)
        joined = np.empty(int((ends - starts).sum()) + len(joined_tails), np.uint8)
        join_pairs(self._bytes, starts, ends, joined_tails, tail_ends, joined)
        return joined.data

    @property
    def finish_reasons(self) -> list[str]:
        return list(map(self._finish_reasons.__getitem__, range(len(self))))

    def beginnings(self, chars: int) -> set[str]:
        """The first characters of the rows' instructions, as they were asked (not in NFC): each that differs, once."""
        return {last_user_message(messages)[:chars] for messages in self._messages.distinct.values()}

    def answer(self, index: int) -> Answer:
        """A row's answer, as `as_answer` makes it of a completion."""
        if index not in self._answers:
            self.read([index])
        return self._answers[index]

    def read(self, indices: Sequence[int]) -> None:
        """Makes the answers of rows together, which is faster than one by one."""
        messages, slots, finish_reasons = self._messages, self._slots, self._finish_reasons
        instructions = self._instructions
        for index, text in zip(indices, self.texts.decoded(indices), strict=True):
            asked = messages.rows_alike[index]
            if asked not in instructions:
                instructions[asked] = instruction_of(messages[asked])
            if self.unsure[index]:
                text = nfc(text)
            self._answers[index] = Answer(text, instructions[asked], finish_reasons[index], slots[index])

    def lengths(self) -> Counts:
        """Characters of each row's text, in NFC."""
        lengths = self.texts.sizes.copy()
        unsure = np.flatnonzero(self.unsure).tolist()
        lengths[unsure] = [len(self.answer(index).text) for index in unsure]
        return lengths

    def slots(self, chosen: Flags) -> list[tuple[Slots, int]]:
        """The slots of the rows chosen: each that differs once, with the number of rows that have it."""
        counts = np.bincount(self._slots.first[chosen], minlength=len(self))
        return [(self._slots.distinct[first], int(counts[first])) for first in np.flatnonzero(counts).tolist()]

    def _unsure(self) -> Flags:
        """Rows whose text may be another than it looks in JSON: not in NFC, or escaped in an unusual way."""
        unsure = self.texts.irregular.copy()
        doubted = np.flatnonzero(self.texts.maybe_not_nfc & ~unsure).tolist()
        unsure[doubted] = [nfc(text) != text for text in self.texts.decoded(doubted)]
        return unsure


class _Values(Generic[Value]):
    """The values of a field, by row; those that are alike are decoded once, when the first of all is wanted."""

    def __init__(self, data: bytes, starts: Places, ends: Places, decode: Callable[[bytes], list[Value]]) -> None:
        self._data, self._starts, self._ends, self._decode = data, starts, ends, decode
        self.first = np.empty(len(starts), np.int64)  # the row that has the value first
        first_alike(np.frombuffer(data, np.uint8), starts, ends, self.first)

    def __getitem__(self, index: int) -> Value:
        return self.distinct[self.rows_alike[index]]

    @cached_property
    def rows_alike(self) -> list[int]:
        """For each row the first that has the same value."""
        rows: list[int] = self.first.tolist()
        return rows

    @cached_property
    def distinct(self) -> dict[int, Value]:
        """Each value that differs, by the row that has it first."""
        rows = np.flatnonzero(self.first == np.arange(len(self.first)))
        spans = zip(self._starts[rows].tolist(), self._ends[rows].tolist(), strict=True)
        values = [self._data[start:end] or b"{}" for start, end in spans]  # only slots may be left out
        return dict(zip(rows.tolist(), self._decode(b"[" + b",".join(values) + b"]"), strict=True))


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
    try:
        batch = Batch(b"".join(good))
    except NOT_PLAIN:  # the name of a field is written with escapes
        batch = Batch(b"".join(map(encode_line, map(_decode_row, good))))
    return Lines(batch, last, bad, torn)
