"""The verifiers that compare: matches, choice, json_schema, math. After a hostile answer the next one is judged."""

import socket
import time
from typing import Any

import pytest
from pydantic import ValidationError
from referencing.exceptions import Unresolvable

from filters.reasons import describe
from filters.verify.extract import boxed, fenced_block, last_number
from filters.verify.validation import first_error
from pipeline.records import Reason
from tests.filters.verifying import outcome, settings_of, verify

NEVER_ENDS = "a" * 40  # for the pattern (a+)+$ with another letter after it
DEEP = "[" * 10_000 + "]" * 10_000


@pytest.mark.parametrize(
    ("settings", "text", "reference", "expected", "result"),
    [
        ({}, "  The  CAT\n", "the cat", "passes", "the cat"),
        ({}, "u\u0308ber", "\u00fcber", "passes", "\u00fcber"),
        ({}, "a dog", "the cat", "matches", "a dog"),
        ({}, "b", ["a", "b"], "passes", "b"),
        ({"ignore_case": False}, "The cat", "the cat", "matches", "The cat"),
        ({"ignore_space": False}, "a  b", "a b", "matches", "a  b"),
        ({}, "42", 42, "passes", "42"),
        ({"field": "short"}, "yes", {"short": "Yes", "long": "Yes, it is."}, "passes", "yes"),
        ({"field": "none"}, "yes", {"short": "Yes"}, "unverified matches", None),
        ({}, "yes", None, "unverified matches", None),
        ({"pattern": "answer: (\\w+)"}, "answer: no\nanswer: Yes\nbye", "yes", "passes", "yes"),
        ({"pattern": "answer: (\\w+)"}, "yes", "yes", "matches pattern", None),
        ({"pattern": "\\d+"}, "it is 7", "7", "passes", "7"),
        ({"as": "number"}, "so 1,234.50 in all.", 1234.5, "passes", "1234.5"),
        ({"as": "number"}, "it costs $18", "18", "passes", "18"),
        ({"as": "number"}, "10 - 3 = 7", 10, "matches", "7"),
        ({"as": "number"}, "It is −5.", -5, "passes", "-5"),
        ({"as": "number"}, "It is −5.", 5, "matches", "-5"),
        ({"as": "number"}, "-.5", -0.5, "passes", "-0.5"),
        ({"as": "number"}, "from 10-20", 20, "passes", "20"),
        ({"as": "number"}, "none", 10, "matches number", None),
        ({"as": "number", "tolerance": 0.01}, "3.14", 3.1416, "passes", "3.14"),
        ({"as": "json"}, '```json\n{"b": 1.0, "a": [2]}\n```', {"a": [2], "b": 1}, "passes", '{"a":[2],"b":1}'),
        ({"as": "json"}, '{"a": true}', {"a": 1}, "matches", '{"a":true}'),
        ({"as": "json"}, '{"a": 1}', '{ "a" : 1 }', "passes", '{"a":1}'),
        ({"as": "json"}, '{"a": "é"}', {"a": "e\u0301"}, "passes", '{"a":"é"}'),
        ({"as": "json"}, "a: 1", {"a": 1}, "matches json", None),
        ({"as": "json"}, DEEP, {"a": 1}, "matches json", None),
        ({"as": "json"}, "9" * 5000, 9, "matches json", None),
    ],
)
def test_matches(settings: dict[str, Any], text: str, reference: Any, expected: str, result: str | None) -> None:
    said = verify("matches", text, settings_of("matches", **settings), reference)
    assert (outcome(said), said.result) == (expected, result)


@pytest.mark.parametrize(
    ("settings", "text", "reference", "expected", "result"),
    [
        ({"labels": ["billing", "other"]}, "**Billing**.", None, "passes", "billing"),
        ({"labels": ["billing", "other"]}, "“Billing”。", None, "passes", "billing"),
        ({"labels": ["billing", "other"]}, "It is billing", None, "choice", None),
        ({"labels": ["billing", "other"], "pattern": "is (\\w+)"}, "It is billing", None, "passes", "billing"),
        ({"reference": True}, "Billing", "billing", "passes", "billing"),
        ({"reference": True}, "other", "billing", "choice", "other"),
        (
            {"reference": True, "labels": ["billing"], "field": "queue"},
            "billing",
            {"queue": "billing"},
            "passes",
            "billing",
        ),
        ({"reference": True}, "billing", None, "unverified choice", None),
    ],
)
def test_choice(settings: dict[str, Any], text: str, reference: Any, expected: str, result: str | None) -> None:
    said = verify("choice", text, settings_of("choice", **settings), reference)
    assert (outcome(said), said.result) == (expected, result)


