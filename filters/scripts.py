"""Writing systems as ranges of code points, and how many characters of a text are in one of them.

The ranges are Unicode's blocks and the letters in them (Unicode Standard, Scripts.txt), except Hangul, which is the
11,172 syllables 가-힣 alone: single jamo (ㅋㅋ) do not count as written Korean.
"""

import re

import numpy as np

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
    "bengali": ((0x980, 0x9E3), (0x9F0, 0x9F1), (0x9FC, 0x9FE)),
    "gurmukhi": ((0xA01, 0xA5E), (0xA70, 0xA75)),
    "gujarati": ((0xA81, 0xAE3), (0xAF9, 0xAFF)),
    "oriya": ((0xB01, 0xB63), (0xB71, 0xB71)),
    "tamil": ((0xB82, 0xBD7),),
    "telugu": ((0xC00, 0xC63),),
    "kannada": ((0xC80, 0xCE3), (0xCF1, 0xCF3)),
    "malayalam": ((0xD00, 0xD57), (0xD5F, 0xD63), (0xD7A, 0xD7F)),
    "sinhala": ((0xD81, 0xDDF), (0xDF2, 0xDF3)),
    "armenian": ((0x531, 0x556), (0x560, 0x588)),
    "georgian": ((0x10A0, 0x10FA), (0x10FC, 0x10FF), (0x1C90, 0x1CBF)),
    "ethiopic": ((0x1200, 0x135F), (0x1380, 0x138F)),
    "tibetan": ((0xF40, 0xFBC),),
    "thai": ((0xE01, 0xE3A), (0xE40, 0xE4E)),
    "lao": ((0xE81, 0xECE), (0xEDC, 0xEDF)),
    "khmer": ((0x1780, 0x17D3), (0x17D7, 0x17D7), (0x17DC, 0x17DD)),
    "myanmar": ((0x1000, 0x103F), (0x1050, 0x108F), (0x109A, 0x109D), (0xA9E0, 0xA9EF), (0xAA60, 0xAA7F)),
}
SENTENCE_MARKS = ".!?…。！？｡؟۔।॥။។៕።፧།༎։"  # Thai and Lao have none

_STARTS = {  # first code point of each range, and how far the last is from it
    script: [(np.uint32(first), np.uint32(last - first)) for first, last in ranges]
    for script, ranges in SCRIPTS.items()
}


def character_class(*scripts: str) -> str:
    """The inside of a regex's [] for the scripts named."""
    ranges = [pair for script in scripts for pair in SCRIPTS[script]]
    return "".join(f"{re.escape(chr(first))}-{re.escape(chr(last))}" for first, last in ranges)


UNSPACED = character_class("han", "kana", "thai", "lao", "khmer", "myanmar")  # written without spaces between words


def count_script(text: str, script: str) -> int:
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    wrapped = (codes - first <= size for first, size in _STARTS[script])  # what is under `first` becomes very large
    return int(sum(map(np.count_nonzero, wrapped)))
