"""Made-up Korean stories, and the records and recipe that the benchmarks of the filters make of them.

The stories make no sense, but have realistic statistics. Names, places and sentence patterns (stories.json) are those
of the flagship's teacher. The vocabulary is so large that two stories share little. Some stories follow one plot and
differ only in the words that fill it. Some copy another, with edits.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.recipe import Recipe
from pipeline.records import Completion, Message, Slots, Usage

TEXTS = json.loads(Path(__file__).with_name("stories.json").read_text())
SLOTS = {"name": TEXTS["names"], "place": TEXTS["places"], "opening": TEXTS["openings"], "closing": TEXTS["closings"]}
SYLLABLES = [chr(code) for code in range(0xAC00, 0xD7A4, 7)]  # 1,596 of the 11,172: about as many as are in use
PROMPT = "3~5세 어린이용 한국어 동화 한 편. 등장: 토끼 토토. 키워드: 달, 비. 200~400자."
TEMPLATE = "3~5세 어린이용 한국어 동화 한 편. 등장: {character}. 키워드: {keywords}. 200~400자."
PROMPT_SLOTS = {
    "character": ["토끼 토토", "곰 두두", "할머니", "고양이 미미"],
    "keywords": ["당근", "비", "달", "친구", "엄마", "꽃"],
}


class Story(NamedTuple):
    """A text; `copy_of` is the number of the story it was made from."""

    text: str
    copy_of: int | None


class Writer:
    """Writes stories, the same ones for the same seed."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._nouns = self._words(6000, 2, 4)
        adjectives = [word + ending for word in self._words(1000, 1, 3) for ending in ("한", "은")]
        verbs = [word + ending for word in self._words(1500, 1, 2) for ending in ("었어요", "했답니다")]
        words = dict.fromkeys("nmk", self._nouns) | dict.fromkeys("ab", adjectives) | dict.fromkeys("vw", verbs)
        self._slots = SLOTS | words

    def stories(self, count: int, copies: float) -> Iterator[Story]:
        """`count` stories; the share `copies` of them are copies of others, with 5-15% of the characters changed."""
        originals = count - round(count * copies)
        written: list[str] = []
        for _ in range(originals):
            written.append(self._filled(TEXTS["plot"]) if self._rng.random() < 0.2 else self._free())
            yield Story(written[-1], None)
        for original in self._rng.sample(range(originals), count - originals):
            yield Story(self._edited(written[original]), original)

    def _words(self, count: int, shortest: int, longest: int) -> list[str]:
        return ["".join(self._rng.choices(SYLLABLES, k=self._rng.randint(shortest, longest))) for _ in range(count)]

    def _filled(self, pattern: str) -> str:
        return pattern.format(**{slot: self._rng.choice(words) for slot, words in self._slots.items()})

    def _free(self) -> str:
        patterns = self._rng.choices(TEXTS["patterns"], k=self._rng.randint(6, 12))
        sentences = [self._filled(pattern) for pattern in patterns]
        return " ".join([self._rng.choice(TEXTS["openings"]), *sentences, self._rng.choice(TEXTS["closings"])])

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


def completion(number: int, text: str, prompt: str, slots: Slots | None = None) -> Completion:
    """A record with this text; all else is the same in each."""
    return Completion(
        id=f"{number:016x}",
        prompt_id=f"{number:016x}",
        messages=[Message("user", prompt)],
        slots=slots or {"character": "토끼 토토", "keywords": ["달", "비"]},
        endpoint="http://127.0.0.1:8000/v1",
        sampling={"temperature": 0.8, "top_p": 0.9, "max_tokens": 500, "seed": number},
        text=text,
        finish_reason="stop",
        model="teacher",
        usage=Usage(prompt_tokens=60, completion_tokens=200),
        latency_s=1.0,
        attempts=1,
        created="2026-01-01T00:00:00.000+00:00",
    )


def recipe_of(filters: dict[str, Any]) -> Recipe:
    prompts = {"template": TEMPLATE, "count": 1, "slots": PROMPT_SLOTS}
    about = {"name": "made-up", "teacher": {"model": "teacher"}, "prompts": prompts}
    return Recipe.model_validate({**about, "filters": filters})
