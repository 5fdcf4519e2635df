"""Numbers and values as people and models write them, in the way in which math-verify reads them.

Pure: texts in, texts out. `filters.verify.algebra` has them read and compared.
"""

import re
import unicodedata
from decimal import Decimal

from filters.verify.extract import INDIAN, plain
from filters.verify.quantities import as_one_number

_NUMBER = r"(?<![\w.,^/])(\d+(?:\.\d+)?|\.\d+)"
_CJK = r"\u3000-\u30ff\u3400-\u9fff\uac00-\ud7a3\uff01-\uff0f\uff1a-\uff1f"  # letters, and marks between them
_GLUED = re.compile(  # where math-verify needs a blank: `1/2입니다`, `答案是72。`, `9-6=3`, `<answer>3</answer>`
    rf"(?:(?<=[{_CJK}≈~>=])|(?<=[^\W\d_]:))(?=-?\$?\d)|(?<=[\d}})])(?=[{_CJK}?;—<])"
)
_SMALL = re.compile(r"(?P<power>(?<=[\d)])[⁺⁻]?[⁰¹²³⁴-⁹]+)|(?P<space>(?<=\d) ?)?[¼-¾⅐-⅞]")  # 10⁵, 2½; not cm²
_SCIENTIFIC = re.compile(_NUMBER + r"(?:e| ?[x×] ?10\^)([+-]?\d{1,2})(?![\w^]|\.\d)", re.IGNORECASE)
_SPACE = re.compile(r"(?<=\d)(?<!\d{4}) (?=\d{3}(?![\d/]))")  # in a value by itself, in which 1 500/600 is mixed
_MIXED = re.compile(r"(?<![\w.,^/])(?<!\d )(\d+) (\d+)/(\d+)(?![\w^/]|\.\d)")
_GROUPS = rf"(?:[1-9]\d{{0,2}}(?:(?:,|\{{,\}})\d{{3}})+|{INDIAN})(?![\d,])"
_THOUSANDS = re.compile(  # none in the pair `(100,200)` and the set `\{100,200\}`
    rf"(?<![\d.,])(?<!(?<!\\)[(\[])(?<![,;] )(?<!\\\{{){_GROUPS}"
    rf"|(?<=[(\[]){_GROUPS}(?=\s*(?:[-+*/×÷^]|\\times|\\cdot|\\div))"
)
_DOTTED = re.compile(  # 1.234.567, 1.234,5; not the pair `(1.234,5)` and the set `\{1.234,5\}`
    r"(?<![\w.,/^])(?:[1-9]\d{0,2}(?:\.\d{3}){2,}(?:,\d+)?"
    r"|(?<!(?<!\\)[(\[])(?<![(\[]-)(?<!\\\{)[1-9]\d{0,2}\.\d{3},\d+)(?![,.]?\d)"
)
_EMPHASIS = re.compile(  # **72**, 共**72**个; none in 3*4 and 2**3
    rf"(?<![^\W{_CJK}])(?<![)\]}}^*\\])(\*{{1,3}})(?=\S)(.+?)(?<=[^\s*])\1(?![^\W{_CJK}]|[(*])"
)
# What is no part of a value goes. ’ stays, as it is also a prime.
_PLAIN_SIGNS = str.maketrans("", "", '`"“”„‟«»‹›‘‚€£¥₩₹')
_MINUS_DOLLARS = re.compile(r"(?<![\w.$)])-\$(?=\d)")  # -$5; no end of LaTeX and begin of more: $3$-$5$
_CHOSEN = re.compile(r"(?:\A|(?<=답[:은])|(?<=답[:은] ))[①-⑳](?! ?\d)")  # 정답: ③
_ROOT = re.compile(r"√ ?(?:(\d+(?:\.\d+)?)|\(([^()]*)\))")
_PI = re.compile(r"(?<=\d) ?pi\b")
_ATOM = r"(?:\d+(?:\.\d+)?|π|\\sqrt\{[^{}]*\})"
_TERM = rf"(?:{_ATOM}|\((?:{_ATOM}|[-+*/×·^ ])+\))"
_SYMBOLIC = re.compile(  # 16π, 2√3 (as \sqrt by then), (1 + √5)/2; not the 2π of 2πr
    rf"(?<![\w.,)])(?=[-\d.+*/×·^() ]*(?:π|\\sqrt))(?>-?{_TERM}(?:(?: ?[-+*/×·^] ?-?| (?=[π\\]))?{_TERM})*)"
    r"(?!(?![ckm]?m[²³]?(?![a-z]))[a-z²³])"
)
_RATIO = re.compile(r"(?<![\w:.,/])(\d+(?:\.\d+)?)( ?):\2(\d+(?:\.\d+)?)(?![\d:.]*\d)")
_ANSWER = (  # the word `answer`
    "answer|(?<!\\w)정?답은?|答案|答え|答(?=[:：])|antwort|réponse|respuesta|resposta|risposta|ответ|cevap"
    "|đáp án|đáp số|الجواب|الإجابة|התשובה|उत्तर|คำตอบ"
)
_IS = "is|ist|lautet|est|es|é|è|là|هو|هي|הוא|היא|是|为|は|คือ|[—-](?= )"  # the dash: in Russian
_STATED = re.compile(  # a value right after the last word `answer` that ends its sentence or line
    rf"(?>.*(?:{_ANSWER}))(?: finale?)?(?: ?(?:{_IS}))?\s?[:：=]?\s*"
    r"(?:\$.+?\$|\\\(.+?\\\)|\\\[.+?\\\]|-?\\?\$?[\d.,/]*\d) ?[^\s\d.。।]*(?:[.।]\s|。|\n)",
    re.IGNORECASE | re.DOTALL,
)
_FULL_STOP = re.compile(r"(?<=\d)(/\d+)\.(?=\s|\Z)")  # math-verify reads `6/5.` as 6/5.0, which is no 6/5
_LINES = re.compile(  # \begin{align*} A &= 30^2\pi \\ &= 900\pi \end{align*}
    r"(?:\\\[|\$\$)?\s*\\begin\{((?:align|gather|equation)(?:ed)?\*?)\}(.*?)\\end\{\1\}[\s.]*(?:\\\]|\$\$)?", re.DOTALL
)
_LATEX_STOP = re.compile(r"(?<!\\right)\.(?=\s*\\[\])]|\$)")  # \[ x = \frac{7}{2}. \], which it cannot read
_LATEX = re.compile(r"\$|\\[(\[]")
_DOLLARS = re.compile(r"(?<!\\)\$")
_END = re.compile(r"(?<!\\)[.,;。*`\s]+$")
_NO_UNITS = (  # words that make another value of the number before them
    "and|or|pi|in|mod|sqrt|(?:a|arc)?(?:sin|cos|tan|sec|csc|cot)h?|log|ln|exp|percent|factorial|squared|cubed|dozen|hundred|"
    "thousand|million|billion|hal(?:f|ves)|thirds?|quarters?|fifths?|tenths?|hundredths?|times|plus|minus|over"
)
_THEN_WORDS = re.compile(  # `5 apples`, `5 (apples)`, `1/2 개`, `2/5, so we are done`
    rf"([^\s\d]*\d\S*?)(?:[.,;:] +(?=\w+ )| +(?=[^\W\d_]{{3}}|\([^\W\d_]{{2}}|[{_CJK}])\(?)(?!.*\b(?:{_NO_UNITS})\b)"
    r"[^\W\d_]+(?:[ ,.;:]+[^\W\d_]+)*\)?",
    re.IGNORECASE,
)
_GAP = r"(?:\\[,;:! ]|[~\s])*"
_UNIT = re.compile(  # `72 \text{ clips}`, `9\pi\,\mathrm{cm}^2`; none in `3\mathrm{i}` and `2 \text{ h } 30`
    rf"(?:(?<=[\d)}}])|(?<=\\pi)){_GAP}\\(?:text|textrm|mbox|mathrm(?=\{{\w\w))\{{(?=[^{{}}]*[^\W\d_])"
    rf"(?![^{{}}]*\b(?:{_NO_UNITS}|to|of|is|are|if|for|when|where|otherwise|choose|cis)\b)"
    rf"[^{{}}\d]*\}}(?:\^\{{?[23]\}}?|[²³])?(?!{_GAP}(?:[\d(]|\\[dt]?frac|\\sqrt))",
    re.IGNORECASE,
)


