"""The worker's side of the verifier `math`: reads two values and compares them with math-verify (and so sympy).

Either may never end or fill the memory, as 9**9**9 does: that is for the worker's limits to stop, not math-verify's.
"""

import logging
import math
import re
import unicodedata
from decimal import Decimal
from typing import Any

import math_verify
import sympy
from math_verify.grader import is_equation, take_last_relation

from filters.verify.extract import plain

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that its own time limit is off

_NUMBER = r"(?<![\w.,^/])(\d+(?:\.\d+)?|\.\d+)"
_CJK = r"\u3000-\u30ff\u3400-\u9fff\uac00-\ud7a3\uff01-\uff0f\uff1a-\uff1f"  # letters, and marks between them
_GLUED = (
    re.compile(  # where math-verify needs a blank: `정답은 1/2입니다`, `答案是72。`, `Answer:72`, `<answer>3</answer>`
        rf"(?:(?<=[{_CJK}≈~>])|(?<=[^\W\d_]:))(?=-?\$?\d)|(?<=[\d}})])(?=[{_CJK}?;—<])"
    )
)
_SMALL = re.compile(r"(?P<power>(?<=[\d)])[⁺⁻]?[⁰¹²³⁴-⁹]+)|(?P<space>(?<=\d) ?)?[¼-¾⅐-⅞]")  # 10⁵, 2½; not cm²
_SCIENTIFIC = re.compile(_NUMBER + r"(?:e| ?[x×] ?10\^)([+-]?\d{1,2})(?![\w^]|\.\d)", re.IGNORECASE)
_SPACE = re.compile(r"(?<=\d)(?<!\d{4}) (?=\d{3}(?![\d/]))")  # in a value by itself, in which 1 500/600 is mixed
_MIXED = re.compile(r"(?<![\w.,^/])(?<!\d )(\d+) (\d+)/(\d+)(?![\w^/]|\.\d)")
_GROUPS = r"[1-9]\d{0,2}(?:(?:,|\{,\})\d{3})+(?![\d,])"
_THOUSANDS = re.compile(  # none in the pair `(100,200)` and the set `\{100,200\}`
    rf"(?<![\d.,])(?<!(?<!\\)[(\[])(?<![,;] )(?<!\\\{{){_GROUPS}"
    rf"|(?<=[(\[]){_GROUPS}(?=\s*(?:[-+*/×÷^]|\\times|\\cdot|\\div))"
)
_EMPHASIS = re.compile(r"(?<![\w)\]}^*\\])(\*{1,3})(?=\S)(.+?)(?<=[^\s*])\1(?![\w(*])")  # none in 3*4 and 2**3
_NO_PART = str.maketrans("", "", '`"“”„‟«»‹›‘‚€£¥₩₹')  # of a value; not ’, which is also a prime
_STATED = re.compile(  # a value right after the last word `answer` that ends its sentence or line
    r"(?>.*answer)(?: is)?[:=]?\s*(?:\$.+?\$|\\\(.+?\\\)|\\\[.+?\\\]|-?\\?\$?[\d.,/]*\d)"
    r" ?[^\s\d.]*(?:\.\s|\n)",
    re.IGNORECASE | re.DOTALL,
)
_DOLLARS = re.compile(r"(?<!\\)\$")
_END = re.compile(r"(?<!\\)[.,;。*`\s]+$")
_NO_UNITS = (  # words that make another value of the number before them
    "and|or|pi|in|mod|sqrt|(?:a|arc)?(?:sin|cos|tan|sec|csc|cot)h?|log|ln|exp|percent|factorial|squared|cubed|dozen|hundred|"
    "thousand|million|billion|hal(?:f|ves)|thirds?|quarters?|fifths?|tenths?|hundredths?|times|plus|minus|over"
)
_THEN_WORDS = re.compile(  # `5 apples`, `1/2 개`, `2/5, so we are done`
    rf"([^\s\d]*\d\S*?)(?:[.,;:] +(?=\w+ )| +(?=[^\W\d_]{{3}}|[{_CJK}]))(?!.*\b(?:{_NO_UNITS})\b)"
    r"[^\W\d_]+(?:[ ,.;:]+[^\W\d_]+)*",
    re.IGNORECASE,
)
_GAP = r"(?:\\[,;:! ]|[~\s])*"
_UNIT = re.compile(  # `72 \text{ clips}`, `9\pi\,\mathrm{cm}^2`; none in `3\mathrm{i}` and `2 \text{ h } 30`
    rf"(?:(?<=[\d)}}])|(?<=\\pi)){_GAP}\\(?:text|textrm|mbox|mathrm(?=\{{\w\w))\{{(?=[^{{}}]*[^\W\d_])"
    rf"(?![^{{}}]*\b(?:{_NO_UNITS}|to|of|is|are|if|for|when|where|otherwise|choose|cis)\b)"
    rf"[^{{}}\d]*\}}(?:\^\{{?[23]\}}?|[²³])?(?!{_GAP}(?:[\d(]|\\[dt]?frac|\\sqrt))",
    re.IGNORECASE,
)


