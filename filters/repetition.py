"""The rule `repetition`: answers that loop.

Thresholds are Gopher's (Rae et al. 2021, arXiv:2112.11446, table A1), computed as datatrove's GopherRepetitionFilter
does: a repeat is a later occurrence, shares are of the characters without spaces. Gopher's lines are sentences here, as
an answer is often a single line; a paragraph ends at an empty line. The repeated span of three sentences is C4's
(Raffel et al. 2020, arXiv:1910.10683). An n-gram is of words; a run longer than 24 characters without a space (Chinese,
Japanese, 하하하…) counts by character, and if most of a text is such runs, four characters count as a word. The most
frequent n-gram comes three times or more: in two sentences a name may well come twice.
"""

import re
from collections import Counter
from collections.abc import Hashable, Iterable
from typing import TypeVar

from msgspec.structs import replace
from pydantic import Field, field_validator

from filters.answer import Answer, TextSettings
from filters.scripts import SENTENCE_MARKS
from pipeline.records import Reason

LONGEST_WORD = 24  # characters
CHARS_PER_WORD = 4  # where no spaces show the words; measured on support replies and news in Japanese, Thai and Chinese
TOP_COUNT = 3  # so often a top n-gram comes at least
SHORTEST_SENTENCE = 10  # characters; shorter ones (와! 안녕!) may well come back
_SENTENCES = re.compile(f"[{SENTENCE_MARKS}\n]")
_PARAGRAPHS = re.compile(r"\n\s*\n")
Part = TypeVar("Part", bound=Hashable)


class RepetitionSettings(TextSettings):
    """Highest shares of the text, 0 to 1, that still pass; null (or an empty table) turns a measure off."""

    # the most frequent n-gram, if it comes three times
    top_ngrams: dict[int, float] = Field({2: 0.20, 3: 0.18, 4: 0.16})
    # all that come again
    duplicate_ngrams: dict[int, float] = Field({5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10})
    duplicate_sentences: float | None = Field(0.30, ge=0, le=1)  # of the number of sentences
    duplicate_sentence_chars: float | None = Field(0.20, ge=0, le=1)
    duplicate_paragraphs: float | None = Field(0.30, ge=0, le=1)  # of the number of paragraphs
    duplicate_paragraph_chars: float | None = Field(0.20, ge=0, le=1)
    repeated_span: int | None = Field(3, ge=1)  # as many sentences in a row must not come twice

    @field_validator("top_ngrams", "duplicate_ngrams")
    @classmethod
    def _sensible(cls, table: dict[int, float]) -> dict[int, float]:
        for n, share in table.items():
            if n < 1 or not 0 <= share <= 1:
                raise ValueError(f"wants {{n: share}} with n from 1 and a share from 0 to 1, has {{{n}: {share}}}")
        return dict(sorted(table.items()))


def repetition(answer: Answer, settings: RepetitionSettings) -> Reason | None:
    """Drops an answer that repeats its n-grams, sentences or paragraphs over the thresholds."""
    return _repeated_parts(answer.text, settings) or _repeated_ngrams(answer.text, settings)  # the cheap ones first


def _repeated_ngrams(text: str, settings: RepetitionSettings) -> Reason | None:
    units, per_word = text.split(), 1
    if unspaced := sum(len(unit) for unit in units if len(unit) > LONGEST_WORD):
        per_word = CHARS_PER_WORD if 2 * unspaced > sum(map(len, units)) else 1
        units = [unit for word in units for unit in (word if len(word) > LONGEST_WORD else [word])]
    top_ngrams, duplicate_ngrams = (
        {n * per_word: share for n, share in table.items()}
        for table in (settings.top_ngrams, settings.duplicate_ngrams)
    )
    lengths = list(map(len, units))
    keys: Iterable[tuple[int, Hashable]] = enumerate(units)
    for n in range(1, max((*top_ngrams, *duplicate_ngrams), default=0) + 1):
        again = _same(keys)
        if not again:
            break  # if no n-gram comes twice, no longer one does
        if n in top_ngrams and (reason := _top_ngram(again, n, top_ngrams[n], units, per_word)):
            return reason
        limit = duplicate_ngrams.get(n)
        if limit is not None and (share := _chars_again(again, n, lengths) / sum(lengths)) > limit:
            return Reason(rule="repetition", what="duplicate_ngrams", n=n // per_word, value=share, at_most=limit)
        # A longer n-gram that comes twice is two of these, a word apart: few places are left.
        keys = [(place, (again[place], again[place + 1])) for place in again if place + 1 in again]
    return None


def _top_ngram(again: dict[int, int], n: int, limit: float, units: list[str], per_word: int) -> Reason | None:
    """`per_word`: how many units count as a word."""
    counts = Counter(again.values())
    count = max(counts.values())
    if count < TOP_COUNT:
        return None
    lengths = list(map(len, units))
    chars, top = max((sum(lengths[first : first + n]), first) for first in counts if counts[first] == count)
    share = min(1.0, chars * count / sum(lengths))
    if share <= limit:
        return None
    said = (" " if per_word == 1 else "").join(units[top : top + n])
    words = n // per_word
    return Reason(rule="repetition", what="top_ngrams", n=words, found=said, count=count, value=share, at_most=limit)


def _same(keys: Iterable[tuple[int, Hashable]]) -> dict[int, int]:
    """For each place whose key comes more than once, the first place with that key."""
    firsts: dict[Hashable, int] = {}
    found: dict[int, int] = {}
    for place, key in keys:
        first = firsts.setdefault(key, place)
        if first != place:
            found[first] = found[place] = first
    return found


def _repeated_parts(text: str, settings: RepetitionSettings) -> Reason | None:
    sentences = [part for part in map(str.strip, _SENTENCES.split(text)) if len(part) >= SHORTEST_SENTENCE]
    paragraphs = [part for part in map(str.strip, _PARAGRAPHS.split(text)) if part]
    for name, parts, limit, char_limit in (
        ("sentence", sentences, settings.duplicate_sentences, settings.duplicate_sentence_chars),
        ("paragraph", paragraphs, settings.duplicate_paragraphs, settings.duplicate_paragraph_chars),
    ):
        again = _later_occurrences(parts)
        if not again:
            continue
        share, chars = len(again) / len(parts), sum(map(len, again)) / len(text)
        reason = Reason(rule="repetition", found=again[0], count=len(again), total=len(parts))
        if limit is not None and share > limit:
            return replace(reason, what=f"duplicate_{name}s", value=share, at_most=limit)
        if char_limit is not None and chars > char_limit:
            return replace(reason, what=f"duplicate_{name}_chars", value=chars, at_most=char_limit)
    span = settings.repeated_span
    spans = zip(*(sentences[start:] for start in range(span or 0)), strict=False)
    if twice := _later_occurrences(list(spans)):
        return Reason(rule="repetition", what="repeated_span", n=span, found=twice[0][0])
    return None


def _chars_again(again: dict[int, int], n: int, lengths: list[int]) -> int:
    """Characters of the n-grams that were there before, none counted twice."""
    seen: set[int] = set()
    chars = end = 0
    for place in sorted(again):
        if place < end:
            continue
        if again[place] in seen:
            chars, end = chars + sum(lengths[place : place + n]), place + n
        seen.add(again[place])
    return chars


def _later_occurrences(parts: list[Part]) -> list[Part]:
    seen: set[Part] = set()
    again = []
    for part in parts:
        if part in seen:
            again.append(part)
        seen.add(part)
    return again
