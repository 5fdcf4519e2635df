"""What is counted while answers are judged: one tally per block of lines, added up in order. Reads and writes nothing.

Memory is flat: lengths are counted in bins, and a slot with too many values is not counted further.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import partial

from filters.answer import Answer
from filters.reasons import describe
from pipeline.records import Reason

BIN = 50  # characters a bar of the length histogram
FIRST_BAD_LINES = 100  # named in the report
LAST_BIN = 100  # the last bar holds all that is longer
EXAMPLES = 2  # kept of each rule
EXAMPLE_CHARS = 600
MOST_VALUES = 500  # distinct values of a slot; with more, a rate by value says nothing


@dataclass(frozen=True)
class Example:
    id: str
    reason: str
    text: str  # its first EXAMPLE_CHARS characters


@dataclass(frozen=True)
class BadLine:
    """A line that is no completion, left out with --skip-bad; it stays in completions.jsonl as it is."""

    line: int
    reason: str


@dataclass
class Tally:
    """Counts of lines, and of kept and dropped answers."""

    lines: int = 0  # of the file, bad ones too
    bad_lines: int = 0
    first_bad_lines: list[BadLine] = field(default_factory=list)
    torn: bool = False  # the last line is cut off
    outcomes: Counter[tuple[str, ...]] = field(default_factory=Counter)  # labels of the rules that dropped it; (): kept
    lengths: Counter[tuple[int, bool]] = field(default_factory=Counter)  # bin of BIN characters, whether it is kept
    # By the name of a slot or column: its values, and whether the answer is kept.
    slots: defaultdict[str, Counter[tuple[str, bool]]] = field(default_factory=partial(defaultdict, Counter))
    examples: dict[str, list[Example]] = field(default_factory=dict)  # by rule
    scores: dict[str, Counter[str]] = field(default_factory=dict)  # the judge's: criterion, score: answers

    @property
    def rows(self) -> int:
        return self.outcomes.total()

    @property
    def kept(self) -> int:
        return self.outcomes[()]

    def count(self, row_id: str, answer: Answer, reasons: list[Reason], number: int = 1) -> None:
        """Adds an answer; without reasons it is kept. `number`: -1 takes back an answer that was counted before."""
        labels = tuple([reason.rule for reason in reasons])
        kept = not labels
        self.outcomes[labels] += number
        self.lengths[min(len(answer.text) // BIN, LAST_BIN), kept] += number
        columns = {name: value for name, value in answer.columns.items() if isinstance(value, str)}
        for name, value in {**columns, **answer.slots}.items():
            counts = self.slots[name]
            if len(counts) <= 2 * MOST_VALUES:
                for one in (value,) if isinstance(value, str) else value:
                    counts[one, kept] += number
        for reason in reasons:
            examples = self.examples.setdefault(reason.rule, [])
            if len(examples) < EXAMPLES:
                examples.append(Example(row_id, describe(reason), answer.text[:EXAMPLE_CHARS]))

    def move_to_dropped(self, row_id: str, answer: Answer, reason: Reason) -> None:
        """Takes back an answer that was counted as kept: it is dropped after all."""
        self.count(row_id, answer, [], -1)
        self.count(row_id, answer, [reason])

    def count_bad(self, reason: str) -> None:
        """Notes that the last line counted in `lines` is no completion."""
        self.bad_lines += 1
        if len(self.first_bad_lines) < FIRST_BAD_LINES:
            self.first_bad_lines.append(BadLine(self.lines, reason))

    def add(self, later: "Tally") -> None:
        """Adds a later block's tally."""
        bad = [BadLine(self.lines + one.line, one.reason) for one in later.first_bad_lines]
        self.first_bad_lines += bad[: FIRST_BAD_LINES - len(self.first_bad_lines)]
        self.lines += later.lines
        self.bad_lines += later.bad_lines
        self.torn |= later.torn
        self.outcomes.update(later.outcomes)
        self.lengths.update(later.lengths)
        for name, counts in later.slots.items():
            if len(self.slots[name]) <= 2 * MOST_VALUES:
                self.slots[name].update(counts)
        for label, examples in later.examples.items():
            known = self.examples.setdefault(label, [])
            known.extend(examples[: EXAMPLES - len(known)])
