"""The answer as the rules see it, and what every rule's settings have in common. Reads and writes nothing."""

import re
import unicodedata
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from pipeline.records import Completion, Json, Reason, Slots

nfc = partial(unicodedata.normalize, "NFC")
Nfc = Annotated[str, AfterValidator(nfc)]  # a setting that is compared with an answer


def _regular(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"`{pattern}` is not a regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_regular)]  # a regular expression of a recipe

UNVERIFIED = "unverified"  # the rule of a reason to drop an answer that could not be checked: not the answer's fault


class Answer(msgspec.Struct, frozen=True):
    """One answer under judgement. Its texts are in Unicode's form NFC; the record itself is not changed.

    A teacher may write a Hangul syllable as one character or as two or three (NFD); NFC makes both one.
    """

    text: str
    instruction: str  # the last user message; empty if there is none
    finish_reason: str
    slots: Slots  # what the prompt's template was filled with
    reference: Any = None  # the prompt's own, any JSON
    columns: Json = {}
    tools: list[Json] = []
    reasoning: str = ""
    tool_calls: list[Json] = []


class Verified(NamedTuple):
    """What a rule may return in place of a reason, where it knows more than whether the answer is right."""

    reason: Reason | None = None  # why the answer is dropped; None: it passes
    score: float | None = None  # how good the answer is; higher is better
    result: str | None = None  # the answer or what came of it, normalised: equal for answers that say the same


class Checked(NamedTuple):
    """What all rules say of an answer."""

    reasons: list[Reason]  # why it is dropped, in the recipe's order; empty if it is kept
    scores: dict[str, float]  # by the label of the rule
    result: str | None  # of the first rule that gives one


class RuleSettings(BaseModel):
    """Base of a rule's settings: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TextSettings(RuleSettings):
    """Base of the settings of a rule that reads a text: the answer's own, or the reasoning before it."""

    of: Literal["text", "reasoning"] = Field("text", exclude=True)  # the rule's label says it


def as_answer(row: Completion) -> Answer:
    """The answer of a completion, normalised."""
    asked = next((message.content for message in reversed(row.messages) if message.role == "user"), "")
    return Answer(
        text=nfc(row.text),
        instruction=nfc(asked),
        finish_reason=row.finish_reason,
        slots=row.slots,
        reference=row.reference,
        columns=row.columns,
        tools=row.tools,
        reasoning=nfc(row.reasoning),
        tool_calls=row.tool_calls,
    )
