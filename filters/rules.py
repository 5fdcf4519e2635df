"""The rules: each takes an answer and its settings, and returns the reason to drop it, or None.

Pure functions, one table (RULES) at the end. `length`, `banned_words`, `repeated_word`, `prompt_echo` and
`script_ratio` with the flagship's settings decide as the source's function does, character for character, on NFC text.
docs/filters.md says for each rule what it drops, its settings and its source.
"""

import importlib
import re
import unicodedata
from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Annotated, Any, NamedTuple, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from filters.answer import Answer, Nfc, RuleSettings, TextSettings, Verified, nfc
from filters.groups import AGREES, AgreesSettings, agrees
from filters.meta_talk import MetaTalkSettings, meta_talk
from filters.repetition import RepetitionSettings, repetition
from filters.scripts import SCRIPTS, SENTENCE_MARKS, character_class, count_script
from filters.verify.compare import ChoiceSettings, MatchesSettings, choice, matches
from filters.verify.guard import guarded
from filters.verify.maths import MathSettings, math
from filters.verify.programs import PythonSettings, python
from filters.verify.schema import JsonSchemaSettings, ToolCallsSettings, json_schema, tool_calls
from filters.verify.sql import SqlSettings, sql
from filters.words import mentions, whole_word
from pipeline.errors import RecipeError
from pipeline.records import Reason


class LengthSettings(TextSettings):
    min_chars: int = Field(1, ge=0)
    max_chars: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_chars is not None and self.min_chars > self.max_chars:
            raise ValueError(f"min_chars {self.min_chars} is over max_chars {self.max_chars}")
        return self


def length(answer: Answer, settings: LengthSettings) -> Reason | None:
    """Drops an answer with fewer or more characters (code points in NFC, spaces included)."""
    size = len(answer.text)
    if size < settings.min_chars:
        return Reason(rule="length", value=size, at_least=settings.min_chars)
    if settings.max_chars is not None and size > settings.max_chars:
        return Reason(rule="length", value=size, at_most=settings.max_chars)
    return None


class BannedWordsSettings(TextSettings):
    words: list[Nfc] = Field(min_length=1)
    whole_word: bool = False  # False: anywhere, inside other words too
    ignore_case: bool = False

    @field_validator("words")
    @classmethod
    def _not_empty(cls, words: list[str]) -> list[str]:
        if not all(words):
            raise ValueError("an empty word is in every answer; remove it")
        return words

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        flags = re.IGNORECASE if self.ignore_case else re.NOFLAG
        if self.whole_word:
            return re.compile("|".join(whole_word(word).pattern for word in self.words), flags)
        return re.compile("|".join(map(re.escape, self.words)), flags)


def banned_words(answer: Answer, settings: BannedWordsSettings) -> Reason | None:
    found = settings.pattern.search(answer.text)
    return Reason(rule="banned_words", found=found[0]) if found else None


class RepeatedWordSettings(TextSettings):
    word: Nfc = Field(min_length=1)
    max_count: int = Field(5, ge=0)


def repeated_word(answer: Answer, settings: RepeatedWordSettings) -> Reason | None:
    """Drops an answer that has a word too often; occurrences do not overlap."""
    count = answer.text.count(settings.word)
    if count <= settings.max_count:
        return None
    return Reason(rule="repeated_word", found=settings.word, value=count, at_most=settings.max_count)


class PromptEchoSettings(RuleSettings):
    chars: int = Field(20, ge=1)


def prompt_echo(answer: Answer, settings: PromptEchoSettings) -> Reason | None:
    """Drops an answer that contains the first characters of the instruction, and any answer to an empty one."""
    start = answer.instruction[: settings.chars]
    return Reason(rule="prompt_echo", found=start) if start in answer.text else None


def _known_script(script: str) -> str:
    if script not in SCRIPTS:
        raise ValueError(f"is not a script known here; there are {', '.join(SCRIPTS)}")
    return script


Script = Annotated[str, AfterValidator(_known_script)]


