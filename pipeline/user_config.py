"""The recipe's `prompts.user` section: a second model that goes on with the conversation."""

from pydantic import Field

from pipeline.section import OtherModelConfig


class UserConfig(OtherModelConfig):
    """A second model plays the user: it writes the next message, the teacher answers, and one budget pays both."""

    turns: int = Field(1, ge=1)
    """Messages that it writes; the record has the whole conversation, and the last answer as its text."""
    system: str | None = None
    """What it is told: who the user is, and what they want; null: to react to the answer, and to ask on."""
    max_tokens: int = Field(200, ge=1)
    """Tokens of a message, at most."""
