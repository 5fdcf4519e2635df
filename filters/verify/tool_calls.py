"""The verifier `tool_calls`: the answer calls functions that its row has, with arguments that fit their parameters."""

from typing import Any

import msgspec
from pydantic import Field

from filters.answer import Answer, RuleSettings, Verified
from filters.verify.extract import canonical
from filters.verify.schema import VALIDATION
from filters.verify.worker import call
from pipeline.records import Json, Reason


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
        except ValueError as error:
            return Verified(_wrong(name, str(error)))
        if parameters := functions[name].get("parameters"):
            schema = msgspec.json.encode(parameters).decode()
            if wrong := call(VALIDATION, "first_error", schema, given, seconds=settings.seconds):
                return Verified(_wrong(name, f"{wrong[1]:.200} (at {wrong[0]})"))
        result.append([name, given])
    return Verified(result=canonical(result))


def _wrong(name: str, why: str) -> Reason:
    return Reason(rule="tool_calls", what="arguments", found=name, note=f"arguments of `{name}`: {why}")


def _read(arguments: str) -> Json:
    """Arguments that are a JSON object. Raises ValueError saying what else they are."""
    try:
        given: Any = msgspec.json.decode(arguments)
    except RecursionError:
        raise ValueError("nested too deep") from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(given, dict):
        raise ValueError("not a JSON object")
    return given
