r"""What a verifier takes out of an answer (a pattern, a fenced block, a number, \boxed{…}) and out of its reference."""

import json
import math
import re
import textwrap
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
from pydantic import Field, ValidationInfo

from filters.answer import Answer, Pattern, RuleSettings, nfc
from filters.verify.guard import Unreadable, Unverified
from filters.verify.worker import call

_FENCE = re.compile(  # words may stand before an opening ```: Here it is: ```python
    r"^(?:[ \t]*|(?:[^\n`]|(?<!`)`(?!`))*(?=`{3,}[\w+-]*[ \t]*$))(`{3,}|~{3,}(?=\w))[ \t]*([\w+-]*)[^\n`]*\n"
    r"(.*?)(?:^[ \t]*\1|\1[ \t]*$|\Z)",
    re.DOTALL | re.MULTILINE,
)
INDIAN = r"[1-9]\d?(?:,\d{2})+,\d{3}(?!,\d)"  # 12,34,567
_NUMBER = re.compile(
    r"(?:(?<![\w.])[-+]|(?<![\w.$])[-+]\\?[$€£¥₩₹])?"  # -5, -$5, but no sign in 3-5, $3-$5 and $3$-$5$
    r"(?:(?P<comma>(?<!\d,)(?:"  # a decimal comma, and groups of digits with dots: none in 1,2,3 and 1,234
    r"[1-9]\d{0,2}(?:(?:\.\d{3})+,\d+|(?:\.\d{3}){2,})|(?![1-9]\d{0,2},\d{3}(?!\d))\d+,\d+)(?![,.]?\d))"
    rf"|(?:(?:[1-9]\d{{0,2}}(?:,\d{{3}})+|{INDIAN})(?!\d)|\d+)?(?:\.\d+)?(?<=\d))(?:[eE][-+]?\d+)?(?!\d)"
)
DECIMAL_COMMA = "`12.500` is 12500 and `3,5` is 3.5, in answers and in references that are texts"
INVISIBLE = (  # and without a width; most say which way a text runs
    "\u00ad\u061c\u200b\u200c\u200d\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2066\u2067\u2068\u2069\ufeff"
)
_DIGITS = {code: str(unicodedata.decimal(chr(code))) for code in range(0x80, 0x20000) if chr(code).isdecimal()}
_PLAIN = _DIGITS | str.maketrans("−–－٫٬", "---.,", INVISIBLE)  # Arabic has marks of its own in numbers
# between groups of digits: spaces that do not break, what the Swiss write, and 14,\!400
_THIN_SPACE = re.compile(r"(?:(?<=\d)(?:\\[,:;! ]|[~\u00a0\u2009\u202f'’])|(?<=\d,)\\!)(?=\d{3}(?!\d))")
_SPACED = re.compile(r"\D*[1-9]\d{0,2}(?: \d{3})+(?:[.,]\d+)?\D*")  # 12 500 рублей: the only number of a text
_POINTS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:\.\d{3})+(?!\d)")  # 12.500; none in 0.125 and 1234.567
_SHOWN = 100  # characters of an answer that a reason quotes


class ReferenceSettings(RuleSettings):
    """What the verifiers that use a reference have in common."""

    field: str | None = Field(None, description="the key of a reference that is a JSON object; none: all of it")

    def reference_of(self, answer: Answer) -> Any:
        """The answer's reference. Raises Unverified if the row has none, or none with that key."""
        if answer.reference is None:
            raise Unverified("the row has no reference")
        if self.field is None:
            return answer.reference
        if not isinstance(answer.reference, dict) or self.field not in answer.reference:
            raise Unverified(f"the reference has no key `{self.field}`")
        return answer.reference[self.field]


class PatternSettings(RuleSettings):
    """What the verifiers have in common that look at a part of the answer."""

    pattern: Pattern | None = Field(None, description="a regular expression: its first group is the answer")
    seconds: float = Field(1, gt=0)  # for the pattern

    def part_of(self, answer: Answer) -> str:
        """The part of an answer that counts. Raises Unreadable if the pattern is not in it."""
        if self.pattern is None:
            return answer.text
        found: str | None = call(__name__, "search", self.pattern, answer.text, seconds=self.seconds)
        if found is None:
            raise Unreadable("pattern", shown(answer.text))
        return found


def search(pattern: str, text: str) -> str | None:
    """The first group of the last match, or the match if there is no group. In the worker: it may never end."""
    found = list(re.finditer(pattern, text))
    return (found[-1][1] if found[-1].re.groups else found[-1][0]) if found else None


