"""How alike two texts are: folding, character n-grams, MinHash bands that find likely pairs, and the true Jaccard
similarity that decides. Reads and writes nothing.

Broder 1997 for MinHash; bands of rows after Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", 3.4. The
signatures are rensa's (Fast Similarity Sketching, Dahlgaard et al. 2017); only band keys and glimpses are stored.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from hashlib import blake2b
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

from filters.answer import nfc
from pipeline.records import folded

Array = NDArray[Any]
PERMUTATIONS = 120  # values of a signature: 120 has many divisors
RECALL = 0.995  # at least this share of the pairs exactly as similar as the threshold shares a band
GLIMPSE = 64  # bytes
_SEED = 1
_BATCH = 128  # texts per call of rensa: from 256 on it starts threads, and a process forked after that would hang
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, and without a pattern in its bits
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_SELECTORS = {chr(code) for code in range(0xFE00, 0xFE10)}  # they choose how an emoji is drawn, and count as marks
_PLAIN = re.compile("[\x00-\x7f가-힣“”‘’…·—–]*")
_PLAIN_WORDS = re.compile("[0-9a-z가-힣]+")
_MARKS = ".,;:?…。，、；：？؟،؛۔।॥။၊។៕።፧།༎։"
_AROUND_WORD = re.compile(rf"(?<=[^\s{_MARKS}])(?:[{_MARKS}]+|\s+[?？؟]+)(?!\S)|(?<!\S)[¿¡]+")


@cache
def _fold_char(char: str) -> str:
    category = unicodedata.category(char)
    if category == "Cf":
        return ""  # joiners, soft hyphens: nobody sees them
    return char if category[0] in "LMN" and char not in _SELECTORS else " "


def fold(text: str) -> str:
    """The text in NFC and without case; every run of spaces, punctuation and symbols is one space, none at the ends."""
    lower = text.casefold()
    if _PLAIN.fullmatch(lower):  # NFC and categories change nothing else there; three times as fast
        return " ".join(_PLAIN_WORDS.findall(lower))
    return " ".join("".join(map(_fold_char, nfc(lower))).split())


def fold_prompt(text: str) -> str:
    """The text in NFC, without case, spacing and marks around a word. Signs stay: `12 + 7` asks other than `12 - 7`."""
    seen = text if _PLAIN.fullmatch(text) else "".join(filter(_fold_char, text))  # without joiners, byte order marks
    return folded(_AROUND_WORD.sub("", seen))


def digest(text: str) -> bytes:
    """8 bytes that stand for a folded text: two of 5 million different texts share one once in a million times."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def ngram_hashes(text: str, n: int) -> Array:
    """Hashes (uint64) of every run of n characters of a text that has at least n."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    count = len(codes) - n + 1
    hashes = np.zeros(count, np.uint64)
    for place in range(n):
        hashes *= _BASE
        hashes += codes[place : place + count]
    hashes ^= hashes >> np.uint64(29)
    hashes *= _MIX
    hashes ^= hashes >> np.uint64(32)
    return hashes


def ngrams(folded: str, n: int) -> Array:
    """The set of a text's n-grams, as sorted hashes. A text under n characters counts as one n-gram."""
    hashes = ngram_hashes(folded.ljust(n), n)
    hashes.sort()  # np.unique hashes them first: 3 to 11 times as slow for texts of 100 to 1,000 words
    return np.concatenate((hashes[:1], hashes[1:][hashes[1:] != hashes[:-1]]))


def jaccard(first: Array, second: Array) -> float:
    """What two sets of n-grams have in common, as a share of their union (0 to 1)."""
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)


def shape_for(threshold: float) -> tuple[int, int]:
    """Bands, and rows of a band: the most rows (so the fewest false candidates) that still find RECALL of the pairs.

    Two texts whose signatures agree in a whole band are candidates.
    """
    shapes = [(PERMUTATIONS // rows, rows) for rows in range(1, PERMUTATIONS + 1)]
    found = [(bands, rows) for bands, rows in shapes if 1 - (1 - threshold**rows) ** bands >= RECALL]
    return found[-1]


def signatures(folded: Sequence[str], n: int) -> Array:
    """MinHash signatures, uint32, shape (texts, PERMUTATIONS)."""
    values = np.empty((len(folded), PERMUTATIONS), dtype=np.uint32)
    for first in range(0, len(folded), _BATCH):
        texts = [text.ljust(n) for text in folded[first : first + _BATCH]]
        hashes = ngram_hashes("".join(texts), n)
        ends = accumulate(map(len, texts), initial=0)
        own = [hashes[start : end - n + 1] for start, end in pairwise(ends)]  # not those that reach into the next text
        starts = np.cumsum([0, *map(len, own)]).astype(np.uint64)
        digests = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(own), starts, PERMUTATIONS, _SEED)
        values[first : first + _BATCH] = digests.to_rows()
    return values


def band_keys(values: Array, shape: tuple[int, int]) -> Array:
    """One uint32 key per band, shape (texts, bands), of different bands different. Chance equals cost a comparison."""
    count, rows = shape
    bands = values[:, : count * rows].astype(np.uint64).reshape(len(values), count, rows)
    mixed = np.tile(np.arange(count, dtype=np.uint64), (len(values), 1))
    for row in range(rows):
        mixed += bands[:, :, row]
        mixed *= _BASE
        mixed ^= mixed >> np.uint64(29)
    return (mixed >> np.uint64(32)).astype(np.uint32)


def glimpses(values: Array) -> Array:
    """GLIMPSE bytes of each signature: enough to rule out most candidates without reading their texts."""
    mixed = values[:, :GLIMPSE] * np.uint32(int(_BASE) & 0xFFFFFFFF)
    return (mixed >> np.uint32(24)).astype(np.uint8)


def agreement(glimpses: Array, other: Array) -> Array:
    """In how many bytes each glimpse agrees with another one."""
    return np.asarray((glimpses == other).sum(axis=1, dtype=np.uint8))  # a count up to GLIMPSE; wider ones are slower


def may_be_similar(glimpses: Array, other: Array, threshold: float) -> Array:
    """Which of the glimpses may be those of texts whose similarity to another one is `threshold` or more."""
    return np.asarray(agreement(glimpses, other) >= least_agreement(threshold))


def least_agreement(threshold: float) -> float:
    """Bytes in which two glimpses agree at least, if the texts are as similar: four standard deviations are allowed."""
    return float(GLIMPSE * threshold - 4 * (GLIMPSE * threshold * (1 - threshold)) ** 0.5)
