"""The journals of a run's folder, and their rows in its store: parts as they come, until they are compacted.

    parts/<kind>/…                           answers and failures as they come (scale.parts)
    completions.jsonl, failures.jsonl        the journals, compacted

A kind is a journal's name, with its folder: `completions`, `turns/1-user/failures`, … Whatever a run asks has
its journals in a folder of it: turns, new prompts, the judge, an experiment's other teacher.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

from generate.idset import IdSet
from generate.journal import Journal
from pipeline.records import Completion, Failure
from pipeline.rundir import naming
from scale.parts import Uploader, compact, part_names, read_new_rows, row_key
from scale.storage import Store, retried

JOURNALS: dict[str, type[Completion] | type[Failure]] = {"completions.jsonl": Completion, "failures.jsonl": Failure}


class StoredJournals:
    """All journals of a folder, which `owner` alone changes, and what a store has of them."""

    def __init__(self, store: Store, folder: Path, owner: str) -> None:
        self._store, self._folder, self._owner = store, folder, owner
        self._stored: dict[str, IdSet] = {}  # by kind: the rows that the store has
        self._read: set[str] = set()  # parts whose rows are in the local journals
        self._uploaders: dict[str, Uploader] = {}

    def merge(self, kind: str) -> None:
        """Appends the store's rows to the local journal, except those that it has."""
        journal, stored, local = self._folder / f"{kind}.jsonl", self._stored.setdefault(kind, IdSet()), IdSet()
        journal.parent.mkdir(parents=True, exist_ok=True)
        with Journal(journal, JOURNALS[journal.name]):
            pass  # opening it has cut off a torn end
        with journal.open("rb") as file:
            for line in filter(bytes.strip, file):  # a blank line is no row
                local.add(row_key(line, kind))
        with naming(journal), journal.open("ab") as file:
            for line in self._rows(kind, stored):
                if local.add(row_key(line, kind)):
                    file.write(line)

    def upload(self, journals: Iterable[str], *, rest: bool) -> dict[str, int]:
        """Puts the parts that are to be closed now; with `rest` all rows.

        Returns how many rows the store lacked, by kind.
        """
        rows = {}
        for journal in journals:
            kind = str(PurePosixPath(journal).with_suffix(""))
            if kind not in self._uploaders:
                known = self._stored.setdefault(kind, IdSet())
                self._uploaders[kind] = Uploader(self._store, self._owner, self._folder / journal, kind, known=known)
            uploader = self._uploaders[kind]
            rows[kind] = uploader.upload(rest=rest) + uploader.waiting
        return rows

    def compact(self, check: Callable[[], None]) -> None:
        """Sorts the journals and puts each whole, in place of the parts that are in it. Everything is uploaded.

        `check` is called before each change of the store, and may raise.
        """
        for kind in self._uploaders:
            own = f"parts/{kind}/{self._owner}-"
            parts = [name for name in part_names(self._store, kind) if name in self._read or name.startswith(own)]
            if parts:
                journal = self._folder / f"{kind}.jsonl"
                compact(journal)
                retried(self._store.put, f"{kind}.jsonl", journal, check=check)
            for name in parts:
                retried(self._store.delete, name, check=check)

    def _rows(self, kind: str, stored: IdSet) -> Iterator[bytes]:
        """The store's rows, each once: the compacted ones, then those of the parts.

        A part is removed when its rows are compacted: if one has gone meanwhile, all is read once more.
        """
        compacted = self._folder / f".{kind.replace('/', '-')}.stored"
        while True:
            parts = part_names(self._store, kind)
            if self._store.download(f"{kind}.jsonl", compacted):
                with compacted.open("rb") as file:
                    yield from (line for line in filter(bytes.strip, file) if stored.add(row_key(line, kind)))
                compacted.unlink()
            yield from read_new_rows(self._store, kind, parts, stored)
            if {*parts} <= {*part_names(self._store, kind)}:
                break
        self._read.update(parts)
