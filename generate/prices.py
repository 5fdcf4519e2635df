"""What a teacher costs: the recipe's own price, or this table's. Pure: reads and writes nothing.

USD a million tokens, input and output, standard tier, as the providers' pages said on the date below (read through
public copies of them: OpenAI's from its pricing page of 2026-08 to 2026-11, the others from GitHub's table of model
prices, docs.github.com, "Models and pricing"). Prices change: check them where money matters, and say
`teacher.price: {input: …, output: …}` in the recipe. A name whose sources disagreed is left out.
"""

import re
from typing import Literal, NamedTuple

from generate.client import is_private
from pipeline.recipe import TeacherConfig

AS_OF = "2026-11-24"
PICO = 10**12  # pico-dollars in a dollar: prices a token are whole numbers of them
BATCH_SHARE = 2  # OpenAI's and Anthropic's batches cost half

PRICES: dict[str, tuple[float, float]] = {
    "gpt-4.1": (2.0, 8.0),
    "gpt-4.1-mini": (0.4, 1.6),
    "gpt-4.1-nano": (0.1, 0.4),
    "gpt-4o": (2.5, 10.0),
    "gpt-4o-mini": (0.15, 0.6),
    "gpt-5": (1.25, 10.0),
    "gpt-5-mini": (0.25, 2.0),
    "gpt-5-nano": (0.05, 0.4),
    "gpt-5.1": (1.25, 10.0),
    "gpt-5.2": (1.75, 14.0),
    "gpt-5.4": (2.5, 15.0),
    "gpt-5.4-mini": (0.75, 4.5),
    "gpt-5.4-nano": (0.2, 1.25),
    "gpt-5.5": (5.0, 30.0),
    "gpt-5.6-luna": (0.2, 1.2),
    "gpt-5.6-terra": (2.0, 12.0),
    "claude-haiku-4-5": (1.0, 5.0),
    "claude-sonnet-4-5": (3.0, 15.0),
    "claude-sonnet-4-6": (3.0, 15.0),
    "claude-sonnet-5": (2.0, 10.0),
    "claude-opus-4-5": (5.0, 25.0),
    "claude-opus-4-6": (5.0, 25.0),
    "claude-opus-5": (5.0, 25.0),
    "grok-4.6": (2.0, 6.0),
}
_SNAPSHOT = re.compile(r"-(\d{4}-\d{2}-\d{2}|\d{8})$")  # gpt-4.1-2025-04-14 costs what gpt-4.1 does


class Price(NamedTuple):
    """Whole pico-dollars a token."""

    input: int
    output: int

    def cost(self, prompt_tokens: int, completion_tokens: int) -> int:
        """In pico-dollars."""
        return prompt_tokens * self.input + completion_tokens * self.output


def price_of(teacher: TeacherConfig, mode: Literal["online", "batch"] = "online") -> Price | None:
    """The price of the teacher's tokens; None where it is not known, as for a server of one's own.

    A gateway's prefix (`openai/gpt-4.1`) and a snapshot's date are passed over.
    """
    if teacher.price is not None:
        listed = teacher.price.input, teacher.price.output
    elif any(map(is_private, teacher.urls)):
        return None
    else:
        found = PRICES.get(_SNAPSHOT.sub("", teacher.model.rsplit("/", 1)[-1].lower()))
        if found is None:
            return None
        listed = found
    share = BATCH_SHARE if mode == "batch" else 1
    return Price(*(round(usd * PICO / 1_000_000 / share) for usd in listed))