def compare(exact: str | None, text: str, reference: str) -> dict[str, Any]:
    """Whether the values are the same, and the answer's, normalised; None if it has none.

    `exact` is nothing but the value, where it could be told from the text. Raises ValueError if the reference is no
    value.
    """
    gold = _read(f"${_without_words(_value(reference))}$")
    found = _read(f"${_without_words(_value(exact))}$" if exact else _until_stated(_plain(text)))
    if not gold:
        raise ValueError(f"the reference cannot be read: {reference[:80]}")
    same = math_verify.verify(gold, found, timeout_seconds=None) and _are_close(gold[0], found[0])
    return {"same": bool(same), "result": _normalised(found[0]) if found else None}


def warm_up() -> None:
    """Has the reader of LaTeX made, at its first use: that takes 300 times as long as a later one."""
    compare("1", "", "1")


def _value(text: str) -> str:
    r"""A value without what stands around it (`$`, `**`, `\(…\)`, a full stop), for LaTeX."""
    text = _END.sub("", _DOLLARS.sub("", text).lstrip("*` \n"))
    for start, end in ((r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(start) and text.endswith(end):
            text = text[2:-2].strip()
    return _plain(_SPACE.sub("", text))


def _without_words(value: str) -> str:
    """A number without the plain words after it."""
    then_words = _THEN_WORDS.fullmatch(value)
    return then_words[1] if then_words else value


def _until_stated(text: str) -> str:
    """A text without what follows its stated answer: math-verify would take a value from there."""
    stated = _STATED.match(text)
    return stated[0] if stated else text


def _plain(text: str) -> str:
    r"""A text without emphasis, quotes, signs of money and units in `\text{}`, its numbers as math-verify reads them.

    That is `1.5e3` as 1500, `1 1/2` as 3/2 and `10\,500` as 10500: it would read 1.5, 1 and 10 times 500.
    """
    text = _EMPHASIS.sub(r"\2", plain(text).translate(_NO_PART))
    text = _UNIT.sub("", text.replace("\\$", ""))
    text = _THOUSANDS.sub(lambda match: re.sub(r"\D", "", match[0]), text)
    text = _SMALL.sub(_full_size, _GLUED.sub(" ", text))
    text = _SCIENTIFIC.sub(lambda match: f"{Decimal(f'{match[1]}e{match[2]}'):f}", text)
    return _MIXED.sub(lambda match: _fraction(match) or match[0], text)


def _full_size(small: re.Match[str]) -> str:
    """`^5` for ⁵, `1/2` for ½."""
    before = "^" if small["power"] else "" if small["space"] is None else " "
    return before + unicodedata.normalize("NFKC", small[0].strip()).replace("\N{FRACTION SLASH}", "/").replace("−", "-")


def _fraction(mixed: re.Match[str]) -> str | None:
    whole, above, below = map(int, mixed.groups())
    return f"{whole * below + above}/{below}" if above < below else None


def _read(text: str) -> list[Any]:
    return list(math_verify.parse(text, parsing_timeout=None))


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
