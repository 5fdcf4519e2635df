"""What one answer to a probe is worth, and the figures of many: pure, by the recipe's own rules and plain counting.

Words are runs of letters and digits, in Unicode's form NFC and without case. A Korean word is what stands between
spaces, particles included, so distinct-n compares models in one language, not languages. Chinese, Japanese and Thai,
which are written without spaces, count by character.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from evaluate.document import Better
from evaluate.statistics import Figure, distinct, ratio
from filters.adherence import AdherenceSettings
from filters.answer import as_answer, nfc
from filters.reasons import describe
from filters.repetition import RepetitionSettings, repetition
from filters.ruleset import RuleSet
from filters.scripts import character_class
from filters.words import mentions
from pipeline.recipe import Recipe
from pipeline.records import Kept

BETTER: dict[str, Better | None] = {
    "passing": "higher",
    "adherence": "higher",
    "named": "higher",
    "loops": "lower",
    "stopped": "higher",
    "distinct_1": None,  # noise has the most
    "distinct_2": None,
    "characters": None,
    "judge": "higher",
}
_UNSPACED = character_class("han", "kana", "thai")
_WORD = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])[^\W_])+(?:['’](?:(?![{_UNSPACED}])[^\W_])+)*")


class Naming(NamedTuple):
    """Which slots' values an answer is to name, and what else counts for a value. No slots: all that a prompt has."""

    slots: list[str]
    aliases: dict[str, list[str]]


class Judged(NamedTuple):
    """One answer, looked at. None: the prompt has no slots, the recipe no rules, the judge no verdict."""

    dropped_by: dict[str, str]  # reasons, by rule
    passing: bool | None
    named: float | None  # share of the values asked for
    loops: bool
    stopped: bool
    characters: int
    words: list[str]
    judge: int | None


def split_words(text: str) -> list[str]:
    """The words of a text, in order."""
    return _WORD.findall(nfc(text).casefold())


def naming(recipe: Recipe, rules: RuleSet) -> Naming:
    """What adherence asks: `evaluate.adherence`, else the slots of the recipe's rule of that name, else all slots."""
    rule = next((rule.settings for rule in rules.rules if isinstance(rule.settings, AdherenceSettings)), None)
    aliases = rule.aliases if rule else {}
    slots = recipe.evaluate.adherence or (rule.slots if rule else list(recipe.prompts.slots))
    return Naming(slots, aliases)


def look_at(row: Kept, rules: RuleSet, wanted: Naming, score: int | None) -> Judged:
    """Everything that is counted of one answer."""
    answer = as_answer(row)
    reasons = rules.reasons(answer)
    loop = next((rule.settings for rule in rules.rules if isinstance(rule.settings, RepetitionSettings)), None)
    return Judged(
        dropped_by={reason.rule: describe(reason) for reason in reasons},
        passing=not reasons if rules.rules else None,
        named=_named(answer.text, row, wanted),
        loops=repetition(answer, loop or RepetitionSettings()) is not None,
        stopped=row.finish_reason == "stop",
        characters=len(row.text),
        words=split_words(row.text),
        judge=score,
    )


def _named(text: str, row: Kept, wanted: Naming) -> float | None:
    values: list[str] = []
    for slot in wanted.slots or row.slots:
        value = row.slots.get(slot, [])
        values += [nfc(value)] if isinstance(value, str) else map(nfc, value)
    if not values:
        return None
    found = [any(mentions(text, name) for name in (value, *wanted.aliases.get(value, ()))) for value in values]
    return sum(found) / len(found)


def compute(answers: Sequence[Judged], counts: Any) -> dict[str, Figure]:
    """Every figure of `BETTER` that there is, over the answers of one model; `counts` draws them (bootstrap.draw)."""

    def mean(value: Callable[[Judged], float | None]) -> Figure | None:
        values = [value(answer) for answer in answers]
        return ratio([v or 0.0 for v in values], [v is not None for v in values], counts)

    words = [answer.words for answer in answers]
    figures = {
        "passing": mean(lambda a: a.passing),
        "adherence": mean(lambda a: None if a.named is None else a.named == 1),
        "named": mean(lambda a: a.named),
        "loops": mean(lambda a: a.loops),
        "stopped": mean(lambda a: a.stopped),
        "distinct_1": distinct(words, 1, counts),
        "distinct_2": distinct(words, 2, counts),
        "characters": mean(lambda a: a.characters),
        "judge": mean(lambda a: a.judge),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}
