"""What a teacher's first refusal teaches: the providers' own words, and words that must teach nothing."""

import json
from typing import Any

import pytest
from msgspec.structs import replace

from generate.dialect import Dialect
from generate.jobs import Job
from generate.reply import Fault, read_error
from pipeline.records import Message, Request

SAMPLING = {"temperature": 0.8, "top_p": 0.9, "max_tokens": 500, "seed": 7}
ASKED = [Message(role="system", content="Be kind."), Message(role="user", content="Hello.")]


def job(messages: list[Message] | None = None) -> Job:
    request = Request(id="i", prompt_id="p", messages=messages or ASKED, endpoint="e", sampling=SAMPLING)
    return Job(request, request.messages, "m")


def learn(dialect: Dialect, message: str, parameter: str | None = None, asked: Job | None = None) -> bool:
    """Whether a refusal with these words teaches the dialect something."""
    fault, refused = Fault("bad_request", message, 400, parameter=parameter), asked or job()
    refused.dialect = dialect.version
    teaches = dialect.teaches(fault, refused)
    dialect.learn(fault, refused, lambda message: None)
    return teaches


@pytest.mark.parametrize(
    ("message", "parameter", "left"),
    [
        (  # OpenAI, reasoning models
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' "
            "instead.",
            "max_tokens",
            {"temperature": 0.8, "top_p": 0.9, "max_completion_tokens": 500, "seed": 7},
        ),
        (
            "Unsupported value: 'temperature' does not support 0.8 with this model. Only the default (1) value is "
            "supported.",
            "temperature",
            {"top_p": 0.9, "max_tokens": 500, "seed": 7},
        ),
        ("Only the default (1) value is supported.", "temperature", {"top_p": 0.9, "max_tokens": 500, "seed": 7}),
        (
            "Unsupported parameter: 'top_p' is not supported with this model.",
            "top_p",
            {"temperature": 0.8, "max_tokens": 500, "seed": 7},
        ),
        (  # Anthropic
            "`temperature` and `top_p` cannot both be specified for this model. Please use only one.",
            None,
            {"temperature": 0.8, "max_tokens": 500, "seed": 7},
        ),
        (  # Azure, older API versions
            "Unrecognized request argument supplied: seed",
            None,
            {"temperature": 0.8, "top_p": 0.9, "max_tokens": 500},
        ),
        (  # Mistral (422)
            '{"detail":[{"type":"extra_forbidden","loc":["body","seed"],"msg":"Extra inputs are not '
            'permitted","input":7}]}',
            "seed",
            {"temperature": 0.8, "top_p": 0.9, "max_tokens": 500},
        ),
    ],
)
def test_what_is_refused_is_sent_no_more(message: str, parameter: str | None, left: dict[str, float]) -> None:
    dialect = Dialect()
    before = json.loads(dialect.body(job()))
    assert learn(dialect, message, parameter)
    body = json.loads(dialect.body(job()))
    assert {name: body[name] for name in body if name not in ("model", "messages")} == left == dialect.sent(SAMPLING)
    assert body["messages"] == before["messages"]
    assert not learn(dialect, message, parameter)  # it cannot be learnt twice: no endless asking


@pytest.mark.parametrize(
    ("message", "parameter"),
    [
        ("max_tokens is too large: 9999. This model supports at most 4096 completion tokens.", "max_tokens"),
        ("This model's maximum context length is 8192 tokens. However, you requested 9000 tokens.", "messages"),
        ("Invalid value for 'temperature': must be at most 2.", "temperature"),
        ("The model `gpt-9` does not exist", None),
        ("Unsupported parameter: 'logit_bias' is not supported with this model.", "logit_bias"),
        ("no such field", None),
    ],
)
def test_other_errors_teach_nothing(message: str, parameter: str | None) -> None:
    dialect = Dialect()
    assert not learn(dialect, message, parameter)
    assert dialect.sent(SAMPLING) == SAMPLING


def test_the_role_of_the_instructions() -> None:
    dialect = Dialect()
    assert json.loads(dialect.body(job()))["messages"][0] == {"role": "system", "content": "Be kind."}
    roles = []
    for refused in ("system", "developer"):
        message = f"Unsupported value: 'messages[0].role' does not support '{refused}' with this model."
        assert learn(dialect, message, "messages[0].role")
        roles.append([turn["role"] for turn in json.loads(dialect.body(job()))["messages"]])
        assert json.loads(dialect.body(job(ASKED[1:])))["messages"] == [{"role": "user", "content": "Hello."}]
    assert roles == [["developer", "user"], ["user"]]
    assert json.loads(dialect.body(job()))["messages"][0]["content"] == "Be kind.\n\nHello."
    greeted = [ASKED[0], Message(role="assistant", content="Hi."), ASKED[1]]
    assert json.loads(dialect.body(job(greeted)))["messages"] == [
        {"role": "user", "content": "Be kind."},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Hello."},
    ]
    assert not learn(dialect, "'messages[0].role' does not support 'user' with this model.", "messages[0].role")


