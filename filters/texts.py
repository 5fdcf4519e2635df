"""Texts side by side in one array of bytes, to ask all at once what a loop would ask each. Reads and writes nothing.

The texts stay as they stand in JSON: quoted, escaped, in UTF-8. Hangul syllables and the ideographs from U+5000 on are
known by their first two bytes and never decoded; what else is not ASCII (`_others`) is, but only that.
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
Flags = NDArray[np.bool_]  # one a text, or one a byte
Counts = NDArray[np.int64]  # one a text
_Marks = NDArray[np.uint64]  # flags of bytes, 64 a word; the words after the last byte are 0

_SYLLABLES = (0xAC00, 0xD7A3)
_IDEOGRAPHS = (0x5000, 0x9FFF)  # all Han
_QUOTE, _SLASH, _U, _BACKSLASH = b'"/u\\'


class Texts:
    """JSON strings of rows, in their order. Raises ValueError where they are not UTF-8."""

    def __init__(self, strings: Sequence[Any]) -> None:
        """`strings`: bytes or the like, each a JSON value."""
        self._joined = b"\n".join([b"", *strings, b""])
        self._bytes = np.frombuffer(self._joined, np.uint8)
        sizes = np.fromiter(map(len, strings), np.int64, len(strings))
        self._ends = np.concatenate([[0], np.cumsum(sizes + 1)])  # newlines: a text is what lies between two of these
        from_e5 = self._bytes - np.uint8(0xE5)  # the first bytes of ideographs are E5 to E9, of syllables EA to ED
        self._ideographs = _marked(from_e5 <= 4)
        inside = _marked(from_e5 <= 8)
        outside = _marked(self._beside_syllables(), len(self._bytes))
        self._syllables = inside & ~self._ideographs & ~outside
        self._later_bytes = _marked(self._bytes.view(np.int8) < -0x40)  # a character's second byte and on: 80 to BF
        first = self._check_lengths()
        self._others = _places((first & ~inside) | outside)
        self._others_codes = self._decode_others()

    def _beside_syllables(self) -> Flags:
        """The first bytes of U+A000 to U+ABFF, and of U+D780 to U+DFFF: some syllables, surrogates."""
        first, second = self._bytes[:-1], self._bytes[1:]
        beside: Flags = first == 0xEA
        beside &= second < 0xB0
        beside |= (first == 0xED) & (second >= 0x9E)
        return beside

    def _check_lengths(self) -> _Marks:
        """The first bytes of characters beyond ASCII, each followed by as many later bytes as it says."""
        first = _marked(self._bytes >= 0xC0)
        expected = _moved(first, 1) | _moved(_marked(self._bytes >= 0xE0), 2)
        if self._bytes.max() >= 0xF0:
            expected |= _moved(_marked(self._bytes >= 0xF0), 3)
        if (expected != self._later_bytes).any():
            raise ValueError("not UTF-8")
        return first

    def _decode_others(self) -> NDArray[np.uint32]:
        four_bytes = np.ndarray(max(len(self._bytes) - 3, 0), "<u4", self._joined, strides=(1,))  # from each byte on
        whole = four_bytes[self._others]
        first = whole & 0xFF
        second, third, fourth = whole >> 8 & 0x3F, whole >> 16 & 0x3F, whole >> 24 & 0x3F
        two = first - 0xC0 << 6 | second
        three = first - 0xE0 << 12 | second << 6 | third
        four = first - 0xF0 << 18 | second << 12 | third << 6 | fourth
        of_three, of_four = first >= 0xE0, first >= 0xF0
        codes = np.where(of_four, four, np.where(of_three, three, two))
        longer = (codes < 0x80) | of_three & (codes < 0x800) | of_four & (codes < 0x10000)  # than it has to be
        if (longer | (codes > 0x10FFFF) | (codes >> 11 == 0xD800 >> 11)).any():
            raise ValueError("not UTF-8")
        return codes

    def __len__(self) -> int:
        return len(self._ends) - 1

    def all_strings(self) -> bool:
        """Whether each value is a string, and not another kind of JSON."""
        return bool((self._bytes[self._ends[:-1] + 1] == _QUOTE).all())

    def __getitem__(self, index: int) -> str:
        """A text, quotes and escapes undone. Raises msgspec.DecodeError for half a surrogate pair."""
        start, end = self._bounds[index], self._bounds[index + 1]
        text = self._joined[start + 2 : end - 1].decode()
        if "\\" not in text:
            return text
        text = text.replace("\\n", "\n").replace('\\"', '"')
        if "\\" not in text:
            return text
        return _decode(self._joined[start + 1 : end])  # another escape, or a backslash that is one of the text's own

    @cached_property
    def _bounds(self) -> list[int]:
        bounds: list[int] = self._ends.tolist()
        return bounds

    @cached_property
    def sizes(self) -> Counts:
        """Characters of each text (code points); wrong where the text is `irregular`."""
        return np.diff(self._ends) - 3 - self.escapes - self._sums(self._later_bytes)

    @cached_property
    def escapes(self) -> Counts:
        """Escapes in each text; wrong where the text is `irregular`."""
        return self._sums(self._backslashes)

    @cached_property
    def irregular(self) -> Flags:
        r"""Texts with an escape that stands for more than the character behind it (`\\`, `\/`, `\u0000`)."""
        places = _places(self._backslashes)
        behind = self._bytes[places + 1]
        return self._numbers(places[(behind == _BACKSLASH) | (behind == _SLASH) | (behind == _U)]) > 0

    @cached_property
    def maybe_not_nfc(self) -> Flags:
        """Texts with a character that may not stand, or not alone, in Unicode's form NFC; escaped ones are not seen."""
        doubtful = doubtful_in_nfc()
        codes = np.minimum(self._others_codes, len(doubtful) - 1)
        return self._numbers(self._others[doubtful[codes]]) > 0

    def ends_with(self, mark: str) -> Flags:
        """Texts whose last character is the mark, for certain."""
        written = _written(mark)
        start = self._ends[1:] - 1 - len(written)
        found: Flags = self._bytes.take(start - 1, mode="clip") != _BACKSLASH
        for offset, byte in enumerate(written):
            found &= self._bytes.take(start + offset, mode="clip") == byte
        return found

    def count(self, ranges: Ranges) -> Counts:
        """How many characters of each text are in the ranges of code points; the n of an escape `\\n` is one, too.

        A range holds all Hangul syllables or none, and all ideographs from U+5000 on or none.
        """
        counts = np.zeros(len(self), np.int64)
        inside = np.zeros(len(self._others), np.bool_)
        for first, last in ranges:
            if first < 0x80:
                counts += self._sums(_marked(self._bytes - np.uint8(first) <= min(last, 0x7F) - first))
            for block, marks in ((_SYLLABLES, self._syllables), (_IDEOGRAPHS, self._ideographs)):
                if first <= block[0] and block[1] <= last:
                    counts += self._sums(marks)
            inside |= (first <= self._others_codes) & (self._others_codes <= last)
        return counts + self._numbers(self._others[inside])

    def occurrences(self, *words: str) -> Counts:
        """How often each text has one of the words, overlaps counted; rather too many (`\\n` has an n) than too few."""
        counts = np.zeros(len(self), np.int64)
        needles = []
        for word in map(_written, words):
            if len(word) == 1:
                counts += self._sums(_marked(self._bytes == word[0]))
            else:
                at = 1 if word[0] >= 0xE0 else 0  # the last two bytes of a syllable are rarer than its first two
                needles.append((word, at, np.frombuffer(word[at : at + 2], np.uint16)[0]))
        near = np.zeros(len(self._pairs[0]), np.bool_)
        for _, _, pair in needles:
            for pairs in self._pairs:
                near |= pairs == pair
        places = _places(_marked(near))
        candidates = [pairs[places] for pairs in self._pairs]
        for word, at, pair in needles:
            even, odd = (places[found == pair] * 2 for found in candidates)
            begins = np.concatenate([even, odd + 1]) - at
            begins = begins[begins <= len(self._bytes) - len(word)]
            for offset in reversed(range(len(word))):
                begins = begins[self._bytes[begins + offset] == word[offset]]
            counts += self._numbers(np.sort(begins))
        return counts

    @cached_property
    def _pairs(self) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
        """Neighbouring bytes: those that begin at even places, and at odd ones; the last may be left out."""
        count = (len(self._bytes) - 1) // 2
        even = np.frombuffer(self._joined, np.uint16, count)
        odd = np.frombuffer(self._joined, np.uint16, count, offset=1)
        return even, odd.copy()  # aligned: faster

    @cached_property
    def _backslashes(self) -> _Marks:
        return _marked(self._bytes == _BACKSLASH)

    def _numbers(self, places: Counts) -> Counts:
        """How many of the places, which are in order, are in each text."""
        return np.diff(np.searchsorted(places, self._ends))

    def _sums(self, marks: _Marks) -> Counts:
        """How many bytes of each text are marked."""
        before = np.zeros(len(marks) + 1, np.int64)
        np.cumsum(np.bitwise_count(marks), out=before[1:])
        word, below = self._bits
        counts = before[word] + np.bitwise_count(marks[word] & below)
        differences: Counts = counts[1:] - counts[:-1]
        return differences

    @cached_property
    def _bits(self) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """Where `_ends` are in words of 64 marks: the words, and masks of the bits before them."""
        one = np.uint64(1)
        return self._ends >> 6, (one << (self._ends & 63).astype(np.uint64)) - one


