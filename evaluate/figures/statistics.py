"""Intervals by the percentile bootstrap over prompts (Efron and Tibshirani 1993), for figures that are ratios of sums.

Pure arithmetic. Prompts are drawn, since several answers to one prompt are not independent; where prompts belong to
groups (`prompts.group`), whole groups are. Every model's figures are computed on the same resamples, so differences and
ratios between models are paired.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np

from evaluate.document import Estimate

SEED = 0
RESAMPLES = 2000
AT_ONCE = 100  # resamples whose n-grams are counted at once


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


def distinct(texts: Sequence[Sequence[str]], n: int, drawn: Resamples) -> Figure | None:
    """distinct-n (Li et al. 2016): different n-grams over all words, of all texts together (each a list of words).

    A resample holds some texts twice, so it has fewer different n-grams, and its figure is too low. So the resampled
    figures are moved until their mean is the figure itself; only their spread makes the interval.
    """
    words = np.array([len(text) for text in texts], dtype=float)
    if not words.sum():
        return None
    grams = [{tuple(text[start : start + n]) for start in range(len(text) - n + 1)} for text in texts]
    column = {gram: number for number, gram in enumerate(set.union(*grams))}
    present = np.zeros((len(texts), len(column)), dtype=np.float32)
    for number, own in enumerate(grams):
        present[number, [column[gram] for gram in own]] = 1
    some = (drawn.counts > 0).astype(np.float32)
    different = [((some[start : start + AT_ONCE] @ present) > 0).sum(axis=1) for start in range(0, len(some), AT_ONCE)]
    resampled = np.concatenate(different) / np.maximum(drawn.counts @ words, 1)
    value = len(column) / float(words.sum())
    return Figure(value, np.clip(resampled + (value - resampled.mean()), 0, 1), prompts=drawn.count_groups())
