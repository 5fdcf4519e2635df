"""Conversations and tools as users write them, checked and put into the form of the OpenAI API. Pure.

Data sets differ: arguments of a call are an object or its JSON, calls and results have ids or not (TRL), and a column
of Parquet holds tools as JSON. Inside the project there is one form.
"""

from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import count
from typing import Any, Literal

import msgspec

from pipeline.records import Json, Message

ROLES = ("system", "developer", "user", "assistant", "tool")
A_TOOL = '{"type": "function", "function": {"name": …, "parameters": …}}'


class Function(msgspec.Struct, frozen=True):
    """What is called, and with what."""

    name: str
    arguments: str | Json | None = None


class ToolCall(msgspec.Struct, frozen=True):
    """One call of an assistant's turn, as a server or a data set has it."""

    function: Function
    id: str | None = None

    def json(self, number: int) -> Json:
        """The call in the OpenAI form; `number` makes an id where it has none. Its arguments stay unread text."""
        name, arguments = self.function.name, self.function.arguments or {}
        said = arguments if isinstance(arguments, str) else msgspec.json.encode(arguments).decode()
        return {"id": self.id or f"call_{number}", "type": "function", "function": {"name": name, "arguments": said}}


class Turn(msgspec.Struct, frozen=True):
    """One chat turn, as a data set has it."""

    role: str
    content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None  # of a turn with the role `tool`: the function whose result it is


def conversation(turns: Sequence[Turn]) -> list[Message]:
    """The turns as messages; a result without an id is that of the first open call.

    Raises ValueError for an unknown role, a call that is not the assistant's, a result of no call, and a call without
    a result.
    """
    messages: list[Message] = []
    numbers, calls = count(1), list[Json]()  # that wait for a result
    for number, turn in enumerate(turns, start=1):
        if turn.role not in ROLES:
            raise ValueError(f"role {turn.role!r} is not one of {', '.join(ROLES)}")
        if turn.tool_calls and turn.role != "assistant":
            raise ValueError(f"message {number}: only the assistant calls tools, not {turn.role!r}")
        if turn.role == "tool":
            call = next((call for call in calls if _is_result(turn, call)), None)
            if call is None:
                raise ValueError(f"message {number}: a `tool` turn must be the result of a call before it")
            calls.remove(call)
            messages.append(Message("tool", turn.content or "", tool_call_id=call["id"]))
            continue
        if calls:
            break
        if turn.content is None and not turn.tool_calls:
            raise ValueError(f"message {number} has no `content`")
        calls = [call.json(next(numbers)) for call in turn.tool_calls or ()]
        messages.append(Message(turn.role, turn.content or "", calls.copy()))
    if calls:
        raise ValueError(f"message {len(messages)}: no `tool` turn has the result of {calls[0]['function']['name']}")
    return messages


def _is_result(turn: Turn, call: Json) -> bool:
    return turn.tool_call_id in (None, "", call["id"]) and turn.name in (None, "", call["function"]["name"])


def template_turns(messages: Sequence[Message]) -> list[Json]:
    """The messages as chat templates read them: the arguments of a call are an object (TRL, vLLM), not its JSON."""
    turns: list[Json] = msgspec.to_builtins(messages)
    for function in (call["function"] for turn in turns for call in turn.get("tool_calls", ())):
        with suppress(msgspec.DecodeError, UnicodeError, RecursionError):
            function["arguments"] = msgspec.json.decode(function["arguments"])
    return turns


class _Declared(msgspec.Struct):
    name: str
    parameters: Json | None = None


class _Tool(msgspec.Struct):
    type: Literal["function"]
    function: _Declared


def read_tools(given: Any) -> list[Json]:
    """Tools from a list or its JSON.

    Raises ValueError if they are not in the OpenAI form, share a name, or have parameters that are no JSON Schema.
    """
    try:
        tools = msgspec.json.decode(given) if isinstance(given, str | bytes) else given
        functions = [tool.function for tool in msgspec.convert(tools, list[_Tool])]
        for function in functions:
            if function.parameters:
                _check_parameters(function.name, msgspec.json.encode(function.parameters))
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ValueError(f"must be a list of {A_TOOL}: {error}") from None
    names = [function.name for function in functions]
    if len(set(names)) < len(names):
        raise ValueError(f"must have different names, not {', '.join(names)}")
    return list(tools)


@lru_cache(1000)  # rows have the same tools
def _check_parameters(name: str, parameters: bytes) -> None:
    from pipeline.json_schema import check_schema  # here: jsonschema is slow to import

    try:
        check_schema(msgspec.json.decode(parameters))
    except ValueError as error:
        raise ValueError(
            f"must have a JSON Schema as `parameters` (types: string, number, integer, boolean, object, array, null); "
            f"`{name}`: {error}"
        ) from None
