"""`decide`, held against every row of the table in docs/generation.md: neither can change without the other."""

import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from generate.client import read_exception
from generate.dialect import Dialect
from generate.jobs import Job
from generate.reply import Answer, Fault, read_answer, read_error
from generate.verdict import (
    FAILURES_IN_ROW,
    QUIET_S,
    REFUSED_ALIKE,
    EndRun,
    Fail,
    Pause,
    Retry,
    State,
    decide,
    speaks_of_endpoint,
)
from pipeline.generate_config import GenerateConfig
from pipeline.records import Message, Request

CONFIG = GenerateConfig()
LIMITED = {"idle": True, "limited": 2, "limited_s": CONFIG.give_up_s}  # by nothing but 429, and for long
PAGE = Path(__file__).parents[2] / "docs" / "generation.md"
HEADER = "| reply | in failures.jsonl | verdict | what follows |"


def said(content: Any = "text", finish_reason: Any = "stop", usage: Any = None, **more: Any) -> Answer | Fault:
    message = {"role": "assistant", "content": content, **more.pop("message", {})}
    choice = {"message": message, "finish_reason": finish_reason}
    return read_answer(json.dumps({"choices": [choice], "usage": usage, **more}).encode())


def error(status: int, message: str = "no", code: str | None = None, **headers: str) -> Fault:
    body = json.dumps({"error": {"message": message, "code": code}}).encode()
    return read_error(status, body, {name.replace("_", "-"): value for name, value in headers.items()})


def broken(exception: BaseException) -> Fault:
    return read_exception(exception, 300)


def refused_connection() -> aiohttp.ClientConnectorError:
    return aiohttp.ClientConnectorError(None, ConnectionRefusedError(111, "refused"))  # type: ignore[arg-type]


def asked(attempts: int = 1) -> Job:
    request = Request(
        id="i", prompt_id="p", messages=[Message("user", "hi")], endpoint="e", sampling={"max_tokens": 5, "seed": 1}
    )
    return Job(request, request.messages, "m", attempts=attempts)


