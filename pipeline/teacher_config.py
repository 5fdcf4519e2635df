"""The recipe's `teacher` section."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from pydantic import Field, SecretStr, field_validator

from pipeline.records import BOM
from pipeline.section import (
    OtherModelConfig,
    PriceConfig,
    Section,
    VariableName,
    as_given,
    checked_urls,
    weighted_urls,
)


class Example(Section):
    """A question and its right answer, told as two turns."""

    prompt: str
    """What a user asks."""
    answer: str
    """What the teacher is to answer."""


class TeacherConfig(Section):
    """The model that answers, and where it answers."""

    model: str = Field(min_length=1)
    """A Hub id, a local folder, or `embedded:<name>`: the name by which the endpoint knows the model."""
    base_url: str | list[str] = "http://127.0.0.1:8000/v1"
    """Its endpoint, or several that serve the same model: a list, or `a,b`; each with its weight: `URL 4`."""
    urls_file: Path | None = None
    """Its endpoints, one `URL` or `URL WEIGHT` per line, read again and again; `base_url` only names them in ids."""
    api_key_env: VariableName = "OPENAI_API_KEY"
    """The environment variable that holds the key; a local server needs none."""
    api_key_header: str = "Authorization"
    """The header that carries the key: `Bearer <key>` in Authorization, the bare key in any other, like `api-key`."""
    headers: dict[str, str] = Field({})
    """Further headers of every request; `${NAME}` in a value is that environment variable."""
    query: dict[str, str] = Field({})
    """Parameters added to every URL, like `{api-version: …}`."""
    price: PriceConfig | None = None
    """The teacher's price, if the table in generate/prices.py does not know it or is wrong."""
    system: str | None = None
    """A system prompt for the teacher only; a prompt's own follows it. What every model is told: `prompts.system`."""
    examples: list[Example] = Field([])
    """For the teacher only, before the prompt: a list of `{prompt: …, answer: …}`, or a JSONL file of them."""
    _section: str = "teacher"

    @field_validator("examples", mode="before")
    @classmethod
    def _read_examples(cls, given: Any) -> Any:
        given = as_given(given)
        if not isinstance(given, str | Path):
            return given
        try:
            return msgspec.json.Decoder().decode_lines(Path(given).read_bytes().removeprefix(BOM))
        except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ValueError(f"{reason}: give a list or a JSONL file of {{prompt, answer}}") from None

    @field_validator("base_url")
    @classmethod
    def _http_url(cls, given: str | list[str]) -> str | list[str]:
        entries = checked_urls(given)
        return entries[0] if len(entries) == 1 else entries

    @property
    def section(self) -> str:
        """Where the recipe names this model, for messages."""
        return self._section

    @property
    def max_tokens_key(self) -> str:
        """Where the recipe says how long its answers may be, for messages."""
        return f"{'sampling' if self._section == 'teacher' else self._section}.max_tokens"

    @property
    def url_weights(self) -> dict[str, float]:
        """Where the teacher answers, and the weight of each endpoint: its share of the requests beside the others."""
        return weighted_urls([self.base_url] if isinstance(self.base_url, str) else self.base_url)

    @property
    def urls(self) -> list[str]:
        """Where the teacher answers."""
        return [*self.url_weights]

    @property
    def url(self) -> str:
        """The first of them: the one that `serve` starts, and the one in a request's identity."""
        first = self.base_url if isinstance(self.base_url, str) else self.base_url[0]
        return first.split()[0]

    def only_at(self, weights: Mapping[str, float]) -> "TeacherConfig":
        """The same teacher at these endpoints, with their weights, whatever `urls_file` says."""
        urls = [f"{url} {weight:g}" for url, weight in weights.items()]
        return self.model_copy(update={"base_url": urls, "urls_file": None})

    def told_nothing(self) -> "TeacherConfig":
        """The same teacher without `system` and `examples`, for prompts that hold all that it is told."""
        return self.model_copy(update={"system": None, "examples": []})

    def another(self, named: OtherModelConfig, section: str) -> "TeacherConfig":
        """The model of that section, told nothing; at a URL of its own without this one's key and headers."""
        model, url = named.model or self.model, named.base_url or self.base_url
        other = self.told_nothing() if url == self.base_url else TeacherConfig(model=model, base_url=url)
        price = named.price or (other.price if model == self.model else None)
        key = named.api_key_env or other.api_key_env
        other = other.model_copy(update={"model": model, "api_key_env": key, "price": price})
        other._section = section
        return other

    def key_header(self) -> dict[str, str]:
        """The header with the key, as it is sent; none without a key."""
        if (key := self.api_key()) is None:
            return {}
        if self.api_key_header.lower() == "authorization":
            return {"Authorization": f"Bearer {key.get_secret_value()}"}
        return {self.api_key_header: key.get_secret_value()}

    def api_key(self) -> SecretStr | None:
        """The key, from the environment only; None if the variable is unset or empty.

        Spaces and line breaks around it are what `$(cat file)` and .env files leave, never part of a key.
        """
        value = os.environ.get(self.api_key_env, "").strip()
        return SecretStr(value) if value else None