class ScriptRatioSettings(TextSettings):
    script: str | list[str]  # or several together: Japanese is kana and han
    min_share: float = Field(0.5, gt=0, le=1)

    @field_validator("script")
    @classmethod
    def _known(cls, script: str | list[str]) -> str | list[str]:
        if not script:
            raise ValueError("names no script")
        for one in [script] if isinstance(script, str) else script:
            _known_script(one)
        return script

    @cached_property
    def scripts(self) -> list[str]:
        return list(dict.fromkeys([self.script] if isinstance(self.script, str) else self.script))


def script_ratio(answer: Answer, settings: ScriptRatioSettings) -> Reason | None:
    """Drops an answer of whose characters (spaces and punctuation counted) too few are of the script or scripts."""
    share = sum(count_script(answer.text, one) for one in settings.scripts) / max(len(answer.text), 1)
    if share >= settings.min_share:
        return None
    return Reason(rule="script_ratio", what=" and ".join(settings.scripts), value=share, at_least=settings.min_share)


class FinishReasonSettings(RuleSettings):
    allowed: list[str] = Field(["stop"], min_length=1)


def finish_reason(answer: Answer, settings: FinishReasonSettings) -> Reason | None:
    """Drops an answer that the engine ended for another reason (`length`: cut off, `content_filter`: withheld).

    An answer that calls tools ends with `tool_calls`, which counts as `stop`.
    """
    found = "stop" if answer.finish_reason == "tool_calls" else answer.finish_reason
    if found in settings.allowed or answer.finish_reason in settings.allowed:
        return None
    return Reason(rule="finish_reason", found=answer.finish_reason, allowed=settings.allowed)


class ForeignScriptSettings(TextSettings):
    scripts: list[Script] = Field(["han", "kana", "cyrillic"], min_length=1)
    max_count: int = Field(0, ge=0)  # characters

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(f"[{character_class(*self.scripts)}]")


def foreign_script(answer: Answer, settings: ForeignScriptSettings) -> Reason | None:
    """Drops an answer into which characters of other scripts leaked."""
    found = settings.pattern.findall(answer.text)
    if len(found) <= settings.max_count:
        return None
    scripts, first = ", ".join(settings.scripts), "".join(found[:10])
    return Reason(rule="foreign_script", what=scripts, value=len(found), at_most=settings.max_count, found=first)


class EndingSettings(TextSettings):
    marks: str = Field(SENTENCE_MARKS, min_length=1)  # characters that may end the last sentence


# Emoji, their modifiers, spaces, closing brackets, quotes of both kinds: „…“ and »…« end with an opening one.
_AFTER_THE_END = {"So", "Sk", "Cf", "Mn", "Zs", "Cc", "Pe", "Pf", "Pi"}


def ending(answer: Answer, settings: EndingSettings) -> Reason | None:
    """Drops an answer that stops in mid-sentence; quotes, brackets, Markdown and emoji after the mark are skipped."""
    for char in reversed(answer.text):
        if char in settings.marks:
            return None
        if char not in "\"'*_`" and unicodedata.category(char) not in _AFTER_THE_END:
            return Reason(rule="ending", found=answer.text[-20:])
    return Reason(rule="ending")


class AdherenceSettings(RuleSettings):
    slots: list[str] = Field(min_length=1)  # slots whose values must be named in the answer
    max_missing: int = Field(0, ge=0)  # values that may be missing
    aliases: dict[Nfc, list[Nfc]] = Field({})  # other names that count for a value: {달: [달님, 보름달]}
    whole_word: bool = True  # False: inside other words too, for languages whose words change: кот in котом


