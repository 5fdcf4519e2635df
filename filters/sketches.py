"""What is remembered of every row while duplicates are looked for: some hundred bytes, and the offset of its line.

Reads the answers that the rules let pass, kept.jsonl of other runs and evaluation files; writes nothing. The texts stay
on disk: a row that looks like another is read again.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from filters.minhash import Array, band_keys, digest, fold, glimpses, ngrams, shape_for, signatures
from filters.stream import Line, in_blocks
from pipeline.errors import DataError
from pipeline.recipe import DedupConfig
from pipeline.records import Message

ID_BYTES = 16  # of an id, to order rows by
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
        turns = [message.content for message in self.messages if message.role not in ("system", "developer")]
        return "\n".join(turns) or self.prompt

    @property
    def answer(self) -> str:
        """The answer; of a prompt alone, the prompt: it is no answer to learn either."""
        return self.question if self.text is None else self.text


class View(NamedTuple):
    """One text of each row (its answer or its prompt), as numbers to compare."""

    digests: Array  # uint64 (rows,): equal for texts that are the same, once folded
    bands: Array  # uint32 (rows, bands); no columns if near duplicates are not looked for
    glimpses: Array  # uint8 (rows, GLIMPSE), or no columns


class Block(NamedTuple):
    """The rows of one block of lines; `bad` is the first line that is no row, and why."""

    ids: Array  # bytes (rows,)
    starts: Array  # int64 (rows,): offsets of their lines
    answers: View
    prompts: View | None  # None if prompts are not compared
    lines: int
    bad: tuple[int, str] | None


@dataclass(frozen=True)
class Sketches:
    """All rows, source after source; `first` is the number of each source's first row, and of the end."""

    sources: Sequence[Source]
    first: list[int]
    ids: Array
    starts: Array
    answers: View
    prompts: View | None

    @property
    def kinds(self) -> Array:
        """The Kind of each row."""
        return np.repeat([source.kind for source in self.sources], np.diff(self.first))

    def source(self, row: int) -> int:
        """The index of the row's source."""
        return bisect_right(self.first, row) - 1


def sketch(sources: Sequence[Source], config: DedupConfig) -> Sketches:
    """Reads every row of every source once. Raises DataError `path:line: reason` at a line that is no row."""
    blocks, first = [_sketch_lines(iter(()), Kind.OWN, config)], [0]
    for source in sources:
        lines = 0
        with closing(in_blocks(source.path, partial(_sketch_lines, kind=source.kind, config=config))) as made:
            for block in made:
                if block.bad is not None:
                    number, reason = block.bad
                    raise DataError(f"{source.path}:{lines + number}: {reason}")
                lines += block.lines
                blocks.append(block)
        first.append(sum(len(block.ids) for block in blocks))
    prompts = [block.prompts for block in blocks if block.prompts is not None]
    return Sketches(
        sources=sources,
        first=first,
        ids=np.concatenate([block.ids for block in blocks]),
        starts=np.concatenate([block.starts for block in blocks]),
        answers=_joined([block.answers for block in blocks]),
        prompts=_joined(prompts) if prompts else None,
    )


def _joined(views: list[View]) -> View:
    return View(*(np.concatenate(columns) for columns in zip(*views, strict=True)))


def _sketch_lines(lines: Iterator[Line], kind: Kind, config: DedupConfig) -> Block:
    answers, prompts, ids, starts = list[str](), list[str](), list[bytes](), list[int]()
    compare_prompts = config.prompts is not None or bool(config.contamination)
    number, bad = 0, None
    for number, (start, line) in enumerate(lines, start=1):
        if line is not None and line.isspace():
            continue
        try:
            row = _decode(line, kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            bad = (number, str(error))
            break
        answers.append(fold(row.answer))
        if compare_prompts:
            prompts.append(fold(row.question))
        ids.append(row.id.encode())
        starts.append(start)
    return Block(
        ids=np.array(ids, dtype=f"S{ID_BYTES}"),
        starts=np.array(starts, dtype=np.int64),
        answers=_view(answers, config.near, config.ngram),
        prompts=_view(prompts, None if config.prompts == 1 else config.prompts, config.ngram)
        if compare_prompts
        else None,
        lines=number,
        bad=bad,
    )


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
    if kind is not Kind.EVALUATION and row.text is None:
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
        self._files[index].seek(int(self._sketches.starts[number]))
        return _decoder.decode(self._files[index].readline())
