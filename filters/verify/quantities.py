"""Quantities of which math-verify would read one part: `1만 2천`, `12万`, `3분의 2`, `1.5 million`, `3시간 20분`, …

Pure: texts in, texts out. Each becomes the one number that it is; what is not certain stays as it stands.
"""

import re
from decimal import Decimal
from functools import partial
from math import prod

_DIGITS = r"\d{1,20}(?:,\d{3})*(?:\.\d+)?"
_ALONE = r"(?<![A-Za-z\d.,/^])"  # no part of a longer number or a term comes before
_PLACES = {"": 1, "십": 10, "백": 100, "천": 1000, "만": 10**4, "억": 10**8, "조": 10**12}
_UP_TO_10000 = rf"(?:{_DIGITS}천 ?)?(?:{_DIGITS}백 ?)?(?:{_DIGITS}십 ?)?(?:{_DIGITS})?"
_KOREAN = re.compile(  # 1억 2천만, 3만5천, 12만 3,400; not 2만큼 (by 2), 3조 and 3조각 (group 3, 3 pieces)
    rf"{_ALONE}(?=[\d.,]+[십백천만억조])"
    rf"(?:{_UP_TO_10000}조 ?)?(?:{_UP_TO_10000}억 ?)?(?:{_UP_TO_10000}만 ?)?{_UP_TO_10000}"
    r"(?<! )(?![\d,.]*\d|[십백천만억조큼])(?:(?<!조)|(?= ?[원달]))"
)
_PART = re.compile(rf"({_DIGITS})?([십백천]?) ?([만억조]?)")
# The same in Japanese and Chinese; not 3千克 (kilograms), 3千米 (kilometres), 3百分点 (points of percent).
_HAN = re.compile(r"(?<=\d)(?:[十百千]?[万萬億亿]|千(?![克米瓦卡焦赫帕伏字])|百(?![分货]))")
_AS_KOREAN = str.maketrans("十百千万萬億亿", "십백천만만억억")
_ENGLISH = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_IN_WORDS = re.compile(  # 1.5 million, 3 hundred thousand, 3 \text{ dozen}
    rf"{_ALONE}({_DIGITS})(?: ?\\text\{{)?((?:[ -]?(?:{'|'.join(_ENGLISH)})\b)+)\}}?", re.IGNORECASE
)
_FRACTION = re.compile(rf"{_ALONE}(?:(\d+)[과와] ?)?(\d+) ?분의 ?(\d+)(?!\.?\d)")  # 3분의 2, 2와 3분의 1
_COMPOUNDS = (  # 3시간 20분: a unit, the smaller one after it, and how many of these it has
    ("시간|시|hours?|h", "분|minutes?|min", 60),
    ("분|minutes?|min", "초|seconds?|s", 60),
    ("km|킬로미터", "m|미터", 1000),
    ("m|미터", "cm|센티미터", 100),
    ("cm|센티미터", "mm|밀리미터", 10),
    ("kg|킬로그램", "g|그램", 1000),
    ("L|리터", "mL|밀리리터", 1000),
)
_AND = "(?: and | ?)"
_UNITS = [
    (re.compile(rf"{_ALONE}({_DIGITS}) ?(?:{large}){_AND}({_DIGITS}) ?({small})(?![A-Za-z²³^/])"), factor)
    for large, small, factor in _COMPOUNDS
]
# Most texts have no two units together: one search in place of seven.
_ANY_UNIT = re.compile(rf"\d ?(?:{'|'.join(large for large, _, _ in _COMPOUNDS)}){_AND}\d")
_PRODUCT = re.compile(rf"({_DIGITS})( ?[^\W\d_]{{0,4}}) ?\(({_DIGITS}) ?[×x*] ?({_DIGITS})\)")  # 42 (6 × 7)
_BELOW_ZERO = re.compile(r"영하 ?(?=\d)")


def as_one_number(text: str) -> str:
    """The text with each such quantity as one number, of units in the smaller one: `3시간 20분` is `200분`."""
    text = _BELOW_ZERO.sub("-", text)
    text = _FRACTION.sub(lambda found: f"{found[1] or ''} {found[3]}/{found[2]}".lstrip(), text)
    text = _HAN.sub(lambda found: found[0].translate(_AS_KOREAN), text)
    text = _KOREAN.sub(_sum_of_parts, text)
    text = _IN_WORDS.sub(_product, text)
    for units, factor in _UNITS if _ANY_UNIT.search(text) else ():
        text = units.sub(partial(_in_smaller_unit, factor), text)
    return _PRODUCT.sub(_without_product, text)


def without_words(text: str) -> str:
    """The text with `1.5 million` as 1.5, for questions that ask for millions."""
    return _IN_WORDS.sub(r"\1", text)


def _in_smaller_unit(factor: int, two: re.Match[str]) -> str:
    return _written(_value(two[1]) * factor + _value(two[2])) + two[3]


def _sum_of_parts(korean: re.Match[str]) -> str:
    total = below = Decimal(0)
    for digits, small, large in _PART.findall(korean[0]):
        below += _value(digits or "0") * _PLACES[small]
        if large:
            total, below = total + below * _PLACES[large], Decimal(0)
    return _written(total + below)


def _product(found: re.Match[str]) -> str:
    words = re.findall("[a-z]+", found[2].lower())
    return _written(_value(found[1]) * prod(map(_ENGLISH.__getitem__, words)))


def _without_product(found: re.Match[str]) -> str:
    """The value alone, if the product in brackets says the same."""
    number, unit, one, other = found.groups()
    return number + unit if _value(one) * _value(other) == _value(number) else found[0]


def _value(digits: str) -> Decimal:
    return Decimal(digits.replace(",", ""))


def _written(number: Decimal) -> str:
    return f"{number.normalize():f}"
