"""Made-up rows to train on, whose lengths are those of a real run. Imports nothing that is slow to load."""

import random
from typing import Any

from benchmarks.measure import question
from benchmarks.simulator import LENGTHS

WORDS = ["Toby", "the", "rabbit", "found", "a", "red", "kite", "by", "old", "oak", "in", "snow", "and", "hid", "it"]
WORDS_PER_TOKEN = 0.8


def made_up_rows(count: int, words_per_token: float = WORDS_PER_TOKEN) -> list[dict[str, Any]]:
    """Words without sense, `words_per_token` of them for each token of a real run's answers."""
    rng = random.Random(0)
    stories = (rng.choices(WORDS, k=round(rng.choice(LENGTHS) * words_per_token)) for _ in range(count))
    return [
        {
            "prompt": [{"role": "user", "content": question(number)}],
            "completion": [{"role": "assistant", "content": " ".join(story)}],
            "tools": None,
        }
        for number, story in enumerate(stories)
    ]
