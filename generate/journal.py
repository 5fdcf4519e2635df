"""Append-only journals: completions.jsonl, failures.jsonl, logprobs.jsonl: a line a request, safe against any kill.

A line is written whole, in one write, the moment it is known; fsync follows in groups (`sync`, called at an interval
and at the end), so a killed process loses nothing and a power cut at most the last interval. A journal is never
rewritten: only a torn last line is cut off. A request that failed and was answered later stands in both files, and
the answer counts; of two failures of one request the later counts. The processes of one run may share a journal: each
holds the file's lock while it opens it or writes a line, and fixes what another that was killed left.
"""

import fcntl
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import msgspec

from generate.idset import IdSet
from pipeline.errors import DataError, DistillError
from pipeline.records import Completion, Failure, TokenLogprobs, encode_line

Line = Completion | Failure | TokenLogprobs

BLOCK = 65_536  # bytes looked at together for the end of a line


@dataclass
class Contents:
    """What a journal held when it was read."""

    ids: IdSet = field(default_factory=IdSet)
    models: Counter[str] = field(default_factory=Counter)  # as the server named them, with their lines
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0  # of the completion's
    counted: int = 0  # answers whose completion's tokens are known
    good_bytes: int = 0  # up to the end of the last whole line
    torn_bytes: int = 0  # what follows it, to be cut off
    unended: bool = False  # the last line is whole but for its newline


def read_journal(path: Path, kind: type[Line]) -> Contents:
    """What the journal holds; changes nothing. A journal that is not there is empty.

    Raises DataError `path:line: reason` at a line that is wrong, unless it is a last line without its end.
    """
    contents = Contents()
    decoder = msgspec.json.Decoder(kind)
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return contents
    except OSError as error:
        raise DistillError(f"{path}: {error.strerror or error}") from None
    with file:
        for number, line in enumerate(file, start=1):
            ended = line.endswith(b"\n")
            if ended and not line.strip():
                contents.good_bytes += len(line)
                continue
            try:
                record = decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                if not ended:
                    contents.torn_bytes = len(line)
                    break
                raise DataError(f"{path}:{number}: {error}; take that line out and run again") from None
            contents.good_bytes += len(line)
            contents.unended = not ended
            _count(contents, record)
    return contents


def _count(contents: Contents, record: Line) -> None:
    contents.ids.add(record.id)
    if not isinstance(record, TokenLogprobs):
        contents.models[record.model] += 1
    if isinstance(record, Completion):
        contents.prompt_tokens += record.usage.prompt_tokens or 0
        contents.completion_tokens += record.usage.completion_tokens or 0
        contents.reasoning_tokens += record.usage.reasoning_tokens or 0
        contents.counted += record.usage.completion_tokens is not None


class Journal:
    """A journal open for writing; use as a context manager."""

    def __init__(self, path: Path, kind: type[Line]) -> None:
        """Reads the journal, fixes its end and opens it. Raises DataError or DistillError."""
        self.path, self._dirty = path, False
        with self._explained():
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            with self._explained(), self._locked():
                self.found = read_journal(path, kind)
                if self.found.torn_bytes:
                    os.ftruncate(self._fd, self.found.good_bytes)
                self._end = self.found.good_bytes
                if self.found.unended:
                    self._write(b"\n")
        except BaseException:
            os.close(self._fd)
            raise

    def append(self, *records: Line) -> None:
        """Writes a line for each, in one write.

        Raises DistillError when the disk does not take them; the file then ends as it did before.
        """
        lines = b"".join(map(encode_line, records))
        with self._explained(), self._locked():
            size = os.fstat(self._fd).st_size
            if size != self._end:  # another process has written; was it killed at that?
                self._end = self._repaired(size)
            self._write(lines)

    def sync(self) -> None:
        """Makes sure that what was written survives a power cut (fsync). May run in another thread than `append`.

        Raises DistillError if the journal was moved or removed: what is written would not be found again.
        """
        if self._dirty:
            self._dirty = False
            with self._explained():
                os.fsync(self._fd)
            self._check_place()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.sync()
        finally:
            os.close(self._fd)

    def _check_place(self) -> None:
        """Raises DistillError unless the path still names the open file."""
        opened = os.fstat(self._fd)
        with suppress(FileNotFoundError):
            if os.path.samestat(self.path.stat(), opened):
                return
        if opened.st_nlink:
            raise DistillError(
                f"{self.path}: was moved away while the run worked; move it back and run the same command again"
            )
        raise DistillError(
            f"{self.path}: was removed while the run worked, and the answers in it are lost; "
            "run the same command again to ask again"
        )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DistillError(
                f"{self.path}: cannot be written: {error.strerror or error}; what was written before is whole. "
                "Fix that and run the same command again"
            ) from None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _write(self, lines: bytes) -> None:
        """Appends the lines at `_end`; if the disk does not take it, the file ends there again."""
        try:
            written = os.write(self._fd, lines)
            while written < len(lines):  # the disk is nearly full, or a signal came: the next write says which
                written += os.write(self._fd, lines[written:])
        except OSError:
            with suppress(OSError):  # then the last line is torn, and the next to open or write cuts it off
                os.ftruncate(self._fd, self._end)
            raise
        self._end += len(lines)
        self._dirty = True

    def _repaired(self, size: int) -> int:
        """Cuts off a last line without its end; returns the size then."""
        end = size
        while end and os.pread(self._fd, 1, end - 1) != b"\n":
            start = max(0, end - BLOCK)
            end = start + os.pread(self._fd, end - start, start).rfind(b"\n") + 1
        if end < size:
            os.ftruncate(self._fd, end)
        return end
