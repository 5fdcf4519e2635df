"""The verifiers `json_schema` (the answer, or the fenced block in it, is JSON that a JSON Schema accepts) and
`tool_calls` (it calls functions that its row has, with arguments that fit their parameters).

Validation is jsonschema's, in the worker: a schema can be slow. What `$ref` names is never fetched.
"""

from typing import Any, Self

import msgspec
from pydantic import ConfigDict, Field, PrivateAttr, ValidationInfo, model_validator

from filters.answer import Answer, RuleSettings, Verified, nfc
from filters.verify.extract import PatternSettings, beside_recipe, canonical, canonical_json, shown
from filters.verify.worker import call
from pipeline.records import BOM, Json, Reason

VALIDATION = "filters.verify.validation"


class JsonSchemaSettings(PatternSettings):
    source: dict[str, Any] | str = Field(alias="schema", description="the schema, or a JSON file that holds it")
    model_config = ConfigDict(serialize_by_alias=True)
    _schema: str = PrivateAttr()  # as JSON

    @model_validator(mode="after")
    def _is_a_schema(self, info: ValidationInfo) -> Self:
        schema: Any = self.source
        if isinstance(schema, str):
            path = beside_recipe(schema, info)
            try:
                schema = msgspec.json.decode(path.read_bytes().removeprefix(BOM))
            except (msgspec.DecodeError, RecursionError) as error:
                raise ValueError(f"schema: {path}: {error}") from None
        from pipeline.json_schema import check_schema  # here: jsonschema is slow to import

        try:
            check_schema(schema)
        except ValueError as error:
            raise ValueError(f"schema: {error}") from None
        self._schema = nfc(msgspec.json.encode(schema).decode())
        return self


def json_schema(answer: Answer, settings: JsonSchemaSettings) -> Verified:
    """Drops an answer that is not JSON, or that its schema refuses."""
    value = canonical_json(settings.part_of(answer))
    wrong = call(VALIDATION, "first_error", settings._schema, value, seconds=settings.seconds)
    if wrong:
        where, message = wrong
        return Verified(Reason(rule="json_schema", what=where, found=shown(message)))
    return Verified(result=value)


class ToolCallsSettings(RuleSettings):
    required: bool = False  # an answer that calls nothing is dropped
    allowed: list[str] | None = None  # names of functions; null: all that the row has
    max_calls: int | None = Field(None, ge=1)
    seconds: float = Field(1, gt=0, le=600)  # for the check of one call


def tool_calls(answer: Answer, settings: ToolCallsSettings) -> Verified:
    """Drops an answer with a wrong call, too many calls or, where one is required, none."""
    calls = [one["function"] for one in answer.tool_calls]
    functions = {tool["function"]["name"]: tool["function"] for tool in answer.tools}
    allowed = [name for name in functions if settings.allowed is None or name in settings.allowed]
    if not calls:
        return Verified(Reason(rule="tool_calls", what="none") if settings.required else None)
    if settings.max_calls is not None and len(calls) > settings.max_calls:
        return Verified(Reason(rule="tool_calls", what="calls", value=len(calls), at_most=settings.max_calls))
    result = []
    for name, arguments in ((one["name"], one["arguments"]) for one in calls):
        if name not in allowed:
            return Verified(Reason(rule="tool_calls", what="name", found=name, allowed=allowed))
        try:
            given = _read(arguments)
            as_json = nfc(canonical(given))
        except RecursionError:
            return Verified(_wrong(name, "nested too deep"))
        except ValueError as error:
            return Verified(_wrong(name, str(error)))
        if parameters := functions[name].get("parameters"):
            schema = nfc(msgspec.json.encode(parameters).decode())
            if wrong := call(VALIDATION, "first_error", schema, as_json, seconds=settings.seconds):
                return Verified(_wrong(name, f"{wrong[1]:.200} (at {wrong[0]})"))
        result.append([name, given])
    return Verified(result=nfc(canonical(result)))


def _wrong(name: str, why: str) -> Reason:
    return Reason(rule="tool_calls", what="arguments", found=name, note=f"arguments of `{name}`: {why}")


def _read(arguments: str) -> Json:
    """Arguments that are a JSON object. Raises ValueError saying what else they are."""
    try:
        given: Any = msgspec.json.decode(arguments)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(given, dict):
        raise ValueError("not a JSON object")
    return given
