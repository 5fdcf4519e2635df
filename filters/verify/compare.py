"""The verifiers `matches` and `choice`: the answer, or a part of it, against the reference or a list of labels."""

import unicodedata
from contextlib import suppress
from datetime import date
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from filters.answer import Answer, Verified, nfc
from filters.verify.extract import (
    DECIMAL_COMMA,
    INVISIBLE,
    PatternSettings,
    ReferenceSettings,
    all_shown,
    boxed,
    canonical,
    canonical_json,
    last_number,
    same_number,
    shown,
    with_decimal_point,
)
from filters.verify.guard import Unreadable, Unverified
from pipeline.records import Reason, folded

# What a model puts around a label, and ends it with: in other scripts, all punctuation but dashes.
_MARKS = {"Po", "Ps", "Pe", "Pi", "Pf"}
_PUNCTUATION = [char for char in map(chr, range(0x80, 0x10000)) if unicodedata.category(char) in _MARKS]
_AROUND = " \t\n\"'`*_.,;:!()[]" + "".join(_PUNCTUATION) + INVISIBLE
_DOTTED_I = "i\u0307"  # what Python makes of Turkish İ without case: its small letter is a plain i


class MatchesSettings(PatternSettings, ReferenceSettings):
    form: Literal["text", "number", "json"] = Field("text", alias="as")
    ignore_case: bool = True
    ignore_space: bool = True
    tolerance: float | None = Field(
        None, ge=0, description="of numbers, as a share of the reference; none: 1e-6, and 0 of whole numbers"
    )
    decimal_comma: bool = Field(False, description=DECIMAL_COMMA)
    model_config = ConfigDict(serialize_by_alias=True)

    def normalised(self, text: str) -> str:
        text = nfc(text)
        text = text.casefold().replace(_DOTTED_I, "i") if self.ignore_case else text
        return " ".join(text.split()) if self.ignore_space else text


def matches(answer: Answer, settings: MatchesSettings) -> Verified:
    """Drops an answer that is not the reference, or none of them where the reference is a list of texts or numbers."""
    reference, part = settings.reference_of(answer), settings.part_of(answer)
    if settings.form == "json":
        return _same_json(part, reference)
    wanted = reference if isinstance(reference, list) else [reference]
    if settings.form == "number":
        if settings.decimal_comma:
            part, *wanted = map(with_decimal_point, (part, *wanted))
        return _same_number(part, wanted, settings.tolerance)
    texts = list(map(_as_text, wanted))
    result = settings.normalised(part)
    if result in map(settings.normalised, texts):
        return Verified(result=result)
    return Verified(Reason(rule="matches", found=shown(part), allowed=all_shown(texts)), result=result)


def _as_text(reference: Any) -> str:
    """A reference as it is compared with texts: 1.0, as pandas has an integer beside missing cells, is `1`."""
    return reference if isinstance(reference, str) else canonical(reference)


def _same_number(part: str, wanted: list[Any], tolerance: float | None) -> Verified:
    numbers = [number for one in wanted if (number := last_number(str(one))) is not None]
    if not numbers:
        raise Unverified(f"the reference has no number: {shown(str(wanted))}")
    number = last_number(part)
    if number is None:
        raise Unreadable("number", shown(part))
    result = canonical(number)
    if any(same_number(number, one, tolerance) for one in numbers):
        return Verified(result=result)
    return Verified(Reason(rule="matches", found=result, allowed=all_shown(map(str, wanted))), result=result)


def _same_json(part: str, reference: Any) -> Verified:
    result, wanted = canonical_json(part), _as_json(reference)
    if result == wanted:
        return Verified(result=result)
    return Verified(Reason(rule="matches", found=shown(result), allowed=[shown(wanted)]), result=result)


def _as_json(reference: Any) -> str:
    """A reference as JSON; a text may be JSON already."""
    if isinstance(reference, str):
        with suppress(Unreadable):
            return canonical_json(reference)
    return nfc(canonical(reference))


def _text(given: Any) -> Any:
    if isinstance(given, bool | int | float | date):
        as_yaml = " (as YAML reads yes, no, on and off)" if isinstance(given, bool) else ""
        raise ValueError(f"should be a text{as_yaml}; put it in quotes")
    return given


class ChoiceSettings(PatternSettings, ReferenceSettings):
    labels: list[Annotated[str, BeforeValidator(_text)]] = Field(
        [], description="the answers that there are; none: any"
    )
    reference: bool = Field(False, description="the answer must be the row's label")

    @model_validator(mode="after")
    def _asks_something(self) -> Self:
        if not self.labels and not self.reference:
            raise ValueError("names neither labels nor `reference: true`")
        return self


def choice(answer: Answer, settings: ChoiceSettings) -> Verified:
    """Drops an answer that is not one of the labels, or not the row's own label.

    Raises Unverified if the row's own label is none of them.
    """
    wanted = _as_text(settings.reference_of(answer)) if settings.reference else None
    own = None if wanted is None else _label(wanted, settings.labels)
    known = list(map(_folded, settings.labels))
    if known and own is not None and own not in known:
        raise Unverified(f"the reference {shown(own)!r} is none of the labels")
    part = settings.part_of(answer)
    result = _label(_out_of_box(part), settings.labels)
    if known and result not in known:
        return Verified(Reason(rule="choice", found=shown(part), allowed=settings.labels))
    if wanted is not None and result != own:
        return Verified(Reason(rule="choice", found=shown(part), allowed=[wanted]), result=result)
    return Verified(result=result)


def _folded(text: str) -> str:
    return folded(text).replace(_DOTTED_I, "i")


def _out_of_box(text: str) -> str:
    r"""What `\(\boxed{C}\).` holds; any other text as it stands."""
    box = boxed(text)
    if box is None or text.replace(f"\\boxed{{{box}}}", "").strip(_AROUND + "$\\"):
        return text
    return box


def _label(text: str, labels: list[str]) -> str:
    """The label that a text says; the text itself, without the marks around it, if it says none.

    First the text as it stands (`.NET` beside `NET`), then without its marks, then as `B` where it is a wide `Ｂ`, then
    without the label's marks, too.
    """
    text, known = _folded(text), list(map(_folded, labels))
    bare = text.strip(_AROUND) or text
    for said in (text, bare, unicodedata.normalize("NFKC", bare)):
        if said in known:
            return said
    return next((label for label in known if label.strip(_AROUND) == bare), bare)
