"""Texts side by side in one array, to ask all of them at once what a loop would ask each. Reads and writes nothing.

The texts stay as they stand in JSON, quoted and escaped, in units of UTF-16: one unit a character, but two for an emoji
(a surrogate pair) and two for an escape (`\\n`, `\\"`).
"""

import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from filters.scripts import Ranges

_decode = msgspec.json.Decoder(str).decode
Flags = NDArray[np.bool_]  # one a text, or one a unit
Counts = NDArray[np.int64]  # one a text

_PLAIN: Ranges = ((0xAC00, 0xD7A3), (0x3400, 0x9FFF))  # Hangul syllables, ideographs: NFC whatever stands beside them
_NEWLINE, _QUOTE, _SLASH, _U, _BACKSLASH = (ord(char) for char in '\n"/u\\')


class Texts:
    """JSON strings of rows, in their order. Raises UnicodeDecodeError where they are not UTF-8."""

    def __init__(self, strings: Sequence[Any]) -> None:
        """`strings`: bytes or the like, each a JSON value without a newline in it (JSON has none inside a string)."""
        self._joined = b"\n".join([b"", *strings, b""]).decode()
        self._units = np.frombuffer(self._joined.encode("utf-16-le"), np.uint16)
        self._ends = positions(self._units == _NEWLINE)  # a text is what lies between two of these

    def __len__(self) -> int:
        return len(self._ends) - 1

    def all_strings(self) -> bool:
        """Whether each value is a string, and not another kind of JSON."""
        return bool((self._units[self._ends[:-1] + 1] == _QUOTE).all())

    def __getitem__(self, index: int) -> str:
        """A text, quotes and escapes undone. Raises msgspec.DecodeError for half a surrogate pair."""
        start, end = self._bounds[index], self._bounds[index + 1]
        text = self._joined[start + 2 : end - 1]
        if "\\" not in text:
            return text
        text = text.replace("\\n", "\n").replace('\\"', '"')
        if "\\" not in text:
            return text
        return _decode(self._joined[start + 1 : end])  # another escape, or a backslash that is one of the text's own

    @cached_property
    def _bounds(self) -> list[int]:
        """The newlines' places in `_joined`, which counts characters where `_ends` counts units."""
        bounds = self._ends
        if len(self._joined) < len(self._units):
            bounds = bounds - np.cumsum(self._low_surrogates)[bounds]
        places: list[int] = bounds.tolist()
        return places

    @cached_property
    def sizes(self) -> Counts:
        """Characters of each text (code points); wrong where the text is `irregular`."""
        sizes = np.diff(self._ends) - 3 - self.escapes
        if len(self._joined) < len(self._units):
            sizes -= self.count(self._low_surrogates)
        return sizes

    @cached_property
    def escapes(self) -> Counts:
        """Escapes in each text; wrong where the text is `irregular`."""
        return self.count(self._backslashes)

    @cached_property
    def irregular(self) -> Flags:
        r"""Texts with an escape that stands for more than the character behind it (`\\`, `\/`, `\u0000`)."""
        escaped = positions(self._backslashes)
        behind = self._units[escaped + 1]
        return self._with_any(escaped[(behind == _BACKSLASH) | (behind == _SLASH) | (behind == _U)])

    @cached_property
    def maybe_not_nfc(self) -> Flags:
        """Texts with a character that may not stand, or not alone, in Unicode's form NFC; escaped ones are not seen."""
        plain = (self._units < 0x300) | self.within(_PLAIN)
        rest = positions(~plain)
        return self._with_any(rest[doubtful_in_nfc()[self._units[rest]]])

    @property
    def last_units(self) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
        """The last unit of each text and the one before it; a quote where there is none."""
        return self._units[np.maximum(self._ends[1:] - 2, 0)], self._units[np.maximum(self._ends[1:] - 3, 0)]

    def within(self, ranges: Ranges) -> Flags:
        """The units that are a character in the ranges of code points; those over 65,535 are passed over."""
        inside = np.zeros(len(self._units), np.bool_)
        for first, last in ranges:
            if last < 0x10000:
                inside |= (self._units - np.uint16(first)) <= last - first
        return inside

    def occurrences(self, word: str) -> Counts:
        """How often each text has a word, overlaps counted; rather too many (behind a backslash) than too few."""
        units = np.frombuffer(msgspec.json.encode(word)[1:-1].decode().encode("utf-16-le"), np.uint16)
        size = len(self._units) - len(units) + 1
        if size <= 0:
            return np.zeros(len(self), np.int64)
        found = self._units[:size] == units[0]
        if len(units) > 1:
            found &= self._units[1 : 1 + size] == units[1]
        if not found.any():
            return np.zeros(len(self), np.int64)
        places = positions(found)
        for offset in range(2, len(units)):
            places = places[self._units[places + offset] == units[offset]]
        return np.bincount(np.searchsorted(self._ends, places) - 1, minlength=len(self))

    def count(self, marked: Flags) -> Counts:
        """How many units of each text are marked."""
        if not marked.any():
            return np.zeros(len(self), np.int64)
        words = _packed(marked, len(self._units))
        before = np.zeros(len(words) + 1, np.int64)
        np.cumsum(np.bitwise_count(words), out=before[1:])
        word, below = self._bits
        counts = before[word] + np.bitwise_count(words[word] & below)
        differences: Counts = counts[1:] - counts[:-1]
        return differences

    @cached_property
    def _bits(self) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """Where `_ends` are in words of 64 marks: the words, and masks of the bits before them."""
        one = np.uint64(1)
        return self._ends >> 6, (one << (self._ends & 63).astype(np.uint64)) - one

    @cached_property
    def _low_surrogates(self) -> Flags:
        return self.within(((0xDC00, 0xDFFF),))

    @cached_property
    def _backslashes(self) -> Flags:
        marked: Flags = self._units == _BACKSLASH
        return marked

    def _with_any(self, places: NDArray[np.int64]) -> Flags:
        flags = np.zeros(len(self), np.bool_)
        flags[np.searchsorted(self._ends, places) - 1] = True
        return flags


