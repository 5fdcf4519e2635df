"""Texts around every threshold of the reference rules, made from others by one to three changes each."""

import random
from collections.abc import Iterator
from unicodedata import normalize

from benchmarks.chapter_filter import BANNED, Change, insert


def mutations(sources: list[tuple[str, str]], count: int, seed: int) -> Iterator[tuple[str, str]]:
    """The sources as they are, then with one to three changes each."""
    rng = random.Random(seed)
    yield from sources
    for _ in range(count - len(sources)):
        text, prompt = rng.choice(sources)
        for change in rng.choices(CHANGES, k=rng.randint(1, 3)):
            text = change(text, prompt, rng)
        yield text, prompt


def _resize(text: str, prompt: str, rng: random.Random) -> str:
    size = rng.choice([0, 1, 149, 150, 151, 599, 600, 601, rng.randint(0, 900)])
    return (text * (size // max(len(text), 1) + 1))[:size]


def _other_script(text: str, prompt: str, rng: random.Random) -> str:
    share = rng.choice([0.3, 0.5, rng.random()])
    return "".join(rng.choice("abcé ㄱ漢あ🐰힣가ힿ") if rng.random() < share else char for char in text)


def _half(text: str, prompt: str, rng: random.Random) -> str:
    """Exactly half of the characters, or one less or more, are syllables."""
    half = rng.randint(75, 300)
    chars = ["가"] * (half + rng.choice([-1, 0, 1])) + ["."] * half
    rng.shuffle(chars)
    return "".join(chars)


CHANGES: list[Change] = [  # around the thresholds
    _resize,
    _other_script,
    _half,
    lambda text, prompt, rng: insert(text, "같은", rng, times=rng.choice([4, 5, 6, 7])),
    lambda text, prompt, rng: insert(text, rng.choice([*BANNED, "ai", "Model", "로 봇", "AI는"]), rng),
    lambda text, prompt, rng: insert(text, prompt[: rng.choice([19, 20, 21])], rng),
    lambda text, prompt, rng: normalize("NFD", text),
    lambda text, prompt, rng: text.replace(" ", rng.choice(["", "\n", "\t", "\u3000"])),
]
