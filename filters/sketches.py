"""What is remembered of every row while duplicates are looked for: some hundred bytes, and where its line is.

Reads the survivors of the rules, kept.jsonl of other runs and evaluation files; writes nothing. The texts stay on disk:
a row that looks like another is read again.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from filters.minhash import band_keys, digest, fold, glimpses, ngrams, shape_for, signatures
from filters.stream import Chunk, process
from pipeline.errors import DataError
from pipeline.recipe import DedupConfig
from pipeline.records import Message

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from filters.minhash import Hashes, Keys

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


class Kept(msgspec.Struct, frozen=True):
    """What matters here of a row of kept.jsonl."""

    id: str
    messages: list[Message]
    text: str


class Question(msgspec.Struct, frozen=True):
    """A row to evaluate on: a kept row that was held out, or a prompt alone."""

    id: str = ""
    messages: list[Message] = []
    prompt: str = ""
    text: str | None = None


@dataclass
class Columns:
    """Rows as bytes, a column each; what a process hands over of a chunk, and what is gathered of all."""

    exact: bytearray  # 8 bytes a row: the digest of its folded text
    bands: bytearray  # 4 bytes a band; empty, as the next, where near-duplicates are not looked for
    glimpse: bytearray  # GLIMPSE bytes
    prompt: bytearray  # 8 bytes: the digest of its folded prompt; empty where prompts are not compared
    prompt_bands: bytearray
    prompt_glimpse: bytearray
    ids: bytearray  # ID_BYTES, zeros added
    scores: bytearray  # 4 bytes
    starts: bytearray  # 8 bytes: the offset of its line


class Part(NamedTuple):
    """A chunk's rows; `size` is the length of all its lines, `bad` the first line that is no row, and why."""

    columns: Columns
    size: int
    lines: int
    bad: tuple[int, str] | None


@dataclass(frozen=True)
class Sketches:
    """All rows, source after source; `first` is the number of each source's first row, and of the end."""

    sources: Sequence[Source]
    first: list[int]
    exact: "Hashes"
    bands: "Keys"  # (rows, bands)
    glimpse: "NDArray[np.uint8]"  # (rows, GLIMPSE)
    prompt: "Hashes"
    prompt_bands: "Keys"
    prompt_glimpse: "NDArray[np.uint8]"
    ids: "NDArray[np.bytes_]"
    scores: "NDArray[np.float32]"
    starts: "NDArray[np.int64]"

    def source(self, row: int) -> int:
        """The index of the row's source."""
        return bisect_right(self.first, row) - 1

    def order(self) -> "NDArray[np.int64]":
        """The rows from the first to be kept to the last.

        By kind, then by the judge's score, then by id: which row of a pair is kept does not hang on the files' order.
        """
        import numpy as np

        kinds = np.repeat(
            np.array([source.kind for source in self.sources], dtype=np.int8), np.diff(np.array(self.first))
        )
        order: NDArray[np.int64] = np.lexsort((self.ids, -self.scores, kinds))
        return order