UTF_16 = json.dumps({"choices": [{"message": {"content": "text"}, "finish_reason": "stop"}]}).encode("utf-16")
CALL = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}
NO_KEY_OF_GEMINI = json.dumps(
    [
        {
            "error": {
                "code": 400,
                "message": "API key expired. Please renew the API key.",
                "status": "INVALID_ARGUMENT",
                "details": [{"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}],
            }
        }
    ]
).encode()
LAST = {"attempts": CONFIG.max_attempts}

# Row of the table → replies that it speaks of, and what else is known then.
ROWS: dict[str, tuple[list[Answer | Fault], dict[str, Any]]] = {
    "an answer": ([said()], {}),
    "`finish_reason: length`": ([said(finish_reason="length")], {}),
    "no `usage`, or one that is no count (negative, not a number, a prompt or a text of 0 tokens)": (
        [said(usage=None), said(usage={"prompt_tokens": -1}), said(usage="7"), said(usage={"prompt_tokens": "x"})],
        {},
    ),
    "no `finish_reason`": ([said(finish_reason=None)], {}),
    "`finish_reason` in another API's words (`eos` of Together, `end_turn`, `STOP`, `max_tokens`, …)": (
        [said(finish_reason=reason) for reason in ("eos", "eos_token", "end_turn", "STOP", "MAX_TOKENS")],
        {},
    ),
    "a content of parts": ([said([{"type": "thinking"}, {"type": "text", "text": "x"}])], {}),
    "reasoning beside the text, or before it in `<think>…</think>`": (
        [said(message={"reasoning_content": "hm"}), said("<think>hm</think>text")],
        {},
    ),
    "tool calls, with or without text": (
        [said(text, "tool_calls", message={"tool_calls": [CALL]}) for text in (None, "", "text")],
        {},
    ),
    "half a surrogate pair in the text": ([said("half \ud83d")], {}),
    "JSON in UTF-16": ([read_answer(UTF_16)], {}),
    "fewer choices than were asked for (`generate.share_prompt`)": (
        [Fault("missing_choice", "2 of 4 choices came", 200)],
        {**LAST, "failing": FAILURES_IN_ROW},  # they do not count
    ),
    "429 for rate": ([error(429), error(429, retry_after="2"), error(429, Retry_After_Ms="5")], {}),
    "429 at the last attempt, nothing answered for two minutes": ([error(429)], LAST),
    "429 to several requests for `give_up_s` (600 s), nothing answered meanwhile, and nothing in flight": (
        [error(429)],
        LIMITED,
    ),
    "402; words or a code of a used-up quota (`insufficient_quota` with 429, Anthropic's credit balance with 400)": (
        [
            error(402, "Insufficient Balance"),
            error(429, code="insufficient_quota"),
            error(400, "Your credit balance is too low to access the Anthropic API."),
        ],
        {},
    ),
    "408 or 5xx": ([error(408), error(500), error(503), error(529)], {}),
    "503 or 529 at the last attempt, something answered in the last two minutes": (
        [error(503), error(529)],
        {**LAST, "quiet_s": QUIET_S - 1},
    ),
    "5xx at the last attempt": ([error(500)], LAST),
    "5xx with a `Retry-After` beyond `give_up_s`": ([error(503, **{"retry-after": "99999"})], {}),
    "connection refused, no route": (
        [broken(refused_connection()), broken(aiohttp.ConnectionTimeoutError())],
        LAST,  # they do not count
    ),
    "connection reset, closed in the body, wrong Content-Length, an encoding that it is not": (
        [
            broken(aiohttp.ServerDisconnectedError()),
            broken(aiohttp.ClientPayloadError()),
            broken(ConnectionResetError()),
        ],
        {},
    ),
    "no whole answer in `request_timeout_s` (300 s; 3600 at a server that shows what it works on)": (
        [broken(TimeoutError()), broken(TimeoutError())],
        {},
    ),
    "a timeout after which less than a tenth of an attempt's time is left to `deadline_s` (three such times)": (
        [broken(TimeoutError())],
        {"has_time": False},
    ),
    "HTML, an event stream, truncated or no JSON with status 2xx": (
        [read_answer(body) for body in (b"<html>", b"data: {}\n\n", b'{"choices": [{"mess', b"")],
        {},
    ),
    "an error object with status 200, in a choice too, or a finish reason `error`, `abort`, "
    "`insufficient_system_resource` or `network_error` (gateways, DeepSeek, Zhipu)": (
        [
            read_answer(b'{"error": {"code": "overloaded"}}'),
            said("half", "insufficient_system_resource"),
            said("half", "network_error"),
        ],
        {},
    ),
    "an error object with status 200, no choice and a `code` that is an HTTP status, as 429 (OpenRouter)": (
        [read_answer(b'{"error": {"code": 429, "message": "Rate limit exceeded: free-models-per-min"}}')],
        {},
    ),
    "the eighth failure in a row, of different requests": ([error(500)], {"failing": FAILURES_IN_ROW}),
    "a failure while the endpoint is down": ([error(500)], {**LAST, "failing": FAILURES_IN_ROW, "down": True}),
    "a failure when all endpoints have been down for `give_up_s` (600 s)": (
        [error(500), broken(refused_connection())],
        {"down": True, "all_down_s": CONFIG.give_up_s},
    ),
    "400 or 422 that refuses a setting": (
        [error(status, "Unsupported parameter: 'seed' is not supported") for status in (400, 422)],
        {},
    ),
    "any other 4xx; 429 to a request larger than a minute allows (OpenAI)": (
        [
            *map(error, (400, 409, 413, 422, 451)),
            error(429, "Request too large for gpt-4.1 in organization org-x on …"),
        ],
        {},
    ),
    "403": ([error(403)], {}),
    "the 20th request in a row, all refused alike, or all cut off in their thoughts": (
        [error(400), error(403), read_answer(b"{}"), read_answer(b"[]"), said("<think>hm", "length")],
        {"refused_alike": REFUSED_ALIKE},
    ),
    "401; 400 for a wrong key (Gemini, xAI)": (
        [error(401), read_error(400, NO_KEY_OF_GEMINI, {}), error(400, "Incorrect API key provided: na***ys.")],
        {},
    ),
    "404, 405, a redirect": ([error(404), error(405), error(308)], {}),
    "401, 404, 405 or a redirect while another endpoint is up": (
        [error(401), error(404), error(405), error(308)],
        {**LAST, "others_up": True},
    ),
    "an empty answer": (
        [said(""), said(None), said(" \n"), said(None, "tool_calls", message={"tool_calls": []})],
        {"refused_alike": REFUSED_ALIKE},  # a model may end at once, and often
    ),
    "a thought that was cut off before the text began": ([said("<think>hm", "length")], {}),
    "no `choices`": ([read_answer(b'{"choices": []}'), read_answer(b'{"odd": "\xed\xa0\xbd"}')], {}),
    "JSON of another shape": ([read_answer(b"[]"), said(5), said(message={"tool_calls": [{"id": "1"}]})], {}),
    "a refusal in place of text": ([said(None, message={"refusal": "I cannot."})], {}),
    "a content filter; a finish reason of one (`SAFETY`, `RECITATION`, `sensitive`, …)": (
        [said("half", "content_filter"), error(400, code="content_filter"), said("half", "RECITATION")],
        {},
    ),
    "a reply of more than 64 MiB": ([Fault("too_large", "long", 200)], {}),
}


def table() -> list[list[str]]:
    """The rows of the page: reply, error, verdict."""
    lines = PAGE.read_text(encoding="utf-8").split(HEADER)[1].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split(" |")] for line in lines[: lines.index("")]]
    return [[row[0], row[1].strip("` "), row[2]] for row in rows]


