"""What is remembered of every row while duplicates are looked for: some hundred bytes, and the offset of its line.

Reads kept.jsonl of other runs and evaluation files; this run's rows are sketched while the rules judge them. Writes
nothing. The texts stay on disk: a row that looks like another is read again.
"""

from bisect import bisect_right
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from filters.minhash import Array, band_keys, digest, fold, glimpses, ngrams, shape_for, signatures
from filters.stream import read_lines
from pipeline.errors import DataError
from pipeline.recipe import DedupConfig
from pipeline.records import Message

ID_BYTES = 16  # of an id, to order rows by
BATCH = 4096  # rows of another file whose texts are held at once
READ_AGAIN = 4096  # rows whose n-grams are held at once: about 3 KB each


class Kind(IntEnum):
    """Whose rows they are; the order in which they come."""

    EVALUATION = 0  # never to be trained on
    OTHER_RUN = 1  # kept already
    OWN = 2


class Source(NamedTuple):
    """A file of rows; `name` is what reports call it."""

    path: Path
    kind: Kind
    name: str


class Row(msgspec.Struct, frozen=True):
    """What matters here of a row: a kept answer, or a prompt to evaluate on, alone or with its answer."""

    id: str = ""
    messages: list[Message] = []
    prompt: str = ""
    text: str | None = None

    @property
    def question(self) -> str:
        """What was asked: every turn but the system's."""
        return question_of(self.messages) or self.prompt

    @property
    def answer(self) -> str:
        """The answer; of a prompt alone, the prompt: it is no answer to learn either."""
        return self.question if self.text is None else self.text


class View(NamedTuple):
    """One text of each row (its answer or its prompt), as numbers to compare."""

    digests: Array  # uint64 (rows,): equal for texts that are the same, once folded
    bands: Array  # uint32 (rows, bands); no columns if near duplicates are not looked for
    glimpses: Array  # uint8 (rows, GLIMPSE), or no columns


class Text(NamedTuple):
    """What is compared of a row, and where its line begins in the file."""

    id: str
    start: int
    answer: str
    question: str


class Sketch(NamedTuple):
    """Rows as numbers, in the order of their file."""

    ids: Array  # bytes (rows,)
    starts: Array  # int64 (rows,): offsets of their lines
    views: list[View]  # of the answers; and of the prompts, if those are compared


@dataclass(frozen=True)
class Sketches:
    """All rows, source after source; `first` is the number of each source's first row, and of the end."""

    sources: Sequence[Source]
    first: list[int]
    rows: Sketch

    @property
    def kinds(self) -> Array:
        """The Kind of each row."""
        return np.repeat([source.kind for source in self.sources], np.diff(self.first))

    def source(self, row: int) -> int:
        """The index of the row's source."""
        return bisect_right(self.first, row) - 1


def question_of(messages: Sequence[Message]) -> str:
    """What was asked: every turn but the system's."""
    return "\n".join([message.content for message in messages if message.role not in ("system", "developer")])


def sketch(texts: Sequence[Text], config: DedupConfig) -> Sketch:
    """Some rows of one file."""
    views = [_view([fold(text.answer) for text in texts], config.near, config.ngram)]
    if config.prompts is not None or config.contamination:
        threshold = None if config.prompts == 1 else config.prompts
        views.append(_view([fold(text.question) for text in texts], threshold, config.ngram))
    ids = np.array([text.id.encode() for text in texts], dtype=f"S{ID_BYTES}")
    return Sketch(ids, np.array([text.start for text in texts], dtype=np.int64), views)


def joined(parts: Sequence[tuple[Source, Sequence[Sketch]]], config: DedupConfig) -> Sketches:
    """All rows of all sources."""
    every = [sketch([], config), *(one for _, sketches in parts for one in sketches)]
    ids, starts, views = zip(*every, strict=True)
    columns = [View(*map(np.concatenate, zip(*of_texts, strict=True))) for of_texts in zip(*views, strict=True)]
    counts = [sum(len(one.ids) for one in sketches) for _, sketches in parts]
    rows = Sketch(np.concatenate(ids), np.concatenate(starts), columns)
    return Sketches([source for source, _ in parts], np.cumsum([0, *counts]).tolist(), rows)


def sketch_file(source: Source, config: DedupConfig) -> list[Sketch]:
    """Reads another run's or an evaluation's rows. Raises DataError `path:line: reason` at a line that is no row."""
    made, texts = [], list[Text]()
    with source.path.open("rb") as file:
        for number, (start, line) in enumerate(read_lines(file, 0, source.path.stat().st_size), start=1):
            if line is not None and line.isspace():
                continue
            try:
                row = _decode(line, source.kind)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise DataError(f"{source.path}:{number}: {error}") from None
            texts.append(Text(row.id, start, row.answer, row.question))
            if len(texts) == BATCH:
                made.append(sketch(texts, config))
                texts = []
    return [*made, sketch(texts, config)]


def _view(folded: list[str], threshold: float | None, n: int) -> View:
    digests = np.frombuffer(b"".join(map(digest, folded)), dtype=np.uint64)
    if threshold is None:
        return View(digests, np.empty((len(folded), 0), np.uint32), np.empty((len(folded), 0), np.uint8))
    values = signatures(folded, n)
    return View(digests, band_keys(values, shape_for(threshold)), glimpses(values))


_decoder = msgspec.json.Decoder(Row)


def _decode(line: bytes | None, kind: Kind) -> Row:
    """A row of a source of that kind. Raises msgspec.DecodeError."""
    if line is None:
        raise msgspec.ValidationError("a line too long for a row")
    row = _decoder.decode(line)
    if kind is Kind.OTHER_RUN and row.text is None:
        raise msgspec.ValidationError("no `text`: not a row of kept.jsonl")
    if not row.messages and not row.prompt:
        raise msgspec.ValidationError("neither `messages` nor `prompt`: no row to evaluate on")
    return row


class Reader:
    """Reads rows again, by number: their ids, and their n-grams to compare."""

    def __init__(self, sketches: Sketches, ngram: int, stack: ExitStack) -> None:
        self._sketches = sketches
        self._files = [stack.enter_context(source.path.open("rb")) for source in sketches.sources]
        self.answer_ngrams = lru_cache(READ_AGAIN)(lambda number: ngrams(fold(self.row(number).answer), ngram))
        self.prompt_ngrams = lru_cache(READ_AGAIN)(lambda number: ngrams(fold(self.row(number).question), ngram))

    def row(self, number: int) -> Row:
        index = self._sketches.source(number)
        self._files[index].seek(int(self._sketches.rows.starts[number]))
        return _decoder.decode(self._files[index].readline())