def sketch(sources: Sequence[Source], config: DedupConfig, verdicts: Mapping[str, float]) -> Sketches:
    """Reads every row of every source once; `verdicts` are scores by id, the higher the better, 0 where there is none.

    Raises DataError `path:line: reason` at a line that is no row.
    """
    import numpy as np

    all_rows = Columns(*(bytearray() for _ in fields(Columns)))
    first = [0]
    for source in sources:
        _gather(source, config, verdicts, all_rows)
        first.append(len(all_rows.exact) // 8)
    count = first[-1]
    return Sketches(
        sources=sources,
        first=first,
        exact=np.frombuffer(all_rows.exact, dtype=np.uint64),
        bands=_table(all_rows.bands, np.uint32, count),
        glimpse=_table(all_rows.glimpse, np.uint8, count),
        prompt=np.frombuffer(all_rows.prompt, dtype=np.uint64),
        prompt_bands=_table(all_rows.prompt_bands, np.uint32, count),
        prompt_glimpse=_table(all_rows.prompt_glimpse, np.uint8, count),
        ids=np.frombuffer(all_rows.ids, dtype=f"S{ID_BYTES}"),
        scores=np.frombuffer(all_rows.scores, dtype=np.float32),
        starts=np.frombuffer(all_rows.starts, dtype=np.int64),
    )


def _table(column: bytearray, dtype: "type[np.generic]", count: int) -> "NDArray[Any]":
    """A column of several values a row; of none where it is empty."""
    import numpy as np

    return np.frombuffer(column, dtype=dtype).reshape(count, -1 if column else 0)


def _gather(source: Source, config: DedupConfig, verdicts: Mapping[str, float], all_rows: Columns) -> None:
    import numpy as np

    offset = lines = 0
    size = source.path.stat().st_size
    work = partial(sketch_chunk, kind=source.kind, config=config, verdicts=verdicts)
    with closing(process(source.path, size, work, ())) as parts:
        for part in parts:
            if part.bad is not None:
                number, reason = part.bad
                raise DataError(f"{source.path}:{lines + number}: {reason}")
            starts = np.frombuffer(part.columns.starts, dtype=np.int64) + offset
            columns = replace(part.columns, starts=bytearray(starts.tobytes()))
            for column in fields(Columns):
                getattr(all_rows, column.name).extend(getattr(columns, column.name))
            offset += part.size
            lines += part.lines


def sketch_chunk(
    chunk: Chunk, kind: Kind, config: DedupConfig, verdicts: Mapping[str, float]
) -> tuple[Part, tuple[bytes, ...]]:
    """The rows of a chunk; the work of one process."""
    import numpy as np

    texts: list[str] = []
    prompts: list[str] = []
    ids: list[bytes] = []
    scores: list[float] = []
    starts: list[int] = []
    position = 0
    bad = None
    for number, line in enumerate(chunk.lines, start=1):
        if line is None:
            bad = (number, "a line too long for a row")
            break
        if line and not line.isspace():
            try:
                row = decode(line, kind)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                bad = (number, str(error))
                break
            texts.append(fold(text_of(row)))
            prompts.append(fold(prompt_of(row)) if _prompts_matter(config) else "")
            ids.append(row.id.encode()[:ID_BYTES].ljust(ID_BYTES, b"\0"))
            scores.append(verdicts.get(row.id, 0.0))
            starts.append(position)
        position += len(line) + 1
    bands, glimpse = _bands(texts, config.near, config.ngram)
    prompt_bands, prompt_glimpse = _bands(prompts, config.prompts if config.prompts != 1 else None, config.ngram)
    columns = Columns(
        exact=_digests(texts),
        bands=bands,
        glimpse=glimpse,
        prompt=_digests(prompts) if _prompts_matter(config) else bytearray(),
        prompt_bands=prompt_bands,
        prompt_glimpse=prompt_glimpse,
        ids=bytearray(b"".join(ids)),
        scores=bytearray(np.array(scores, dtype=np.float32).tobytes()),
        starts=bytearray(np.array(starts, dtype=np.int64).tobytes()),
    )
    return Part(columns, position, len(chunk.lines), bad), ()


def _prompts_matter(config: DedupConfig) -> bool:
    return config.prompts is not None or bool(config.contamination)


def _digests(folded: list[str]) -> bytearray:
    return bytearray(b"".join([digest(text) for text in folded]))


def _bands(folded: list[str], threshold: float | None, n: int) -> tuple[bytearray, bytearray]:
    """The bands' keys and the glimpses; nothing where there is no threshold."""
    if threshold is None or not folded:
        return bytearray(), bytearray()
    values = signatures(folded, n)
    return bytearray(band_keys(values, shape_for(threshold)).tobytes()), bytearray(glimpses(values).tobytes())


def decode(line: bytes, kind: Kind) -> Kept | Question:
    """A row of a source of that kind. Raises msgspec.DecodeError."""
    if kind is not Kind.EVALUATION:
        return _kept_decoder.decode(line)
    row = _question_decoder.decode(line)
    if not row.messages and not row.prompt:
        raise msgspec.ValidationError("neither `messages` nor `prompt`: no row to evaluate on")
    return row


_kept_decoder = msgspec.json.Decoder(Kept)
_question_decoder = msgspec.json.Decoder(Question)


def prompt_of(row: Kept | Question) -> str:
    """What was asked: every turn but the system's."""
    turns = [message.content for message in row.messages if message.role not in ("system", "developer")]
    return "\n".join(turns) or (row.prompt if isinstance(row, Question) else "")


def text_of(row: Kept | Question) -> str:
    """The answer; of a prompt alone, the prompt: it is no answer to learn either."""
    return prompt_of(row) if row.text is None else row.text


class Reader:
    """Reads rows again, by number: their ids, and their n-grams to compare."""

    def __init__(self, sketches: Sketches, ngram: int, stack: ExitStack) -> None:
        self._sketches = sketches
        self._files = [stack.enter_context(source.path.open("rb")) for source in sketches.sources]
        self._ngram = ngram
        self.text_ngrams = lru_cache(READ_AGAIN)(self._text_ngrams)
        self.prompt_ngrams = lru_cache(READ_AGAIN)(self._prompt_ngrams)

    def row(self, number: int) -> Kept | Question:
        """The row, as far as it matters here."""
        index = self._sketches.source(number)
        file = self._files[index]
        file.seek(int(self._sketches.starts[number]))
        return decode(file.readline(), self._sketches.sources[index].kind)

    def _text_ngrams(self, number: int) -> "Hashes":
        return ngrams(fold(text_of(self.row(number))), self._ngram)

    def _prompt_ngrams(self, number: int) -> "Hashes":
        return ngrams(fold(prompt_of(self.row(number))), self._ngram)