def test_the_page_and_the_test_have_the_same_rows() -> None:
    assert [reply for reply, _, _ in table()] == list(ROWS)


@pytest.mark.parametrize(("reply", "kind", "verdict"), table())
def test_each_row_is_what_decide_says(reply: str, kind: str, verdict: str) -> None:
    replies, known = ROWS[reply]
    for one in replies:
        if isinstance(one, Answer):
            assert verdict == "Answered"
            continue
        job = asked(known.get("attempts", 1))
        state = State("http://e/v1", **{name: value for name, value in known.items() if name != "attempts"})
        state = state._replace(teaches=Dialect().teaches(one, job))
        assert not kind or one.error == kind
        assert type(decide(one, job, state, CONFIG)).__name__ == verdict


@pytest.mark.parametrize(
    ("fault", "known", "verdict"),
    [
        (error(429, **{"retry-after": "4"}), {}, Pause(4.0, Retry(4.0, step=0))),
        (error(429), {**LAST, "quiet_s": QUIET_S - 1}, Pause(0.25, Retry(0.0, step=1, counted=False))),
        (error(429), {**LAST, "quiet_s": QUIET_S}, Pause(0.25, Fail(held_back=True))),
        (error(429), {**LIMITED, "idle": False}, Pause(0.25, Retry(0.0, step=1))),  # others are at work
        (error(429), {**LIMITED, "limited_s": CONFIG.give_up_s - 1}, Pause(0.25, Retry(0.0, step=1))),
        (error(429), {**LIMITED, "limited": 1}, Pause(0.25, Retry(0.0, step=1))),  # its own fault
        (error(429), {}, Pause(0.25, Retry(0.0, step=1))),
        (error(429), {"step": 3}, Pause(1.0, Retry(0.0, step=1))),
        (error(429), {"step": 0}, Pause(0.0, Retry(0.0, step=1))),  # sent before the last step
        (error(429, **{"retry-after": "99999"}), {}, Pause(99999.0, Retry(0.0, step=0))),  # the endpoint waits
        (error(500), {"attempts": 2}, Retry(0.0, step=2)),
        (error(503, **{"retry-after": "4"}), {}, Retry(4.0, step=1)),
        (error(503), {**LAST, "quiet_s": QUIET_S - 1}, Retry(0.0, step=CONFIG.max_attempts, counted=False)),
        (error(503), {**LAST, "quiet_s": QUIET_S}, Fail()),
        (error(500), {**LAST, "quiet_s": QUIET_S - 1}, Fail()),
        (error(500), {"failing": 8, "step": 2}, Pause(1.0, Retry(0.0, step=1), down=True)),
        (error(500), {"failing": 8, "step": 0}, Pause(0.0, Retry(0.0, step=1), down=True)),
        (error(500), {"failing": 8, "down": True}, Pause(0.5, Retry(0.0, step=1, counted=False), down=True)),
        (broken(refused_connection()), {"has_time": False}, Pause(0.5, Retry(step=1, counted=False), down=True)),
        (Fault("missing_choice", "2 of 4 choices came", 200), {}, Retry(step=0, counted=False)),
        (error(403), {"refused_alike": 1}, Fail(held_back=True)),
        (error(403), {"refused_alike": 0}, Fail(held_back=False)),
        (said(""), {"refused_alike": 5}, Fail(held_back=False)),
        (error(400), {"others_up": True}, Fail()),  # another endpoint would say the same
        (error(500), {"others_up": True}, Retry(0.0, step=1)),
    ],
)
def test_how_long_and_whose_fault(fault: Fault, known: dict[str, Any], verdict: object) -> None:
    job = asked(known.pop("attempts", 1))
    assert decide(fault, job, State("http://e/v1", **known), CONFIG) == verdict


