"""A place for the files of a run that several machines can reach: a folder, S3 or what speaks its protocol, or GCS.

A name is a path under the store's URL. An object is there whole or not at all, and `put_new` never replaces one: of
several that put the same name at once, one gets True. Folders need nothing; clouds need the extra `storage` (the
package obstore), and take endpoint and credentials from their usual environment variables.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from time import sleep
from typing import Protocol, TypeVar
from urllib.parse import unquote, urlsplit
from uuid import uuid4

from pipeline.errors import DistillError, UsageError, first_line
from pipeline.records import decode_json
from pipeline.rundir import sync_path

Value = TypeVar("Value")

CLOUDS = ("s3", "gs")
HIDDEN = "."  # begins the name of a file that a folder is still writing
LARGE = 5 * 1024 * 1024  # bytes of a file that goes up in more than one request
REQUEST_S, FILE_S = 30.0, 24 * 3600.0  # for a request, and for one of a whole file, of any size on a slow line
SILENT_S = 300.0  # without a byte of such a file; an upload has 12 requests at once, of LARGE bytes each
WAITS_S = (0.1, 0.2, 0.4, 0.8, 1.6)  # after an attempt to change an object


class TryAgain(DistillError):
    """The store was away, or had an error of its own: the same call may succeed a moment later."""


def cloud_endpoint() -> str:
    """Where S3 is said to be, if not at Amazon's; empty otherwise."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")


class Store(Protocol):
    """Every method raises DistillError when the store cannot be reached or refuses.

    `put` and `delete` try once (but large files, which go up in many requests) and raise TryAgain: see `retried`.
    `get` raises it after several tries.
    """

    url: str

    def put_new(self, name: str, data: bytes) -> bool:
        """Writes an object if there is none of this name; False if there is: nothing has changed then."""

    def put(self, name: str, data: bytes | Path) -> None:
        """Writes an object, or the content of a file, in place of an older one."""

    def get(self, name: str) -> bytes | None:
        """An object's content; None if there is none of this name."""

    def download(self, name: str, path: Path) -> bool:
        """Writes an object's content to a local file, whatever its size; False if there is none of this name."""

    def names(self, folder: str = "") -> list[str]:
        """The names of all objects under a folder (of names, such as `parts/completions`), sorted."""

    def delete(self, name: str) -> None:
        """Removes an object; it may be gone already."""


def open_store(url: str | Path) -> Store:
    """A folder's path or file:// URL, s3://bucket/path or gs://bucket/path. Checks that it can be read.

    Raises UsageError for a wrong URL or a missing package, DistillError if there is no access or no such bucket.
    """
    parts = urlsplit(str(url))
    if url == "":
        raise UsageError("no URL of a run is given")
    if parts.scheme and (parts.query or parts.fragment):
        raise UsageError(f"{url}: a path cannot have ? or # in it; write %3F or %23")
    if parts.scheme in CLOUDS:
        if not parts.netloc or not parts.path.strip("/"):
            raise UsageError(f"{url}: a bucket and a path are needed: {parts.scheme}://bucket/path")
        store: Store = Bucket(str(url).rstrip("/"))
    elif parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise UsageError(f"{url}: names a machine, {parts.netloc}; a folder has three slashes: file:///folder")
        store = Folder(Path(unquote(parts.path)))
    elif "://" in str(url):
        raise UsageError(f"{url}: not a store; give a folder, or a URL that begins with s3://, gs:// or file://")
    else:
        store = Folder(Path(url))
    store.names("lease")  # small; says now what would go wrong later
    return store


def retried(change: Callable[..., None], *given: str | bytes | Path, check: Callable[[], None] = lambda: None) -> None:
    """Calls `put` or `delete` of a store, again after passing errors.

    `check` is called before each attempt, and may raise: a machine that slept in the last one may have lost the run.
    """
    for wait in WAITS_S:
        check()
        try:
            return change(*given)
        except TryAgain:
            sleep(wait)
    check()
    return change(*given)


def read_record(store: Store, name: str, kind: type[Value], fix: str) -> Value | None:
    """The value of a JSON object; None if there is none of this name. Raises DataError, with the fix, if no `kind`."""
    data = store.get(name)
    return None if data is None else decode_json(data, kind, f"{store.url}/{name}", fix)


