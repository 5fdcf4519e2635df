"""The verifier `json_schema`: the answer, or the fenced block in it, is JSON that a JSON Schema accepts.

Validation is jsonschema's, in the worker: a schema can be slow. What `$ref` names is never fetched.
"""

from typing import Any, Self

import msgspec
from pydantic import ConfigDict, Field, PrivateAttr, ValidationInfo, model_validator

from filters.answer import Answer, Verified
from filters.verify.compare import PatternSettings
from filters.verify.extract import beside_recipe, canonical, parse_json, shown
from filters.verify.worker import call
from pipeline.records import Reason

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
                schema = msgspec.json.decode(path.read_bytes())
            except msgspec.DecodeError as error:
                raise ValueError(f"schema: {path}: {error}") from None
        from filters.verify.validation import check_schema  # here: jsonschema is slow to import

        check_schema(schema)
        self._schema = msgspec.json.encode(schema).decode()
        return self


def json_schema(answer: Answer, settings: JsonSchemaSettings) -> Verified:
    """Drops an answer that is not JSON, or that its schema refuses."""
    value = parse_json(settings.part_of(answer))
    wrong = call(VALIDATION, "first_error", settings._schema, value, seconds=settings.seconds)
    if wrong:
        where, message = wrong
        return Verified(Reason(rule="json_schema", what=where, found=shown(message)))
    return Verified(result=canonical(value))
