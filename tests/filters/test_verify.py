"""The verifiers that compare: matches, choice, json_schema, math. After a hostile answer the next one is judged."""

import json
import socket
import textwrap
import time
from datetime import date
from typing import Any

import pytest
from pydantic import ValidationError
from referencing.exceptions import Unresolvable

from filters.reasons import describe
from filters.verify import worker
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
        ({}, "iki DİLİM", "İki dilim", "passes", "iki dilim"),
        ({}, "kir", "kır", "matches", "kir"),
        ({}, "b", ["a", "b"], "passes", "b"),
        ({"as": "number"}, "5", [4, "5 cats"], "passes", "5"),
        ({"as": "number"}, "5", "many", "unverified matches", None),
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
        ({"as": "number"}, "1e6", 1000000.5, "passes", "1000000"),
        ({"as": "number"}, "1e6", 1000001.0, "matches", "1000000"),
        ({"as": "number"}, "Ответ: 12 500 рублей.", 12500, "passes", "12500"),
        ({"as": "number"}, "C'est 1 234 567,5 €.", "1 234 567,5", "passes", "1234567.5"),
        ({"as": "number", "decimal_comma": True}, "Es sind 12.500 €.", 12500, "passes", "12500"),
        ({"as": "number", "decimal_comma": True}, "1.234,5 oder 3,125", "3,125", "passes", "3.125"),
        ({"as": "number", "decimal_comma": True}, "Es sind 12,500 kg.", 12.5, "passes", "12.5"),
        ({"as": "number", "decimal_comma": True}, "Es sind 12.500 €.", "12.500", "passes", "12500"),
        ({"as": "number", "decimal_comma": True}, "Es sind 0.125 kg.", "0,125", "passes", "0.125"),
        ({"as": "number", "decimal_comma": True}, "Es sind 1.234.567,5 €.", "1234567.5", "passes", "1234567.5"),
        ({"as": "number", "decimal_comma": True}, "Es sind 1234,567 m.", "1234.567", "passes", "1234.567"),
        ({"as": "number"}, "Es sind 12.500 €.", 12500, "matches", "12.5"),
        ({"as": "number"}, "In 2020 500 came.", 500, "passes", "500"),
        ({"as": "number"}, "It is 10 200, or 5 300.", 300, "passes", "300"),
        ({"as": "number"}, "It is −5.", -5, "passes", "-5"),
        ({"as": "number"}, "It is −5.", 5, "matches", "-5"),
        ({"as": "number"}, "-.5", -0.5, "passes", "-0.5"),
        ({"as": "number"}, "from 10-20", 20, "passes", "20"),
        ({"as": "number"}, "a loss of -$1,250.50.", -1250.5, "passes", "-1250.5"),
        ({"as": "number"}, "a loss of −€5", -5, "passes", "-5"),
        ({"as": "number"}, "-\\$.5", -0.5, "passes", "-0.5"),
        ({"as": "number"}, "$-5", -5, "passes", "-5"),
        ({"as": "number"}, "5", "-$5", "matches", "5"),
        ({"as": "number"}, "$3-$5", 5, "passes", "5"),
        ({"as": "number"}, "3-$5", 5, "passes", "5"),
        ({"as": "number"}, "$3$–$5$", 5, "passes", "5"),
        ({"as": "number"}, "- $5", 5, "passes", "5"),  # an item of a list
        ({"as": "number"}, "so $14,\\!400$ ways", "14400", "passes", "14400"),
        # a decimal comma
        ({"as": "number"}, "Das macht 17,50 €.", "12,50", "matches", "17.5"),
        ({"as": "number"}, "Das macht 12,50 €.", 12.5, "passes", "12.5"),
        ({"as": "number"}, "-0,125", "-0.125", "passes", "-0.125"),
        ({"as": "number"}, "1.234,56 €", 1234.56, "passes", "1234.56"),
        ({"as": "number"}, "1.234.567", 1234567, "passes", "1234567"),
        ({"as": "number"}, "2{,}5", "2,5", "passes", "2.5"),
        ({"as": "number"}, "1{,}234", 1234, "passes", "1234"),
        ({"as": "number"}, "12\\,500 or 13\u202f500", 13500, "passes", "13500"),
        ({"as": "number"}, "1,234", 1.234, "matches", "1234"),  # it may be either
        ({"as": "number"}, "1,2,3", 3, "passes", "3"),  # a list
        ({"as": "number"}, "0.5,25", 25, "passes", "25"),
        ({"as": "number"}, "(3,4)", 4, "matches", "3.4"),
        ({"as": "number"}, "(3, 4)", 4, "passes", "4"),
        # as India, the Arab world and Switzerland write them
        ({"as": "number"}, "Rs. 12,34,567.50", 1234567.5, "passes", "1234567.5"),
        ({"as": "number"}, "₹1,23,456", 23456, "matches", "123456"),
        ({"as": "number"}, "5, 25, 125", 125, "passes", "125"),  # a list
        ({"as": "number"}, "\u0661\u066c\u0662\u0663\u0664\u066b\u0665", "1234.5", "passes", "1234.5"),
        ({"as": "number"}, "उत्तर ४२ है।", 42, "passes", "42"),
        ({"as": "number"}, "CHF 1'234’567.50", 1234567.5, "passes", "1234567.5"),
        ({"as": "number"}, "It is 5'11.", 11, "passes", "11"),
        ({"as": "number"}, "none", 10, "matches number", None),
        ({"as": "number", "tolerance": 0.01}, "3.14", 3.1416, "passes", "3.14"),
        ({"as": "json"}, '```json\n{"b": 1.0, "a": [2]}\n```', {"a": [2], "b": 1}, "passes", '{"a":[2],"b":1}'),
        ({"as": "json"}, '{"a": true}', {"a": 1}, "matches", '{"a":true}'),
        ({"as": "json"}, '{"a": 1}', '{ "a" : 1 }', "passes", '{"a":1}'),
        ({"as": "json"}, '{"a": "é"}', {"a": "e\u0301"}, "passes", '{"a":"é"}'),
        ({"as": "json"}, "a: 1", {"a": 1}, "matches json", None),
        ({"as": "json"}, DEEP, {"a": 1}, "matches json", None),
        ({"as": "json"}, "9" * 5000, 9, "matches json", None),
        # whole numbers are compared exactly, unless the recipe gives a tolerance, which is a share of the reference
        ({"as": "number"}, "87,654,322", "87,654,321", "matches", "87654322"),
        ({"as": "number"}, "9007199254740993", 9007199254740992, "matches", "9007199254740993"),
        ({"as": "number"}, "-9007199254740993", -9007199254740992, "matches", "-9007199254740993"),
        ({"as": "number"}, "87,654,321.0", "87,654,321", "passes", "87654321"),
        ({"as": "number"}, "0.33333333", "0.3333333", "passes", "0.33333333"),
        ({"as": "number", "tolerance": 1e-6}, "87,654,322", "87,654,321", "passes", "87654322"),
        ({"as": "number", "tolerance": 0.5}, "20", "10", "matches", "20"),
        ({"as": "number", "tolerance": 0.5}, "15", "10", "passes", "15"),
        ({"as": "json"}, '"\\u1112\\u1161"', "\ud558", "passes", '"\ud558"'),
        ({"as": "json"}, '\ufeff{"a":1}', {"a": 1}, "passes", '{"a":1}'),
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
        *(
            ({"labels": ["billing", "other"]}, text, None, "passes", "billing")
            for text in (
                "„Billing“",
                "‚Billing‘",
                "›Billing‹",
                "【Billing】",
                "（Billing）",
                "Billing：",
                "\ufeffBilling\u200b",
            )
        ),
        ({"labels": ["\u200bbilling", "other"], "reference": True}, "Billing", "billing", "passes", "\u200bbilling"),
        # marks of other scripts, and wide letters and digits
        ({"labels": ["نعم", "لا"], "reference": True}, "نعم،", "نعم", "passes", "نعم"),
        ({"labels": ["हाँ", "नहीं"], "reference": True}, "**हाँ**।", "हाँ", "passes", "हाँ"),
        ({"labels": ["sí", "no"], "reference": True}, "¡Sí!", "sí", "passes", "sí"),
        ({"labels": ["İade", "Fatura"], "reference": True}, "iade.", "İade", "passes", "iade"),
        ({"labels": ["diğer", "fatura"], "reference": True}, "DİĞER", "diğer", "passes", "diğer"),
        ({"labels": ["فاتورة", "لا"], "reference": True}, "\u202bفاتورة\u202c", "فاتورة", "passes", "فاتورة"),
        ({"labels": ["A", "B"], "reference": True}, "（Ｂ）．", "B", "passes", "b"),
        ({"labels": ["A", "B"], "reference": True}, "Ａ", "B", "choice", "a"),
        ({"labels": ["4", "-4"], "reference": True}, "–4", "4", "choice", None),  # a dash may be a minus
        ({"labels": ["m2", "m²"], "reference": True}, "m²", "m2", "choice", "m²"),
        ({"labels": ["A", "B"], "reference": True}, "\\[ \\boxed{B} \\]", "B", "passes", "b"),
        ({"labels": ["A", "B"], "reference": True}, "It is A or B.\n\\[ \\boxed{B} \\]", "B", "choice", None),
        ({"labels": ["A", "B"], "reference": True}, "$\\boxed{(A)}$.", "B", "choice", "a"),
        ({"labels": ["A", "B"], "pattern": "is (.+)"}, "The answer is \\(\\boxed{B}\\).", "B", "passes", "b"),
        ({"reference": True}, "\\boxed{Oslo}", "Oslo", "passes", "oslo"),
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
        # of the row's own word, which the recipe's labels lack
        ({"reference": True, "labels": ["billing"]}, "Other", "other", "unverified choice", None),
        ({"reference": True, "labels": ["billing"]}, "billing", "other", "unverified choice", None),
        ({"reference": True}, "", ".", "choice", ""),
        ({"reference": True, "labels": ["NET", ".NET"]}, ".NET", "NET", "choice", ".net"),
        ({"reference": True, "labels": ["NET", ".NET"]}, "(NET).", "NET", "passes", "net"),
        ({"reference": True, "labels": ["?", "!"]}, "!", "?", "choice", "!"),
        ({"reference": True, "labels": ["(A)", "(B)"]}, "**A**.", "(A)", "passes", "(a)"),
        ({"labels": ["Yes.", "No."]}, "yes", None, "passes", "yes."),
        # a column of integers with a missing cell is one of floats in pandas
        ({"reference": True, "labels": ["0", "1"]}, "1", 1.0, "passes", "1"),
        ({"reference": True, "labels": ["0", "1"]}, "0", 1.0, "choice", "0"),
        ({"reference": True}, "1", 1.0, "passes", "1"),
        ({"reference": True, "labels": ["true", "false"]}, "True", True, "passes", "true"),
    ],
)
def test_choice(settings: dict[str, Any], text: str, reference: Any, expected: str, result: str | None) -> None:
    said = verify("choice", text, settings_of("choice", **settings), reference)
    assert (outcome(said), said.result) == (expected, result)