@pytest.mark.parametrize(
    ("fault", "speaks"),
    [(error(500), True), (broken(refused_connection()), True), (broken(TimeoutError()), True)]
    + [(fault, False) for fault in (error(400), error(401), error(402), error(429), said(""))]
    + [(Fault("missing_choice", "2 of 4 choices came", 200), False)],
)
def test_what_is_a_sign_that_the_endpoint_is_down(fault: Fault, speaks: bool) -> None:
    assert speaks_of_endpoint(fault) == speaks


def test_the_end_of_a_run_names_what_to_fix() -> None:
    state = State("http://e/v1", key="MY_KEY is not set", refused_alike=REFUSED_ALIKE)
    for fault, words in [
        (error(401, "wrong key"), "http://e/v1 answers 401 (wrong key): MY_KEY is not set"),
        (error(402, "Insufficient Balance"), "the quota is used up (Insufficient Balance); top it up"),
        (error(400, "no such field"), "20 requests in a row end with bad_request (status 400): no such field."),
    ]:
        verdict = decide(fault, asked(), state, CONFIG)
        assert isinstance(verdict, EndRun)
        assert words in verdict.message


@pytest.mark.parametrize(("url", "doubted"), [("http://e:8000", True), ("http://e/v1", False), ("http://e/v4", False)])
def test_a_url_without_its_version_that_answers_404_is_asked_about(url: str, doubted: bool) -> None:
    verdict = decide(error(404, "Not Found"), asked(), State(url), CONFIG)
    assert isinstance(verdict, EndRun)
    assert verdict.message.endswith("; should the URL end in /v1?") == doubted


def test_a_404_of_azure_names_the_deployment() -> None:
    """Azure: `Resource not found` without an api-version, `DeploymentNotFound` for a wrong name."""
    verdict = decide(error(404, "Resource not found"), asked(), State("https://n/openai/deployments/d"), CONFIG)
    assert isinstance(verdict, EndRun)
    assert verdict.message.endswith("does the deployment have this name, and teacher.query an api-version?")
