"""What jsonschema does for the verifiers `json_schema` and `tool_calls`. Apart from them, as it is slow to import."""

import json
from functools import lru_cache
from typing import Any

import jsonschema
import msgspec
from jsonschema.validators import validator_for
from jsonschema_specifications import REGISTRY


def check_schema(schema: Any) -> None:
    """Raises ValueError if it is not a JSON Schema."""
    try:
        validator_for(schema, default=jsonschema.Draft202012Validator).check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"schema: {error.message} (at {error.json_path})") from None


def first_error(schema: str, value: str) -> tuple[str, str] | None:
    """Where a JSON text breaks its schema and how; None if it does not. In the worker."""
    error = jsonschema.exceptions.best_match(_validator(schema).iter_errors(json.loads(value)))
    return error and (error.json_path, error.message)


@lru_cache(100)
def _validator(schema: str) -> Any:
    read = msgspec.json.decode(schema)
    kind = validator_for(read, default=jsonschema.Draft202012Validator)
    return kind(read, registry=REGISTRY, format_checker=kind.FORMAT_CHECKER)
