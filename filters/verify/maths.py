"""The verifier `math`: the answer is worth the same as the reference, as math-verify says (installed where wanted)."""

from importlib.util import find_spec
from typing import Self

from pydantic import Field, model_validator

from filters.answer import Answer, Verified
from filters.verify.extract import (
    DECIMAL_COMMA,
    PatternSettings,
    ReferenceSettings,
    boxed,
    shown,
    with_decimal_point,
)
from filters.verify.guard import Unreadable
from filters.verify.worker import call
from pipeline.records import Reason


class MathSettings(PatternSettings, ReferenceSettings):
    seconds: float = Field(5, gt=0)  # for the pattern, and for reading and comparing both
    decimal_comma: bool = Field(False, description=DECIMAL_COMMA)

    @model_validator(mode="after")
    def _is_there(self) -> Self:
        if find_spec("math_verify") is None:
            install = ".venv/bin/pip install -c constraints.txt math-verify"
            raise ValueError(f"needs the package math-verify; install it with: {install}")
        return self


def math(answer: Answer, settings: MathSettings) -> Verified:
    r"""Drops an answer whose value is not the reference's: what \boxed{…} or the pattern holds, else its last value."""
    reference, part = settings.reference_of(answer), settings.part_of(answer)
    if settings.decimal_comma:
        reference, part = with_decimal_point(reference), with_decimal_point(part)
    reference = str(reference)
    exact = boxed(part)
    if exact is None and settings.pattern:
        exact = part
    if exact is not None and not exact.strip():
        raise Unreadable("value", shown(part[-100:]))
    found = call(
        "filters.verify.algebra", "compare", exact, part, reference, seconds=settings.seconds, load=("warm_up",)
    )
    if found["same"]:
        return Verified(result=found["result"])
    if found["result"] is None:
        raise Unreadable("value", shown(part[-100:]))
    return Verified(
        Reason(rule="math", found=shown(found["result"]), allowed=[shown(reference)]), result=found["result"]
    )
