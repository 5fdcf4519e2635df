"""The rule `tool_calls`: an answer calls functions that the row has, with arguments that fit their parameters.

Parameters are JSON Schema (the OpenAI API's `tools`), checked by jsonschema, which never fetches a `$ref`.
"""

from functools import lru_cache
from typing import Any

import msgspec
from pydantic import Field

from filters.answer import UNVERIFIED, Answer, RuleSettings
from pipeline.records import Json, Reason

SAID_CHARS = 200  # of jsonschema's words, which quote the arguments
TOO_DEEP = "nested too deep"
_encoder = msgspec.json.Encoder()


class ToolCallsSettings(RuleSettings):
    required: bool = False  # an answer that calls nothing is dropped
    allowed: list[str] | None = None  # names of functions; null: all that the row has
    max_calls: int | None = Field(None, ge=1)


def tool_calls(answer: Answer, settings: ToolCallsSettings) -> Reason | None:
    """Drops an answer with a wrong call, too many calls or, where one is required, none."""
    calls = answer.tool_calls
    if not calls:
        return Reason(rule="tool_calls", what="none") if settings.required else None
    if settings.max_calls is not None and len(calls) > settings.max_calls:
        return Reason(rule="tool_calls", what="calls", value=len(calls), at_most=settings.max_calls)
    functions: dict[str, Json] = {tool["function"]["name"]: tool["function"] for tool in answer.tools}
    allowed = [name for name in functions if settings.allowed is None or name in settings.allowed]
    for call in calls:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        if name not in allowed:
            return Reason(rule="tool_calls", what="name", found=name, allowed=allowed)
        try:
            wrong = _wrong(arguments, _encoder.encode(functions[name].get("parameters") or {}))
        except _NoSchema as error:
            return Reason(rule=UNVERIFIED, what="tool_calls", note=f"parameters of `{name}`: {error}")
        if wrong:
            return Reason(rule="tool_calls", what="arguments", found=name, note=f"arguments of `{name}`: {wrong}")
    return None


class _NoSchema(Exception):
    """The parameters of a function are not a JSON Schema that can be used."""


def _wrong(arguments: str, schema: bytes) -> str | None:
    """Why a call's arguments do not fit, or None."""
    try:
        given = msgspec.json.decode(arguments)
    except RecursionError:
        return TOO_DEEP
    except (msgspec.DecodeError, UnicodeError) as error:
        return f"not JSON: {error}"
    if not isinstance(given, dict):
        return "not a JSON object"
    from jsonschema.exceptions import best_match
    from referencing.exceptions import Unresolvable

    try:
        wrong = best_match(_validator(schema).iter_errors(given))
    except RecursionError:
        return TOO_DEEP
    except Unresolvable as error:
        raise _NoSchema(f"{error}; a `$ref` must point into the schema itself") from None
    return f"{wrong.message[:SAID_CHARS]} (at {wrong.json_path})" if wrong else None


@lru_cache
def _validator(schema: bytes) -> Any:
    """A validator of the schema. Raises _NoSchema."""
    from jsonschema import Draft202012Validator, SchemaError  # a tenth of a second, and few recipes have tools
    from jsonschema.validators import validator_for
    from referencing import Registry

    parameters = msgspec.json.decode(schema)
    kind = validator_for(parameters, default=Draft202012Validator)
    try:
        kind.check_schema(parameters)
    except SchemaError as error:
        raise _NoSchema(f"not a JSON Schema: {error.message[:SAID_CHARS]}") from None
    return kind(parameters, registry=Registry())  # an empty registry: nothing is looked up elsewhere
