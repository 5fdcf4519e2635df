"""The recipe's `sampling` section: how the teacher samples."""

from typing import Any

from pydantic import Field, field_validator

from pipeline.section import AnyValue, Section

TOKEN_IDS = "return_tokens_as_token_ids"  # vLLM's: tokens are named by their ids, since the strings of two may be equal
LIMITS = ("max_tokens", "max_completion_tokens")  # two names of one: the budget counts by sampling.max_tokens
LOGPROBS = ("logprobs", "top_logprobs", TOKEN_IDS)  # fields of a request


class SamplingConfig(Section):
    """How the teacher samples. All of it is sent with every request, always."""

    temperature: float = Field(0.8, ge=0, le=2)
    """0 takes the likeliest token each time; higher is more varied."""
    top_p: float = Field(0.9, gt=0, le=1)
    """Sample only among the likeliest tokens that together have this probability. Below 1, vLLM on a CPU sorts the
    vocabulary for each token: a third to a half of a small model's time."""
    max_tokens: int = Field(500, ge=1)
    """Tokens of an answer, at most."""
    seed: int | None = 0
    """The seed from which, with its id, each request's own seed is derived; null: none is sent."""
    logprobs: int | None = Field(None, ge=1, le=20)
    """Likeliest tokens to store per token of an answer, in logprobs.jsonl, for `train.kd.teacher: stored`."""
    extra: dict[str, AnyValue] = Field({})
    """Further fields of the request, sent as they are: `top_k`, `chat_template_kwargs`, …"""

    @field_validator("extra")
    @classmethod
    def _not_ours(cls, extra: dict[str, Any]) -> dict[str, Any]:
        taken = {"temperature", "top_p", "seed", "model", "messages", "stream", "n", "tools", *LIMITS, *LOGPROBS}
        if taken := taken & extra.keys():
            raise ValueError(
                f"cannot hold {', '.join(sorted(taken))}: the recipe sets that elsewhere, or the client does"
            )
        return extra

    def fields(self) -> dict[str, Any]:
        """What a request carries of it."""
        logprobs = {"logprobs": True, "top_logprobs": self.logprobs, TOKEN_IDS: True} if self.logprobs else {}
        return {**self.model_dump(exclude={"logprobs", "extra"}, exclude_none=True), **logprobs, **self.extra}
