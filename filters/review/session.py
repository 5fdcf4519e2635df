"""A review that can be stopped and continued: the sample in review_sample.json, each verdict in reviews.jsonl.

The sample is drawn from kept.jsonl and dropped.jsonl in one pass: half of it kept, every dropping rule in turn. It
holds all that the page shows, and how many answers each stratum had, so that findings can be weighted back to the run.
A verdict is on disk (fsync) before `record` returns. The file is append-only: to undo is to add a line.
"""

import errno
import fcntl
import os
import random
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec

from filters.rows import filtered_rows
from pipeline.errors import DataError, UsageError
from pipeline.instructions import INSTRUCTIONS
from pipeline.records import Completion, Dropped, Slots, encode_line, read_json, said
from pipeline.rundir import RunDir, naming, write_jsonl

KEPT = "kept"  # the stratum of the answers that were kept; the others are named by their rule
SAMPLE_FILES = "review_sample.json and reviews.jsonl"  # without them the next review draws its sample anew
ACCEPTED_FROM = 3  # a score from here on accepts


class Item(msgspec.Struct, frozen=True, kw_only=True):
    """One answer to review. The page does not show its stratum."""

    id: str
    stratum: str
    system: str
    question: str
    text: str
    slots: Slots = {}


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """The answers to review, in their order."""

    seed: int
    population: dict[str, int]  # answers by stratum, in the whole run
    items: list[Item]

    @property
    def drawn_from(self) -> int:
        """How many answers the run had."""
        return sum(self.population.values())

    def is_as_asked(self, size: int | None, seed: int | None) -> bool:
        """Whether it is a sample of this size and seed; None: of any."""
        return (size is None or min(size, self.drawn_from) == len(self.items)) and seed in (None, self.seed)


def draw(run: RunDir, size: int, seed: int) -> Sample:
    """Draws `size` answers, or all if the run has fewer. Raises DataError if there is nothing to draw from."""
    rng = random.Random(seed)
    population: dict[str, int] = {}
    drawn: dict[str, list[Item]] = {}
    for row in filtered_rows(run):
        stratum = row.rule if isinstance(row, Dropped) else KEPT
        population[stratum] = count = population.get(stratum, 0) + 1
        items = drawn.setdefault(stratum, [])
        if len(items) < size:
            items.append(_item(stratum, row))
        elif (place := rng.randrange(count)) < size:  # reservoir sampling: each is drawn with the same chance
            items[place] = _item(stratum, row)
    if not drawn:
        raise DataError(f"{run.kept}: no answers; run `python -m generate` and `python -m filters` first")
    for items in drawn.values():
        rng.shuffle(items)
    chosen = _allot(drawn, size)
    rng.shuffle(chosen)
    return Sample(seed=seed, population=population, items=chosen)


def _item(stratum: str, row: Completion) -> Item:
    turns = [turn for turn in row.messages if turn.role not in INSTRUCTIONS]
    shown = [f"{turn.role}: {said(turn)}" for turn in turns] if len(turns) > 1 else [said(turn) for turn in turns]
    return Item(
        id=row.id,
        stratum=stratum,
        system="\n\n".join(turn.content for turn in row.messages if turn.role in INSTRUCTIONS),
        question="\n\n".join(shown),
        text=said(row),
        slots=row.slots,
    )


def _allot(drawn: dict[str, list[Item]], size: int) -> list[Item]:
    """Half of them kept, the other half from the rules in turn; where one side has too few, the other fills up."""
    kept = drawn.pop(KEPT, [])
    turns = max((len(items) for items in drawn.values()), default=0)
    dropped = [items[turn] for turn in range(turns) for _, items in sorted(drawn.items()) if turn < len(items)]
    from_kept = min(len(kept), max((size + 1) // 2, size - len(dropped)))
    return kept[:from_kept] + dropped[: size - from_kept]


class Review(msgspec.Struct, frozen=True, kw_only=True):
    """A line of reviews.jsonl. `undo` takes back the verdict before it on the same answer."""

    id: str
    verdict: Literal["accept", "reject", "skip", "undo"]
    score: int | None = None  # 1 to 5, where the person gave one
    created: str = msgspec.field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))


class Session(AbstractContextManager["Session"]):
    """One person's review of a run; use as a context manager.

    `gone`: answers of the sample that the run did not have any more when the review was opened.
    """

    def __init__(self, run: RunDir, *, size: int, seed: int) -> None:
        """Continues the review where it was stopped, or draws a sample.

        Raises DataError for a wrong file, and UsageError if there is no run, or another process has the review open:
        each would show what the other has judged. The run itself is not locked: it may be filtered meanwhile.
        """
        run.check_there()
        self._file: BinaryIO = run.reviews.open("a+b", buffering=0)
        try:
            with naming(run.reviews):
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UsageError(f"{run.reviews}: another review of this run is open; go on there, or end it") from None
        sample = load_sample(run)
        self.gone = 0 if sample is None else _gone(sample, run)
        if sample is None:
            sample = draw(run, size, seed)
            write_jsonl(run.review_sample, [sample])
        self.sample = sample
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
            last = next(reversed(self.verdicts))
            self._write(Review(id=last, verdict="undo"))
            del self.verdicts[last]

    def _write(self, review: Review) -> Review:
        """Raises OSError where it is not on disk: nothing of it stays in the file."""
        line, end = encode_line(review), self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(end)
            error.filename = self._file.name
            raise
        return review


def load_sample(run: RunDir) -> Sample | None:
    """The sample under review, if there is one. Raises DataError where it cannot be read."""
    return read_json(run.review_sample, Sample, f"move it and {run.reviews} away to start a new review")


def _gone(sample: Sample, run: RunDir) -> int:
    """How many answers of the sample the run has no more: another teacher or sampling has given it others."""
    left = {item.id for item in sample.items}
    for row in filtered_rows(run):
        left.discard(row.id)
    return len(left)


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
