"""What a teacher costs: the recipe's own price, or this table's. Pure: reads and writes nothing.

USD per million tokens, input and output, standard tier, for prompts of up to 100,000 tokens (for longer ones, from
100,000 to 272,000 tokens on, some providers charge more). SOURCES names each provider's page and the date of the public
copy that was read. Prices change: check them if money matters, and set `teacher.price: {input: …, output: …}`. The
table leaves out a name whose sources disagreed or whose price was a passing offer, Mistral's models, and models that
think beyond `max_tokens` (Grok), whose cost no request can bound.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from pipeline.address import is_private
from pipeline.teacher_config import TeacherConfig

PICO = 10**12  # pico-dollars in a dollar: a price per token is a whole number of them
PRICED_TOKENS = 100_000  # of a prompt; a longer one can cost more than the table says
TABLE_TIERS = ("auto", "default", "flex")  # OpenAI's service_tier: what the table says, or less
DEARER = ("models", "plugins", "web_search_options")  # OpenRouter's: others that may answer instead, and paid extras
BATCH_SHARE = 0.5  # of the price, for batches: OpenAI's, Anthropic's and Google's

SOURCES = {  # by how a model's name begins
    ("gpt-", "o"): "https://developers.openai.com/api/docs/pricing as of 2026-08-05",
    ("claude-",): "https://platform.claude.com/docs/en/about-claude/pricing as of 2026-10",
    ("gemini-",): "https://ai.google.dev/gemini-api/docs/pricing as of 2026-08-05",
    ("deepseek-",): "https://api-docs.deepseek.com/quick_start/pricing as of 2026-10-27",
}
PRICES: dict[str, tuple[float, float]] = {
    "gpt-4.1": (2.0, 8.0),
    "gpt-4.1-mini": (0.4, 1.6),
    "gpt-4.1-nano": (0.1, 0.4),
    "gpt-4o": (2.5, 10.0),
    "gpt-4o-2024-05-13": (5.0, 15.0),  # the only snapshot with its own price
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
    "gpt-5.6-sol": (5.0, 30.0),
    "gpt-5.6-terra": (2.0, 12.0),
    "o1": (15.0, 60.0),
    "o3-mini": (1.1, 4.4),
    "o4-mini": (1.1, 4.4),
    "claude-haiku-4-5": (1.0, 5.0),
    "claude-haiku-5-5": (0.1, 0.5),
    "claude-sonnet-4-5": (3.0, 15.0),
    "claude-sonnet-4-6": (3.0, 15.0),
    "claude-sonnet-5": (2.0, 10.0),
    "claude-sonnet-5-5": (2.0, 10.0),
    "claude-opus-4-5": (5.0, 25.0),
    "claude-opus-4-6": (5.0, 25.0),
    "claude-opus-4-7": (5.0, 25.0),
    "claude-opus-4-8": (5.0, 25.0),
    "claude-opus-5": (5.0, 25.0),
    "claude-opus-5-5": (4.0, 20.0),
    "claude-fable-5": (10.0, 50.0),
    "claude-fable-5-1": (10.0, 50.0),
    "gemini-2.5-flash": (0.3, 2.5),
    "gemini-2.5-flash-lite": (0.1, 0.4),
    "gemini-2.5-pro": (1.25, 10.0),
    "gemini-3.1-pro-preview": (2.0, 12.0),
    "gemini-3.5-flash": (1.5, 9.0),
    "gemini-3.5-flash-lite": (0.3, 2.5),
    "deepseek-flash": (0.3, 1.2),  # at peak hours; half at other times
    "deepseek-v4-pro": (1.32, 3.96),
}
_SNAPSHOT = re.compile(r"-(\d{4}-\d{2}-\d{2}|\d{8})$")  # gpt-4.1-2025-04-14 costs what gpt-4.1 does


class Price(NamedTuple):
    """Whole pico-dollars per token."""

    input: int
    output: int

    def cost(self, prompt_tokens: int, completion_tokens: int) -> int:
        """In pico-dollars."""
        return prompt_tokens * self.input + completion_tokens * self.output


def price_of(teacher: TeacherConfig, mode: Literal["online", "batch"] = "online") -> Price | None:
    """The price of the teacher's tokens; None if it is not known, as for a server of one's own.

    A gateway's prefix (`openai/gpt-4.1`) and a snapshot's date are ignored.
    """
    if teacher.price is not None:
        listed = teacher.price.input, teacher.price.output
    elif (name := _listed(teacher)) is not None:
        listed = PRICES[name]
    else:
        return None
    share = BATCH_SHARE if mode == "batch" else 1
    return Price(*(round(share * usd * PICO / 1_000_000) for usd in listed))


def dearer_by(extra: Mapping[str, Any]) -> str | None:
    """The further field of a request that may make it dearer than the table says; None if none does."""
    if extra.get("service_tier", "default") not in TABLE_TIERS:
        return "service_tier"
    return next((name for name in DEARER if name in extra), None)


def source_of(teacher: TeacherConfig) -> str | None:
    """Where `price_of` has the price from; None if it has none."""
    if teacher.price is not None:
        return "teacher.price"
    name = _listed(teacher) or ""
    return next((source for begins, source in SOURCES.items() if name.startswith(begins)), None)


def _listed(teacher: TeacherConfig) -> str | None:
    """The teacher's name in the table."""
    if any(map(is_private, teacher.urls)):
        return None
    name = teacher.model.rsplit("/", 1)[-1].lower()
    return next((known for known in (name, _SNAPSHOT.sub("", name)) if known in PRICES), None)
