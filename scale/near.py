"""Near-duplicates in pieces: pairs of rows that share a band, from buckets that no machine holds all of.

The same pairs that filters.duplicates compares on one machine, each found once: rows with the same text are one, and of
all rows of a bucket every two are compared, first by their glimpses, then by the true Jaccard similarity. Which of them
is dropped is decided by the one-machine rule, over verified pairs. Pure: scale.filtering moves the arrays.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import numpy as np

from filters.duplicates import Match
from filters.minhash import Array, agreement, jaccard, ngrams

ENTRY = np.dtype([("key", np.uint32), ("column", np.uint8), ("row", np.uint32)])  # a band of a row, packed
# Two texts that share a band, by the first row of each. `first_column` is the first band of `first` that `other` has,
# and `other_column` the first of `other` that `first` has: of equally similar rows, that of the first band is named.
PAIR = np.dtype([("first", np.int64), ("other", np.int64), ("first_column", np.uint8), ("other_column", np.uint8)])
ROWS_AT_ONCE = 1 << 16  # glimpses compared at once: 4 MiB
NO_PAIRS = np.empty(0, PAIR)


def entries_of(bands: Array, buckets: int) -> list[Array]:
    """The bands of some rows (uint32, shape (rows, bands)) as ENTRY arrays, one for each of so many buckets."""
    rows, columns = bands.shape
    entries = np.empty(rows * columns, ENTRY)
    entries["key"] = bands.ravel()
    entries["column"] = np.tile(np.arange(columns, dtype=np.uint8), rows)
    entries["row"] = np.repeat(np.arange(rows, dtype=np.uint32), columns)
    bucket = entries["key"] % np.uint32(buckets)
    entries = entries[np.argsort(bucket, kind="stable")]
    return np.split(entries, np.cumsum(np.bincount(bucket, minlength=buckets))[:-1])


def first_rows(digests: Array, alive: Array) -> Array:
    """For each row the first row with the same text (int64), or -1 where it is not `alive`."""
    rows = np.flatnonzero(alive)
    _, first, group = np.unique(digests[rows], return_index=True, return_inverse=True)
    firsts = np.full(len(digests), -1, np.int64)
    firsts[rows] = rows[first][group]
    return firsts


def candidates(
    parts: Iterable[tuple[int, Array]], firsts: Array, glimpses_of: Callable[[Array], Array], least: float
) -> Array:
    """PAIRs of one bucket whose glimpses agree in at least `least` bytes.

    `parts`: the number of the first row of an array of ENTRY, and the array. `firsts`: of `first_rows`. `glimpses_of`
    gives the glimpses of sorted rows.
    """
    entries = [_known(first, part, firsts) for first, part in parts]
    if not entries:
        return NO_PAIRS
    keys, columns, rows = (np.concatenate(one) for one in zip(*entries, strict=True))
    order = np.lexsort((rows, columns, keys))
    keys, columns, rows = keys[order], columns[order], rows[order]
    counts = np.diff(_starts(keys, columns), append=len(keys))
    shared = np.repeat(counts > 1, counts)  # else no other row has this band
    keys, columns, rows = keys[shared], columns[shared], rows[shared]
    once = _starts(keys, columns, rows)  # copies of a text are one row
    keys, columns, rows = keys[once], columns[once], rows[once]
    several = [(start, stop) for start, stop in pairwise([*_starts(keys).tolist(), len(keys)]) if stop - start > 1]
    if not several:
        return NO_PAIRS
    needed = np.unique(np.concatenate([rows[start:stop] for start, stop in several]))
    glimpses = glimpses_of(needed)
    found = [
        pairs
        for start, stop in several
        for pairs in _pairs(
            rows[start:stop], columns[start:stop], glimpses[np.searchsorted(needed, rows[start:stop])], least
        )
    ]
    return merged(found)


def _starts(*columns: Array) -> Array:
    """The places where sorted columns begin to have other values, the first place included."""
    changed = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return np.flatnonzero(np.insert(changed, 0, len(columns[0]) > 0))


def _known(first: int, part: Array, firsts: Array) -> tuple[Array, Array, Array]:
    rows = firsts[first + part["row"].astype(np.int64)]
    known = rows >= 0
    return part["key"][known], part["column"][known], rows[known]


def _pairs(rows: Array, columns: Array, glimpses: Array, least: float) -> Iterable[Array]:
    """The PAIRs among rows with one key; the same row may stand there in two columns, by chance."""
    for at in range(len(rows) - 1):
        for start in range(at + 1, len(rows), ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, len(rows))
            alike = agreement(glimpses[start:stop], glimpses[at]) >= least
            others = start + np.flatnonzero(alike & (rows[start:stop] != rows[at]))
            if len(others):
                pairs, ahead = np.empty(len(others), PAIR), rows[others] > rows[at]
                pairs["first"], pairs["other"] = np.minimum(rows[others], rows[at]), np.maximum(rows[others], rows[at])
                pairs["first_column"] = np.where(ahead, columns[at], columns[others])
                pairs["other_column"] = np.where(ahead, columns[others], columns[at])
                yield pairs


def merged(parts: Sequence[Array]) -> Array:
    """Each pair once, with the first of its columns, sorted."""
    pairs: Array = np.concatenate([NO_PAIRS, *parts])
    if not len(pairs):
        return pairs
    pairs = pairs[np.lexsort((pairs["other"], pairs["first"]))]
    at = _starts(pairs["first"], pairs["other"])
    once: Array = pairs[at]
    for column in ("first_column", "other_column"):
        once[column] = np.minimum.reduceat(pairs[column], at)
    return once


def similarities(texts: Sequence[str], first: Array, other: Array, n: int) -> Array:
    """The Jaccard similarities of pairs of folded texts, given by their numbers; `first` is sorted."""
    sets: dict[int, Array] = {}
    found = np.empty(len(first), np.float64)
    for at, (one, two) in enumerate(zip(first.tolist(), other.tolist(), strict=True)):
        for number in (one, two):
            if number not in sets:
                sets[number] = ngrams(texts[number], n)
        found[at] = jaccard(sets[one], sets[two])
    return found


class PairSearch:
    """What filters.duplicates asks about a row, answered from verified pairs."""

    def __init__(self, what: str, firsts: Array, compared: int, threshold: float, pairs: Array, similar: Array) -> None:
        """`similar`: the similarity of each of the PAIRs. Only rows under `compared` are found."""
        self._what, self._firsts, self._compared = what, firsts, compared
        self._alike: dict[int, list[tuple[float, int, int]]] = {}  # of a text: how similar, in which band, which other
        self._stay: dict[int, list[tuple[int, int]]] = {}  # rows that stay, by text: in which order, the row
        self._added = 0
        close = np.flatnonzero(similar >= threshold)
        for (first, other, first_column, other_column), similarity in zip(
            pairs[close].tolist(), similar[close].tolist(), strict=True
        ):
            self._alike.setdefault(first, []).append((similarity, first_column, other))
            self._alike.setdefault(other, []).append((similarity, other_column, first))

    def add(self, row: int) -> None:
        """Notes a row that stays."""
        if row < self._compared:
            self._stay.setdefault(int(self._firsts[row]), []).append((self._added, row))
            self._added += 1

    def match(self, row: int) -> Match | None:
        """As filters.duplicates has it: the same text, else the most similar row; of equals that of the first band."""
        text = int(self._firsts[row])
        if same := self._stay.get(text):
            return Match(self._what, same[0][1], None)
        found = [
            (-similarity, column, added, other)
            for similarity, column, one in self._alike.get(text, ())
            for added, other in self._stay.get(one, ())
        ]
        if not found:
            return None
        similarity, _, _, other = min(found)
        return Match(self._what, other, -similarity)
