"""The worker's side of the verifier `math`: reads two values and compares them with math-verify (and so sympy).

Either may never end or fill the memory, as 9**9**9 does: that is for the worker's limits to stop, not math-verify's.
"""

import logging
from typing import Any

import math_verify
import sympy

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that its own time limit is off


def compare(exact: str | None, text: str, reference: str) -> dict[str, Any]:
    """Whether the values are the same, and the answer's, normalised; None if it has none.

    `exact` is nothing but the value, where it could be told from the text. Raises ValueError if the reference is no
    value.
    """
    gold, found = _read(f"${reference}$"), _read(f"${exact}$" if exact else text)
    if not gold:
        raise ValueError(f"the reference cannot be read: {reference[:80]}")
    same = math_verify.verify(gold, found, timeout_seconds=None)
    return {"same": bool(same), "result": _normalised(found[0]) if found else None}


def _read(text: str) -> list[Any]:
    return list(math_verify.parse(text, parsing_timeout=None))


def _normalised(value: Any) -> str:
    if isinstance(value, sympy.Eq) and value.lhs.is_Symbol:  # x = 3
        value = value.rhs
    if isinstance(value, sympy.Basic):
        value = value.doit()
        if value.is_number and value.is_real:
            return f"{float(value):.12g}"
    return str(value)