def beside_recipe(name: str | Path, info: ValidationInfo) -> Path:
    """The path of a file that a recipe's settings name. Raises ValueError if there is none.

    The recipe's folder is `folder` in the context of validation; without one it is the current folder.
    """
    path = Path((info.context or {}).get("folder", "."), name)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; it is looked for beside the recipe")
    return path


def fenced_block(text: str, *languages: str) -> str:
    """The first ``` or ~~~language block of one of these languages, else the first block, else the whole text.

    A block of ``` may lack its end, and a text its beginning. A text that is one line may hold both, and a language.
    """
    bare = text.strip()
    blocks = [(match[2].lower(), match[3]) for match in _FENCE.finditer(bare)]
    named = [block for language, block in blocks if language in languages]
    if blocks:
        return _flush_left((named or [blocks[0][1]])[0])
    if bare.endswith("```"):
        text = bare.removesuffix("```").strip()
        if text.startswith("```"):
            text = text.removeprefix("```").strip()
            language, _, rest = text.partition(" ")
            text = rest if language.lower() in languages else text
    return _flush_left(text)


def _flush_left(text: str) -> str:
    """A text without what indents all its lines, as in an item of a list, and without blank lines around it."""
    return (textwrap.dedent(text) if text.lstrip("\r\n").startswith((" ", "\t")) else text).strip()


def plain(text: str) -> str:
    """The text with digits as 0-9, every minus as `-`, and nothing that cannot be seen or parts groups of digits."""
    return _THIN_SPACE.sub("", text.translate(_PLAIN))


def with_decimal_point(value: Any) -> Any:
    """A text in which a comma is the decimal sign as English writes its numbers; anything else as it is."""
    if not isinstance(value, str):
        return value
    whole = _POINTS.sub(lambda match: match[0].replace(".", ""), value)
    return re.sub(r"(?<=\d)(?:,|\{,\})(?=\d)", ".", whole)


def last_number(text: str) -> float | None:
    """The last number of a text, `1,234.5` and `1.234,5` read as one; None if there is none or it is too large.

    A sign follows no letter or digit: the last number of `10-20` is 20; that of `-$5` is -5. A number of digits only
    is an int.
    """
    text = plain(text).replace("{,}", ",")
    if _SPACED.fullmatch(text):
        text = re.sub(r"(?<=\d) (?=\d)", "", text)
    found = [match for match in _NUMBER.finditer(text) if match[0]]
    if not found:
        return None
    said = found[-1][0]
    said = said.replace(".", "").replace(",", ".") if found[-1]["comma"] else said
    digits = re.sub(r"[^\d.eE+-]", "", said)
    number = float(digits)
    if not math.isfinite(number):
        return None
    return int(digits) if digits.lstrip("+-").isdecimal() else number


def same_number(number: float, reference: float, tolerance: float | None) -> bool:
    """Whether a number is the reference, give or take a share of it. None: whole numbers exactly, others by 1e-6."""
    if tolerance is None:
        tolerance = 0 if _is_whole(number) and _is_whole(reference) else 1e-6
    if math.isinf(reference):  # any share of it is infinite
        return number == reference
    return abs(number - reference) <= tolerance * abs(reference)


def _is_whole(number: float) -> bool:
    return isinstance(number, int) or (number.is_integer() and abs(number) < 1 << 53)  # larger floats all are


def boxed(text: str) -> str | None:
    r"""What the last \boxed{…} holds, its braces matched; None if there is none."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for match in re.finditer(r"[{}]", text[start:]):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return text[start + len("\\boxed{") : start + match.start()]
    return None


def canonical_json(text: str) -> str:
    """The `canonical` of a JSON text, or of the fenced block that holds it. Raises Unreadable saying what is wrong."""
    try:
        return nfc(canonical(msgspec.json.decode(fenced_block(text.removeprefix("\ufeff"), "json"))))
    except RecursionError:
        raise Unreadable("json", "nested too deep") from None
    except (msgspec.MsgspecError, UnicodeError) as error:  # the latter for half a surrogate pair
        raise Unreadable("json", str(error)) from None


def canonical(value: Any) -> str:
    """JSON as one text that is equal for equal values: keys sorted, `1.0` as `1`."""
    return json.dumps(_whole_as_int(value), sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _whole_as_int(value: Any) -> Any:
    match value:
        case float() if value.is_integer():
            return int(value)
        case dict():
            return {key: _whole_as_int(item) for key, item in value.items()}
        case list():
            return [_whole_as_int(item) for item in value]
        case _:
            return value


def shown(text: str) -> str:
    """As much of an answer as a reason quotes."""
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def all_shown(texts: Iterable[str]) -> list[str]:
    """The first few right answers, as a reason quotes them."""
    return [shown(text) for text in list(texts)[:10]]
