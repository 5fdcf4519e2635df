"""How different texts are from each other: a pool that takes no near duplicates, and two figures that need no model.

Pure: reads and writes nothing. Texts are compared folded, by character n-grams (filters.minhash).
"""

import random
import re
from collections.abc import Sequence
from itertools import chain

import msgspec
import numpy as np

from filters.minhash import (
    Array,
    band_keys,
    fold,
    glimpses,
    jaccard,
    may_be_similar,
    ngrams,
    shape_for,
    signatures,
)
from filters.scripts import UNSPACED
from pipeline.filters_config import DedupConfig

NGRAM = DedupConfig().ngram  # characters, as the filters compare answers unless a recipe says otherwise
COMPARED = 500  # texts, at most, that the figures are taken of: they depend on how many there are
WORDS = 3  # of an n-gram whose share is told
_WORD = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")  # of a folded text; where nothing parts words, a character


class Distinct:
    """Texts none of which is as similar as `threshold` (Jaccard) to one that came before it."""

    def __init__(self, threshold: float) -> None:
        self._threshold, self._shape = threshold, shape_for(threshold)
        self._grams: list[Array] = []
        self._glimpses: list[bytes] = []
        self._bands: dict[int, list[int]] = {}

    def add(self, text: str, *, always: bool = False) -> bool:
        """Takes the text and returns True, unless it is like an earlier one; `always` takes that too."""
        folded = fold(text)
        values = signatures([folded], NGRAM)
        grams, keys, glimpse = ngrams(folded, NGRAM), band_keys(values, self._shape)[0].tolist(), glimpses(values)[0]
        near = () if always else self._candidates(keys, glimpse)
        if any(jaccard(grams, self._grams[number]) >= self._threshold for number in near):
            return False
        for key in keys:
            self._bands.setdefault(key, []).append(len(self._grams))
        self._grams.append(grams)
        self._glimpses.append(glimpse.tobytes())
        return True

    def _candidates(self, keys: list[int], glimpse: Array) -> list[int]:
        """The texts that share a band with this one, without those whose glimpses differ too much."""
        sharing = list({number for key in keys for number in self._bands.get(key, ())})
        others = np.frombuffer(b"".join(self._glimpses[number] for number in sharing), np.uint8)
        may_be = may_be_similar(others.reshape(-1, len(glimpse)), glimpse, self._threshold)
        return [sharing[at] for at in np.flatnonzero(may_be).tolist()]


class Diversity(msgspec.Struct, frozen=True, kw_only=True):
    """Two figures of a set of texts; None: there are too few."""

    texts: int
    distinct: float | None  # share of the runs of WORDS words that are different ("distinct-n", arXiv 1510.03055)
    similarity: float | None  # to the nearest other text: the mean, a Jaccard similarity estimated by MinHash


def diversity(texts: Sequence[str], compared: int) -> Diversity:
    """The figures of `compared` of the texts, drawn at random (always the same): comparable if `compared` is equal."""
    folded = [fold(text) for text in random.Random(0).sample(texts, min(compared, COMPARED, len(texts)))]
    words = [_WORD.findall(text) for text in folded]
    runs = list(chain.from_iterable(zip(*(one[at:] for at in range(WORDS)), strict=False) for one in words))
    similarity = None
    if len(folded) > 1:
        values = signatures(folded, NGRAM)
        alike = np.array([(values == own).mean(axis=1) for own in values])
        np.fill_diagonal(alike, 0)
        similarity = round(float(alike.max(axis=1).mean()), 4)
    return Diversity(
        texts=len(folded), distinct=round(len(set(runs)) / len(runs), 4) if runs else None, similarity=similarity
    )
