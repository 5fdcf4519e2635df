"""Intervals by the percentile bootstrap over prompts (Efron and Tibshirani 1993), for figures that are ratios of sums.
Shares of answers have Wilson's (1927).

Pure arithmetic. Prompts are drawn, since several answers to one prompt are not independent; where prompts belong to
groups (`prompts.group`), whole groups are. Every model's figures are computed on the same resamples, so differences and
ratios between models are paired.
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import numpy as np

from evaluate.document import Estimate, Z

SEED = 0
RESAMPLES = 2000
ROUNDING = 1e-12  # a variance under this is that of equal numbers


@dataclass(frozen=True)
class Figure:
    """A figure, and the same on each resample (a numpy array; nan if a resample has nothing to divide by)."""

    value: float
    resampled: Any
    exact: tuple[float, float] | None = None  # a 95% interval to use in place of the resamples'
    prompts: float = inf  # how many it is over, those of one group counted once; inf: not counted

    def estimate(self) -> Estimate:
        """With its 95% interval."""
        return Estimate(self.value, *(self.exact or interval(self.resampled)))

    def minus(self, other: "Figure") -> Estimate:
        return Estimate(self.value - other.value, *interval(self.resampled - other.resampled))

    def over(self, other: "Figure") -> Estimate | None:
        """The quotient; None if it would divide by zero."""
        if not other.value:
            return None
        with np.errstate(divide="ignore", invalid="ignore"):
            quotient = self.resampled / other.resampled
        return Estimate(self.value / other.value, *interval(quotient[np.isfinite(quotient)]))


Figures = Mapping[str, Mapping[str, Figure]]  # model → name → figure


def merged(one: Figures, other: Figures) -> Figures:
    """Both figures of every model."""
    return {key: {**one.get(key, {}), **other.get(key, {})} for key in {**one, **other}}


def quotient(figures: Figures, name: str, above: str, below: str, less: float = 0) -> Estimate | None:
    """A figure of one model over that of another, `less` taken from both; None if one of them does not have it."""
    one, other = figures.get(above, {}).get(name), figures.get(below, {}).get(name)
    if one is None or other is None:
        return None
    return Figure(one.value - less, one.resampled - less).over(Figure(other.value - less, other.resampled - less))


@dataclass(frozen=True)
class Resamples:
    """What was drawn. `counts`: how often each prompt is in each resample, floats (resamples, prompts)."""

    counts: Any
    groups: Any  # the number of each prompt's group, integers (prompts,)

    def count_groups(self, some: Any = None) -> int:
        """Of how many groups the prompts are. `some`: only these of them, booleans (prompts,)."""
        return len(np.unique(self.groups if some is None else self.groups[some]))


def draw(groups: Sequence[Hashable]) -> Resamples:
    """Draws whole groups. `groups`: what each prompt belongs to; itself, where it belongs to no other."""
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    own = np.array([numbers[group] for group in groups], dtype=int)
    drawn = np.random.default_rng(SEED).integers(0, len(numbers), (RESAMPLES, len(numbers)))
    counts = np.zeros((RESAMPLES, len(numbers)))
    np.add.at(counts, (np.arange(RESAMPLES)[:, None], drawn), 1)
    return Resamples(counts[:, own], own)


def interval(values: Any) -> list[float]:
    """The 2.5th and the 97.5th percentile; nan is left out."""
    return [float(value) for value in np.nanpercentile(values, [2.5, 97.5])]


def ratio(numerators: Sequence[float], denominators: Sequence[float], drawn: Resamples) -> Figure | None:
    """Sum over sum, one of each per prompt: a mean if the denominators are 1. None if they sum to 0."""
    above, below = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    if not below.sum():
        return None
    with np.errstate(invalid="ignore", divide="ignore"):
        resampled = (drawn.counts @ above) / (drawn.counts @ below)
    return Figure(float(above.sum() / below.sum()), resampled, prompts=drawn.count_groups(below != 0))


def share(yes: Sequence[float], asked: Sequence[float], drawn: Resamples) -> Figure | None:
    """`ratio` of ones and zeros, with Wilson's interval: near 0 and 1 the bootstrap's is too narrow."""
    found = ratio(yes, asked, drawn)
    return found and replace(found, exact=wilson(found.value, _independent(found, sum(asked))))


def _independent(share: Figure, prompts: float) -> float:
    """How many independent prompts tell as much as these.

    Prompts of one group may be alike, so it is their number over the design effect (Kish 1965), which the spread of the
    resamples shows. Where the resamples do not differ, it is the number of groups.
    """
    groups, spread = share.prompts, float(np.nanvar(share.resampled))
    if groups == prompts or spread < ROUNDING:
        return groups
    return min(share.value * (1 - share.value) / spread * (groups - 1) / groups, prompts)


def wilson(share: float, count: float) -> tuple[float, float]:
    """The 95% interval of a share of `count` (Wilson 1927). Unlike the bootstrap's, it has a width at 0 and at 1."""
    middle, spread = share + Z * Z / (2 * count), Z * (share * (1 - share) / count + Z * Z / (4 * count**2)) ** 0.5
    scale = 1 + Z * Z / count
    return (middle - spread) / scale if share else 0.0, (middle + spread) / scale if share < 1 else 1.0


def distinct(texts: Sequence[Sequence[str]], n: int, drawn: Resamples) -> Figure | None:
    """distinct-n (Li et al. 2016): different n-grams over all words, of all texts together (each a list of words).

    A resample holds some texts twice, which alone lowers the figure, and its spread is not the figure's. So the
    resampled figures are linear, by the jackknife: each group counts by how far the figure falls without it.
    """
    words = np.bincount(drawn.groups, [len(text) for text in texts])
    if not words.sum():
        return None
    grams: list[set[tuple[str, ...]]] = [set() for _ in words]
    for group, text in zip(drawn.groups, texts, strict=True):
        grams[group].update(zip(*(text[start:] for start in range(n)), strict=False))
    holders = Counter(gram for own in grams for gram in own)
    alone = np.array([sum(holders[gram] == 1 for gram in own) for own in grams])
    value = len(holders) / float(words.sum())
    without = (len(holders) - alone) / np.maximum(words.sum() - words, 1)
    counts = drawn.counts[:, np.unique(drawn.groups, return_index=True)[1]]
    resampled = value + (counts - 1) @ (value - without) * (len(words) - 1) / len(words)
    return Figure(value, np.clip(resampled, 0, 1), prompts=len(words))
