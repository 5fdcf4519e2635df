"""JSON strings in an array of bytes, to ask all at once what a loop would ask each. Reads and writes nothing.

The strings stay as they stand: quoted, escaped, in UTF-8. Hangul syllables and the ideographs from U+5000 on are known
by their bytes and never decoded; what else is not ASCII is, but only that.
"""

import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache, cached_property

import msgspec
import numpy as np
from numba import types
from numpy.typing import NDArray

from filters.compiled import BYTES, FLAGS, NUMBERS, PLACES, Bytes, Places, byte, compiled, place
from filters.scripts import Ranges

_decode = msgspec.json.Decoder(list[str]).decode
Flags = NDArray[np.bool_]  # one a text
Counts = NDArray[np.int64]  # one a text
Shares = NDArray[np.float64]  # one a text

_SYLLABLES = (0xAC00, 0xD7A3)
_IDEOGRAPHS = (0x5000, 0x9FFF)  # all Han
_IDEOGRAPHS_FIRST, _IDEOGRAPHS_LAST = 0xE5, 0xE9  # their first bytes
_BACKSLASH, _SLASH, _U, _SMALL_A = b"\\/ua"
_BLOCK = 128  # bytes counted together: so few that a byte holds the count
_CODES = 0x110000  # code points


class Texts:
    """Texts in their order. The methods that count answer for all of them."""

    def __init__(self, data: bytes, starts: Places, ends: Places) -> None:
        """`data`: UTF-8. From each start to its end is a JSON string, its quotes included, and behind it some byte."""
        self._data = data
        self._bytes = np.frombuffer(data, np.uint8)
        self._starts, self._ends = starts, ends
        self.sizes = np.zeros(len(starts), np.int64)  # characters (code points); wrong where `irregular`
        self._letters = np.zeros(len(starts), np.int64)  # of escapes, as the n of `\n`
        # An escape stands for more than the character behind it: `\\`, `\/`, `\u0000`.
        self.irregular = np.zeros(len(starts), np.bool_)
        self._syllables = np.zeros(len(starts), np.int64)
        self._has_others = np.zeros(len(starts), np.bool_)  # characters that must be decoded to be known
        self._counts: dict[Ranges, Counts] = {}
        figures = self.sizes, self._letters, self._syllables, self.irregular, self._has_others
        _measure(self._bytes, starts, ends, *figures)

    def __len__(self) -> int:
        return len(self._starts)

    def decoded(self, indices: Sequence[int]) -> list[str]:
        """Some of the texts, quotes and escapes undone."""
        starts, ends = self._starts[indices].tolist(), self._ends[indices].tolist()
        strings = [self._data[start:end] for start, end in zip(starts, ends, strict=True)]
        return _decode(b"[" + b",".join(strings) + b"]")

    @cached_property
    def maybe_not_nfc(self) -> Flags:
        """Texts with a character that may not stand, or not alone, in Unicode's form NFC; escaped ones are not seen."""
        counts = np.zeros(len(self), np.int64)
        _count_others(self._bytes, self._starts, self._ends, self._has_others, doubtful_in_nfc(), counts)
        return counts > 0

    def ends_with(self, mark: str) -> Flags:
        """Texts whose last character is the mark, for certain."""
        written = _written(mark)
        start = self._ends - 1 - len(written)
        found: Flags = self._bytes.take(start - 1, mode="clip") != _BACKSLASH
        for offset, char in enumerate(written):
            found &= self._bytes.take(start + offset, mode="clip") == char
        return found

    def count(self, ranges: Ranges) -> Counts:
        """How many characters of each text are in the ranges of code points; wrong where `irregular`.

        A range holds all Hangul syllables or none, all ideographs from U+5000 on or none, all letters a to z or none,
        and of the characters before U+0020 none.
        """
        counts = self._counts.get(ranges)
        if counts is not None:
            return counts
        counts = self._counts[ranges] = np.zeros(len(self), np.int64)
        texts = self._bytes, self._starts, self._ends
        for first, last in ranges:
            if first < 0x80:
                _count_bytes(*texts, first, min(last, 0x7F), counts)
            if first <= ord("a") and ord("z") <= last:
                counts -= self._letters
            if first <= _SYLLABLES[0] and _SYLLABLES[1] <= last:
                counts += self._syllables
            if first <= _IDEOGRAPHS[0] and _IDEOGRAPHS[1] <= last:
                _count_bytes(*texts, _IDEOGRAPHS_FIRST, _IDEOGRAPHS_LAST, counts)
        _count_others(*texts, self._has_others, _inside(ranges), counts)
        return counts

    def occurrences(self, *words: str) -> Counts:
        """How often each text has one of the words, overlaps counted; rather too many (`\\n` has an n) than too few."""
        counts = np.zeros(len(self), np.int64)
        written = list(map(_written, words))
        joined, ends = np.frombuffer(b"".join(written), np.uint8), np.cumsum(list(map(len, written)), dtype=np.int64)
        _count_words(self._bytes, self._starts, self._ends, joined, ends, counts)
        return counts


