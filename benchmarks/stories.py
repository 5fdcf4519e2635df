"""Made-up Korean stories for `near_duplicates` and `chapter_filter`: no sense, but realistic statistics.

Names, places and sentence patterns are as the flagship's teacher uses them, over a vocabulary so large that two stories
share little. Some stories follow one plot word by word, and differ in the words that fill it. Some copy another, with
edits.
"""

import random
from collections.abc import Iterator
from typing import NamedTuple

NAMES = [
    "토끼 토토",
    "곰 두두",
    "할머니",
    "고양이 미미",
    "강아지 바둑이",
    "다람쥐 도리",
    "병아리 삐약이",
    "거북이 부기",
]
PLACES = ["숲속", "바닷가", "시골 마을", "할머니 댁", "꽃밭", "놀이터", "눈 내린 언덕", "작은 연못"]
OPENINGS = ["옛날 옛적에", "어느 맑은 아침", "비가 그친 오후에", "별이 빛나는 밤에", "첫눈이 내린 날", "바람이 부는 날"]
CLOSINGS = [
    "그날 밤 모두 행복하게 잠이 들었답니다.",
    "그 뒤로 둘은 언제나 사이좋게 지냈어요.",
    "모두 함께 웃으며 집으로 돌아갔답니다.",
]
PATTERNS = [
    "{name}는 {place}에서 {a} {n}을 보았어요.",
    "{a} {n}이 {b} {m} 옆에서 {v}.",
    '"{n}아, 나랑 같이 {m}을 찾으러 갈래?" 하고 {name}가 물었어요.',
    "{name}는 {n}을 {m}에게 나누어 주며 {v}.",
    "그때 {place} 쪽에서 {a} {n} 소리가 들려왔어요.",
    "{n}은 {b} 마음으로 {m}을 꼭 안아 주었지요.",
    "하지만 {m}은 {n} 때문에 {v}.",
    "{name}는 깜짝 놀라 {n} 뒤로 숨었어요.",
    "{b} {n}과 {a} {m}이 서로 도와 {v}.",
    "한참을 걷던 {name}는 {n} 아래에서 {v}.",
]
# One plot that every story of its kind follows: alike, but not the same.
PLOT = (
    "{opening} {name}는 {place}에 놀러 갔어요. 그곳에는 {a} {n}이 살고 있었어요. "
    "{name}는 {n}에게 다가가 인사를 했어요. "
    '"안녕, {n}아! 나랑 같이 {m}을 찾아볼래?" {n}은 {b} 목소리로 좋다고 말했어요. '
    "둘은 {m}을 찾아 {a} {k}을 지나갔어요. "
    "가는 길에 {k}이 {v}. {name}는 {b} {k}을 도와주었어요. 마침내 둘은 {m}을 찾아 기뻐하며 {w}. {closing}"
)
SYLLABLES = [chr(code) for code in range(0xAC00, 0xD7A4, 7)]  # 1,596 of the 11,172: about as many as are in use


class Story(NamedTuple):
    """A text; `copy_of` is the number of the story it was made from."""

    text: str
    copy_of: int | None


class Writer:
    """Writes stories, the same ones for the same seed."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._nouns = self._words(6000, 2, 4)
        self._adjectives = [word + ending for word in self._words(1000, 1, 3) for ending in ("한", "은")]
        self._verbs = [word + ending for word in self._words(1500, 1, 2) for ending in ("었어요", "했답니다")]

    def stories(self, count: int, copies: float) -> Iterator[Story]:
        """So many stories; the share `copies` of them copies one of the others, 5-15% of the characters changed."""
        originals = count - round(count * copies)
        written: list[str] = []
        for _ in range(originals):
            written.append(self._filled(PLOT) if self._rng.random() < 0.2 else self._free())
            yield Story(written[-1], None)
        for original in self._rng.sample(range(originals), count - originals):
            yield Story(self._edited(written[original]), original)

    def _words(self, count: int, shortest: int, longest: int) -> list[str]:
        return ["".join(self._rng.choices(SYLLABLES, k=self._rng.randint(shortest, longest))) for _ in range(count)]

    def _filled(self, pattern: str) -> str:
        pick = self._rng.choice
        return pattern.format(
            name=pick(NAMES),
            place=pick(PLACES),
            opening=pick(OPENINGS),
            closing=pick(CLOSINGS),
            **{slot: pick(self._nouns) for slot in "nmk"},
            **{slot: pick(self._adjectives) for slot in "ab"},
            **{slot: pick(self._verbs) for slot in "vw"},
        )

    def _free(self) -> str:
        patterns = self._rng.choices(PATTERNS, k=self._rng.randint(6, 12))
        sentences = [self._filled(pattern) for pattern in patterns]
        return " ".join([self._rng.choice(OPENINGS), *sentences, self._rng.choice(CLOSINGS)])

    def _edited(self, text: str) -> str:
        """Replaces words, in one place or in several, until 5-15% of the characters are others."""
        words = text.split(" ")
        left = self._rng.uniform(0.05, 0.15) * len(text)
        places = self._rng.choice([1, 1, 2, 4, 8])
        for place in range(places):
            share = left / (places - place)
            position = self._rng.randrange(len(words))
            while share > 0 and position < len(words):
                changed = len(words[position]) + 1
                words[position] = self._rng.choice(self._nouns)
                share, left, position = share - changed, left - changed, position + 1
        return " ".join(words)
