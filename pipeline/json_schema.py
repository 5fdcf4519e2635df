"""Whether something is a JSON Schema. Apart from other modules, as jsonschema is slow to import."""

from typing import Any

import jsonschema
from jsonschema.validators import validator_for


def check_schema(schema: Any) -> None:
    """Raises ValueError if it is not a JSON Schema."""
    try:
        validator_for(schema, default=jsonschema.Draft202012Validator).check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"{error.message} (at {error.json_path})") from None
