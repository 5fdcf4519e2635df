"""What is counted while answers are judged: one tally a chunk, added up in order. Flat in memory; reads and writes
nothing.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from filters.answer import Answer
from filters.batch import Batch
from filters.texts import Counts
from pipeline.records import Slots

BIN = 50  # characters a bar of the length histogram
LAST_BIN = 100  # the last bar holds all that is longer
EXAMPLES = 2  # kept of each rule
EXAMPLE_CHARS = 600
MOST_VALUES = 500  # distinct values of a slot; with more, a rate by value says nothing
SlotsCount = tuple[Slots, int]  # what the prompts of so many answers were filled with


@dataclass(frozen=True)
class Example:
    """One answer that a rule dropped."""

    id: str
    reason: str
    text: str  # its first EXAMPLE_CHARS characters


@dataclass
class Tally:
    """Counts of kept and dropped answers."""

    kept: int = 0
    failed: Counter[tuple[str, ...]] = field(default_factory=Counter)  # labels of the rules that dropped an answer
    kept_lengths: Counter[int] = field(default_factory=Counter)  # by bin
    dropped_lengths: Counter[int] = field(default_factory=Counter)
    kept_slots: dict[str, Counter[str]] = field(default_factory=dict)  # slot, value: answers
    dropped_slots: dict[str, Counter[str]] = field(default_factory=dict)
    examples: dict[str, list[Example]] = field(default_factory=dict)
    scores: dict[str, Counter[str]] = field(default_factory=dict)  # the judge's: criterion, score: answers

    @property
    def dropped(self) -> int:
        return self.failed.total()

    def count_kept(self, lengths: Counts, slots: Iterable[SlotsCount]) -> None:
        """Adds answers that every rule let pass."""
        self.kept += len(lengths)
        _count_lengths(self.kept_lengths, lengths)
        _count_slots(self.kept_slots, slots)

    def count_dropped(self, lengths: Counts, slots: Iterable[SlotsCount]) -> None:
        """Adds the lengths and slots of answers whose rules `note` has had."""
        _count_lengths(self.dropped_lengths, lengths)
        _count_slots(self.dropped_slots, slots)

    def note_all(self, batch: Batch, found: dict[int, dict[str, str]]) -> None:
        """Adds the rules that dropped answers of a batch, by their indices."""
        self.failed.update(map(tuple, found.values()))
        for index, reasons in found.items():
            for label in reasons:
                if len(self.examples.get(label, ())) < EXAMPLES:
                    self._add_example(batch.id(index), batch.answer(index), label, reasons[label])

    def note(self, row_id: str, answer: Answer, reasons: dict[str, str]) -> None:
        """Adds the rules that dropped an answer."""
        self.failed[tuple(reasons)] += 1
        for label, reason in reasons.items():
            self._add_example(row_id, answer, label, reason)

    def _add_example(self, row_id: str, answer: Answer, label: str, reason: str) -> None:
        examples = self.examples.setdefault(label, [])
        if len(examples) < EXAMPLES:
            examples.append(Example(row_id, reason, answer.text[:EXAMPLE_CHARS]))

    def move_to_dropped(self, row_id: str, answer: Answer, reasons: dict[str, str]) -> None:
        """Takes back an answer that was counted as kept: it is dropped after all."""
        self.kept -= 1
        self.kept_lengths[min(len(answer.text) // BIN, LAST_BIN)] -= 1
        values: dict[str, Counter[str]] = {}
        _count_slots(values, [(answer.slots, 1)])
        for name, counts in values.items():
            self.kept_slots[name].subtract(counts)
        self.count_dropped(np.array([len(answer.text)]), [(answer.slots, 1)])
        self.note(row_id, answer, reasons)

    def add(self, other: "Tally") -> None:
        """Adds a later chunk's tally."""
        self.kept += other.kept
        self.failed.update(other.failed)
        self.kept_lengths.update(other.kept_lengths)
        self.dropped_lengths.update(other.dropped_lengths)
        for mine, theirs in ((self.kept_slots, other.kept_slots), (self.dropped_slots, other.dropped_slots)):
            for name, values in theirs.items():
                counted = mine.setdefault(name, Counter())
                if len(counted) <= MOST_VALUES:
                    counted.update(values)
        for label, examples in other.examples.items():
            known = self.examples.setdefault(label, [])
            known.extend(examples[: EXAMPLES - len(known)])


def _count_lengths(counts: Counter[int], lengths: Counts) -> None:
    bins = np.bincount(np.minimum(lengths // BIN, LAST_BIN))
    for index in np.flatnonzero(bins).tolist():
        counts[index] += int(bins[index])


def _count_slots(counts: dict[str, Counter[str]], slots: Iterable[SlotsCount]) -> None:
    as_often: dict[int, list[Slots]] = {}
    for row, count in slots:
        as_often.setdefault(count, []).append(row)
    for count, rows in as_often.items():
        for name in dict.fromkeys(chain.from_iterable(rows)):
            values = [row[name] for row in rows if name in row]
            found = Counter([value for value in values if isinstance(value, str)])
            found.update(chain.from_iterable([value for value in values if not isinstance(value, str)]))
            counted = counts.setdefault(name, Counter())
            for value, number in found.items():
                counted[value] += number * count
