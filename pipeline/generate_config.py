"""The recipe's section `generate`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.section import Section


class GenerateConfig(Section):
    """How fast the client asks, and how long it waits for an endpoint."""

    mode: Literal["online", "batch"] = "online"
    """batch: through the endpoint's Batch API, at half the price, within a day."""
    concurrency: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Requests in flight per endpoint, times its weight; auto: as many as keep the endpoint full."""
    share_prompt: bool = False
    """true: one request (`n`) for all samples of a prompt. Pays where an API charges for prompts; vLLM caches them."""
    processes: int = Field(1, ge=1)
    """Processes on this machine; more than one if a single core cannot keep the server full."""
    requests_per_minute: float | None = Field(None, gt=0)
    """Limit per endpoint, times its weight; null: what the endpoint's headers say, if they do."""
    tokens_per_minute: float | None = Field(None, gt=0)
    """Limit per endpoint, times its weight; null: what the endpoint's headers say, if they do."""
    request_timeout_s: float | None = Field(None, gt=0)
    """Seconds for one attempt; null: 300, or 3600 at a server that shows what it is working on, as vLLM does."""
    deadline_s: float | None = Field(None, gt=0)
    """Seconds in flight over all attempts of a request; null: three times `request_timeout_s`."""
    max_attempts: int = Field(6, ge=1)
    """Attempts per request before it counts as failed."""
    give_up_s: float = Field(600, gt=0)
    """Seconds that all endpoints may be down before the run ends."""
    metrics_port: int | None = Field(None, ge=1, le=65535)
    """Serves metrics for Prometheus at this port while requests go out; null: none."""
    metrics_host: str = "127.0.0.1"
    """The address to serve metrics at: this machine only, or 0.0.0.0 for everybody who can reach it."""
    batch_poll_s: float = Field(60, gt=0)
    """Seconds between two looks at a batch, at most."""

    @model_validator(mode="after")
    def _shared_online(self) -> "GenerateConfig":
        if self.share_prompt and self.mode == "batch":
            raise ValueError(
                "share_prompt is for mode online, because a batch has a request for each sample; leave out one of them"
            )
        return self
