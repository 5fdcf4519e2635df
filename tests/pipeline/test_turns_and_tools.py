"""Conversations with tools as data sets have them, and what no chat can be."""

import json
from typing import Any

import msgspec
import pytest

from pipeline.records import Json, Message, question_text, said
from pipeline.turns_and_tools import Turn, conversation, read_tools, template_turns

CALL = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Bonn"}'}}
OTHER = {"id": "b", "type": "function", "function": {"name": "now", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def read(*turns: dict[str, Any]) -> list[Message]:
    return conversation(msgspec.convert(turns, list[Turn]))


def test_a_conversation_in_the_openai_form_stays_as_it_is() -> None:
    messages = [
        Message("system", "Be brief."),
        Message("user", "What is the weather?"),
        Message("assistant", "", [CALL, OTHER]),
        Message("tool", "12:00", tool_call_id="b"),  # in another order
        Message("tool", "rain", tool_call_id="a"),
        Message("assistant", "Rain."),
        Message("user", "Thanks."),
    ]
    given = msgspec.to_builtins(messages)
    given[2]["content"] = None
    assert read(*given) == messages
    assert [json.loads(line) for line in map(msgspec.json.encode, messages[:2])] == given[:2]


def test_calls_and_results_without_ids_get_them() -> None:
    """TRL's form: arguments as an object, no ids, a result with the name of its function."""
    calls = [{"type": "function", "function": {"name": name, "arguments": {"n": 1}}} for name in ("a", "b", "a")]
    found = read(
        {"role": "user", "content": "go"},
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "name": "b", "content": "of b"},
        {"role": "tool", "content": "first of a"},
        {"role": "tool", "name": "a", "content": "second of a"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "c"}}]},
        {"role": "tool", "content": "of c"},
    )
    assert [call["id"] for turn in found for call in turn.tool_calls] == ["call_1", "call_2", "call_3", "call_4"]
    assert [turn.tool_call_id for turn in found if turn.role == "tool"] == ["call_2", "call_1", "call_3", "call_4"]
    assert [call["function"]["arguments"] for turn in found for call in turn.tool_calls] == [*['{"n":1}'] * 3, "{}"]


USER, CALLS, RESULT = (
    {"role": "user", "content": "go"},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "a", "content": "rain"},
)


@pytest.mark.parametrize(
    ("turns", "fault"),
    [
        ([{"role": "robot", "content": "x"}], "role 'robot' is not one of system, developer, user, assistant, tool"),
        ([{"role": "user"}], "message 1 has no `content`"),
        ([USER, {"role": "assistant", "content": None}], "message 2 has no `content`"),
        ([{**USER, "tool_calls": [CALL]}], "message 1: only the assistant calls tools, not 'user'"),
        ([USER, RESULT], "message 2: a `tool` turn must be the result of a call before it"),
        ([USER, CALLS, RESULT, RESULT], "message 4: a `tool` turn must be"),
        ([USER, CALLS, {**RESULT, "tool_call_id": "z"}], "message 3: a `tool` turn must be"),
        ([USER, CALLS, {**RESULT, "name": "now"}], "message 3: a `tool` turn must be"),
        ([USER, CALLS, USER], "message 2: no `tool` turn has the result of weather"),
        ([USER, CALLS], "message 2: no `tool` turn has the result of weather"),
    ],
)
def test_what_no_chat_can_be_is_named(turns: list[dict[str, Any]], fault: str) -> None:
    with pytest.raises(ValueError) as error:
        read(*turns)
    assert str(error.value).startswith(fault)


def test_conversations_that_call_different_tools_are_different_questions() -> None:
    turns = [Message("user", "go"), Message("assistant", "", [CALL]), Message("tool", "x", tool_call_id="a")]
    other = [turns[0], Message("assistant", "", [OTHER]), turns[2]]
    assert question_text(turns) != question_text(other)
    assert question_text(turns) == question_text([Message("user", " GO"), *turns[1:]])
    assert said(turns[1]) == 'weather {"city":"Bonn"}'
    assert said(Message("assistant", "Look.", [CALL, OTHER])) == 'Look.\nweather {"city":"Bonn"}\nnow {}'


def test_tools_are_a_list_or_its_json() -> None:
    assert read_tools([TOOL]) == read_tools(json.dumps([TOOL])) == read_tools(json.dumps([TOOL]).encode()) == [TOOL]
    assert read_tools([]) == []


def wrong_type(name: str) -> Json:
    return {"type": "function", "function": {"name": "now", "parameters": {"type": name}}}


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ([{"name": "weather"}], "…}}: Object missing required field `type`"),
        ([{"type": "retrieval", "function": {"name": "x"}}], ": Invalid enum value 'retrieval'"),
        ([{"type": "function", "function": {}}], "missing required field `name`"),
        ({"type": "function"}, "Expected `array`, got `object`"),
        ("tools", "malformed"),
        ("[" * 100_000, "must be a list of"),
        ([wrong_type("str")], "must have a JSON Schema as `parameters` (types: string, number"),
        ([wrong_type("OBJECT")], "; `now`: 'OBJECT' is not valid under any of the given schemas (at $.type)"),
        ([TOOL, TOOL], "must have different names, not weather, weather"),
    ],
)
def test_other_tools_are_refused(given: Any, fault: str) -> None:
    with pytest.raises(ValueError) as error:
        read_tools(given)
    assert fault in str(error.value)


def test_a_template_gets_arguments_as_an_object() -> None:
    cut = {"id": "c", "type": "function", "function": {"name": "now", "arguments": "{"}}
    messages = [Message("assistant", "", [CALL, cut])]
    calls = template_turns(messages)[0]["tool_calls"]
    assert [call["function"]["arguments"] for call in calls] == [{"city": "Bonn"}, "{"]
    assert messages[0].tool_calls[0]["function"]["arguments"] == '{"city":"Bonn"}'
