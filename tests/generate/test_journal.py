"""Journals: what is left of them after a kill at any byte, a full disk, and a careless editor."""

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from generate.idset import FULL, WIDTH, IdSet
from generate.journal import Journal, read_journal
from pipeline.errors import DataError, DistillError
from pipeline.records import Completion, Message, Usage, encode_line, read_jsonl
from tests.completion_fields import completion_fields
from tests.full_disk import full_disk


def completion(name: str, text: str = "이야기 🐰\n둘째 줄") -> Completion:
    usage = Usage(prompt_tokens=2, completion_tokens=3)
    messages = [Message(role="user", content="질문")]
    return Completion(**completion_fields(name, text, messages=messages, sampling={"seed": 1}, usage=usage))


def write(path: Path, *names: str) -> None:
    with Journal(path, Completion) as journal:
        for name in names:
            journal.append(completion(name))


def test_what_is_written_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    write(path, "a", "b")
    write(path, "c")
    assert [record.id for record in read_jsonl(path, Completion)] == ["a", "b", "c"]
    found = read_journal(path, Completion)
    assert ("a" in found.ids, "c" in found.ids, "d" in found.ids) == (True, True, False)
    assert (found.models, found.prompt_tokens, found.completion_tokens) == ({"m": 3}, 6, 9)


@given(texts=st.lists(st.text(max_size=40), min_size=1, max_size=6), data=st.data())
def test_cut_at_any_byte_it_goes_on_with_every_whole_line(texts: list[str], data: st.DataObject) -> None:
    lines = [encode_line(completion(str(number), text)) for number, text in enumerate(texts)]
    whole = b"".join(lines)
    at = data.draw(st.integers(0, len(whole)))
    zeros = data.draw(st.integers(0, 20))  # what some file systems leave after a power cut
    survivors, end = [], 0
    for number, line in enumerate(lines):
        if end + len(line) - 1 <= at:  # without its newline a line is still whole
            survivors.append(str(number))
        end += len(line)
    if zeros and at not in {sum(map(len, lines[:n])) for n in range(len(lines) + 1)}:
        survivors = [name for name in survivors if sum(map(len, lines[: int(name) + 1])) <= at]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.jsonl"
        path.write_bytes(whole[:at] + b"\0" * zeros)
        with Journal(path, Completion) as journal:
            missing = [str(n) for n in range(len(lines)) if str(n) not in journal.found.ids]
            assert sorted({str(n) for n in range(len(lines))} - set(missing)) == sorted(survivors)
            for name in missing:
                journal.append(completion(name))
        assert sorted(record.id for record in read_jsonl(path, Completion)) == sorted(map(str, range(len(lines))))


def test_a_whole_line_that_lacks_only_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    write(path, "a", "b")
    path.write_bytes(path.read_bytes()[:-1])
    write(path, "c")
    assert [record.id for record in read_jsonl(path, Completion)] == ["a", "b", "c"]


def test_a_torn_line_is_told_and_only_reading_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    write(path, "a")
    torn = path.read_bytes() + b'{"id": "b"'
    path.write_bytes(torn)
    assert read_journal(path, Completion).torn_bytes == 10
    assert path.read_bytes() == torn
    with Journal(path, Completion) as journal:
        assert journal.found.torn_bytes == 10
    assert path.read_bytes() == torn[:-10]


@pytest.mark.parametrize("bad", [b"{\n", b"[]\n", b'{"id": 3}\n', b"\xff\n", b"\0\0\n"])
def test_a_bad_line_before_the_end_is_an_error_and_nothing_is_changed(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "c.jsonl"
    before = encode_line(completion("a")) + bad + encode_line(completion("b"))
    path.write_bytes(before)
    with pytest.raises(DataError) as caught:
        Journal(path, Completion)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert path.read_bytes() == before


def test_what_is_synced_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, sizes, sync = tmp_path / "c.jsonl", list[int](), os.fsync

    def note_sync(handle: int) -> None:
        assert os.path.samestat(os.fstat(handle), path.stat())
        sizes.append(path.stat().st_size)
        sync(handle)

    monkeypatch.setattr(os, "fsync", note_sync)
    line = len(encode_line(completion("a")))
    with Journal(path, Completion) as journal:
        journal.append(completion("a"))
        journal.sync()
        journal.sync()  # nothing is new
        journal.append(completion("b"))
    assert sizes == [line, 2 * line]


def test_a_full_disk_is_one_error_and_what_was_written_stays_whole(tmp_path: Path) -> None:
    """A limit on the file's size stands for the disk: the kernel takes half of the line, then refuses."""
    path = tmp_path / "c.jsonl"
    write(path, "a", "b")
    before = path.read_bytes()
    with Journal(path, Completion) as journal:
        refused = pytest.raises(DistillError, match=r"c\.jsonl: cannot be written: File too large")
        with full_disk(len(before) + 50), refused:
            journal.append(completion("c"))
        assert path.read_bytes() == before
        journal.append(completion("c"))
    assert [record.id for record in read_jsonl(path, Completion)] == ["a", "b", "c"]


def test_a_journal_that_is_removed_or_moved_ends_the_run(tmp_path: Path) -> None:
    """Or the run would pay for answers that go into a file without a name."""
    path = tmp_path / "run" / "c.jsonl"
    path.parent.mkdir()
    moved = pytest.raises(DistillError, match=r"c\.jsonl: was moved away while the run worked")
    with moved, Journal(path, Completion) as journal:
        journal.append(completion("a"))
        journal.sync()
        path.parent.rename(tmp_path / "moved")
        journal.append(completion("b"))
        journal.sync()
    assert [record.id for record in read_jsonl(tmp_path / "moved" / "c.jsonl", Completion)] == ["a", "b"]
    path = tmp_path / "moved" / "c.jsonl"
    removed = pytest.raises(DistillError, match=r"c\.jsonl: was removed while the run worked")
    with removed, Journal(path, Completion) as journal:
        path.unlink()
        path.touch()  # another file of the same name
        journal.append(completion("c"))
        journal.sync()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(DistillError, match=r"nowhere/c\.jsonl: cannot be written: No such file"):
        Journal(tmp_path / "nowhere" / "c.jsonl", Completion)


def test_a_group_that_may_write_the_run_may_write_its_journals(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        with Journal(tmp_path / "c.jsonl", Completion):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "c.jsonl").stat().st_mode & 0o777 == 0o664


@given(st.lists(st.text(max_size=3)))
def test_an_id_set_is_a_set(items: list[str]) -> None:
    ids, model = IdSet(), set()
    for item in items:
        assert ids.add(item) == (item not in model)
        model.add(item)
    assert len(ids) == len(model)
    assert all(item in ids for item in items)
    assert "never added" not in ids


def test_an_id_set_of_many_is_exact_and_no_bucket_grows_with_it() -> None:
    ids = IdSet()
    assert all(ids.add(str(n)) for n in range(100_000))
    assert not any(ids.add(str(n)) for n in range(100_000))
    assert not any(str(n) in ids for n in range(100_000, 200_000))
    assert max(map(len, ids._buckets)) <= 4 * FULL * WIDTH