@compiled(types.boolean(types.uint8, types.uint8, types.uint8))
def _is_syllable(first: int, second: int, third: int) -> bool:
    """Whether three bytes that follow each other are a Hangul syllable: EA B0 80 to ED 9E A3."""
    not_before = (first != 0xEA) | (second >= 0xB0)
    not_behind = (first != 0xED) | (second < 0x9E) | ((second == 0x9E) & (third <= 0xA3))
    return (first >= 0xEA) & (first <= 0xED) & not_before & not_behind


@compiled(types.boolean(types.uint8))
def _is_ideograph(first: int) -> bool:
    return (first >= _IDEOGRAPHS_FIRST) & (first <= _IDEOGRAPHS_LAST)


@compiled(types.void(BYTES, PLACES, PLACES, NUMBERS, NUMBERS, NUMBERS, types.bool_[::1], types.bool_[::1]))
def _measure(
    data: Bytes,
    starts: Places,
    ends: Places,
    sizes: Counts,
    letters: Counts,
    syllables: Counts,
    irregular: Flags,
    has_others: Flags,
) -> None:
    for text in range(len(starts)):
        at, end = place(starts[text]) + place(1), place(ends[text]) - place(1)
        sizes[text] = end - at
        while at < end:
            stop = min(at + place(_BLOCK), end)
            beyond, escaped, hangul = byte(0), byte(0), byte(0)
            more, others = False, False
            for index in range(at, stop):
                char, behind = data[index], data[index + place(1)]
                is_later = (char >= 0x80) & (char < 0xC0)  # a character's second byte and on
                is_backslash = char == _BACKSLASH
                beyond = byte(beyond + (is_later | is_backslash))
                escaped = byte(escaped + (is_backslash & (behind >= _SMALL_A)))
                more |= is_backslash & ((behind == _BACKSLASH) | (behind == _SLASH) | (behind == _U))
                is_syllable = _is_syllable(char, behind, data[index + place(2)])
                hangul = byte(hangul + is_syllable)
                others |= (char >= 0xC0) & ~(is_syllable | _is_ideograph(char))
            sizes[text] -= beyond
            letters[text] += escaped
            syllables[text] += hangul
            irregular[text] |= more
            has_others[text] |= others
            at = stop


@compiled(types.void(BYTES, PLACES, PLACES, types.uint8, types.uint8, NUMBERS))
def _count_bytes(data: Bytes, starts: Places, ends: Places, first: int, last: int, counts: Counts) -> None:
    """Adds how many bytes of each text are in a range."""
    for text in range(len(starts)):
        at, end = place(starts[text]) + place(1), place(ends[text]) - place(1)
        while at < end:
            stop = min(at + place(_BLOCK), end)
            inside = byte(0)
            for index in range(at, stop):
                inside = byte(inside + ((data[index] >= first) & (data[index] <= last)))
            counts[text] += inside
            at = stop


