"""Writing systems as ranges of code points, and a fast exact count of a text's characters in one of them.

The ranges are Unicode's blocks and the letters in them (Unicode Standard, Scripts.txt), except Hangul, which is the
11,172 syllables 가-힣 alone: single jamo (ㅋㅋ) do not count as written Korean.
"""

import re
from codecs import utf_16_le_encode
from functools import lru_cache

Ranges = tuple[tuple[int, int], ...]  # first and last code point, both inside

SCRIPTS: dict[str, Ranges] = {
    "hangul": ((0xAC00, 0xD7A3),),
    "latin": (
        *((0x41, 0x5A), (0x61, 0x7A), (0xAA, 0xAA), (0xBA, 0xBA), (0xC0, 0xD6), (0xD8, 0xF6), (0xF8, 0x24F)),
        *((0x1E00, 0x1EFF), (0xFF21, 0xFF3A), (0xFF41, 0xFF5A)),
    ),
    "han": (
        *((0x3005, 0x3005), (0x3007, 0x3007), (0x3400, 0x4DBF), (0x4E00, 0x9FFF)),
        *((0xF900, 0xFAFF), (0x20000, 0x3FFFF)),
    ),
    "kana": (
        *((0x3041, 0x3096), (0x309D, 0x309F), (0x30A1, 0x30FA), (0x30FC, 0x30FF)),
        *((0x31F0, 0x31FF), (0xFF66, 0xFF9D)),
    ),
    "cyrillic": ((0x400, 0x52F), (0x1C80, 0x1C8F), (0x2DE0, 0x2DFF), (0xA640, 0xA69F)),
    "greek": ((0x370, 0x373), (0x376, 0x37D), (0x37F, 0x3FF), (0x1F00, 0x1FFE)),
    "arabic": ((0x620, 0x65F), (0x66E, 0x6D3), (0x6D5, 0x6FF), (0x750, 0x77F), (0x8A0, 0x8FF), (0xFB50, 0xFDFF)),
    "hebrew": ((0x591, 0x5F4), (0xFB1D, 0xFB4F)),
    "devanagari": ((0x900, 0x963), (0x966, 0x97F), (0xA8E0, 0xA8FF)),
    "thai": ((0xE01, 0xE3A), (0xE40, 0xE4E)),
}

PAGE = 256  # code points that share the high byte of their UTF-16 code unit


def character_class(*scripts: str) -> str:
    """The inside of a regex's [] for the scripts named."""
    return "".join(f"{re.escape(chr(first))}-{re.escape(chr(last))}" for first, last in script_ranges(*scripts))


def script_ranges(*scripts: str) -> Ranges:
    """The code points of the scripts named."""
    return tuple(pair for script in scripts for pair in SCRIPTS[script])


class ScriptCounter:
    """Counts a script's characters by pages of 256: about 1 µs for 300 Hangul characters, where a loop needs 19.

    A page that belongs to the script as a whole is counted from the high bytes of UTF-16, by two C calls; a page that
    belongs to it in part (or lies beyond the first 65,536 code points) by a regex, and only where one occurs.
    """

    def __init__(self, script: str) -> None:
        ranges = SCRIPTS[script]
        whole, touched = set(), set()
        for first, last in ranges:
            if last < 0x10000:
                touched |= set(range(first // PAGE, last // PAGE + 1))
                whole |= set(range(-(-first // PAGE), (last + 1) // PAGE))
            else:
                touched |= set(range(0xD8, 0xDC))  # written as surrogate pairs
        self._whole = bytes(sorted(whole))
        self._partial = bytes(sorted(touched - whole))
        inside = [pair for pair in ranges if pair[1] < 0x80]
        self._ascii = bytes(code for first, last in inside for code in range(first, last + 1))
        rest = {
            (max(first, page * PAGE), min(last, page * PAGE + PAGE - 1))
            for first, last in ranges
            if last < 0x10000
            for page in range(first // PAGE, last // PAGE + 1)
            if page not in whole
        }
        rest |= {pair for pair in ranges if pair[1] >= 0x10000}
        self._rest = re.compile(
            "[" + "".join(f"{re.escape(chr(a))}-{re.escape(chr(b))}" for a, b in sorted(rest)) + "]"
        )

    def share(self, text: str, enough: float = 2.0) -> float:
        """The script's share of all characters, 0 to 1 (0 for an empty text).

        Once `enough` is reached the rest is not counted: the share returned is then at least `enough`, not exact.
        """
        size = len(text)
        if not size:
            return 0.0
        if text.isascii():
            return (size - len(text.encode("ascii").translate(None, self._ascii))) / size
        pages = utf_16_le_encode(text, "surrogatepass")[0][1::2]
        units = len(pages)
        count = units - len(pages.translate(None, self._whole))
        if count / size >= enough or len(pages.translate(None, self._partial)) == units:
            return count / size
        return (count + len(self._rest.findall(text))) / size


@lru_cache
def script_counter(script: str) -> ScriptCounter:
    """The counter of a script in SCRIPTS."""
    return ScriptCounter(script)
