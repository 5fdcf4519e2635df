"""What is remembered of every row while duplicates are looked for: some hundred bytes, and the offset of its line.

Reads kept.jsonl of other runs and evaluation files; this run's rows are sketched while the rules judge them. Writes
nothing. The texts stay on disk: a row that looks like another is read again.
"""

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from functools import lru_cache
from itertools import islice
from typing import BinaryIO, NamedTuple

import msgspec
import numpy as np

from filters.minhash import (
    GLIMPSE,
    Array,
    band_keys,
    digest,
    fold,
    fold_prompt,
    glimpses,
    ngrams,
    shape_for,
    signatures,
)
from filters.stream import read_lines
from pipeline.errors import DataError
from pipeline.filters_config import DedupConfig
from pipeline.instructions import INSTRUCTIONS
from pipeline.records import BOM, Json, Message, said

BATCH = 4096  # rows of another file whose texts are held at once
READ_AGAIN = 4096  # rows whose n-grams are held at once: about 3 KB each


class Kind(IntEnum):
    """Whose rows they are; the order in which they come."""

    EVALUATION = 0  # never to be trained on
    OTHER_RUN = 1  # kept already
    OWN = 2


class Source(NamedTuple):
    """A file of rows, and what reports call it. It stays open: what takes its place meanwhile is not read."""

    file: BinaryIO
    kind: Kind
    name: str


class Text(NamedTuple):
    """What is compared of a row, and where its line begins in the file."""

    id: str
    start: int
    answer: str  # of a prompt to evaluate on, the prompt: it is no answer to learn either
    prompt: str


class Sketches(NamedTuple):
    """All rows, source after source; `first` is the number of each source's first row, and of the end.

    A row that looks like another is read again, by its number.
    """

    config: DedupConfig
    sources: Sequence[Source]
    first: list[int]
    rows: Array  # of `_row_type`
    kinds: Array  # the Kind of each row

    @property
    def own(self) -> int:
        """The number of this run's first row: it is the last source."""
        return self.first[-2]

    def source(self, row: int) -> int:
        return bisect_right(self.first, row) - 1

    def text(self, row: int) -> Text:
        source, start = self.sources[self.source(row)], int(self.rows["start"][row])
        source.file.seek(start)
        return _text(source.file.readline(), start, source.kind)

    def compared(self, row: int, name: str) -> str:
        """The answer or prompt of a row as it is compared."""
        return _compared(self.text(row), name, self.config)

    def ngrams_of(self, name: str) -> Callable[[int], Array]:
        """A function of a row's number: the n-grams of its answer or prompt."""
        return lru_cache(READ_AGAIN)(lambda row: ngrams(self.compared(row, name), self.config.ngram))


def question_of(messages: Sequence[Message]) -> str:
    """What was asked: every turn but the system's."""
    return "\n".join([message.content for message in messages if message.role not in INSTRUCTIONS])


def _row_type(config: DedupConfig) -> np.dtype[np.void]:
    """A row as numbers: its id and offset; digest, band keys and glimpse of its answer, and of its prompt if compared.

    Band keys and glimpse are not there where near duplicates are not looked for.
    """
    fields = [("id", "S16"), ("start", np.int64)]
    for text, threshold in thresholds(config).items():
        near = [] if threshold is None else [("bands", np.uint32, shape_for(threshold)[:1]), ("glimpse", "u1", GLIMPSE)]
        fields.append((text, [("digest", np.uint64), *near]))
    return np.dtype(fields)


def thresholds(config: DedupConfig) -> dict[str, float | None]:
    """The texts of a row that are compared, and from which similarity on they are alike; None: only if the same."""
    prompts = {"prompt": None if config.prompts == 1 else config.prompts}
    return {"answer": config.near, **(prompts if config.prompts or config.contamination else {})}


def _same(text: Text, name: str, config: DedupConfig) -> str:
    """What rows that are the same have in common: a prompt, an answer, or in a `row` both."""
    if name == "prompt":
        return fold_prompt(text.prompt)
    return f"{fold_prompt(text.prompt)}\n{fold(text.answer)}" if config.of == "row" else fold(text.answer)


def _compared(text: Text, name: str, config: DedupConfig) -> str:
    """The text whose n-grams are compared, in which signs do not count."""
    return fold(f"{text.prompt}\n{text.answer}" if name == "answer" and config.of == "row" else getattr(text, name))


def sketch(texts: Sequence[Text], config: DedupConfig) -> Array:
    """Some rows of one file, of `_row_type`."""
    rows = np.empty(len(texts), _row_type(config))
    rows["id"] = [text.id.encode() for text in texts]
    rows["start"] = [text.start for text in texts]
    for name, threshold in thresholds(config).items():
        view, same = rows[name], [_same(text, name, config) for text in texts]
        view["digest"] = np.frombuffer(b"".join(map(digest, same)), dtype=np.uint64)
        if threshold is not None:
            alone = name == "answer" and config.of != "row"  # without a prompt both texts are the same
            values = signatures(same if alone else [_compared(text, name, config) for text in texts], config.ngram)
            view["bands"], view["glimpse"] = band_keys(values, shape_for(threshold)), glimpses(values)
    return rows


def joined(parts: Sequence[tuple[Source, Sequence[Array]]], config: DedupConfig) -> Sketches:
    sources, counts = [source for source, _ in parts], [sum(map(len, sketches)) for _, sketches in parts]
    rows = np.concatenate([one for _, sketches in parts for one in sketches] or [sketch([], config)])
    kinds = np.repeat([source.kind for source in sources], counts)
    return Sketches(config, sources, np.cumsum([0, *counts]).tolist(), rows, kinds)


def sketch_file(source: Source, config: DedupConfig) -> list[Array]:
    """Reads another run's or an evaluation's rows. Raises DataError `path:line: reason` at a line that is no row."""
    texts = _texts(source)
    return [sketch(batch, config) for batch in iter(lambda: [*islice(texts, BATCH)], [])]


def _texts(source: Source) -> Iterator[Text]:
    size = os.fstat(source.file.fileno()).st_size
    for number, (start, line) in enumerate(read_lines(source.file, 0, size), start=1):
        if line is not None and line.isspace():
            continue
        try:
            yield _text(line, start, source.kind)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise DataError(f"{source.file.name}:{number}: {error}") from None


class _Row(msgspec.Struct):
    """What matters here of a line: a kept answer, or a prompt to evaluate on, alone or with its answer."""

    id: str | int = ""  # in a file of prompts it may be a number
    messages: list[Message] = []
    prompt: str = ""
    text: str | None = None
    tool_calls: list[Json] = []


_decode = msgspec.json.Decoder(_Row).decode


def _text(line: bytes | None, start: int, kind: Kind) -> Text:
    """A row of a source of that kind. Raises msgspec.DecodeError."""
    if line is None:
        raise msgspec.ValidationError("a line too long for a row")
    row = _decode(line.removeprefix(BOM))
    if kind is Kind.OTHER_RUN and row.text is None:
        raise msgspec.ValidationError("no `text`: not a row of kept.jsonl")
    if not row.messages and not row.prompt:
        raise msgspec.ValidationError("neither `messages` nor `prompt`: no row to evaluate on")
    question = question_of(row.messages) or row.prompt
    answer = question if row.text is None else said(Message("assistant", row.text, row.tool_calls))
    return Text(str(row.id), start, answer, question)
