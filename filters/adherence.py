"""The rule `adherence`: what the prompt's slots asked for is in the answer."""

from pydantic import Field, field_validator

from filters.answer import Answer, RuleSettings, nfc
from filters.words import mentions


class AdherenceSettings(RuleSettings):
    slots: list[str] = Field(min_length=1)  # slots whose values must be named in the answer
    max_missing: int = Field(0, ge=0)  # values that may be missing
    aliases: dict[str, list[str]] = Field({})  # other names that count for a value: {달: [달님, 보름달]}

    @field_validator("aliases")
    @classmethod
    def _normalised(cls, aliases: dict[str, list[str]]) -> dict[str, list[str]]:
        return {nfc(value): [nfc(name) for name in names] for value, names in aliases.items()}


def adherence(answer: Answer, settings: AdherenceSettings) -> str | None:
    """Drops an answer that does not name the values asked for (see filters.words.mentions for how they are found)."""
    missing = []
    for slot in settings.slots:
        asked = answer.slots.get(slot)
        if asked is None:
            return f"the prompt has no slot `{slot}`"
        for value in (asked,) if isinstance(asked, str) else asked:
            value = nfc(value)
            if not mentions(answer.text, value) and not any(
                mentions(answer.text, name) for name in settings.aliases.get(value, ())
            ):
                missing.append(f"`{value}` ({slot})")
    if len(missing) <= settings.max_missing:
        return None
    return f"asked for and not there: {', '.join(missing)}"
