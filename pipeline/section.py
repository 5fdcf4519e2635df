"""What all sections of a recipe share, and the small sections that several of them hold."""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, AnyHttpUrl, BaseModel, ConfigDict, Field, TypeAdapter, field_validator
from pydantic.fields import FieldInfo

MOST_WEIGHT = 1000  # more is no weight: a port that was written after a space
MOST_USD = 1e9  # more is a slip, and a number that overflows in pico-dollars
HALF_PAIR = "half of a surrogate pair, which UTF-8 cannot write; write the character itself, or remove it"
DEEPEST = 100  # levels of a value: deeper ones cannot be written, and an anchor within itself has no end


class Section(BaseModel):
    """One section: frozen, unknown keys refused. The text under each key is what `--help` and docs/settings.md show."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        populate_by_name=True,
        serialize_by_alias=True,
    )

    @field_validator("*")
    @classmethod
    def _can_be_written(cls, value: Any) -> Any:
        if isinstance(value, Path):
            if "\0" in str(value):
                raise ValueError("holds NUL, which no file name can; remove it")
            return value  # its bytes may be no UTF-8, as file names' may
        try:
            json.dumps(value, ensure_ascii=False, default=repr).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"holds {error.object[error.start]!r}, {HALF_PAIR}") from None
        return value


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section that a key holds; None for a plain value."""
    kinds = (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def checked_urls(given: str | list[str]) -> list[str]:
    """Endpoints as a recipe keeps them: `URL`, or `URL WEIGHT`; of each text those between its commas.

    Raises ValueError at one that is no http URL or has a wrong weight, or if there is none.
    """
    texts = [given] if isinstance(given, str) else given
    weights = weighted_urls(entry for text in texts for entry in text.split(","))
    if not weights:
        raise ValueError("needs at least one URL")
    for url in weights:
        TypeAdapter(AnyHttpUrl).validate_python(url)
    return [url if weight == 1 else f"{url} {weight:g}" for url, weight in weights.items()]


def weighted_urls(entries: Iterable[str]) -> dict[str, float]:
    """URLs and their weights: `URL`, or `URL WEIGHT` with a number above 0; 1 without. Raises ValueError."""
    weights: dict[str, float] = {}
    for entry in entries:
        url, *given = entry.split(None, 1) or [""]
        url, weight = url.rstrip("/"), given[0].strip() if given else "1"
        try:
            number = float(weight)
        except ValueError:
            number = 0.0
        if not 0 < number <= MOST_WEIGHT:
            raise ValueError(f"{url}: its weight must be a number above 0, at most {MOST_WEIGHT}, not {weight!r}")
        if weights.setdefault(url, number) != number:
            raise ValueError(f"{url} has two weights, {weights[url]:g} and {number:g}; keep one")
    return weights


Endpoints = Annotated[str, AfterValidator(lambda given: ",".join(checked_urls(given)))]  # with commas between them


def json_value(given: Any, level: int = 0) -> Any:
    """A value of any shape as JSON has it: a number that is a key becomes text. Raises ValueError if it is no JSON."""
    if level > DEEPEST:
        raise ValueError(f"is nested over {DEEPEST} levels deep; make it flatter, or text")
    if isinstance(given, dict):
        if wrong := [key for key in given if isinstance(key, bool) or not isinstance(key, str | int | float)]:
            raise ValueError(f"has the key {wrong[0]!r}, as YAML reads it; put it in quotes")
        return {str(key): json_value(value, level + 1) for key, value in given.items()}
    if isinstance(given, list | tuple):
        return [json_value(value, level + 1) for value in given]
    if given is None or isinstance(given, str | int) or (isinstance(given, float) and math.isfinite(given)):
        return given
    raise ValueError(f"holds {given!r}, which JSON does not have; make it a text, in quotes")


def as_given(value: Any) -> Any:
    """A list, or the name of a file that holds it, which comes as the only item of a list if it is a flag's value."""
    return value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str) else value


AnyValue = Annotated[Any, AfterValidator(json_value)]


def _checked_name(given: str) -> str:
    if not re.fullmatch(r"([A-Za-z_][A-Za-z0-9_]*)?", given):
        raise ValueError("must be the name of an environment variable, not a key: give the key in that variable")
    return given


VariableName = Annotated[str, AfterValidator(_checked_name)]  # of an environment variable that holds a key


class PriceConfig(Section):
    """What a model costs, in USD per million tokens."""

    input: float = Field(ge=0, le=MOST_USD)
    """USD per million prompt tokens."""
    output: float = Field(ge=0, le=MOST_USD)
    """USD per million completion tokens."""


class OtherModelConfig(Section):
    """A model beside the teacher."""

    model: str | None = Field(None, min_length=1)
    """The model, as its endpoint names it; null: the teacher itself."""
    base_url: Endpoints | None = None
    """Where it answers; null: at the teacher's URL, with the teacher's key, headers and query."""
    api_key_env: VariableName | None = Field(None, min_length=1)
    """The environment variable that holds its key; null: the teacher's at the teacher's URL, else OPENAI_API_KEY."""
    price: PriceConfig | None = None
    """Its price, if the table does not know it or is wrong."""


class BudgetConfig(Section):
    """What a run may spend at most, over all calls. A request in flight counts as the most that it can cost."""

    usd: float | None = Field(None, gt=0, le=MOST_USD)
    """USD; null: no limit. Needs a price: of the table, or `price`."""
    tokens: int | None = Field(None, gt=0)
    """Prompt and completion tokens together; null: no limit."""
