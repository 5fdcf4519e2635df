"""The rule `adherence`: the answer names what the prompt's slots asked for."""

from pydantic import Field

from filters.answer import Answer, Nfc, RuleSettings, nfc
from filters.words import mentions
from pipeline.records import Reason


class AdherenceSettings(RuleSettings):
    slots: list[str] = Field(min_length=1)  # slots whose values must be named in the answer
    max_missing: int = Field(0, ge=0)  # values that may be missing
    aliases: dict[Nfc, list[Nfc]] = Field({})  # other names that count for a value: {달: [달님, 보름달]}


def adherence(answer: Answer, settings: AdherenceSettings) -> Reason | None:
    """Drops an answer that does not name the values asked for (see filters.words.mentions for how they are found)."""
    missing: dict[str, list[str]] = {}
    for slot in settings.slots:
        asked = answer.slots.get(slot)
        if asked is None:
            return Reason(rule="adherence", what=slot)
        for value in map(nfc, (asked,) if isinstance(asked, str) else asked):
            others = settings.aliases.get(value, ())
            if not mentions(answer.text, value) and not any(mentions(answer.text, name) for name in others):
                missing.setdefault(slot, []).append(value)
    count = sum(map(len, missing.values()))
    if count <= settings.max_missing:
        return None
    return Reason(rule="adherence", missing=missing, value=count, at_most=settings.max_missing)
