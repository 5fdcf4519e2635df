"""Stores and leases: the same promises in a folder and in S3 (moto), and one clear error for what is wrong."""

import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from socket import SHUT_RDWR
from typing import Any

import pytest
from moto.server import DomainDispatcherApplication

from pipeline.errors import DataError, DistillError, UsageError
from scale import run_lease, storage
from scale.run_lease import Lease, TakenOver
from scale.storage import Folder, Store, TryAgain, open_store, retried
from tests.full_disk import full_disk, without_locks
from tests.servers.object_storage import post


def test_objects_are_put_read_listed_and_removed(store: Store, tmp_path: Path) -> None:
    assert (store.names(), store.get("a/b")) == ([], None)
    assert [store.put_new("a/b", b"1"), store.put_new("a/b", b"2"), store.put_new("ab", b"3")] == [True, False, True]
    assert store.get("a/b") == b"1"
    assert (store.names(), store.names("a"), store.names("c")) == (["a/b", "ab"], ["a/b"], [])
    (tmp_path / "big").write_bytes(b"x" * 6_000_000)  # more than one request
    store.put("a/b", tmp_path / "big")
    store.download("a/b", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "big").read_bytes()
    for _ in range(2):
        store.delete("a/b")
    assert store.names() == ["ab"]


def test_a_download_of_what_is_not_there_says_so_and_writes_nothing(store: Store, tmp_path: Path) -> None:
    store.put("a/b", b"1")
    for name in ("a", "c"):
        assert store.download(name, tmp_path / "copy") is False
        assert not (tmp_path / "copy").exists()
    assert store.download("a/b", tmp_path / "copy") is True
    assert (tmp_path / "copy").read_bytes() == b"1"


def test_a_full_disk_names_the_file_that_a_download_did_not_fit_into(store: Store, tmp_path: Path) -> None:
    store.put("a/b", b"1")
    with full_disk(), pytest.raises(DistillError, match=f"/a/b → {tmp_path}/copy: .*File too large"):
        store.download("a/b", tmp_path / "copy")


def test_of_two_that_put_one_name_one_succeeds(store: Store) -> None:
    with ThreadPoolExecutor(2) as pool:
        for name in map(str, range(10)):
            won = list(pool.map(lambda data, name=name: store.put_new(name, data), [b"0", b"1"]))
            assert won.count(True) == 1
            assert store.get(name) == b"%d" % won.index(True)


@pytest.mark.parametrize("broken", [b"500 Internal Server Error", b"503 Slow Down", None], ids=["500", "503", "reset"])
@pytest.mark.parametrize(("change", "given"), [("put", [b"2"]), ("delete", [])])
def test_a_change_is_tried_again_only_while_this_machine_has_the_run(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, given: list[bytes], broken: bytes | None
) -> None:
    """Between two attempts a machine may have slept for hours."""
    store, asked, checks = open_store(f"s3://bucket/{tmp_path.name}"), list[str](), list[int]()
    store.put("a", b"1")
    answers, lost = DomainDispatcherApplication.__call__, 2

    def failing(self: Any, environ: dict[str, Any], start: Callable[..., object]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] == "GET":
            return answers(self, environ, start)
        asked.append(environ["REQUEST_METHOD"])
        if len(asked) > 2:
            return answers(self, environ, start)
        if broken is None:
            environ["werkzeug.socket"].shutdown(SHUT_RDWR)
        start((broken or b"500 Broken").decode(), [])
        return [b""]

    def check() -> None:
        checks.append(len(asked))
        if len(asked) == lost:
            raise TakenOver("by another machine")

    monkeypatch.setattr(DomainDispatcherApplication, "__call__", failing)
    with pytest.raises(TakenOver):
        retried(getattr(store, change), "a", *given, check=check)
    assert (store.get("a"), checks) == (b"1", [0, 1, 2])
    asked.clear()
    lost = 9
    retried(getattr(store, change), "a", *given, check=check)
    assert (store.get("a"), checks[3:]) == (given[0] if given else None, [0, 1, 2])