@compiled(types.void(BYTES, PLACES, PLACES, FLAGS, FLAGS, NUMBERS))
def _count_others(data: Bytes, starts: Places, ends: Places, chosen: Flags, flags: Flags, counts: Counts) -> None:
    """Adds how many characters of each text chosen have a flag, but for ASCII, syllables and ideographs."""
    for text in range(len(starts)):
        at, end = place(starts[text]) + place(1), place(ends[text]) - place(1)
        while chosen[text] and at < end:
            first, second, third = data[at], data[at + place(1)], data[at + place(2)]
            at += place(1)
            if first < 0xC0 or _is_ideograph(first) or _is_syllable(first, second, third):
                continue
            code = place(first & 0x1F) * place(64) + place(second & 0x3F)
            if first >= 0xE0:
                code = place(first & 0x0F) * place(64) + place(second & 0x3F)
                code = code * place(64) + place(third & 0x3F)
            if first >= 0xF0:  # up to F4
                code = code * place(64) + place(data[at + place(2)] & 0x3F)
            counts[text] += flags[code]


@compiled(types.void(BYTES, PLACES, PLACES, BYTES, PLACES, NUMBERS))
def _count_words(data: Bytes, starts: Places, ends: Places, words: Bytes, word_ends: Places, counts: Counts) -> None:
    """Adds how often each text has one of the words, which are not empty and stand one after another."""
    for text in range(len(starts)):
        word = place(0)
        for number in range(len(word_ends)):
            size = place(word_ends[number]) - word
            # Three bytes of it to look for: the last two of a syllable are rarer than its first two.
            offset = place(1) if words[word] >= 0xE0 else place(0)
            next_offset = min(offset + place(1), size - place(1))
            one, two, three = words[word + offset], words[word + next_offset], words[word + size - place(1)]
            begin = place(starts[text]) + place(1)
            end = max(place(ends[text]), begin + size) - size  # behind the last place where the word may begin
            found = False
            for index in range(begin, end):
                alike = (data[index + offset] == one) & (data[index + next_offset] == two)
                found |= alike & (data[index + size - place(1)] == three)
            if found:
                for index in range(begin, end):
                    if data[index + offset] == one and data[index + next_offset] == two:
                        different = byte(0)
                        for behind in range(size):
                            different |= data[index + behind] ^ words[word + behind]
                        counts[text] += different == 0
            word += size


@cache
def _inside(ranges: Ranges) -> Flags:
    """For each code point, whether it is in one of the ranges."""
    inside = np.zeros(_CODES, np.bool_)
    for first, last in ranges:
        inside[first : last + 1] = True
    return inside


def _written(text: str) -> bytes:
    """A text as it stands inside a JSON string."""
    return msgspec.json.encode(text)[1:-1]


def flags(values: Iterable[bool], size: int) -> Flags:
    """One flag a text."""
    return np.fromiter(values, np.bool_, size)


def is_plain(text: str) -> bool:
    """Whether each of its characters is NFC whatever stands beside it: what follows can change the last one only."""
    doubtful = doubtful_in_nfc()
    return not any(doubtful[ord(char)] for char in text)


@cache
def doubtful_in_nfc() -> Flags:
    """For each code point, False where it is NFC whatever stands beside it.

    Doubtful is what NFC replaces, what combines with a character before it, and what lies beyond U+FFFF, except U+1F000
    to U+1FBFF: emoji, which neither change nor combine.
    """
    doubtful = np.zeros(_CODES, np.bool_)
    for code in (*range(0x300, 0x3400), *range(0xA000, 0xAC00), *range(0xD7A4, 0xD800), *range(0xF900, 0x10000)):
        char = chr(code)
        doubtful[code] = unicodedata.combining(char) or not unicodedata.is_normalized("NFC", char)
    doubtful[0x10000:] = True
    doubtful[0x1F000:0x1FC00] = False
    for code in range(0x10000):
        parts = unicodedata.decomposition(chr(code)).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            doubtful[int(parts[1], 16)] = True
    doubtful[0x1161 : 0x1175 + 1] = doubtful[0x11A8 : 0x11C2 + 1] = True  # jamo: they make syllables by arithmetic
    return doubtful