TICKET = {
    "type": "object",
    "required": ["queue"],
    "properties": {"queue": {"enum": ["billing", "other"]}, "day": {"type": "string", "format": "date"}},
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("schema", "text", "expected"),
    [
        (TICKET, '{"queue": "billing"}', "passes"),
        (TICKET, 'Here:\n```json\n{"queue": "other", "day": "2026-02-01"}\n```\nDone.', "passes"),
        (TICKET, '{"queue": "sales"}', "json_schema $.queue"),
        (TICKET, '{"queue": "other", "day": "2026-02-31"}', "json_schema $.day"),
        (TICKET, "{}", "json_schema $"),
        (TICKET, "billing", "json_schema json"),
        (TICKET, '{"queue": NaN}', "json_schema json"),
        (TICKET, DEEP, "json_schema json"),
        ({"type": "number"}, "9" * 5000, "json_schema json"),
        ({"type": "string", "pattern": "^(a+)+$"}, f'"{NEVER_ENDS}!"', "unverified json_schema"),
        ({"uniqueItems": True}, "[" + ",".join(f'{{"a":{i}}}' for i in range(30_000)) + "]", "unverified json_schema"),
        ({"$ref": "#"}, "1", "unverified json_schema"),
        ({"$ref": "http://127.0.0.1:9/schema.json"}, "1", "unverified json_schema"),
    ],
)
def test_json_schema(schema: dict[str, Any], text: str, expected: str) -> None:
    settings = settings_of("json_schema", schema=schema, seconds=1)
    assert outcome(verify("json_schema", text, settings)) == expected


def test_a_schema_may_lie_beside_the_recipe(tmp_path: Any) -> None:
    (tmp_path / "ticket.json").write_text('{"type": "integer"}')
    said = verify("json_schema", " 1.0 ", settings_of("json_schema", tmp_path, schema="ticket.json"))
    assert said == (None, None, "1")
    for schema, problem in (("none.json", "no such file"), ({"type": "no"}, "not valid under any")):
        with pytest.raises(ValidationError, match=problem):
            settings_of("json_schema", tmp_path, schema=schema)


def test_what_a_schema_refers_to_is_not_fetched() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        with pytest.raises(Unresolvable):
            first_error(f'{{"$ref": "http://127.0.0.1:{server.getsockname()[1]}/schema.json"}}', 1)
        with pytest.raises(BlockingIOError):  # nobody has come
            server.accept()


def test_a_pattern_that_never_ends_costs_its_row_only() -> None:
    settings = settings_of("matches", pattern="(a+)+$", seconds=0.5)
    said = verify("matches", NEVER_ENDS + "!", settings, "a")
    assert outcome(said) == "unverified matches" and said.reason and "longer than 0.5 s" in said.reason.note
    assert outcome(verify("matches", "aaa", settings, "aaa")) == "passes"
    with pytest.raises(ValidationError, match="not a regular expression"):
        settings_of("matches", pattern="(")


@pytest.mark.parametrize(
    ("text", "reference", "expected", "result"),
    [
        ("So the answer is \\boxed{\\frac{1}{2}}.", "0.5", "passes", "0.5"),
        ("2 + 2 = 4. The answer is 4.", 4, "passes", "4"),
        ("It is 1,000 dollars", "1000", "passes", "1000"),
        ("$x^2 + 2x + 1$", "(x+1)^2", "passes", "x**2 + 2*x + 1"),
        ("The answer is 5.", "4", "math", "5"),
        ("\\boxed{x = 50\\%}", "0.5", "passes", "0.5"),
        ("I do not know.", "4", "math value", None),
        ("The answer is 5.", None, "unverified math", None),
        ("\\boxed{9^{9^{9}}}", "4", "unverified math", None),
        ("\\boxed{(10^9)!}", "4", "unverified math", None),
    ],
)
def test_math(text: str, reference: Any, expected: str, result: str | None) -> None:
    said = verify("math", text, settings_of("math", seconds=2), reference)
    assert (outcome(said), said.result) == (expected, result)


def test_what_a_verifier_takes_out_of_an_answer() -> None:
    assert fenced_block("a\n```\nx\n```\n```sql\ny\n```", "sql") == "y"
    assert fenced_block("```python\nx = 1\n") == "x = 1"
    assert fenced_block(" plain ") == "plain"
    assert boxed("\\boxed{1} or \\boxed{\\frac{1}{2}} {") == "\\frac{1}{2}"
    assert boxed("\\boxed{1") is None
    assert [last_number(text) for text in ("-1.5e3", "3 of 1,234", "v2.", "1e999", "")] == [-1500, 1234, 2, None, None]
    started = time.monotonic()
    last_number("1," * 500_000)
    fenced_block("```" * 300_000)
    boxed("\\boxed{" + "{" * 1_000_000)
    assert time.monotonic() - started < 60  # none of them is quadratic


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        (Reason(rule="matches", found="a dog", allowed=["the cat", "a cat"]), "`a dog`, wanted: `the cat` or `a cat`"),
        (Reason(rule="matches#2", what="pattern", found="hm"), "the pattern is not in `hm`"),
        (Reason(rule="json_schema", what="$.queue", found="'x' is not one of"), "$.queue: 'x' is not one of"),
        (Reason(rule="sql", what="error", found="no such column: x"), "does not run: no such column: x"),
        (Reason(rule="sql", what="time", found="2 s"), "takes too long: more than 2 s"),
        (
            Reason(rule="sql", what="result", value=3, total=1, found="SELECT 1"),
            "finds something else (3 rows, the reference 1): `SELECT 1`",
        ),
        (
            Reason(rule="python", what="error", count=1, total=3, found="assert f(1): AssertionError"),
            "1 of 3 tests pass; the first that does not: assert f(1): AssertionError",
        ),
        (
            Reason(rule="python", what="error", count=0, total=1, found="SyntaxError: invalid syntax"),
            "0 of 1 tests pass; the first that does not: SyntaxError: invalid syntax",
        ),
        (Reason(rule="unverified", what="sql", note="the row has no reference"), "sql: the row has no reference"),
    ],
)
def test_reasons_in_words(reason: Reason, words: str) -> None:
    assert describe(reason) == words