def value_alone(text: str) -> str:
    r"""A value without what stands around it (`$`, `**`, `\(…\)`, a full stop, plain words after it), for LaTeX."""
    text = _END.sub("", _DOLLARS.sub("", text).lstrip("*` \n"))
    for start, end in ((r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(start) and text.endswith(end):
            text = text[2:-2].strip()
    value = _plain(_SPACE.sub("", text))
    then_words = _THEN_WORDS.fullmatch(value)
    return then_words[1] if then_words else value


def value_within(text: str) -> str:
    """A text up to the answer that it states, if it states one: math-verify would take a value from what follows.

    `16π` becomes LaTeX, and `3:2` a fraction.
    """
    text = _plain(_LINES.sub(_last_line, text))
    text = _LATEX_STOP.sub("", _RATIO.sub(r"\1/\3", text))
    text = _FULL_STOP.sub(r"\1\n", text)
    if not _LATEX.search(text):
        text = _SYMBOLIC.sub(r"$\g<0>$", text)
    stated = _STATED.match(text)
    return stated[0] if stated else text


def _plain(text: str) -> str:
    r"""A text without emphasis, quotes, signs of money and units in `\text{}`, its numbers as math-verify reads them.

    That is `1.5e3` as 1500, `1 1/2` as 3/2 and `10\,500` as 10500: it would read 1.5, 1 and 10 times 500.
    """
    text = _EMPHASIS.sub(r"\2", _MINUS_DOLLARS.sub("$-", plain(text)).translate(_PLAIN_SIGNS))
    text = _DOTTED.sub(lambda match: match[0].replace(".", "").replace(",", "."), text)
    text = _UNIT.sub("", as_one_number(text).replace("\\$", ""))
    text = _CHOSEN.sub(lambda match: f"{unicodedata.numeric(match[0]):.0f}", _PI.sub("π", text))
    text = _ROOT.sub(lambda match: f"\\sqrt{{{match[1] or match[2]}}}", text)
    text = _THOUSANDS.sub(lambda match: re.sub(r"\D", "", match[0]), text)
    text = _SMALL.sub(_full_size, _GLUED.sub(" ", text))
    text = _SCIENTIFIC.sub(lambda match: f"{Decimal(f'{match[1]}e{match[2]}'):f}", text)
    return _MIXED.sub(lambda match: _fraction(match) or match[0], text)


def _last_line(lines: re.Match[str]) -> str:
    r"""`\[ 900\pi \]`, of equations below each other, which math-verify cannot read."""
    last = re.split(r"\\\\(?:\[[\w.]+\])?", lines[2].rstrip("\\ \n"))[-1].replace("&", "")
    return "\\[ " + re.sub(r"^(?:[=\s]|\\(?:q?quad|Rightarrow|implies))+", "", last) + " \\]"


def _full_size(small: re.Match[str]) -> str:
    """`^5` for ⁵, `1/2` for ½."""
    before = "^" if small["power"] else "" if small["space"] is None else " "
    return before + unicodedata.normalize("NFKC", small[0].strip()).replace("\N{FRACTION SLASH}", "/").replace("−", "-")


def _fraction(mixed: re.Match[str]) -> str | None:
    whole, above, below = map(int, mixed.groups())
    return f"{whole * below + above}/{below}" if above < below else None
