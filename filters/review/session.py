"""A review that can be stopped and continued: the sample in review_sample.json, each verdict in reviews.jsonl.

A verdict is on disk (fsync) before `record` returns. The file is append-only: to undo is to add a line.
"""

import fcntl
import os
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec

from filters.review.sample import Item, Sample, draw
from pipeline.errors import DataError, UsageError
from pipeline.records import encode_line
from pipeline.rundir import RunDir, write_jsonl

ACCEPTED_FROM = 3  # a score from here on accepts


class Review(msgspec.Struct, frozen=True, kw_only=True):
    """A line of reviews.jsonl. `undo` takes back the verdict before it on the same answer."""

    id: str
    verdict: Literal["accept", "reject", "skip", "undo"]
    score: int | None = None  # 1 to 5, where the person gave one
    created: str = msgspec.field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))


class Session(AbstractContextManager["Session"]):
    """One person's review of a run; use as a context manager."""

    def __init__(self, run: RunDir, *, size: int, seed: int) -> None:
        """Continues the review where it was stopped, or draws a sample.

        Raises DataError for a wrong file, and UsageError if another process has the review open: each would show what
        the other has judged. The run itself is not locked: it may be filtered meanwhile.
        """
        sample = load_sample(run)
        if sample is None:
            sample = draw(run, size, seed)
            write_jsonl(run.review_sample, [sample])
        self.sample = sample
        self._file: BinaryIO = run.reviews.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UsageError(f"{run.reviews}: another review of this run is open; go on there, or end it") from None
        self.verdicts, good = _read(run.reviews)
        if good < run.reviews.stat().st_size:  # a line that a killed process did not end
            self._file.truncate(good)

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def done(self) -> int:
        """Answers of the sample with a verdict."""
        return sum(item.id in self.verdicts for item in self.sample.items)

    @property
    def current(self) -> Item | None:
        """The answer to judge now; None when all are judged."""
        return next((item for item in self.sample.items if item.id not in self.verdicts), None)

    def record(self, verdict: Literal["accept", "reject", "skip"], score: int | None = None) -> None:
        """The verdict on the current answer; a score decides by itself."""
        assert self.current is not None
        if score is not None:
            verdict = "accept" if score >= ACCEPTED_FROM else "reject"
        review = self._write(Review(id=self.current.id, verdict=verdict, score=score))
        self.verdicts[review.id] = review

    def undo(self) -> None:
        """Takes back the last verdict, if there is one: its answer is the current one again."""
        if self.verdicts:
            last, _ = self.verdicts.popitem()
            self._write(Review(id=last, verdict="undo"))

    def _write(self, review: Review) -> Review:
        self._file.write(encode_line(review))
        self._file.flush()
        os.fsync(self._file.fileno())
        return review


def load_sample(run: RunDir) -> Sample | None:
    """The sample under review, if there is one. Raises DataError where it cannot be read."""
    try:
        return msgspec.json.decode(run.review_sample.read_bytes(), type=Sample)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise DataError(f"{run.review_sample}: {error}; move it and {run.reviews} away to start a new review") from None


def read_reviews(run: RunDir) -> dict[str, Review]:
    """The verdicts that stand, by id, in their order. Raises DataError `path:line: reason`."""
    return _read(run.reviews)[0] if run.reviews.exists() else {}


def _read(path: Path) -> tuple[dict[str, Review], int]:
    """The verdicts that stand, and the bytes up to the end of the last whole line."""
    verdicts: dict[str, Review] = {}
    good = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            good += len(line)
            try:
                review = msgspec.json.decode(line, type=Review)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise DataError(f"{path}:{number}: {error}; take that line out and run again") from None
            verdicts.pop(review.id, None)
            if review.verdict != "undo":
                verdicts[review.id] = review
    return verdicts, good
