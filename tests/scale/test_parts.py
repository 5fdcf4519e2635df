"""Parts in a folder store: what an uploader puts, what readers see, and the race for one name."""

import gzip
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from generate.idset import IdSet
from pipeline.errors import DataError, DistillError
from scale import parts
from scale.journals import StoredJournals
from scale.parts import Uploader, compact, part_name, part_names, read_new_rows, read_part
from scale.storage import Folder, Store, open_store
from tests.full_disk import full_disk

KIND = "completions"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


def line(number: int, created: str = "2026-01-01") -> bytes:
    return json.dumps({"id": f"id{number:04}", "created": created, "text": "ok"}).encode() + b"\n"


def rows(store: Store) -> list[bytes]:
    """The rows of all parts, each once."""
    return list(read_new_rows(store, KIND, part_names(store, KIND), IdSet()))


def append(journal: Path, *lines: bytes) -> None:
    with journal.open("ab") as file:
        file.writelines(lines)


def test_of_many_that_put_one_name_one_succeeds(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        for name in (f"a/{number}" for number in range(20)):
            won = list(pool.map(lambda data, name=name: store.put_new(name, data), [b"%d" % n for n in range(8)]))
            assert won.count(True) == 1
            assert store.get(name) == b"%d" % won.index(True)
    assert len(store.names()) == 20


def test_a_part_closes_at_its_rows_or_its_time(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = tmp_path / "completions.jsonl"
    uploader = Uploader(store, "me", journal, KIND)
    assert uploader.upload() == 0
    append(journal, *map(line, range(2500)), b'{"id": "torn')
    assert uploader.upload() == 2000
    assert uploader.upload() == 0
    monkeypatch.setattr(parts, "SECONDS", 0.0)
    assert uploader.upload() == 500
    assert part_names(store, KIND) == [f"parts/completions/me-{number:06}.jsonl.gz" for number in range(3)]
    assert rows(store) == [line(number) for number in range(2500)]


def test_repeated_ids_are_read_once_and_known_ones_never(store: Store, tmp_path: Path) -> None:
    for owner in ("one", "two"):
        append(tmp_path / owner, *map(line, range(10)))
        assert Uploader(store, owner, tmp_path / owner, KIND).upload(rest=True) == 10
    assert len(rows(store)) == 10
    again = Uploader(store, "one", tmp_path / "one", KIND)  # its process was killed: it does not know what it put
    again.upload(rest=True)
    assert len(part_names(store, KIND)) == 3
    assert len(rows(store)) == 10


def test_a_part_whose_put_was_not_heard_of_stays_as_it_is(store: Store, tmp_path: Path) -> None:
    """The store took it, and the reply was lost. A reader that has read it must find later rows in a later part."""

    class Deaf(Folder):
        heard = False

        @contextmanager
        def _written(self, name: str, data: bytes | Path) -> Iterator[tuple[Path, Path]]:
            with super()._written(name, data) as paths:
                yield paths
            if not self.heard:
                self.heard = True
                raise DistillError("no reply")

    journal = tmp_path / "completions.jsonl"
    uploader = Uploader(Deaf(tmp_path / "store"), "me", journal, KIND)
    append(journal, *map(line, range(10)))
    with pytest.raises(DistillError):
        uploader.upload(rest=True)
    (first,) = part_names(store, KIND)
    append(journal, *map(line, range(10, 15)))
    assert uploader.upload(rest=True) == 15
    assert read_part(store, first) == list(map(line, range(10)))
    assert rows(store) == list(map(line, range(15)))


def test_a_put_that_is_refused_though_nothing_is_there_leaves_no_gap(store: Store, tmp_path: Path) -> None:
    """S3 refuses one of two writes at once (409), also where neither succeeds. A reader would stop at the gap."""

    class Busy(Folder):
        refused = 0

        def put_new(self, name: str, data: bytes) -> bool:
            if part_names(self, KIND) and not self.refused:  # the second part
                self.refused += 1
                return False
            return super().put_new(name, data)

    busy, journal = Busy(tmp_path / "store"), tmp_path / "completions.jsonl"
    uploader = Uploader(busy, "me", journal, KIND)
    for number in range(3):
        append(journal, line(number))
        if number == 1:
            with pytest.raises(DistillError, match=r"me-000001\.jsonl\.gz: refused, and not there"):
                uploader.upload(rest=True)
        else:
            uploader.upload(rest=True)
    assert busy.refused == 1
    assert part_names(store, KIND) == [part_name(KIND, "me", number) for number in range(2)]
    assert rows(store) == list(map(line, range(3)))


WHOLE = gzip.compress(b"".join(map(line, range(50))))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (WHOLE[:10] + b"\xff\xff\xff" + WHOLE[13:], r"me-000000\.jsonl\.gz: not a part"),
        (gzip.compress(line(1) + b"not json\n"), "no row of completions: .*not json"),
        (gzip.compress(b'{"created": "2026"}\n'), "no row of completions: .*`id`"),
    ],
    ids=["damaged", "no JSON", "no id"],
)
def test_a_damaged_part_is_one_clear_error(store: Store, data: bytes, words: str) -> None:
    store.put(part_name(KIND, "me", 0), data)
    with pytest.raises(DataError, match=words) as caught:
        rows(store)
    assert "\n" not in str(caught.value)


def test_a_full_disk_names_the_journal_that_a_part_did_not_fit_into(store: Store, tmp_path: Path) -> None:
    journal = tmp_path / "home" / "completions.jsonl"
    append(tmp_path / "theirs", line(1))
    Uploader(store, "other", tmp_path / "theirs", KIND).upload(rest=True)
    with full_disk(), pytest.raises(OSError, match="File too large") as raised:
        StoredJournals(store, journal.parent, "me").merge(KIND)
    assert raised.value.filename == str(journal)
    StoredJournals(store, journal.parent, "me").merge(KIND)
    assert journal.read_bytes() == line(1)


def test_compacting_sorts_and_keeps_the_first_of_each(tmp_path: Path) -> None:
    journal = tmp_path / "completions.jsonl"
    append(journal, line(3), line(1, "2026-01-02"), line(2), line(1, "2026-01-01"))
    compact(journal)
    assert journal.read_bytes() == line(1, "2026-01-01") + line(2) + line(3)