def positions(marked: Flags) -> NDArray[np.int64]:
    """Where the marks are; fast where they are few."""
    words = _packed(marked, len(marked))
    some = np.flatnonzero(words)
    marks = np.flatnonzero(np.unpackbits(words[some].view(np.uint8), bitorder="little").view(np.bool_))
    places: Counts = some[marks >> 6] * 64 + (marks & 63)
    return places


def flags(values: Iterable[bool], size: int) -> Flags:
    """One flag a text."""
    return np.fromiter(values, np.bool_, size)


def _packed(marked: Flags, size: int) -> NDArray[np.uint64]:
    """64 marks a word; no marks from the last of them on to `size`, and one more."""
    packed = np.packbits(marked, bitorder="little")
    words = np.zeros(size // 64 + 1, np.uint64)
    words.view(np.uint8)[: len(packed)] = packed
    return words


@cache
def doubtful_in_nfc() -> Flags:
    """For each unit of UTF-16, False where its character is NFC whatever stands beside it.

    Doubtful is what NFC replaces, what combines with a character before it, and (surrogates) what lies beyond U+FFFF,
    except U+1F000 to U+1FBFF: emoji, which neither change nor combine.
    """
    doubtful = np.zeros(0x10000, np.bool_)
    for code in (*range(0x300, 0x3400), *range(0xA000, 0xAC00), *range(0xD7A4, 0xD800), *range(0xF900, 0x10000)):
        char = chr(code)
        doubtful[code] = unicodedata.combining(char) or not unicodedata.is_normalized("NFC", char)
    doubtful[0xD800:0xDC00] = True
    doubtful[0xD83C : 0xD83E + 1] = False
    for code in range(0x10000):
        parts = unicodedata.decomposition(chr(code)).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            doubtful[int(parts[1], 16)] = True
    doubtful[0x1161 : 0x1175 + 1] = doubtful[0x11A8 : 0x11C2 + 1] = True  # jamo: they make syllables by arithmetic
    return doubtful