def positions(marked: Flags) -> Counts:
    """Where the flags are set; fast where they are few."""
    return _places(_marked(marked))


def flags(values: Iterable[bool], size: int) -> Flags:
    """One flag a text."""
    return np.fromiter(values, np.bool_, size)


def _written(text: str) -> bytes:
    """A text as it stands inside a JSON string."""
    return msgspec.json.encode(text)[1:-1]


def _marked(marked: Flags, size: int | None = None) -> _Marks:
    """`size`: flags that there should be; those that are missing are not set."""
    packed = np.packbits(marked, bitorder="little")
    words = np.zeros((size or len(marked)) // 64 + 1, np.uint64)
    words.view(np.uint8)[: len(packed)] = packed
    return words


def _moved(marks: _Marks, distance: int) -> _Marks:
    """Marks on the bytes so far (under 64) behind the marked ones."""
    moved = marks << np.uint64(distance)
    moved[1:] |= marks[:-1] >> np.uint64(64 - distance)
    return moved


def _places(marks: _Marks) -> Counts:
    """Where the marks are, in order."""
    if np.bitwise_count(marks).sum() > 8 * len(marks):
        return np.flatnonzero(np.unpackbits(marks.view(np.uint8), bitorder="little").view(np.bool_))
    words = np.flatnonzero(marks != 0)
    bits = marks[words]
    found = list[Counts]()
    while len(words) > 256:  # takes the first mark of each word, until few words have more
        below = bits - np.uint64(1)
        found.append(words * 64 + np.bitwise_count(~bits & below))
        bits &= below
        more = np.flatnonzero(bits != 0)
        words, bits = words[more], bits[more]
    rest = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little").view(np.bool_))
    return np.sort(np.concatenate([*found, words[rest >> 6] * 64 + (rest & 63)]), kind="stable")


def is_plain(text: str) -> bool:
    """Whether each of its characters is NFC whatever stands beside it: what follows can change the last one only."""
    doubtful = doubtful_in_nfc()
    return not any(doubtful[min(ord(char), len(doubtful) - 1)] for char in text)


@cache
def doubtful_in_nfc() -> Flags:
    """For each code point up to U+1FFFF, False where it is NFC whatever stands beside it; those beyond are as the last.

    Doubtful is what NFC replaces, what combines with a character before it, and what lies beyond U+FFFF, except U+1F000
    to U+1FBFF: emoji, which neither change nor combine.
    """
    doubtful = np.zeros(0x20000, np.bool_)
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
