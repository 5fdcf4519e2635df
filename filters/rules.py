"""The rules: each takes an answer and its settings, and returns the reason to drop it, or None.

Pure functions, one table (RULES) at the end. `length`, `banned_words`, `repeated_word`, `prompt_echo` and
`script_ratio` with the flagship's settings decide as the chapter's function does, character for character, on NFC text.
docs/filters.md says for each rule what it drops, its settings and its source.
"""

import re
import unicodedata
from collections.abc import Callable
from functools import cached_property
from os.path import commonprefix
from typing import Any, NamedTuple, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from filters.adherence import AdherenceSettings, adherence
from filters.answer import Answer, RuleSettings, nfc
from filters.batch import Batch
from filters.language import LanguageSettings, language
from filters.meta_talk import MetaTalkSettings, meta_talk
from filters.repetition import RepetitionSettings, repetition
from filters.scripts import SCRIPTS, ScriptCounter, character_class, script_counter, script_ranges
from filters.texts import Flags, Shares, flags, is_plain
from filters.words import whole_word


class LengthSettings(RuleSettings):
    min_chars: int = Field(1, ge=0)
    max_chars: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_chars is not None and self.min_chars > self.max_chars:
            raise ValueError(f"min_chars {self.min_chars} is over max_chars {self.max_chars}")
        return self


def length(answer: Answer, settings: LengthSettings) -> str | None:
    """Drops an answer with fewer or more characters (code points in NFC, spaces included)."""
    size = len(answer.text)
    return _wrong_length(size, settings) if _is_outside(size, settings) else None


def _is_outside(size: Any, settings: LengthSettings) -> Any:
    """Of one size, or of many at once."""
    return (size < settings.min_chars) | (settings.max_chars is not None and size > settings.max_chars)


def _wrong_length(size: int, settings: LengthSettings) -> str:
    if size < settings.min_chars:
        return f"{size} characters, at least {settings.min_chars} wanted"
    return f"{size} characters, at most {settings.max_chars} wanted"


def fails_length(batch: Batch, settings: LengthSettings) -> Flags:
    outside: Flags = _is_outside(batch.texts.sizes, settings)
    return outside


def length_at_a_glance(batch: Batch, indices: list[int], settings: LengthSettings) -> list[str]:
    return [_wrong_length(size, settings) for size in batch.texts.sizes[indices].tolist()]


class BannedWordsSettings(RuleSettings):
    words: list[str] = Field(min_length=1)
    whole_word: bool = False  # False: anywhere, inside other words too, as the chapter has it
    ignore_case: bool = False

    @field_validator("words")
    @classmethod
    def _not_empty(cls, words: list[str]) -> list[str]:
        if not all(words):
            raise ValueError("an empty word is in every answer; remove it")
        return [nfc(word) for word in words]

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        flags = re.IGNORECASE if self.ignore_case else re.NOFLAG
        if self.whole_word:
            return re.compile("|".join(whole_word(word).pattern for word in self.words), flags)
        return re.compile("|".join(map(re.escape, self.words)), flags)


def banned_words(answer: Answer, settings: BannedWordsSettings) -> str | None:
    """Drops an answer that contains a word."""
    found = settings.pattern.search(answer.text)
    return f"contains `{found[0]}`" if found else None


def may_have_banned_words(batch: Batch, settings: BannedWordsSettings) -> Flags:
    if settings.ignore_case:
        return np.ones(len(batch), np.bool_)
    return batch.texts.occurrences(*settings.words) > 0


class RepeatedWordSettings(RuleSettings):
    word: str = Field(min_length=1)
    max_count: int = Field(5, ge=0)

    @field_validator("word")
    @classmethod
    def _normalised(cls, word: str) -> str:
        return nfc(word)


def repeated_word(answer: Answer, settings: RepeatedWordSettings) -> str | None:
    """Drops an answer that has a word too often; occurrences do not overlap."""
    count = answer.text.count(settings.word)
    return f"`{settings.word}` {count} times, at most {settings.max_count}" if count > settings.max_count else None


def may_repeat_word(batch: Batch, settings: RepeatedWordSettings) -> Flags:
    return batch.texts.occurrences(settings.word) > settings.max_count


class PromptEchoSettings(RuleSettings):
    chars: int = Field(20, ge=1)


def prompt_echo(answer: Answer, settings: PromptEchoSettings) -> str | None:
    """Drops an answer that contains the first characters of the instruction."""
    start = answer.instruction[: settings.chars]
    if start not in answer.text:
        return None
    return f"repeats the instruction: `{start}`" if start else "there is no instruction"


def may_echo_prompt(batch: Batch, settings: PromptEchoSettings) -> Flags:
    beginnings = batch.beginnings(settings.chars + 1)
    if len(beginnings) > 20:
        beginnings = {commonprefix(list(beginnings))}  # noqa: RUF071
    # In NFC the last character may be changed by one that follows, the others by nothing.
    starts = [beginning[:-1] for beginning in beginnings]
    if not all(starts) or not all(map(is_plain, beginnings)):
        return np.ones(len(batch), np.bool_)
    return batch.texts.occurrences(*starts) > 0


class ScriptRatioSettings(RuleSettings):
    script: str
    min_share: float = Field(0.5, gt=0, le=1)

    @field_validator("script")
    @classmethod
    def _known(cls, script: str) -> str:
        return _known_script(script)

    @cached_property
    def counter(self) -> ScriptCounter:
        return script_counter(self.script)


