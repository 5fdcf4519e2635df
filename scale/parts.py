"""Answers in a store: parts of up to 1,000 rows, each put once and never changed; and a run's journal made of them.

    parts/completions/<owner>-<number>.jsonl.gz     the owner is one writer: a machine's folder of the run, or a lease

An uploader follows a local journal (generate.journal) and puts its whole lines. Readers drop repeated ids: a writer
that was thought dead may have put a row that another was asked for again.
"""

import gzip
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic

import msgspec

from generate.idset import IdSet
from pipeline.errors import DataError, DistillError
from pipeline.rundir import replacing
from scale.storage import Store

ROWS = 1000  # that close a part
SECONDS = 15.0  # after which a part that has any row is closed
READERS = 8  # parts fetched at once


class _Row(msgspec.Struct):
    id: str
    created: str = ""


_decoder = msgspec.json.Decoder(_Row)


def row_key(line: bytes, kind: str) -> str:
    """What makes a row the same as another: its id; of failures also the time, for a request may fail again.

    Raises DataError.
    """
    try:
        row = _decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(f"no row of {kind}: {error}: {line[:80]!r}") from None
    return f"{row.id} {row.created}" if kind.endswith("failures") else row.id


def part_name(kind: str, owner: str, number: int) -> str:
    """Where a writer's part is in the store."""
    return f"parts/{kind}/{owner}-{number:06}.jsonl.gz"


def part_names(store: Store, kind: str) -> list[str]:
    """The parts that are in the store, sorted: those of one owner in the order in which it wrote them."""
    return store.names(f"parts/{kind}")


def read_part(store: Store, name: str) -> list[bytes]:
    """The lines of a part, each with its newline; none if it is gone (compacted). Raises DataError."""
    data = store.get(name)
    try:
        return gzip.decompress(data).splitlines(keepends=True) if data else []
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{store.url}/{name}: not a part: {error}") from None


def read_new_rows(store: Store, kind: str, names: list[str], known: IdSet) -> Iterator[bytes]:
    """Streams the lines of these parts whose key is not in `known`, and adds their keys to it."""
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(names), READERS):
            for lines in pool.map(lambda name: read_part(store, name), names[start : start + READERS]):
                yield from (line for line in lines if known.add(row_key(line, kind)))


class Uploader:
    """Puts what is appended to a journal, as parts of one owner."""

    def __init__(self, store: Store, owner: str, journal: Path, kind: str, *, known: IdSet | None = None) -> None:
        """Lines whose key is in `known` are in the store already. The owner must be this writer's alone."""
        self._store, self._journal, self._kind, self._owner = store, journal, kind, owner
        self._known = IdSet() if known is None else known
        self._number = sum(name.startswith(f"parts/{kind}/{owner}-") for name in part_names(store, kind))
        self._read = 0  # bytes of the journal
        self._waiting: list[bytes] = []
        self._since = 0.0  # when the first that waits was read

    def upload(self, *, rest: bool = False) -> int:
        """Puts the parts that are to be closed now; with `rest`, all there is. Returns the rows put.

        Raises DistillError if the store does not take one; the next call tries that again.
        """
        put = 0
        while self._follow() and (len(self._waiting) >= ROWS or rest or monotonic() - self._since >= SECONDS):
            data = gzip.compress(b"".join(self._waiting), compresslevel=1, mtime=0)
            while not self._store.put_new(name := part_name(self._kind, self._owner, self._number), data):
                if self._store.get(name) is None:  # S3 also says no to one of two writes at once: a gap ends readers
                    raise DistillError(f"{self._store.url}/{name}: refused, and not there")
                self._number += 1  # put by an earlier call that did not hear of it; readers drop what repeats
            self._number += 1
            put += len(self._waiting)
            self._waiting = []
        return put

    @property
    def waiting(self) -> int:
        """Rows that were read and not put."""
        return len(self._waiting)

    def _follow(self) -> bool:
        """Reads whole new lines until a part is full; whether any line waits."""
        try:
            file = self._journal.open("rb")
        except FileNotFoundError:
            return False
        with file:
            file.seek(self._read)
            while len(self._waiting) < ROWS and (line := file.readline()).endswith(b"\n"):
                self._read += len(line)
                if line.strip() and self._known.add(row_key(line, self._kind)):
                    self._since = self._since if self._waiting else monotonic()
                    self._waiting.append(line)
        return bool(self._waiting)


def compact(journal: Path) -> None:
    """Sorts a journal that nobody writes to by id, in place, each once: the row that was created first.

    Holds the ids and places of the rows in memory, not the rows.
    """
    best: dict[str, tuple[str, int, int]] = {}
    start = 0
    with journal.open("rb") as file:
        for line in file:
            if line.strip():
                key, place = row_key(line, journal.stem), (_decoder.decode(line).created, start, len(line))
                best[key] = min(best.get(key, place), place)
            start += len(line)
        with replacing(journal) as out:
            for _, (_, start, size) in sorted(best.items()):
                file.seek(start)
                out.write(file.read(size))
