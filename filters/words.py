"""Words as they stand in a text: with Korean particles, English endings, or no spaces at all (Chinese, Thai, Lao, …).

The Korean particles and the forms of the copula 이다 are those of the National Institute of Korean Language's standard
grammar, as far as they follow a noun. Used by `banned_words` and `adherence`.
"""

import re
import unicodedata
from functools import lru_cache

from filters.scripts import UNSPACED

# What may follow a Korean noun and leave it that noun, up to three in a row: 할머니-께서-는, 비-까지-도, 친구-들-에게.
_PARTICLES = """
    들 님 씨 이 가 은 는 을 를 의 에 에서 에게 에게서 한테 한테서 께 께서 로 으로 로서 으로서 로써 으로써
    와 과 랑 이랑 하고 도 만 까지 부터 마저 조차 처럼 같이 만큼 보다 마다 밖에 대로 뿐 나 이나 든지 이든지
    라도 이라도 아 야 여 이여 요 이요
"""
_COPULA = "이|입니|인데"
_COPULA_AFTER_VOWEL = f"{_COPULA}|였|예|라고|라는|라면|란"  # not after 달: 달라고 asks for something
_NEVER_AFTER_CONSONANT = "(?!라도|랑|나|여)"  # 달라도 and 달랑 are other words; with 달 it is 달이라도, 달이랑
_SEVERAL = f"(?:{'|'.join(sorted(_PARTICLES.split(), key=len, reverse=True))}){{0,3}}"
_AFTER_ENGLISH = "(?:s|es|'s|’s|s'|s’|ed|d|ing|y)?"
_UNSPACED = re.compile(f"[{UNSPACED}]")
_SPACED = rf"[^\W{UNSPACED}]"  # a letter or digit that a word may go on with: not の after iPhone
# Vowel signs of India's scripts, Devanagari to Sinhala: राम is no word of its own in रामायण.
_SIGNS = "".join(chr(code) for code in range(0x900, 0xE00) if unicodedata.category(chr(code)) in ("Mn", "Mc"))
_HANGUL = re.compile("[가-힣]")
_ARTICLES = {"a", "an", "the"}


@lru_cache(maxsize=4096)
def whole_word(word: str, *, ignore_case: bool = False, endings: bool = False) -> re.Pattern[str]:
    """Finds `word` as a word of its own: `비` in `비가 와요`, not in `나비` or `비밀`; `AI` in `AI가`, not in `PAIN`.

    What is written without spaces may stand beside it: `AI` in `私はAIです`.
    `endings` also allows English plurals and endings (carrots, rained). A word of a script that is written without
    spaces is found anywhere.
    """
    flags = re.IGNORECASE if ignore_case else re.NOFLAG
    core = re.escape(word)
    if _UNSPACED.search(word):
        return re.compile(core, flags)
    # A vowel sign goes on with a word, but where endings may differ it may be one, as in दिनों of दिन.
    letter, last = (_SPACED, r"\w") if endings else (f"(?:{_SPACED}|[{_SIGNS}])", rf"[\w{_SIGNS}]")
    # What comes before is looked at last: a regex that begins with fixed text is searched many times as fast.
    alone = core + (rf"(?<!{letter}{core})" if re.match(r"\w", word) else "")
    if not re.search(f"{last}$", word):
        return re.compile(alone, flags)
    english = _AFTER_ENGLISH if endings and not _HANGUL.match(word[-1]) else ""
    copula, never = (_COPULA, _NEVER_AFTER_CONSONANT) if _ends_in_consonant(word) else (_COPULA_AFTER_VOWEL, "")
    return re.compile(f"{alone}{english}{never}(?:{_SEVERAL}|(?:{copula})[가-힣]{{0,5}})(?!{letter})", flags)


def _ends_in_consonant(word: str) -> bool:
    """Whether the last Hangul syllable has a final consonant (the 28 finals, none first, turn fastest)."""
    return _HANGUL.match(word[-1]) is not None and (ord(word[-1]) - ord("가")) % 28 > 0


def mentions(text: str, value: str, *, whole_words: bool = True) -> bool:
    """Whether a text names a thing: `value` as it stands, or each of its words in any order (English articles apart).

    A Korean word of two syllables or more may be part of a longer one (당근 in 당근밭); one of a single syllable must
    stand alone with its particles, since 비 is also in 나비, 준비 and 비밀. Without `whole_words` any word may be part
    of a longer one (кот in котом). Case does not matter.
    """
    if value in text and len(value) > 1 and "가" <= value[-1] <= "힣":
        return True
    return all(word in text if isinstance(word, str) else word.search(text) for word in _words_of(value, whole_words))


@lru_cache(maxsize=4096)
def _words_of(value: str, whole_words: bool) -> tuple[str | re.Pattern[str], ...]:
    """What to look for: a text to be found anywhere, or a pattern."""
    words = [word for word in value.split() if word.lower() not in _ARTICLES] or value.split()
    if not whole_words:
        return tuple(re.compile(re.escape(word), re.IGNORECASE) for word in words)
    return tuple(
        word if len(word) > 1 and _HANGUL.match(word) else whole_word(word, ignore_case=True, endings=True)
        for word in words
    )