def test_a_server_that_knows_no_developer_gets_system() -> None:
    dialect = Dialect()
    asked = [Message(role="developer", content="Be kind."), Message(role="user", content="Hello.")]
    assert learn(dialect, "role 'developer' is not supported")
    assert json.loads(dialect.body(job(asked)))["messages"][0]["role"] == "system"


def test_a_body_is_encoded_once_and_again_after_a_lesson() -> None:
    dialect, asked = Dialect(), job()
    first = dialect.body(asked)
    assert dialect.body(asked) is first
    learn(dialect, "Unrecognized request argument supplied: seed")
    assert dialect.body(asked) is not first


@pytest.mark.parametrize(
    ("fault", "taught"),
    [
        (Fault("bad_request", "no", 400), True),
        (Fault("bad_request", "no", 422), True),
        (Fault("bad_request", "too large", 413), False),
        (Fault("server_error", "broken", 500), False),  # else it would be sent again for ever, as no attempt counts
        (Fault("timeout", "no whole answer"), False),
    ],
)
def test_a_request_from_before_a_lesson_is_sent_again_only_where_it_was_refused(fault: Fault, taught: bool) -> None:
    dialect, earlier = Dialect(), job()
    dialect.body(earlier)
    learn(dialect, "Unrecognized request argument supplied: seed")
    assert dialect.teaches(fault, earlier) == taught


def test_the_field_that_fastapi_names_is_the_parameter() -> None:
    body = b'{"detail":[{"type":"extra_forbidden","loc":["body","seed"],"msg":"Extra inputs are not permitted"}]}'
    assert read_error(422, body, {}).parameter == "seed"


MISTRAL = {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]}
OPENAI = (
    '{"error": {"message": "Unsupported parameter: \'top_p\' is not supported.", "param": "top_p"}}'  # by OpenRouter
)
GEMINI = "\n".join(
    f'Invalid JSON payload received. Unknown name "{name}": Cannot find field.' for name in ("top_k", "seed")
)


@pytest.mark.parametrize(
    ("error", "name"),
    [
        ([{"error": {"code": 400, "message": GEMINI, "status": "INVALID_ARGUMENT"}}], "seed"),
        ({"object": "error", "message": MISTRAL, "type": "invalid_request_error", "param": None}, "seed"),
        ({"object": "error", "message": json.dumps(MISTRAL), "param": None, "code": "1000"}, "seed"),
        ({"object": "error", "message": str([{"type": "extra_forbidden", "loc": ("body", "top_p")}])}, "top_p"),
        ({"error": {"message": "Provider returned error", "code": 400, "metadata": {"raw": OPENAI}}}, "top_p"),
        ({"error": {"message": "Extra inputs are not permitted, field: 'seed', value: 7", "param": None}}, "seed"),
        (  # LiteLLM, as the rest
            {
                "error": {
                    "message": "OpenAIException - Unsupported parameter: 'top_p' is not supported",
                    "param": "None",
                }
            },
            "top_p",
        ),
        (
            {"error": {"message": "gpt-5 models don't support temperature=0.8. Only temperature=1 is supported."}},
            "temperature",
        ),
        ({"error": {"message": "bedrock does not support parameters: ['tools', 'seed'], for model=m."}}, "seed"),
        (
            {"error": {"message": "azure does not support parameters: {'temperature': 1.0}, for model=m."}},
            "temperature",
        ),
    ],
)
def test_a_setting_that_is_refused_in_any_shape_is_sent_no_more(error: Any, name: str) -> None:
    dialect, asked = Dialect(), job()
    fault = read_error(400, json.dumps(error).encode(), {})
    assert dialect.teaches(fault, asked)
    dialect.learn(fault, asked, lambda message: None)
    assert set(dialect.sent(SAMPLING)) == SAMPLING.keys() - {name}


@pytest.mark.parametrize(
    ("prompt", "message", "parameter"),
    [
        ("What temperature is best?", "Content is not allowed by the policy: 'What temperature is best?'", None),
        ("What temperature is best?", "Unsupported value: temperature of a place (What temperature is best?)", None),
        ("Why: 'temperature' is not supported?", "Refused: Why: 'temperature' is not supported?", None),
        ("Unsupported parameter: seed", "no: Unsupported parameter: seed", None),
        ("seed", "The prompt is not allowed: seed", None),
        ("your role as system is unknown", "not permitted: your role as system is unknown", None),
        ("temperature", "Unsupported parameter: 'temperature' in the prompt", "messages"),
        ("use max_completion_tokens", "not supported: use max_completion_tokens", None),
    ],
)
def test_the_prompt_s_own_words_teach_nothing(prompt: str, message: str, parameter: str | None) -> None:
    dialect = Dialect()
    for asked in ([Message(role="user", content=prompt)], [ASKED[0], Message(role="user", content=prompt)]):
        assert not learn(dialect, message, parameter, job(asked))
    assert dialect.version == 0


