"""The recipe's `prompts.user` section: a second model that goes on with the conversation."""

from pydantic import Field

from pipeline.section import Endpoints, PriceConfig, Section, VariableName


class UserConfig(Section):
    """A second model plays the user: after an answer it writes the next message, and the teacher answers that."""

    turns: int = Field(1, ge=1)
    """Messages that it writes; the record has the whole conversation, and the last answer as its text."""
    model: str | None = Field(None, min_length=1)
    """The model, as its endpoint names it; null: the teacher itself."""
    base_url: Endpoints | None = None
    """Where it answers; null: at the teacher's URL, with the teacher's key, headers and query."""
    api_key_env: VariableName | None = Field(None, min_length=1)
    """The environment variable that holds its key; null: the teacher's at the teacher's URL, else OPENAI_API_KEY."""
    price: PriceConfig | None = None
    """Its price, if the table does not know it or is wrong. What it costs is part of the run's budget."""
    system: str | None = None
    """What it is told: who the user is, and what they want; null: to react to the answer, and to ask on."""
    max_tokens: int = Field(200, ge=1)
    """Tokens of a message, at most."""