class Folder:
    """A store in a folder, on a local disk or a shared file system with hard links (NFS has them)."""

    def __init__(self, path: Path) -> None:
        self.url, self._path = str(path), path

    def put_new(self, name: str, data: bytes) -> bool:
        with self._explained(name), self._written(name, data) as (temporary, target):
            try:
                os.link(temporary, target)  # unlike a rename, it never replaces
            except FileExistsError:
                return False
        return True

    def put(self, name: str, data: bytes | Path) -> None:
        with self._explained(name), self._written(name, data) as (temporary, target):
            temporary.replace(target)

    def get(self, name: str) -> bytes | None:
        with self._explained(name):
            try:
                return (self._path / name).read_bytes()
            except FileNotFoundError:
                return None

    def download(self, name: str, path: Path) -> bool:
        with self._explained(f"{name} → {path}"):  # either disk may be full
            if not (self._path / name).is_file():
                return False
            shutil.copyfile(self._path / name, path)
        return True

    def names(self, folder: str = "") -> list[str]:
        with self._explained(folder):
            paths = [path for path in (self._path / folder).rglob("*") if path.is_file()]
        return sorted(str(path.relative_to(self._path)) for path in paths if not path.name.startswith(HIDDEN))

    def delete(self, name: str) -> None:
        with self._explained(name):
            (self._path / name).unlink(missing_ok=True)

    @contextmanager
    def _written(self, name: str, data: bytes | Path) -> Iterator[tuple[Path, Path]]:
        """The data in a file of its own, on disk, and where it is to be."""
        target = self._path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{HIDDEN}{target.name}.{uuid4().hex}")
        try:
            with temporary.open("wb") as file:
                if isinstance(data, Path):
                    with data.open("rb") as source:
                        shutil.copyfileobj(source, file)
                else:
                    file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary, target
            sync_path(target.parent)
        finally:
            temporary.unlink(missing_ok=True)

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DistillError(f"{self._path / name}: {error.strerror or error}") from None


class Bucket:
    """A store in S3 (or what speaks its protocol) or Google Cloud Storage, through obstore."""

    def __init__(self, url: str) -> None:
        try:
            from obstore import exceptions, store
        except ImportError:
            raise UsageError(f"{url}: needs the package obstore; run `pip install -e .[storage]`") from None
        self.url, self._errors, endpoint = url, exceptions, cloud_endpoint()
        if endpoint and not re.match("https?://", endpoint):
            raise UsageError(f"AWS_ENDPOINT_URL is {endpoint}; begin it with http:// or https://")
        try:
            self._store, self._once, self._files = (
                store.from_url(
                    url,
                    client_options={
                        "allow_http": endpoint.startswith("http://"),
                        "timeout": timedelta(seconds=most_s),
                        "read_timeout": timedelta(seconds=SILENT_S),
                    },
                    retry_config={"max_retries": retries, "retry_timeout": timedelta(seconds=2 * most_s)},
                )
                for retries, most_s in ((5, REQUEST_S), (0, REQUEST_S), (5, FILE_S))
            )
        except (exceptions.BaseError, ValueError) as error:
            raise UsageError(f"{url}: no URL of a bucket and a path: {first_line(str(error))}") from None

    def put_new(self, name: str, data: bytes) -> bool:
        with self._explained(name):
            try:
                self._store.put(name, data, mode="create")
            except self._errors.AlreadyExistsError:
                return False
        return True

    def put(self, name: str, data: bytes | Path) -> None:
        with self._explained(name):
            if isinstance(data, Path) and data.stat().st_size > LARGE:
                self._files.put(name, data)
                return
        with self._explained(name, TryAgain):
            self._once.put(name, data)

    def get(self, name: str) -> bytes | None:
        with self._explained(name, TryAgain):
            try:
                return bytes(self._store.get(name).bytes())
            except FileNotFoundError:
                return None

    def download(self, name: str, path: Path) -> bool:
        with self._explained(f"{name} → {path}"):  # the disk may be full
            try:
                found = self._files.get(name)
            except FileNotFoundError:
                return False
            with path.open("wb") as file:
                for some in found.stream():
                    file.write(some)
        return True

    def names(self, folder: str = "") -> list[str]:
        with self._explained(folder):
            return sorted(item["path"] for chunk in self._store.list(folder or None) for item in chunk)

    def delete(self, name: str) -> None:
        with self._explained(name, TryAgain), suppress(FileNotFoundError):
            self._once.delete(name)

    @contextmanager
    def _explained(self, name: str, passing: type[DistillError] = DistillError) -> Iterator[None]:
        """`passing`: what is raised for an error that may pass."""
        try:
            yield
        except (self._errors.BaseError, OSError) as error:
            kind = passing if isinstance(error, self._errors.GenericError) else DistillError
            raise kind(f"{self.url}/{name}: {_cause(str(error))}") from None
        except ValueError:  # a line break, for one
            raise DistillError(f"{self.url}: {name!r} has a character that no name there may have; rename it") from None


def _cause(message: str) -> str:
    """What an object store answered, in one line."""
    found = re.search(r"<Code>(.*?)</Code>.*?<Message>(.*?)</Message>", message, re.DOTALL)
    cause = f"{found[1]}: {found[2]}" if found else first_line(message)
    if "AuthorizationHeaderMalformed" in message or "configured region" in message:
        return f"{cause}; set AWS_REGION to the bucket's region"
    if re.search(r"\b40[13]\b|169\.254|metadata\.google|redential|(Expired|Invalid)Token", message):
        return f"no access ({cause}); set the variables for the cloud's credentials (docs/storage.md)"
    if "NoSuchBucket" in message:
        return f"{cause}; make the bucket, or correct its name or AWS_ENDPOINT_URL"
    return cause
