"""The verifier `tool_calls`, and what the other rules make of an answer that only calls."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from filters.answer import Answer
from filters.reasons import describe
from filters.ruleset import load_rules
from filters.verify.schema import ToolCallsSettings, tool_calls
from pipeline.filters_config import FiltersConfig
from pipeline.records import Json

WEATHER: Json = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
    "required": ["city"],
    "additionalProperties": False,
}
TREE: Json = {"type": "object", "properties": {"child": {"$ref": "#"}}}
AWAY: Json = {"$ref": "http://127.0.0.1:1/schema.json"}


def tool(name: str, parameters: Json | None = None) -> Json:
    return {"type": "function", "function": {"name": name} | ({"parameters": parameters} if parameters else {})}


TOOLS = [
    tool("weather", WEATHER),
    tool("now"),
    tool("plant", TREE),
    tool("away", AWAY),
    tool("broken", {"type": "objct"}),
    tool("paint", {"type": "object", "properties": {"colour": {"enum": ["빨강"]}}}),
    tool("jamo", {"properties": {"colour": {"enum": [unicodedata.normalize("NFD", "빨강")]}}}),
]


def call(name: str, arguments: Any) -> Json:
    said = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": said}}


def found(*calls: Json, tools: list[Json] = TOOLS, text: str = "", **settings: Any) -> list[str]:
    """The rules that drop an answer, with their words."""
    rules = load_rules(
        FiltersConfig.model_validate({"rules": [{"rule": "tool_calls", **settings}]}), Path("recipe.yaml")
    )
    answer = Answer(text, "", "tool_calls", {}, tools=tools, tool_calls=list(calls))
    return [f"{reason.rule}: {describe(reason)}" for reason in rules.reasons(answer)]


@pytest.mark.parametrize(
    ("calls", "settings", "words"),
    [
        ([call("weather", {"city": "서울"})], {}, None),
        ([call("weather", {"city": "서울", "days": 2}), call("now", {})], {}, None),
        ([call("paint", unicodedata.normalize("NFD", '{"colour": "빨강"}'))], {}, None),
        ([call("paint", '{"colour": "\\u1108\\u1161\\u11af\\u1100\\u1161\\u11bc"}')], {}, None),
        ([call("jamo", {"colour": "빨강"})], {}, None),
        ([call("now", {"whatever": 1})], {}, None),  # a function without parameters says nothing of them
        ([], {}, None),
        ([], {"required": True}, "no tool is called"),
        ([call("now", {})] * 3, {"max_calls": 2}, "3 tool calls, at most 2 wanted"),
        ([call("now", {})] * 2, {"max_calls": 2, "allowed": ["now"]}, None),
        ([call("now", {})], {"allowed": ["weather"]}, "calls `now`, allowed: weather"),
        ([call("wether", {})], {}, "calls `wether`, allowed: weather, now, plant, away, broken"),
        ([call("weather", "{")], {}, "arguments of `weather`: not JSON: Input data was truncated"),
        ([call("weather", [])], {}, "arguments of `weather`: not a JSON object"),
        ([call("weather", {})], {}, "arguments of `weather`: 'city' is a required property (at $)"),
        (
            [call("weather", {"city": "서울", "days": "two"})],
            {},
            "arguments of `weather`: 'two' is not of type 'integer' (at $.days)",
        ),
        ([call("now", {}), call("weather", {"city": "a", "country": "b"})], {}, "('country' was unexpected) (at $)"),
        ([call("weather", '{"city": "\\ud83d"}')], {}, "arguments of `weather`: not JSON: "),
    ],
)
def test_calls_are_held_against_the_rows_tools(calls: list[Json], settings: Json, words: str | None) -> None:
    said = found(*calls, **settings)
    assert len(said) == (words is not None)
    assert words is None or (said[0].startswith("tool_calls: ") and words in said[0])


def test_a_row_without_tools_has_nothing_to_call() -> None:
    assert found(call("now", {}), tools=[]) == ["tool_calls: calls `now`, allowed: none"]


@pytest.mark.parametrize(
    "arguments",
    ['{"child": ' * 10_000 + "{}" + "}" * 10_000, '{"child": ' * 700 + "{}" + "}" * 700, "[" * 100_000, "{" * 100_000],
)
def test_deep_arguments_break_nothing(arguments: str) -> None:
    (said,) = found(call("plant", arguments))
    assert said.startswith(("tool_calls: arguments of `plant`: n", "unverified: tool_calls: RecursionError"))


def test_a_schema_that_cannot_be_used_is_not_the_answers_fault() -> None:
    assert found(call("broken", {}))[0].startswith("unverified: tool_calls: UnknownType")
    assert found(call("away", {}))[0].startswith("unverified: ")  # and nothing was fetched: see json_schema


def test_the_result_is_what_was_called_whatever_its_form() -> None:
    def result(arguments: str) -> str | None:
        answer = Answer("", "", "tool_calls", {}, tools=TOOLS, tool_calls=[call("weather", arguments)])
        return tool_calls(answer, ToolCallsSettings()).result

    assert result('{"city": "a", "days": 1}') == result('{"days":1.0,"city":"a"}') != result('{"city":"b","days":1}')


def test_rules_of_the_text_pass_an_answer_that_only_calls() -> None:
    wanted = ["length", "ending", "finish_reason"]
    rules = load_rules(
        FiltersConfig.model_validate({"rules": [{"rule": rule} for rule in wanted]}), Path("recipe.yaml")
    )
    answer = Answer("", "", "tool_calls", {}, tools=TOOLS, tool_calls=[call("now", {})])
    assert rules.reasons(answer) == []
    assert [reason.rule for reason in rules.reasons(Answer("", "", "length", {}))] == wanted
