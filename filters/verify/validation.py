"""What jsonschema does for the verifiers `json_schema` and `tool_calls`. Apart from them, as it is slow to import."""

import json
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from typing import Any

import jsonschema
import msgspec
from jsonschema.validators import extend, validator_for
from jsonschema_specifications import REGISTRY


def first_error(schema: str, value: str) -> tuple[str, str] | None:
    """Where a JSON text breaks its schema and how; None if it does not. In the worker."""
    error = jsonschema.exceptions.best_match(_validator(schema).iter_errors(json.loads(value)))
    return error and (error.json_path, error.message)


@lru_cache(100)
def _validator(schema: str) -> Any:
    read = msgspec.json.decode(schema)
    kind = validator_for(read, default=jsonschema.Draft202012Validator)
    exact = extend(kind, {"multipleOf": _multiple_of})  # type: ignore[no-untyped-call]
    return exact(read, registry=REGISTRY, format_checker=kind.FORMAT_CHECKER)


def _multiple_of(validator: Any, step: float, value: Any, _schema: Any) -> Iterator[jsonschema.ValidationError]:
    """The numbers as they are written: as floats 19.99 is no multiple of 0.01."""
    if validator.is_type(value, "number") and (Fraction(str(value)) / Fraction(str(step))).denominator != 1:
        yield jsonschema.ValidationError(f"{value} is not a multiple of {step}")