@pytest.mark.parametrize("label", [True, 1, 0.5, date(2026, 1, 2)])
def test_a_label_that_yaml_reads_as_no_text_needs_quotes(label: Any) -> None:
    with pytest.raises(ValidationError, match=r"should be a text.*; put it in quotes"):
        settings_of("choice", labels=["a", label])


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
        # Korean in single jamo, in the answer (also as escapes) or in the schema
        ({"enum": ["한"]}, '"\\u1112\\u1161\\u11ab"', "passes"),
        ({"enum": ["\u1112\u1161\u11ab"]}, '"한"', "passes"),
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
        ({"items": {"multipleOf": 0.01}}, "[19.99, 4.35, 1, 1e300, 123456789012345678901234567890]", "passes"),
        ({"multipleOf": 0.01}, "19.995", "json_schema $"),
        ({"multipleOf": 3}, "10", "json_schema $"),
        ({"multipleOf": 0.01}, '"no number"', "passes"),
        ({"type": "integer"}, "12345678901234567890123", "passes"),
        ({"type": "integer", "format": "int32"}, "5", "passes"),  # JSON Schema does not define it
        ({"$ref": "http://127.0.0.1:9/schema.json"}, "1", "unverified json_schema"),
    ],
)
def test_json_schema(schema: dict[str, Any], text: str, expected: str) -> None:
    settings = settings_of("json_schema", schema=schema, seconds=1)
    assert outcome(verify("json_schema", text, settings)) == expected


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("date-time", "2026-02-01T10:00:00Z", "2026-02-01 noon"),
        ("time", "10:00:00Z", "ten"),
        ("duration", "P3DT4H", "three days"),
        ("uri", "https://example.org/a", "not a uri"),
        ("uri-reference", "../a", "\\\\a"),
        ("uri-template", "/a/{b}", "/a/{b"),
        ("hostname", "example.org", "-bad_-"),
        ("json-pointer", "/a/0", "a"),
        ("uuid", "8d2a4f9e-1c1e-4c57-9f61-2f5b3c8e7a10", "8d2a"),
    ],
)
def test_formats_are_checked(name: str, right: str, wrong: str) -> None:
    settings = settings_of("json_schema", schema={"format": name}, seconds=10)
    assert outcome(verify("json_schema", json.dumps(right), settings)) == "passes"
    assert outcome(verify("json_schema", json.dumps(wrong), settings)) == "json_schema $"


