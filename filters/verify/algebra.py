"""The worker's side of the verifier `math`: reads two values and compares them with math-verify (and so sympy).

Either may never end or fill the memory, as 9**9**9 does: that is for the worker's limits to stop, not math-verify's.
"""

import logging
import math
from decimal import Decimal
from typing import Any

import math_verify
import sympy
from math_verify import LatexExtractionConfig
from math_verify.grader import get_pct_val, is_equation, take_last_relation

from filters.verify.notation import value_alone, value_within
from filters.verify.quantities import without_words

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that its own time limit is off


def compare(exact: str | None, text: str, reference: str) -> dict[str, Any]:
    """Whether the values are the same, and the answer's, normalised; None if it has none.

    `exact` is nothing but the value, where it could be told from the text. `1.5 million` is right for 1500000 and for
    1.5, as for a question that asks for millions. Raises ValueError if the reference is no value.
    """
    found = _compare(exact, text, reference)
    fewer_words = exact and without_words(exact), without_words(text)
    if not found["same"] and fewer_words != (exact, text):
        found["same"] = _compare(*fewer_words, reference)["same"]
    return found


def _compare(exact: str | None, text: str, reference: str) -> dict[str, Any]:
    gold = _read_alone(reference)
    found = _read_alone(exact) if exact else _read(value_within(text))
    if not gold:
        raise ValueError(f"the reference cannot be read: {reference[:80]}")
    same = math_verify.verify(gold, found, timeout_seconds=None) and _are_close(gold[0], found[0])
    same = same or (bool(found) and _same_percentage(gold[0], found[0]))
    return {"same": bool(same), "result": _normalised(found[0]) if found else None}


def warm_up() -> None:
    """Makes what is made at first use, which takes 40 to 300 times as long as later: LaTeX's reader, sympy's rules."""
    compare("(x + 1)^2", "", "x^2 + 2x + 1")


def _read_alone(text: str) -> list[Any]:
    """A value in LaTeX is read whole, or not at all: any one number of it is another value."""
    value = value_alone(text)
    if "\\" in value:
        return _read(f"${value}$".replace("\n", " "), extraction_config=[LatexExtractionConfig()])
    return _read(f"${value}$")


def _read(text: str, **how: Any) -> list[Any]:
    return list(math_verify.parse(text, parsing_timeout=None, **how))


def _same_percentage(gold: Any, found: Any) -> bool:
    """Whether one is the other with a `%`, as 35.0% and 35: math-verify takes whole numbers so only."""
    one, other = (_number(get_pct_val(value, value)) for value in (gold, found))
    return one is not None and one == other and (_number(gold) is None or _number(found) is None)


def _are_close(gold: Any, found: Any) -> bool:
    """Whether two values that math-verify calls the same are so as numbers: it looks at 6 decimals only.

    They must be the same in 4 digits, and in all decimals that both have: 0.333333 is 1/3, 0.0000002 is not 0.0000003.
    """
    one, other = _number(gold), _number(found)
    if one is None or other is None or one == other:
        return True
    smaller = min(abs(one), abs(other))
    if smaller == 0:
        return False
    places = max(3 - math.floor(math.log10(smaller)), min(_decimals(one), _decimals(other)))
    return abs(one - other) <= 0.51 * 10.0**-places  # half of the last digit, and what rounding may add


def _decimals(number: float) -> int:
    exponent = Decimal(f"{number:.12g}").as_tuple().exponent
    return -int(exponent)


def _number(value: Any) -> float | None:
    """A real number; None for anything else, and for a percentage, which math-verify also takes without its mark."""
    value = _right_side(value)
    if not isinstance(value, sympy.Expr) or value.has(sympy.UnevaluatedExpr):
        return None
    value = value.doit()
    return float(value) if value.is_number and value.is_real else None


def _normalised(value: Any) -> str:
    value = _right_side(value)
    if isinstance(value, sympy.Expr):
        value = value.doit()
        if value.is_number and value.is_real:
            return f"{float(value):.12g}"
    return str(value)


def _right_side(value: Any) -> Any:
    """3 of x = 3, of 1 + 2 = 3 and of the chain x = 6/2 = 3."""
    if not is_equation(value):
        return value
    chained = not isinstance(value, sympy.Eq)
    return take_last_relation(value).rhs if chained or value.lhs.is_Symbol or not value.lhs.free_symbols else value
