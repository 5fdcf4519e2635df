"""The verifier `json_schema`: the answer, or the fenced block in it, is JSON that a JSON Schema accepts.

Validation is jsonschema's, in the worker: a schema can be slow. What `$ref` names is never fetched.
"""

from functools import lru_cache
from typing import Any, Self

import jsonschema
import msgspec
from jsonschema.validators import validator_for
from jsonschema_specifications import REGISTRY
from pydantic import ConfigDict, Field, PrivateAttr, ValidationInfo, model_validator

from filters.answer import Answer, Verified
from filters.verify.compare import PatternSettings
from filters.verify.extract import beside_recipe, canonical, parse_json, shown
from filters.verify.worker import call
from pipeline.records import Reason


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
        try:
            validator_for(schema, default=jsonschema.Draft202012Validator).check_schema(schema)
        except jsonschema.SchemaError as error:
            raise ValueError(f"schema: {error.message} (at {error.json_path})") from None
        self._schema = msgspec.json.encode(schema).decode()
        return self


def json_schema(answer: Answer, settings: JsonSchemaSettings) -> Verified:
    """Drops an answer that is not JSON, or that its schema refuses."""
    value = parse_json(settings.part_of(answer))
    wrong = call(__name__, "first_error", settings._schema, value, seconds=settings.seconds)
    if wrong:
        where, message = wrong
        return Verified(Reason(rule="json_schema", what=where, found=shown(message)))
    return Verified(result=canonical(value))


def first_error(schema: str, value: Any) -> tuple[str, str] | None:
    """Where the value breaks its schema and how; None if it does not. In the worker."""
    error = jsonschema.exceptions.best_match(_validator(schema).iter_errors(value))
    return error and (error.json_path, error.message)


@lru_cache(100)
def _validator(schema: str) -> Any:
    read = msgspec.json.decode(schema)
    kind = validator_for(read, default=jsonschema.Draft202012Validator)
    return kind(read, registry=REGISTRY, format_checker=kind.FORMAT_CHECKER)