def test_a_schema_may_lie_beside_the_recipe(tmp_path: Any) -> None:
    (tmp_path / "ticket.json").write_text('{"type": "integer"}', encoding="utf-8-sig")  # with a byte order mark
    said = verify("json_schema", " 1.0 ", settings_of("json_schema", tmp_path, schema="ticket.json"))
    assert said == (None, None, "1")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    for schema, problem in (
        ("none.json", "no such file"),
        ("deep.json", "schema: .*deep.json: "),
        ({"type": "no"}, "not valid under any"),
    ):
        with pytest.raises(ValidationError, match=problem):
            settings_of("json_schema", tmp_path, schema=schema)


def test_what_a_schema_refers_to_is_not_fetched() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        with pytest.raises(Unresolvable):
            first_error(f'{{"$ref": "http://127.0.0.1:{server.getsockname()[1]}/schema.json"}}', "1")
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
        ("I do not know.", " ", "unverified math", None),
        ("\\boxed{9^{9^{9}}}", "4", "unverified math", None),
        ("\\boxed{(10^9)!}", "4", "unverified math", None),
    ],
)
def test_math(text: str, reference: Any, expected: str, result: str | None) -> None:
    said = verify("math", text, settings_of("math", seconds=2), reference)
    assert (outcome(said), said.result) == (expected, result)