def test_what_cannot_be_read_at_the_moment_may_be_read_again(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(f"s3://bucket/{tmp_path.name}")

    def slow_down(self: Any, environ: dict[str, Any], start: Callable[..., object]) -> Iterable[bytes]:
        start("503 Slow Down", [])
        return [b""]

    monkeypatch.setattr(DomainDispatcherApplication, "__call__", slow_down)
    with pytest.raises(TryAgain, match=r"/a: .*503"):
        store.get("a")


def test_a_large_file_may_take_longer_than_a_request(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a student does on a slow line; a request and all further attempts of it have 8 s here."""
    monkeypatch.setattr(storage, "REQUEST_S", 4.0)
    store, answers, here = open_store(f"s3://bucket/{tmp_path.name}"), DomainDispatcherApplication.__call__, tmp_path
    (here / "big").write_bytes(b"x" * 6_000_000)
    store.put("down", here / "big")

    def slow(self: Any, environ: dict[str, Any], start: Callable[..., object]) -> Iterable[bytes]:
        body = b"".join(answers(self, environ, start))
        for begin in range(0, len(body), 1_000_000):
            time.sleep(1.6)
            yield body[begin : begin + 1_000_000]
        if environ["REQUEST_METHOD"] == "PUT":
            time.sleep(9.6)

    monkeypatch.setattr(DomainDispatcherApplication, "__call__", slow)
    with ThreadPoolExecutor(2) as pool:
        up, down = pool.submit(store.put, "up", here / "big"), pool.submit(store.download, "down", here / "copy")
        up.result()
        assert down.result()
    monkeypatch.undo()
    assert (here / "copy").read_bytes() == store.get("up") == (here / "big").read_bytes()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://bucket", "a bucket and a path are needed"),
        ("ftp://bucket/run", "begins with s3://, gs:// or file://"),
        ("s3://nothing/run", "NoSuchBucket"),
        ("file://runs/mine", "three slashes: file:///folder"),
        ("", "no URL of a run is given"),  # else the working directory
        ("s3://bucket/exp#1", r"a path cannot have \? or # in it"),  # what is behind it would be lost
        ("s3://bucket/exp?2", r"a path cannot have \? or # in it"),
        ("file:///runs/exp#1", r"a path cannot have \? or # in it; write %3F or %23"),
        ("s3://bucket//x", "no URL of a bucket and a path"),
        ("s3://buc ket/x", "no URL of a bucket and a path"),
    ],
)
def test_a_wrong_url_is_one_clear_error(server: str, url: str, words: str) -> None:
    with pytest.raises(DistillError, match=words) as caught:
        open_store(url)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["two\nlines.txt", "a\tb.txt", "\udcff.txt"])
def test_a_name_that_no_object_may_have_is_one_clear_error(server: str, tmp_path: Path, name: str) -> None:
    store = open_store(f"s3://bucket/{tmp_path.name}%23%3F")
    store.put("a", b"1")
    assert (store.names(), store.get("a")) == (["a"], b"1")
    with pytest.raises(DistillError, match="has a character that no name there may have; rename it") as caught:
        store.put(name, b"1")
    assert repr(name) in str(caught.value)


def test_an_endpoint_without_its_scheme_is_one_clear_error(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.removeprefix("http://"))
    with pytest.raises(UsageError, match=r"AWS_ENDPOINT_URL is 127\.0\.0\.1:\d+; begin it with http:// or https://"):
        open_store("s3://bucket/run")


def test_no_access_says_what_to_set(server: str) -> None:
    post(server, "reset-auth", b"0")
    try:
        with pytest.raises(DistillError, match=r"no access \(InvalidAccessKeyId: .*set the variables"):
            open_store("s3://bucket/run")
    finally:
        post(server, "reset-auth", b"inf")


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        ("400 Bad Request", b"ExpiredToken", r"no access \(ExpiredToken: words\); set the variables for the cloud"),
        ("400 Bad Request", b"InvalidToken", r"no access \(InvalidToken: words\); set the variables for the cloud"),
        ("400 Bad Request", b"AuthorizationHeaderMalformed", "Malformed: words; set AWS_REGION to the bucket's region"),
        ("301 Moved Permanently", b"PermanentRedirect", "region; set AWS_REGION to the bucket's region"),
    ],
)
def test_what_s3_refuses_says_what_to_set(
    server: str, monkeypatch: pytest.MonkeyPatch, status: str, code: bytes, words: str
) -> None:
    """Expired credentials, and a bucket in another region, as Amazon's list of error codes has them."""

    def refuse(self: Any, environ: dict[str, Any], start: Callable[..., object]) -> Iterable[bytes]:
        start(status, [("Content-Type", "application/xml")])
        return [b"<Error><Code>%s</Code><Message>words</Message></Error>" % code]

    monkeypatch.setattr(DomainDispatcherApplication, "__call__", refuse)
    with pytest.raises(DistillError, match=words):
        open_store("s3://bucket/run")


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(UsageError, match=r"pip install -e \.\[storage\]"):
        open_store("s3://bucket/run")


def test_a_lease_is_one_machines_until_it_is_released_or_stale(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Lease.take(store, "a")
    with pytest.raises(UsageError, match=r"works on this run, its last sign is \d+ s old"):
        Lease.take(store, "b", take_over=True)
    assert Lease.take(store, "a").lost == {}  # the same folder, whose process was killed
    with pytest.raises(TakenOver):
        first.check()
    with pytest.raises(TakenOver):
        first.beat({})
    again = Lease.take(store, "a")
    again.beat({"completions": 7})
    again.beat({"completions": 2})  # the most that only it has had counts
    monkeypatch.setattr(run_lease, "STALE_S", 0.0)
    with pytest.raises(UsageError, match="run the same command with --take-over"):
        Lease.take(store, "b")
    second = Lease.take(store, "b", take_over=True)
    assert second.lost == Lease.take(store, "b").lost == {"completions": 7}  # until the budget counts them
    third = Lease.take(store, "b")
    third.counted()
    third.release()
    assert Lease.take(store, "a").lost == {}


def test_of_two_machines_that_begin_at_once_one_has_the_run(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Lease.take(store, "a")
    with monkeypatch.context() as before:
        before.setattr(type(store), "names", lambda self, folder="": [])  # the other looked before the first began
        with pytest.raises(UsageError, match="another machine has just begun to work on this run"):
            Lease.take(store, "b")
    first.check()


def test_a_lease_from_a_clock_that_is_ahead_is_stale_too(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as ahead:
        ahead.setattr(run_lease, "time", lambda: time.time() + 9 * 3600)
        first = Lease.take(store, "a")
    with pytest.raises(UsageError, match=r"last sign is 540 minutes ahead of the clock here.*with --take-over"):
        Lease.take(store, "b")
    Lease.take(store, "b", take_over=True)
    with pytest.raises(TakenOver):
        first.check()


def test_a_run_that_was_removed_from_its_store_is_one_clear_error(store: Store) -> None:
    lease = Lease.take(store, "a")
    store.delete(lease.name)
    for sign in (lease.check, lambda: lease.beat({})):
        with pytest.raises(DistillError, match="the run has been removed from there"):
            sign()
    assert store.names() == []


def test_a_file_system_without_locks_names_the_lock_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.flock", without_locks)
    with pytest.raises(OSError, match="No locks available") as caught, run_lease.held(tmp_path):
        pass
    assert caught.value.filename == str(tmp_path / ".stored.lock")


def test_storage_that_ignores_the_condition_is_refused(tmp_path: Path) -> None:
    class Careless(Folder):
        def put_new(self, name: str, data: bytes) -> bool:
            self.put(name, data)
            return True

    with pytest.raises(DistillError, match="ignores `If-None-Match`"):
        Lease.take(Careless(tmp_path), "a")
    assert Careless(tmp_path).names() == []


@pytest.mark.parametrize("data", [b"", b'{"owner": "a"}', b'{"owner": "\xff"}', b"\xff"])
def test_a_damaged_lease_is_one_clear_error(tmp_path: Path, data: bytes) -> None:
    store = Folder(tmp_path)
    store.put("lease/000001.json", data)
    with pytest.raises(DataError, match=rf"^{tmp_path}/lease/000001\.json: .*; remove it, if no machine") as caught:
        Lease.take(store, "a")
    assert "\n" not in str(caught.value)
    store.delete("lease/000001.json")
    Lease.take(store, "a")