def adherence(answer: Answer, settings: AdherenceSettings) -> Reason | None:
    """Drops an answer that does not name the values asked for (see filters.words.mentions for how they are found).

    Raises RecipeError if a slot is a column: no answer could pass.
    """
    missing: dict[str, list[str]] = {}
    for slot in settings.slots:
        asked = answer.slots.get(slot)
        if asked is None and slot in answer.columns:
            fix = f'put it into each row\'s `slots`: {{"slots": {{"{slot}": …}}}}'
            raise RecipeError(f"filters.rules: adherence: `{slot}` is a column of the prompts and no slot; {fix}")
        if asked is None:
            return Reason(rule="adherence", what=slot)
        for value in map(nfc, (asked,) if isinstance(asked, str) else asked):
            names = (value, *settings.aliases.get(value, ()))
            if not any(mentions(answer.text, name, whole_words=settings.whole_word) for name in names):
                missing.setdefault(slot, []).append(value)
    count = sum(map(len, missing.values()))
    if count <= settings.max_missing:
        return None
    return Reason(rule="adherence", missing=missing, value=count, at_most=settings.max_missing)


class LanguageSettings(TextSettings):
    allowed: list[str] = Field(min_length=1)  # ISO 639-1 codes: [ko]
    min_probability: float = Field(0.0, ge=0, le=1)  # of the language found; a short or mixed text gets a low one

    @model_validator(mode="after")
    def _can_tell(self) -> Self:
        try:
            known = set(_identifier().labels)
        except ImportError:
            raise ValueError(
                "needs the package py3langid; install it with: .venv/bin/pip install -c constraints.txt py3langid"
            ) from None
        if unknown := [code for code in self.allowed if code not in known]:
            raise ValueError(f"allowed: no language {', '.join(unknown)}; there are {', '.join(sorted(known))}")
        return self


@lru_cache
def _identifier() -> Any:
    langid = importlib.import_module("py3langid.langid")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


def language(answer: Answer, settings: LanguageSettings) -> Reason | None:
    """Drops an answer in another language, or in one that is not certain enough, as py3langid says.

    That is the maintained form of langid.py (Lui and Baldwin 2012): naive Bayes over byte n-grams. Its model
    is in the package; no network. It takes about 1 ms per answer, and no recipe asks for it by default.
    """
    found, probability = _identifier().classify(answer.text)
    probability = float(probability)
    if found not in settings.allowed:
        return Reason(rule="language", found=found, value=probability, allowed=settings.allowed)
    if probability < settings.min_probability:
        return Reason(rule="language", found=found, value=probability, at_least=settings.min_probability)
    return None


class Rule(NamedTuple):
    """A rule, and the model of its settings. `check` returns a Reason or None, or a Verified as verifiers do."""

    check: Callable[[Answer, Any], Reason | Verified | None]
    settings: type[RuleSettings]
    verifies: bool = False  # it says which answers are right, and may take long


RULES = {
    "length": Rule(length, LengthSettings),
    "banned_words": Rule(banned_words, BannedWordsSettings),
    "repeated_word": Rule(repeated_word, RepeatedWordSettings),
    "prompt_echo": Rule(prompt_echo, PromptEchoSettings),
    "script_ratio": Rule(script_ratio, ScriptRatioSettings),
    "finish_reason": Rule(finish_reason, FinishReasonSettings),
    "foreign_script": Rule(foreign_script, ForeignScriptSettings),
    "repetition": Rule(repetition, RepetitionSettings),
    "meta_talk": Rule(meta_talk, MetaTalkSettings),
    "adherence": Rule(adherence, AdherenceSettings),
    "ending": Rule(ending, EndingSettings),
    "language": Rule(language, LanguageSettings),
    AGREES: Rule(agrees, AgreesSettings),
    "matches": Rule(guarded(matches), MatchesSettings, verifies=True),
    "choice": Rule(guarded(choice), ChoiceSettings, verifies=True),
    "json_schema": Rule(guarded(json_schema), JsonSchemaSettings, verifies=True),
    "math": Rule(guarded(math), MathSettings, verifies=True),
    "sql": Rule(guarded(sql), SqlSettings, verifies=True),
    "python": Rule(guarded(python), PythonSettings, verifies=True),
    "tool_calls": Rule(guarded(tool_calls), ToolCallsSettings, verifies=True),
}
