"""What jsonschema does for the verifiers `json_schema` and `tool_calls`. Apart from them, as it is slow to import."""

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import jsonschema
import msgspec
from jsonschema.validators import validator_for
from jsonschema_specifications import REGISTRY

_DATA = ("const", "default", "enum", "examples")  # keywords whose value is no schema


def check_schema(schema: Any) -> None:
    """Raises ValueError if it is not a JSON Schema, or asks for a format that cannot be checked."""
    kind = validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"schema: {error.message} (at {error.json_path})") from None
    known = sorted(kind.FORMAT_CHECKER.checkers)
    if unknown := sorted(set(_formats(schema)) - set(known)):
        raise ValueError(
            f"schema: no check for format {', '.join(map(repr, unknown))}; there are {', '.join(known)}; "
            "use a `pattern`, or leave the format out"
        )


def _formats(schema: Any) -> Iterator[str]:
    """The formats that a schema asks for, whatever stands in it as data."""
    parts = schema if isinstance(schema, list) else []
    if isinstance(schema, dict):
        parts = [part for key, part in schema.items() if key not in _DATA]
        if isinstance(schema.get("format"), str):
            yield schema["format"]
    for part in parts:
        yield from _formats(part)


def first_error(schema: str, value: str) -> tuple[str, str] | None:
    """Where a JSON text breaks its schema and how; None if it does not. In the worker."""
    error = jsonschema.exceptions.best_match(_validator(schema).iter_errors(json.loads(value)))
    return error and (error.json_path, error.message)


@lru_cache(100)
def _validator(schema: str) -> Any:
    read = msgspec.json.decode(schema)
    kind = validator_for(read, default=jsonschema.Draft202012Validator)
    return kind(read, registry=REGISTRY, format_checker=kind.FORMAT_CHECKER)