def script_ratio(answer: Answer, settings: ScriptRatioSettings) -> str | None:
    """Drops an answer of whose characters (spaces and punctuation counted) too few are of the script."""
    share = settings.counter.share(answer.text, enough=settings.min_share)
    return _wrong_share(share, settings) if share < settings.min_share else None


def _wrong_share(share: float, settings: ScriptRatioSettings) -> str:
    return f"{share:.1%} {settings.script}, at least {settings.min_share:.0%} wanted"


def lacks_script(batch: Batch, settings: ScriptRatioSettings) -> Flags:
    lacking: Flags = _shares(batch, settings) < settings.min_share
    return lacking


def script_ratio_at_a_glance(batch: Batch, indices: list[int], settings: ScriptRatioSettings) -> list[str]:
    return [_wrong_share(share, settings) for share in _shares(batch, settings)[indices].tolist()]


def _shares(batch: Batch, settings: ScriptRatioSettings) -> Shares:
    shares: Shares = batch.texts.count(SCRIPTS[settings.script]) / np.maximum(batch.texts.sizes, 1)
    return shares


class FinishReasonSettings(RuleSettings):
    allowed: list[str] = Field(["stop"], min_length=1)


def finish_reason(answer: Answer, settings: FinishReasonSettings) -> str | None:
    """Drops an answer that the engine ended for another reason (`length`: cut off, `content_filter`: withheld)."""
    if answer.finish_reason in settings.allowed:
        return None
    return f"finish_reason is `{answer.finish_reason}`, allowed: {', '.join(settings.allowed)}"


def has_other_finish_reason(batch: Batch, settings: FinishReasonSettings) -> Flags:
    return flags([reason not in settings.allowed for reason in batch.finish_reasons], len(batch))


class ForeignScriptSettings(RuleSettings):
    scripts: list[str] = Field(["han", "kana", "cyrillic"], min_length=1)
    max_count: int = Field(0, ge=0)  # characters

    @field_validator("scripts")
    @classmethod
    def _known(cls, scripts: list[str]) -> list[str]:
        return [_known_script(script) for script in scripts]

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(f"[{character_class(*self.scripts)}]")


def foreign_script(answer: Answer, settings: ForeignScriptSettings) -> str | None:
    """Drops an answer into which characters of other scripts leaked."""
    if settings.pattern.search(answer.text) is None:
        return None
    found = settings.pattern.findall(answer.text)
    if len(found) <= settings.max_count:
        return None
    return f"{len(found)} characters of {', '.join(settings.scripts)}: `{''.join(found[:10])}`"


def may_have_foreign_script(batch: Batch, settings: ForeignScriptSettings) -> Flags:
    return batch.texts.count(script_ranges(*settings.scripts)) > settings.max_count


class EndingSettings(RuleSettings):
    marks: str = Field(".!?…。！？", min_length=1)  # characters that may end the last sentence


_AFTER_THE_END = {"So", "Sk", "Cf", "Mn", "Zs", "Cc", "Pe", "Pf"}  # emoji, their modifiers, spaces, closing brackets


def ending(answer: Answer, settings: EndingSettings) -> str | None:
    """Drops an answer that stops in mid-sentence; quotes, brackets, Markdown and emoji after the mark are skipped."""
    text = answer.text
    end = len(text)
    while (
        end
        and text[end - 1] not in settings.marks
        and (text[end - 1] in "\"'*_`" or unicodedata.category(text[end - 1]) in _AFTER_THE_END)
    ):
        end -= 1
    if end and text[end - 1] in settings.marks:
        return None
    return f"ends with `{text[-20:]}`, no sentence mark" if end else "no sentence in it"


def may_end_otherwise(batch: Batch, settings: EndingSettings) -> Flags:
    ended: Flags = np.logical_or.reduce([batch.texts.ends_with(mark) for mark in settings.marks])
    return ~ended


def _known_script(script: str) -> str:
    if script not in SCRIPTS:
        raise ValueError(f"is not a script known here; there are {', '.join(SCRIPTS)}")
    return script


class Rule(NamedTuple):
    """A rule, the model of its settings, and its screen if it has one.

    A screen tells of many answers at once which the rule may drop; the others it does not drop, for certain. It knows
    only answers that are not `unsure`. Without one the rule reads every answer. A rule with a glance drops all that its
    screen suspects; the glance is what it says of them, without their texts.
    """

    check: Callable[[Answer, Any], str | None]
    settings: type[RuleSettings]
    screen: Callable[[Batch, Any], Flags] | None = None
    glance: Callable[[Batch, list[int], Any], list[str]] | None = None


RULES = {
    "length": Rule(length, LengthSettings, fails_length, length_at_a_glance),
    "banned_words": Rule(banned_words, BannedWordsSettings, may_have_banned_words),
    "repeated_word": Rule(repeated_word, RepeatedWordSettings, may_repeat_word),
    "prompt_echo": Rule(prompt_echo, PromptEchoSettings, may_echo_prompt),
    "script_ratio": Rule(script_ratio, ScriptRatioSettings, lacks_script, script_ratio_at_a_glance),
    "finish_reason": Rule(finish_reason, FinishReasonSettings, has_other_finish_reason),
    "foreign_script": Rule(foreign_script, ForeignScriptSettings, may_have_foreign_script),
    "repetition": Rule(repetition, RepetitionSettings),
    "meta_talk": Rule(meta_talk, MetaTalkSettings),
    "adherence": Rule(adherence, AdherenceSettings),
    "ending": Rule(ending, EndingSettings, may_end_otherwise),
    "language": Rule(language, LanguageSettings),
}
