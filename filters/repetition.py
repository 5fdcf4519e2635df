"""The rule `repetition`: answers that loop.

Thresholds are Gopher's (Rae et al. 2021, arXiv:2112.11446, table A1), computed as datatrove's GopherRepetitionFilter
does: a repeat is a later occurrence, shares are of the characters without spaces. Gopher's lines are sentences here, as
an answer is often a single line. The repeated span of three sentences is C4's (Raffel et al. 2020, arXiv:1910.10683).
An n-gram is of words; a run longer than 24 characters without a space (Chinese, Japanese, 하하하…) counts by character.
"""

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

from pydantic import Field, field_validator

from filters.answer import Answer, RuleSettings

LONGEST_WORD = 24  # characters
SHORTEST_SENTENCE = 10  # characters; shorter ones (와! 안녕!) may well come back
_SENTENCE = re.compile(r"[^.!?…。！？\n]+")
_PARAGRAPHS = re.compile(r"\n\s*")
Part = TypeVar("Part", bound=Hashable)


class RepetitionSettings(RuleSettings):
    """Highest shares of the text, 0 to 1, that still pass; null (or an empty table) turns a measure off."""

    top_ngrams: dict[int, float] = Field({2: 0.20, 3: 0.18, 4: 0.16})  # the most frequent n-gram, if it comes twice
    # all that come again
    duplicate_ngrams: dict[int, float] = Field({5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10})
    duplicate_sentences: float | None = Field(0.30, ge=0, le=1)  # of the number of sentences
    duplicate_sentence_chars: float | None = Field(0.20, ge=0, le=1)
    duplicate_paragraphs: float | None = Field(0.30, ge=0, le=1)  # of the number of paragraphs
    duplicate_paragraph_chars: float | None = Field(0.20, ge=0, le=1)
    repeated_span: int | None = Field(3, ge=1)  # so many sentences in a row must not come twice

    @field_validator("top_ngrams", "duplicate_ngrams")
    @classmethod
    def _sensible(cls, table: dict[int, float]) -> dict[int, float]:
        for n, share in table.items():
            if n < 1 or not 0 <= share <= 1:
                raise ValueError(f"wants {{n: share}} with n from 1 and a share from 0 to 1, has {{{n}: {share}}}")
        return dict(sorted(table.items()))


def repetition(answer: Answer, settings: RepetitionSettings) -> str | None:
    """Drops an answer that repeats its n-grams, sentences or paragraphs over the thresholds."""
    return _repeated_ngrams(answer.text, settings) or _repeated_parts(answer.text, settings)


def _repeated_ngrams(text: str, settings: RepetitionSettings) -> str | None:
    units = _units(text)
    total = sum(map(len, units))
    for n, limit in settings.top_ngrams.items():
        counts = Counter(_ngrams(units, n))
        count = max(counts.values(), default=0)
        if count < 2:
            break  # where no n-gram comes twice, no longer one does
        ngram = max((ngram for ngram in counts if counts[ngram] == count), key=lambda ngram: sum(map(len, ngram)))
        if (share := min(1.0, sum(map(len, ngram)) * count / total)) > limit:
            return f"`{' '.join(ngram)}` {count} times: {share:.0%} of the text, at most {limit:.0%}"
    for n, limit in settings.duplicate_ngrams.items():
        ngrams = list(_ngrams(units, n))
        if len(set(ngrams)) == len(ngrams):
            break
        if (share := _chars_again(ngrams, n) / total) > limit:
            return f"repeated runs of {n} words: {share:.0%} of the text, at most {limit:.0%}"
    return None


def _repeated_parts(text: str, settings: RepetitionSettings) -> str | None:
    sentences = [part for found in _SENTENCE.findall(text) if len(part := found.strip()) >= SHORTEST_SENTENCE]
    paragraphs = [part for part in _PARAGRAPHS.split(text.strip()) if part]
    for name, parts, limit, char_limit in (
        ("sentences", sentences, settings.duplicate_sentences, settings.duplicate_sentence_chars),
        ("paragraphs", paragraphs, settings.duplicate_paragraphs, settings.duplicate_paragraph_chars),
    ):
        again = _later_occurrences(parts)
        if not again:
            continue
        if limit is not None and (share := len(again) / len(parts)) > limit:
            return f"{len(again)} of {len(parts)} {name} are repeats ({share:.0%}), at most {limit:.0%}: `{again[0]}`"
        if char_limit is not None and (share := sum(map(len, again)) / len(text)) > char_limit:
            return f"repeated {name}: {share:.0%} of the text, at most {char_limit:.0%}: `{again[0]}`"
    if settings.repeated_span and (again := _later_occurrences(list(_ngrams(sentences, settings.repeated_span)))):
        return f"{settings.repeated_span} sentences in a row come twice: `{again[0][0]}…`"
    return None


def _units(text: str) -> list[str]:
    """Words; the characters of a run that is too long to be one."""
    units: list[str] = []
    for word in text.split():
        if len(word) > LONGEST_WORD:
            units.extend(word)
        else:
            units.append(word)
    return units


def _ngrams(units: Sequence[str], n: int) -> Iterable[tuple[str, ...]]:
    return zip(*(units[start:] for start in range(n)), strict=False)


def _chars_again(ngrams: list[tuple[str, ...]], n: int) -> int:
    """Characters of the n-grams that came before, none counted twice."""
    seen: set[tuple[str, ...]] = set()
    chars = index = 0
    while index < len(ngrams):
        if ngrams[index] in seen:
            chars += sum(map(len, ngrams[index]))
            index += n
        else:
            seen.add(ngrams[index])
            index += 1
    return chars


def _later_occurrences(parts: list[Part]) -> list[Part]:
    seen: set[Part] = set()
    again = []
    for part in parts:
        if part in seen:
            again.append(part)
        seen.add(part)
    return again