def test_a_new_worker_is_warm_before_the_time_of_an_answer_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first value that is read takes a busy machine seconds, and each answer that is out of time a new worker."""
    seen, exchange = list[tuple[Any, float]](), worker.Worker._exchange

    def noted(self: worker.Worker, request: Any, seconds: float) -> Any:
        seen.append(([*request[1:2]], seconds))
        return exchange(self, request, seconds)

    settings = settings_of("math")
    verify("math", "7", settings, reference="7")
    assert worker._worker
    worker._worker.close()
    monkeypatch.setattr(worker.Worker, "_exchange", noted)
    for _ in range(2):
        assert outcome(verify("math", "7", settings, reference="7")) == "passes"
    assert seen == [([], 60), (["warm_up"], 60), (["compare"], 5), (["compare"], 5)]


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        # small numbers, of which 6 decimals say nothing
        ("\\boxed{6.63\\times 10^{-34}}", "1.6\\times 10^{-19}", "math"),
        ("\\boxed{0.00000012}", "0.00000034", "math"),
        ("\\boxed{\\frac{1}{3000000}}", "0.0000001", "math"),
        ("\\boxed{2\\times 10^{-7}}", "1.6\\times 10^{-7}", "math"),
        ("\\boxed{1.0000001}", "1.0000004", "math"),
        ("\\boxed{0.0}", "0.0000001", "math"),
        ("\\boxed{0.333333}", "1/3", "passes"),
        ("\\boxed{0.071429}", "1/14", "passes"),
        ("\\boxed{0.00001235}", "1/81000", "passes"),
        ("\\boxed{0.0000123}", "1/81000", "math"),
        ("\\boxed{3.141593}", "3.14159265", "passes"),
        ("\\boxed{16\\times 10^{-20}}", "1.6\\times 10^{-19}", "passes"),
        ("\\boxed{50\\%}", "50", "passes"),
        # mixed numbers and e-notation
        ("The answer is 1 1/2.", "3/2", "passes"),
        ("The answer is 1 1/2.", "1", "math"),
        ("The answer is 1.5e3", "1500", "passes"),
        ("\\boxed{1e3}", "1000", "passes"),
        ("1.5 x 10^3", "1500", "passes"),
        ("\\boxed{2e}", "2e", "passes"),
        # spaces between groups of digits
        ("\\boxed{10\\,500}", "10500", "passes"),
        ("\\boxed{10\\,500}", "5000", "math"),
        ("\\boxed{-1\\ 234\\;567.5}", "-1234567.5", "passes"),
        ("\\boxed{10 500}", "10500", "passes"),
        ("\\boxed{10500}", "10\\,500", "passes"),
        ("\\boxed{10500}", "10 500", "passes"),
        ("So it is $10\\,500$.", "10500", "passes"),
        ("So it is 10\u202f500.", "10500", "passes"),
        ("\\boxed{10\\,500/3}", "3500", "passes"),
        ("\\boxed{1 500/600}", "11/6", "passes"),
        ("\\boxed{2\\,x}", "2x", "passes"),
        ("\\boxed{(1,\\,200)}", "(1, 200)", "passes"),
        # an empty box is no value
        ("5 is the answer? No, so \\boxed{}", "5", "math value"),
    ],
)
def test_math_reads_numbers_as_a_person_does(text: str, reference: str, expected: str) -> None:
    assert outcome(verify("math", text, settings_of("math"), reference)) == expected


@pytest.mark.parametrize(
    ("text", "right", "wrong"),
    [
        ("3/4.", "3/4", "3"),
        ("2/5, so we are done.", "2/5", "2"),
        ("2 3/4 cups", "2.75", "3/4"),
        ("$1,234.", "1234", "1"),
        ("1,234 dollars", "1234", "1"),
        ("**5**", "5", "6"),
        ("\\(5\\).", "5", "6"),
        ("$5$.", "5", "6"),
        ("5 \\pi", "5\\pi", "5"),
        ("5\\,", "5", "6"),
        ("3 apples are left", "3", "4"),
        ("3 xy", "3xy", "3"),
        ("2 tenths", "2 tenths", "2"),
        ("3 \\sec x", "3 \\sec x", "3"),
    ],
)
def test_math_reads_what_a_pattern_finds(text: str, right: str, wrong: str) -> None:
    settings = settings_of("math", pattern="answer is (.+)")
    assert outcome(verify("math", f"So the answer is {text}", settings, right)) == "passes"
    assert outcome(verify("math", f"So the answer is {text}", settings, wrong)) == "math"


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("The answer is **5**. I checked it 3 times.", "5"),
        ("**The answer is 5.** I checked it 3 times.", "5"),
        ("**Answer: 5**\n\n**Check:** \\(x = 3\\)", "5"),
        ("**Final Answer:** ***5***\n\nWe used 3 steps.", "5"),
        ("Answer:\n\n5\n\nCheck: 2 + 1 = 3", "5"),
        ("The answer is *5*. I checked it 3 times.", "5"),
        ("The answer is `5`. I checked it 3 times.", "5"),
        ("The answer is “5”. I checked it 3 times.", "5"),
        ("The answer is \\(5\\). I checked it 3 times.", "5"),
        ("The answer is $\\frac{1}{2}$. I checked it 3 times.", "1/2"),
        ("The answer is $5. She had $3 before.", "5"),
        ("The answer is 5 apples. 2 + 1 = 3 are left.", "5"),
        ("Answer: 5 apples were bought, 2 left. 5 - 2 = 3", "3"),  # a computation that begins with a number
        ("The answer is $1$ and $2$. I checked it 3 times.", "\\{1, 2\\}"),
        ("The answer is 3*4. I checked it 3 times.", "12"),
        ("2 * 3 * 4 = 24", "24"),
        ("The answer is 2**3.", "8"),
        ("The answer is −5. I checked it 3 times.", "-5"),
        ("3 − 8 = −5", "-5"),
        ("\\boxed{–5}", "-5"),
        ("\\boxed{\u200b5}", "5"),
        ("It is \u20665\u2069.", "5"),
    ],
)
def test_math_reads_what_an_answer_states(text: str, right: str) -> None:
    assert outcome(verify("math", text, settings_of("math"), right)) == "passes"


def test_what_a_verifier_takes_out_of_an_answer() -> None:
    assert fenced_block("a\n```\nx\n```\n```sql\ny\n```", "sql") == "y"
    assert fenced_block("```python\nx = 1\n") == "x = 1"
    assert fenced_block(" plain ") == "plain"
    assert fenced_block("~~~python\nx = 1\n~~~", "python") == "x = 1"
    assert fenced_block("````md\n```\nx\n```\n````") == "```\nx\n```"
    assert fenced_block("```sql\nSELECT 1```\nor\n```sql\nSELECT 2\n```", "sql") == "SELECT 1"
    assert fenced_block("```sql SELECT 1```", "sql") == fenced_block("```SELECT 1```", "sql") == "SELECT 1"
    assert fenced_block("```SQL SELECT 1```\n", "sql") == "SELECT 1"
    assert fenced_block("Title\n~~~~~\nHere:\n```sql\nSELECT 1\n```", "sql") == "SELECT 1"
    assert fenced_block("x = 1\n```\n") == "x = 1" and fenced_block("``````") == ""
    # in an item of a list all lines of a block are indented, some more than others
    block = "def f():\n    return 1\n\nx = f()"
    indented = textwrap.indent(block, "   ")
    assert fenced_block(f"1. Code:\n   ```python\n{indented}\n   ```\n2. Done.", "python") == block
    assert fenced_block(f"```python\n\n{indented}\n```") == fenced_block(f"\n{indented}\n") == block
    assert fenced_block('```\nx = """\n  \n"""\n```') == 'x = """\n  \n"""'  # a text of its own
    # words before an opening fence, which is not the closing one of what follows
    assert fenced_block(f"This is `f`: ```python\n{block}\n```\nDone.", "python") == block
    assert fenced_block("Use ```x``` here.\n```sql\nSELECT 1\n```", "sql") == "SELECT 1"
    assert fenced_block("if a.startswith('```'):\n    a = 1") == "if a.startswith('```'):\n    a = 1"
    assert boxed("\\boxed{1} or \\boxed{\\frac{1}{2}} {") == "\\frac{1}{2}"
    assert boxed("\\boxed{1") is None
    assert [last_number(text) for text in ("-1.5e3", "3 of 1,234", "v2.", "1e999", "")] == [-1500, 1234, 2, None, None]
    started = time.monotonic()
    for part in ("1,", "1.234", "1.234,", "1,234."):
        last_number(part * 200_000)
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