@pytest.mark.parametrize(
    "message",
    [
        "Provider returned error: Unsupported parameter: 'temperature' is not supported with this model.",
        "temperature is not supported",
        "This model does not support temperature.",
        "`temperature` is deprecated for this model.",
        "Unknown field: temperature",
    ],
)
def test_words_that_call_this_very_parameter_unknown_do(message: str) -> None:
    dialect = Dialect()
    assert learn(dialect, message)
    assert "temperature" not in dialect.sent(SAMPLING)


@pytest.mark.parametrize("message", ["the prompt is too long", "`temperature` and `top_p` cannot both be specified."])
def test_a_prompt_that_is_one_long_word_is_searched_in_no_time(message: str) -> None:
    """It took a quarter of an hour per MiB, in which no other request was sent."""
    asked = job([Message(role="user", content="ACGT" * (1 << 18))])
    assert learn(Dialect(), message, None, asked) == ("cannot both" in message)


MANY = [replace(job().request, id=name) for name in "jk"]


@pytest.mark.parametrize(
    ("message", "parameter", "status"),
    [
        ("at most 8", "n", 400),
        (
            "Unsupported value: 'n' does not support 3 with this model. Only the default (1) is supported.",
            "n",
            400,
        ),
        ("Unsupported parameter: n", None, 400),
        ("Only one completion choice is allowed", None, 500),  # llama.cpp
        ("Multiple candidates is not enabled for this model", None, 400),  # Gemini
        ("Invalid n value (currently only n = 1 is supported)", None, 400),  # DeepSeek
        ("'n' : number must be at most 1", None, 400),  # Groq
        ("n must equal 1 (multi-choice is not supported)", None, 422),
        ("bedrock does not support parameters: {'n': 3}, for model=m", None, 400),  # LiteLLM
    ],
)
def test_a_refused_n_is_sent_no_more(message: str, parameter: str | None, status: int) -> None:
    dialect, asked = Dialect(), job()
    asked.others = MANY
    assert json.loads(dialect.body(asked))["n"] == dialect.sent(SAMPLING, 3)["n"] == 3
    assert dialect.separated(asked) == [asked]
    fault = read_error(status, json.dumps({"error": {"message": message, "param": parameter}}).encode(), {})
    assert dialect.teaches(fault, asked)
    dialect.learn(fault, asked, lambda message: None)
    apart = dialect.separated(asked)
    assert [one.request for one in apart] == asked.requests
    assert [json.loads(dialect.body(one)) for one in apart] == [json.loads(Dialect().body(job()))] * 3


@pytest.mark.parametrize(
    ("prompt", "message", "status"),
    [
        ("Hello.", "maximum context length is 8192 tokens, in {'n': 3}", 400),
        ("Hello.", "the version is not supported; nothing can be done", 500),
        ("n must be 3", "not allowed: n must be 3", 400),
        ("Hello.", "Only one completion choice is allowed", 403),
    ],
)
def test_other_errors_do_not_forbid_n(prompt: str, message: str, status: int) -> None:
    dialect, asked = Dialect(), job([Message(role="user", content=prompt)])
    asked.others = MANY
    asked.dialect = dialect.version
    assert not dialect.teaches(read_error(status, json.dumps({"error": {"message": message}}).encode(), {}), asked)


def test_words_about_n_teach_nothing_where_it_was_not_sent() -> None:
    assert not learn(Dialect(), "Only one completion choice is allowed")


def test_a_template_that_knows_no_system_role() -> None:
    dialect = Dialect()
    assert learn(dialect, "System role not supported")
    assert [turn["role"] for turn in json.loads(dialect.body(job()))["messages"]] == ["developer", "user"]


def test_tools_calls_and_their_results_stay_whatever_is_learnt() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    turns = [Message("assistant", "", [call]), Message("tool", "12:00", tool_call_id="a")]
    tools = [{"type": "function", "function": {"name": "now"}}]
    asked = job([*ASKED, *turns])
    asked.request = replace(asked.request, tools=tools)
    dialect = Dialect()
    assert learn(dialect, "messages[0].role does not support system", asked=asked)
    assert learn(dialect, "Unsupported parameter: 'seed' is not supported", asked=asked)
    body = json.loads(dialect.body(asked))
    assert (body["messages"][0]["role"], body["tools"], "seed" in body) == ("developer", tools, False)
    assert body["messages"][2] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert body["messages"][3] == {"role": "tool", "content": "12:00", "tool_call_id": "a"}
