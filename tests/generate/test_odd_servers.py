"""Replies that no specification foresees, and what a machine's environment adds: each has one decided end."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from generate.batch_api import BatchApi
from generate.client import Client, OneAddress, check_teacher, headers_of, read_exception
from generate.reply import Answer, Choices, Fault, read_answer, read_choices, read_error
from generate.run import generate
from generate.streaming import Refused, Streamed, stream, streaming_session
from pipeline.address import proxy_of
from pipeline.errors import DistillError, RecipeError, UsageError
from pipeline.lineage import read_lineage
from pipeline.records import Usage
from pipeline.rundir import RunDir
from tests.servers.misbehaving_server import (
    Asked,
    Behaviour,
    answer,
    completions,
    cut,
    error,
    failures,
    misbehaving,
    raw,
    recipe_for,
    reset,
)
from tests.servers.streaming_server import COUNTED, streaming


def said(content: Any = "text", finish_reason: Any = "stop", usage: Any = None, **more: Any) -> bytes:
    message = {"role": "assistant", "content": content, **more.pop("message", {})}
    return json.dumps(
        {"choices": [{"message": message, "finish_reason": finish_reason}], "usage": usage, **more}
    ).encode()


def answer_in(body: bytes) -> Answer:
    found = read_answer(body)
    assert isinstance(found, Answer)
    return found


@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        ({"prompt_tokens": 7.0, "completion_tokens": "5"}, (7, 5)),
        ({"prompt_tokens": -7, "completion_tokens": 5}, (None, None)),
        ({"prompt_tokens": 10**30, "completion_tokens": 5}, (None, None)),
        ({"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}, (None, None)),
        ({"prompt_tokens": 7, "completion_tokens": 0, "total_tokens": 7}, (7, None)),  # of an answer that has a text
        ({"prompt_tokens": 7, "total_tokens": 7}, (7, None)),
        ({"prompt_tokens": 7, "total_tokens": 12}, (7, 5)),
        ({"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 9}, (7, 5)),
        ([], (None, None)),
        ("7", (None, None)),
    ],
)
def test_a_usage_that_is_no_count_costs_no_answer(usage: Any, counted: tuple[int | None, int | None]) -> None:
    found = answer_in(said(usage=usage))
    assert (found.text, found.usage.prompt_tokens, found.usage.completion_tokens) == ("text", *counted)


@pytest.mark.parametrize(
    ("texts", "counted"), [(("", ""), 0), (("text", ""), None), (("", "text"), None), (("",), 0), (("text",), None)]
)
def test_no_tokens_are_a_count_only_where_nothing_was_said(texts: tuple[str, ...], counted: int | None) -> None:
    choices = [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"} for text in texts]
    body = json.dumps({"choices": choices, "usage": {"prompt_tokens": 7, "completion_tokens": 0, "total_tokens": 7}})
    found = read_choices(body.encode(), most=len(texts))
    assert isinstance(found, Choices)
    assert found.usage == Usage(prompt_tokens=7, completion_tokens=counted)


@pytest.mark.parametrize(("prompt", "completion"), [(-900, -900), (7, 0)])
def test_a_usage_that_is_no_count_is_charged_in_full(run: RunDir, prompt: int, completion: int) -> None:
    """A negative one would give a budget back what was never there."""
    usage = {"prompt_tokens": prompt, "completion_tokens": completion}
    with misbehaving(lambda asked: raw(said(usage=usage))) as server:
        recipe = recipe_for(server, 10, budget={"tokens": 1500}, sampling={"max_tokens": 500})
        with pytest.raises(DistillError, match=r"budget\.tokens"):
            generate(recipe, run, quiet=True)
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "one "}, {"type": "text", "text": "two"}], "one two"),
        ([{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "two"}], "two"),
    ],
)
def test_a_content_of_parts_is_its_text(content: Any, text: str) -> None:
    assert answer_in(said(content)).text == text


@pytest.mark.parametrize(
    ("content", "message", "reasoning", "text"),
    [
        ("two", {"reasoning": "hm"}, "hm", "two"),
        ("two", {"reasoning_content": "\nhm\n"}, "hm", "two"),
        ("two", {"reasoning": None, "reasoning_content": "hm"}, "hm", "two"),
        ("two", {"reasoning": "hm", "reasoning_content": "hm"}, "hm", "two"),
        ("<think>ah</think>two", {"reasoning": "hm"}, "hm", "two"),
        ("<think>hm</think>\n\ntwo", {"reasoning": ""}, "hm", "two"),
        ("hm\n</think>\n\ntwo", {}, "hm", "two"),
        ("two", {"reasoning": {"odd": 1}, "reasoning_content": 5}, "", "two"),
        ([{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "two"}], {}, "hm", "two"),
        (
            [
                {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
                "odd",
                {"type": "text", "text": "two"},
            ],
            {},
            "hm",
            "two",
        ),
    ],
)
def test_reasoning_is_kept_apart_from_the_text(content: Any, message: Any, reasoning: str, text: str) -> None:
    found = answer_in(said(content, message=message))
    assert (found.reasoning, found.text) == (reasoning, text)


@pytest.mark.parametrize("text", [None, "", "I look it up."])
@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ({"name": "look_up", "arguments": '{"city": "서울"}'}, '{"city": "서울"}'),
        ({"name": "look_up", "arguments": {"city": "서울"}}, '{"city":"서울"}'),  # an object where a text is due
        ({"name": "look_up", "arguments": ""}, "{}"),
        ({"name": "look_up"}, "{}"),
        ({"name": "look_up", "arguments": '{"city": '}, '{"city": '),  # what is wrong with it is the filters' to say
    ],
)
def test_tool_calls_are_an_answer(text: str | None, function: Any, arguments: str) -> None:
    call = {"id": "call_1", "type": "function", "index": 0, "function": function}
    found = answer_in(said(text, "tool_calls", message={"tool_calls": [call, call]}))
    kept = {"id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": arguments}}
    assert (found.text, found.finish_reason, found.tool_calls) == (text or "", "tool_calls", [kept, kept])


def test_reasoning_tokens_are_counted_as_the_server_counts_them(run: RunDir) -> None:
    counted = {"prompt_tokens": 7, "completion_tokens": 5, "completion_tokens_details": {"reasoning_tokens": 3}}
    bodies = {"say 0": said(usage=counted, message={"reasoning": "hm"}), "say 1": said("<think>hm</think>two")}
    with misbehaving(lambda asked: raw(bodies[asked.text])) as server:
        summary = generate(recipe_for(server, 2), run, quiet=True)
        generate(recipe_for(server, 2), run, quiet=True)
    assert {row.usage.reasoning_tokens for row in completions(run)} == {3, None}
    assert (summary.completion_tokens, summary.reasoning_tokens) == (5, 3)
    assert json.loads(run.lineage.read_bytes())["generate"]["reasoning_tokens"] == 3


def test_tool_calls_are_in_the_record(run: RunDir) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}
    body = said(None, "tool_calls", message={"tool_calls": [call], "reasoning": "hm"})
    with misbehaving(lambda asked: raw(body)) as server:
        generate(recipe_for(server, 1), run, quiet=True)
    assert [(row.tool_calls, row.text, row.reasoning) for row in completions(run)] == [([call], "", "hm")]


@pytest.mark.parametrize("content", ["<think>Let me see", None])
def test_an_answer_cut_off_in_its_reasoning_is_none(content: str | None) -> None:
    usage = {"completion_tokens": 500, "completion_tokens_details": {"reasoning_tokens": 500}}
    found = read_answer(said(content, "length", usage, message={} if content else {"reasoning": "Let me see"}))
    assert isinstance(found, Fault)
    assert found.error == "thought_cut_off"
    assert found.message == (
        "the answer has no text (finish_reason length, 500 reasoning tokens): it was cut off while the model was "
        "thinking; raise sampling.max_tokens"
    )


@pytest.mark.parametrize("counted", [{}, {"completion_tokens": 0}])
def test_a_thought_that_is_neither_shown_nor_counted_apart_was_cut_off(counted: dict[str, int]) -> None:
    """Gemini's, whose tokens are in the total alone."""
    found = read_answer(said(None, "length", {"prompt_tokens": 10, "total_tokens": 109, **counted}))
    assert isinstance(found, Fault)
    assert (found.error, found.usage) == ("thought_cut_off", Usage(prompt_tokens=10, completion_tokens=99))
    assert "it was cut off before any text, perhaps while the model was thinking; raise sampling.max" in found.message


@pytest.mark.parametrize(
    ("text", "usage"), [("\n\n", {"prompt_tokens": 10, "completion_tokens": 99}), (None, {"prompt_tokens": 10})]
)
def test_a_blank_text_or_one_without_a_count_is_no_hidden_thought(text: str | None, usage: dict[str, int]) -> None:
    found = read_answer(said(text, "length", usage))
    assert isinstance(found, Fault) and found.error == "empty_answer"


def test_an_answer_that_a_parser_took_for_a_thought_is_told() -> None:
    found = read_answer(said(None, message={"reasoning": "The answer is 4."}))
    assert isinstance(found, Fault)
    assert found.error == "empty_answer"
    assert "all that came is reasoning; does the server's parser of it (--reasoning-parser) fit" in found.message


def test_what_stands_beside_the_text_may_be_odd() -> None:
    found = answer_in(said("half \ud83d", 3, model=5, message={"reasoning_content": "hm"}))
    assert (found.text, found.finish_reason, found.model, found.usage) == ("half \ufffd", "unknown", None, Usage())
    assert answer_in(said(finish_reason=None)).finish_reason == "unknown"
    steering = answer_in(said(finish_reason="\x1b[2Jdone", model="m\x1b]0;x\x07"))
    assert (steering.finish_reason, steering.model) == ("[2Jdone", "m ]0;x")
    assert answer_in(said(score=float("nan"))).text == "text"  # which Python reads, and JSON has not


@pytest.mark.parametrize(
    ("said_by_server", "recorded"),
    [
        *((reason, "stop") for reason in ("eos", "eos_token", "end_turn", "stop_sequence", "STOP")),
        *((reason, "length") for reason in ("max_tokens", "MAX_TOKENS")),
        ("model_length", "model_length"),  # Mistral: the context is full
    ],
)
def test_an_answer_s_end_has_openai_s_name(said_by_server: str, recorded: str) -> None:
    assert answer_in(said(finish_reason=said_by_server)).finish_reason == recorded


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (said(None, "tool_calls", message={"tool_calls": []}), "empty_answer"),
        (said("text", message={"tool_calls": [{"id": "1", "type": "function"}]}), "wrong_shape"),
        (said("text", message={"tool_calls": [{"function": {"name": "f", "arguments": 5}}]}), "wrong_shape"),
        (said([{"type": "image_url"}]), "empty_answer"),
        (said(5), "wrong_shape"),
        (b'{"a":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}", "wrong_shape"),
        (b'data: {"choices":[]}\n\ndata: [DONE]\n\n', "not_json"),
        ('{"choices":[{"message":{"content":"한글"}}]}'.encode("cp949"), "not_json"),
    ],
)
def test_a_reply_without_an_answer_says_which_kind_it_is(body: bytes, kind: str) -> None:
    found = read_answer(body)
    assert isinstance(found, Fault)
    assert found.error == kind


def test_an_error_nested_too_deep_to_read_is_its_bytes() -> None:
    assert read_error(400, b"[" * 100_000, {}).message.startswith("[[[")


@pytest.mark.parametrize(("status", "kind"), [(201, None), (206, None), (204, "not_json")])
def test_any_status_of_success_is_one(run: RunDir, status: int, kind: str | None) -> None:
    with misbehaving(lambda asked: raw(said() if kind is None else b"", status)) as server:
        summary = generate(recipe_for(server, 1), run, quiet=True)
    assert summary.errors == ({kind: 1} if kind else {})


@contextmanager
def raw_server(reply: bytes, family: int = socket.AF_INET, host: str = "127.0.0.1") -> Iterator[str]:
    """Answers every request with these very bytes and closes the connection."""
    with socket.create_server((host, 0), family=family, backlog=64) as listening:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65_536)
                    connection.sendall(reply)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/v1"
        listening.shutdown(socket.SHUT_RDWR)


def http(body: bytes, *headers: str, version: str = "1.1") -> bytes:
    return "\r\n".join([f"HTTP/{version} 200 OK", "Connection: close", *headers, "", ""]).encode() + body


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (http(said(), version="1.0"), None),
        (http(b"40\r\n" + said()[:30], "Transfer-Encoding: chunked"), "connection_lost"),
        (http(b"zz\r\n" + said(), "Transfer-Encoding: chunked"), "connection_lost"),
        (http(said(), "Content-Encoding: gzip"), "connection_lost"),
        (http(said(), f"X-Long: {'a' * 20_000}"), "connection_lost"),
        (b"SSH-2.0-OpenSSH_9\r\n", "connection_lost"),
    ],
    ids=["HTTP/1.0", "a chunk cut", "a chunk's size is none", "gzip that is none", "a header too long", "no HTTP"],
)
def test_http_as_it_should_not_be(run: RunDir, reply: bytes, kind: str | None) -> None:
    with raw_server(reply) as url:
        summary = generate(recipe_for(url, 1, generate={"max_attempts": 1}), run, quiet=True)
    assert summary.errors == ({kind: 1} if kind else {})


def test_ipv6(run: RunDir) -> None:
    with raw_server(http(said()), socket.AF_INET6, "::1") as url:
        assert generate(recipe_for(url, 2), run, quiet=True).answered == 2


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://127.0.0.1:1/v1?api-version=1", "teacher.query"),
        ("http://127.0.0.1:1/v1#x", "teacher.query"),
        ("http://127.0.0.1:1/v1/chat/completions", "leave /chat/completions out"),
        ("http://127.1:1/v1", "no endpoint at"),
    ],
)
def test_a_url_that_cannot_work_is_one_line_before_anything_is_asked(run: RunDir, url: str, words: str) -> None:
    with pytest.raises(DistillError, match=words):
        generate(recipe_for(url, 1), run, quiet=True)


def test_a_key_with_a_line_break_around_it_is_the_key(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", " sk-abc\r\n")
    with misbehaving() as server:
        generate(recipe_for(server, 1), run, quiet=True)
    assert server.asked[0].headers["Authorization"] == "Bearer sk-abc"


def test_what_no_header_can_carry_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\nabc")
    with pytest.raises(RecipeError, match="OPENAI_API_KEY holds a line break"):
        check_teacher(recipe_for("http://127.0.0.1:1/v1").teacher)
    monkeypatch.setenv("OPENAI_API_KEY", "sk")
    monkeypatch.setenv("TEAM", "a\nb")
    teacher = {"model": "m", "base_url": "http://127.0.0.1:1/v1", "headers": {"X-Team": "${TEAM}"}}
    with pytest.raises(RecipeError, match=r"teacher\.headers\.X-Team holds a line break"):
        check_teacher(recipe_for("", teacher=teacher).teacher)
    for name in ("X Team", "", "Größe", "X-Team:"):
        for key, value in (("headers", {name: "a"}), ("api_key_header", name)):
            with pytest.raises(RecipeError, match=f"teacher.{key}: '{name}' cannot name an HTTP header"):
                check_teacher(recipe_for("", teacher={"model": "m", key: value}).teacher)


@pytest.mark.parametrize("name", ["Authorization", "authorization"])
def test_a_header_of_the_recipe_takes_the_place_of_the_key_s(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A server for which the user gave other credentials does not get the key, too."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another")
    recipe = recipe_for("", teacher={"model": "m", "headers": {name: "Basic abc"}})
    for sent in (headers_of(recipe.teacher), BatchApi(recipe, "run").client.default_headers):
        assert [value for header, value in sent.items() if header.lower() == "authorization"] == ["Basic abc"]


def test_the_environment_s_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://me:pw@proxy:3128")
    monkeypatch.setenv("HTTP_PROXY", "proxy:3128")
    monkeypatch.setenv("NO_PROXY", "inside.example")
    assert proxy_of("https://api.example/v1") == "http://me:pw@proxy:3128"
    assert proxy_of("http://api.example/v1") == "http://proxy:3128"
    for url in ("https://inside.example/v1", "http://localhost:1/v1", "http://[::1]:1/v1", "http://0.0.0.0:1/v1"):
        assert proxy_of(url) is None
    for proxy in ("socks5://me:pw@proxy:1080", "http://me:pw@proxy:port"):
        monkeypatch.setenv("HTTPS_PROXY", proxy)
        with pytest.raises(UsageError, match=r"HTTPS_PROXY: \w+://\[secret\]@proxy:\w+ is no HTTP proxy"):
            proxy_of("https://api.example/v1")


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_what_a_proxy_turned_away_is_not_charged(run: RunDir, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    monkeypatch.setattr("pipeline.address.is_loopback", lambda url: False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    turned_away = b"HTTP/1.1 407 Who are you\r\nContent-Length: 0\r\n\r\n"
    with raw_server(turned_away) as proxy:
        monkeypatch.setenv(f"{scheme}_proxy", proxy.removesuffix("/v1"))
        recipe = recipe_for(f"{scheme}://teacher.example/v1", 20, generate={"give_up_s": 0.3}, budget={"tokens": 9999})
        with pytest.raises(DistillError, match="the proxy of the environment answers 407"):
            generate(recipe, run, quiet=True)
    assert not failures(run)
    assert read_lineage(run)["generate"]["spent"]["tokens"] == 0


def test_requests_go_through_the_proxy_and_a_dead_one_is_named(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.address.is_loopback", lambda url: False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with raw_server(http(said())) as proxy:
        monkeypatch.setenv("http_proxy", proxy.removesuffix("/v1"))
        assert generate_from("http://teacher.example/v1", run).answered == 2
    with pytest.raises(DistillError, match="the proxy of the environment: "):
        generate_from("http://teacher.example/v1", RunDir(run.path / "again"))


def generate_from(url: str, run: RunDir) -> Any:
    return generate(recipe_for(url, 2), run, quiet=True)


def test_a_password_in_netrc_is_for_others(run: RunDir, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("pipeline.address.is_loopback", lambda url: False)
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password pw\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-abc")
    with misbehaving() as server:
        generate(recipe_for(server, 1), run, quiet=True)
    assert server.asked[0].headers["Authorization"] == "Bearer sk-abc"


async def test_nor_is_it_for_a_streamed_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("pipeline.address.is_loopback", lambda url: False)
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password pw\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-abc")
    with misbehaving() as server:
        teacher = recipe_for(server).teacher
        async with streaming_session(teacher, timeout_s=5) as session:
            await stream(session, teacher, b'{"messages": [{"role": "user", "content": "say 1"}]}')
    assert server.asked[0].headers["Authorization"] == "Bearer sk-abc"
    assert (server.asked[0].body["stream"], server.asked[0].body["stream_options"]) == (True, {"include_usage": True})


async def test_no_hidden_limit_of_aiohttp_is_left() -> None:
    """100 connections, 300 s for a reply; and a gateway's cookie would send all requests to one server."""
    teacher = recipe_for("http://127.0.0.1:1/v1").teacher
    client, sessions = Client(teacher, teacher.url), [streaming_session(teacher, timeout_s) for timeout_s in (None, 5)]
    async with client, sessions[0], sessions[1]:
        connectors = [session.connector for session in (client._session, *sessions)]
        assert [connector and connector.limit for connector in connectors] == [0, 0, 0]
        assert [session.timeout.total for session in (client._session, *sessions)] == [None, 3600, 5]
        assert isinstance(client._session.cookie_jar, aiohttp.DummyCookieJar)


@pytest.mark.parametrize(("address", "family"), [("10.0.0.7", socket.AF_INET), ("fd00::7", socket.AF_INET6)])
async def test_one_of_a_name_s_addresses_is_the_one_that_is_asked(address: str, family: socket.AddressFamily) -> None:
    (found,) = await OneAddress(address).resolve("teacher.internal", 8000)
    assert (found["hostname"], found["host"], found["port"]) == ("teacher.internal", address, 8000)
    assert (found["family"], found["flags"]) == (family, socket.AI_NUMERICHOST)


async def test_a_streamed_thought_and_a_streamed_call_are_tokens_of_the_answer() -> None:
    deltas = [
        {"role": "assistant", "content": ""},
        {"reasoning": "hm"},
        {"reasoning_content": "so"},
        {"content": "two"},
        {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]},
    ]
    events = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events).encode() + b"data: [DONE]\n\n"
    with misbehaving(lambda asked: raw(body, content_type="text/event-stream")) as server:
        teacher = recipe_for(server).teacher
        async with streaming_session(teacher, timeout_s=5) as session:
            said = await stream(session, teacher, b'{"messages": [{"role": "user", "content": "say 1"}]}')
    assert said.tokens == 4


@pytest.mark.parametrize(
    ("behaviour", "moments"),
    [
        (streaming("on", "ce"), Streamed(1.0, 2.0, 3.0, 7)),
        (streaming("on", "ce", usage=None), Streamed(1.0, 2.0, 3.0, 2)),
        (streaming(reasoning="hm"), Streamed(1.0, 2.0, 3.0, 7)),
        (streaming(), Streamed(1.0, 2.0, 2.0, 7)),  # a token that is no text
    ],
)
async def test_a_streamed_answer_has_the_moments_of_its_first_and_last_token(
    monkeypatch: pytest.MonkeyPatch, behaviour: Behaviour, moments: Streamed
) -> None:
    ticks = count(1)
    monkeypatch.setattr("generate.streaming.time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    with misbehaving(lambda asked: behaviour) as server:
        teacher = recipe_for(server).teacher
        async with streaming_session(teacher, timeout_s=5) as session:
            assert await stream(session, teacher, b'{"messages": [{"role": "user", "content": "say 1"}]}') == moments


@pytest.mark.parametrize(
    ("behaviour", "kind", "says"),
    [
        (reset(), "connection_lost", "Server disconnected"),
        (cut(), "connection_lost", "payload is not completed"),
        (answer(delay_s=600), "timeout", "no whole answer within 0.2 s"),
        (error(503, "busy"), "server_error", "answers 503: busy"),
    ],
)
async def test_a_stream_that_does_not_come_whole_is_a_fault(behaviour: Behaviour, kind: str, says: str) -> None:
    with misbehaving(lambda asked: behaviour) as server:
        async with streaming_session(teacher := recipe_for(server).teacher, timeout_s=0.2) as session:
            with pytest.raises(Refused, match=says) as refused:
                await stream(session, teacher, b'{"messages": [{"role": "user", "content": "say 1"}]}')
    assert refused.value.fault.error == kind


async def test_a_stream_is_whole_once_it_has_said_why_it_ends_and_what_it_counted_stays() -> None:
    ended = {"choices": [{"index": 0, "delta": {"content": "two"}, "finish_reason": "stop"}], "usage": COUNTED}
    body = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in (ended, {"choices": []}))
    with misbehaving(lambda asked: raw(body, content_type="text/event-stream")) as server:
        async with streaming_session(teacher := recipe_for(server).teacher, timeout_s=5) as session:
            said = await stream(session, teacher, b'{"messages": [{"role": "user", "content": "say 1"}]}')
    assert said.tokens == 7


async def test_a_streamed_line_that_is_too_long_is_a_fault() -> None:
    line = b'data: {"choices": [{"index": 0, "delta": {"content": "' + b"L" * (1 << 20) + b'"}}]}\n\n'
    with misbehaving(lambda asked: raw(line, content_type="text/event-stream")) as server:
        teacher = recipe_for(server).teacher
        async with streaming_session(teacher, timeout_s=5) as session:
            with pytest.raises(DistillError, match=r"/chat/completions.*more than \d+ bytes"):
                await stream(session, teacher, b'{"messages": [{"role": "user", "content": "say 1"}]}')


def once(bad: Behaviour) -> Callable[[Asked], Behaviour]:
    return lambda asked: bad if asked.text == "say 1" and asked.attempt == 1 else answer()


@pytest.mark.parametrize("wait", ["99999999999", "1e300", "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_a_rest_longer_than_anybody_waits_ends_the_run(run: RunDir, wait: str) -> None:
    with misbehaving(once(error(429, "slow down", Retry_After=wait))) as server:
        recipe = recipe_for(server, 4, generate={"concurrency": 1})
        with pytest.raises(DistillError, match=r"takes no requests for another \d+ s"):
            generate(recipe, run, quiet=True)
        assert len(completions(run)) < 4
        assert generate(recipe, run, quiet=True).completed == 4


def test_with_another_endpoint_it_is_that_one_s_work(run: RunDir) -> None:
    with misbehaving(lambda asked: error(429, Retry_After="99999999999")) as first, misbehaving() as second:
        teacher = {"model": "stub", "base_url": [first.url, second.url]}
        assert generate(recipe_for(first, 6, teacher=teacher), run, quiet=True).answered == 6


def test_a_5xx_that_asks_for_too_much_is_that_request_s_end(run: RunDir) -> None:
    with misbehaving(once(error(503, "gone", Retry_After="99999999999"))) as server:
        summary = generate(recipe_for(server, 4), run, quiet=True)
    assert (summary.answered, summary.errors) == (3, {"server_error": 1})
    assert failures(run)[0].attempts == 1


def test_a_reset_that_never_comes_ends_the_run(run: RunDir) -> None:
    headers = {
        "x_ratelimit_limit_requests": "600",
        "x_ratelimit_remaining_requests": "0",
        "x_ratelimit_reset_requests": "30d",
    }
    with (
        misbehaving(lambda asked: raw(said(), **headers)) as server,
        pytest.raises(DistillError, match="takes no requests for another"),
    ):
        generate(recipe_for(server, 4, generate={"concurrency": 1}), run, quiet=True)
    assert len(completions(run)) == 1


@pytest.mark.parametrize(
    "body",
    [
        said("First, unplug the ket", "error"),
        said("First, unplug the ket", "abort"),
        said("First, unplug the ket", error={"code": 502, "message": "upstream died"}),
        json.dumps({"choices": [{"message": {"content": "First"}, "error": {"message": "upstream died"}}]}).encode(),
        said("", "error"),
    ],
    ids=["error", "abort", "beside the choice", "in the choice", "empty"],
)
def test_an_answer_that_the_server_broke_off_is_asked_again(run: RunDir, body: bytes) -> None:
    asked = list[str]()  # the first attempt of each is broken off

    def once(request: Asked) -> Behaviour:
        asked.append(request.text)
        return raw(body) if asked.count(request.text) == 1 else answer()

    with misbehaving(once) as server:
        summary = generate(recipe_for(server, 2), run, quiet=True)
    assert (summary.answered, summary.failed, len(asked)) == (2, 0, 4)
    assert not any("unplug" in row.text for row in completions(run))


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (json.dumps({"odd": "값"}).encode("utf-16"), "no_choices"),
        (b'{"odd": "\xed\xa0\xbd"}', "no_choices"),  # half a surrogate pair, not escaped
        (b'{"error": "\xed\xa0\xbd"}', "error_in_answer"),
        (b'{"error": {}}', "error_in_answer"),
        (json.dumps([1]).encode("utf-32"), "wrong_shape"),
        (b'["\xed\xa0\xbd"]', "wrong_shape"),
    ],
)
def test_no_encoding_of_a_body_without_an_answer_is_a_crash(run: RunDir, body: bytes, kind: str) -> None:
    with misbehaving(lambda asked: raw(body) if asked.text == "say 1" else answer()) as server:
        summary = generate(recipe_for(server, 4, generate={"max_attempts": 1}), run, quiet=True)
    assert (summary.answered, summary.errors) == (3, {kind: 1})
    assert read_error(400, body, {}).message


def test_an_error_with_half_a_surrogate_pair_can_be_written(run: RunDir) -> None:
    bad = raw(b'{"error": {"message": "half \\ud83d"}}', 400)
    with misbehaving(lambda asked: bad if asked.text == "say 1" else answer()) as server:
        assert generate(recipe_for(server, 4), run, quiet=True).errors == {"bad_request": 1}
    assert failures(run)[0].message == "half ?"


def test_an_answer_in_utf_16_is_an_answer() -> None:
    assert answer_in(said("이야기").decode().encode("utf-16")).text == "이야기"


@pytest.mark.parametrize("status", [200, 400])
def test_a_reply_without_end_is_given_up(run: RunDir, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("generate.client.MOST_BYTES", 100_000)
    bad = raw(b"x" * 5_000_000, status)
    with misbehaving(lambda asked: bad if asked.text == "say 1" else answer()) as server:
        summary = generate(recipe_for(server, 4), run, quiet=True)
    assert (summary.answered, summary.errors, failures(run)[0].status) == (3, {"too_large": 1}, status)


@pytest.mark.parametrize(
    ("fault", "billed"),
    [
        (read_error(504, b"<html>504 Gateway Time-out</html>", {}), True),  # nginx: the server behind it goes on
        (read_error(524, b"a timeout occurred", {}), True),  # Cloudflare
        (read_error(502, b"<html>502 Bad Gateway</html>", {}), False),
        (read_answer(b'{"error": {"code": 429, "message": "slow down"}}'), False),  # OpenRouter
        (read_answer(b'{"error": {"code": 502, "message": "no provider"}}'), False),
        (read_answer(b'{"error": {"code": "odd", "message": "no"}}'), True),
        (read_answer(said("half", error={"code": 502, "message": "upstream died"})), True),
        (read_exception(TimeoutError(), 5.0), True),
        (read_exception(aiohttp.ServerDisconnectedError(), 5.0), True),
        (read_exception(aiohttp.ConnectionTimeoutError(), 5.0), False),
    ],
)
def test_what_may_have_been_worked_on_is_charged(fault: Answer | Fault, billed: bool) -> None:
    assert isinstance(fault, Fault)
    assert fault.maybe_billed == billed


@pytest.mark.parametrize("code", [400, 401, 402, 403, 429, 502, 503])
def test_an_error_in_a_reply_of_success_is_what_its_code_says(code: int) -> None:
    body = json.dumps({"error": {"code": code, "message": "no"}}).encode()
    assert read_answer(body) == read_error(code, body, {})


@pytest.mark.parametrize("empty", [{}, "", None])
def test_an_error_without_words_is_one_only_where_there_is_no_answer(empty: Any) -> None:
    assert answer_in(said(error=empty)).text == "text"
    fault = read_answer(json.dumps({"error": empty}).encode())
    assert isinstance(fault, Fault) and fault.error == ("no_choices" if empty is None else "error_in_answer")
    assert read_error(502, b"", {}).message == "no words"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            '{"error": {"message": "Model supports at most 1 image.", "code": "bad"}}',
            ": Model supports at most 1 image.",
        ),
        ("temporarily rate-limited upstream", ": temporarily rate-limited upstream"),
        (" ", ""),
        (None, ""),
    ],
)
def test_what_the_provider_behind_a_gateway_said_is_told(raw: str | None, message: str) -> None:
    """OpenRouter, docs "Errors": `metadata` of an error of a provider has its name and its raw words."""
    said = {"message": "Provider returned error", "code": 400, "metadata": {"provider_name": "X", "raw": raw}}
    fault = read_error(400, json.dumps({"error": said}).encode(), {})
    assert (fault.error, fault.message) == ("bad_request", f"Provider returned error{message}")


def test_a_prompt_that_a_filter_behind_a_gateway_withheld() -> None:
    raw = json.dumps({"error": {"message": "The response was filtered", "code": "content_filter"}})
    said = {"message": "Provider returned error", "code": 400, "metadata": {"raw": raw}}
    assert read_error(400, json.dumps({"error": said}).encode(), {}).error == "content_filter"


PER_DAY = {"quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier"}
PER_MINUTE = {"quotaId": "GenerateRequestsPerMinutePerProjectPerModel-FreeTier"}


def gemini_quota(violation: dict[str, str]) -> list[dict[str, Any]]:
    details = [{"violations": [violation]}, {"retryDelay": "34s"}]
    return [{"error": {"code": 429, "message": "You exceeded your current quota", "details": details}}]


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, {"error": {"message": "Your credit balance is too low to access the Anthropic API. Please go to …"}}),
        (400, {"error": {"message": "Budget has been exceeded! Current cost: 26.1, Max budget: 0.25", "code": "400"}}),
        (
            429,
            {"error": {"message": "exceeded budget for model=claude-opus-4-8", "type": "budget_exceeded"}},
        ),  # LiteLLM
        (429, {"error": "Your team x has reached its monthly spending limit. To continue making requests, please …"}),
        (412, {"error": {"message": "… reaching the monthly spending limit or failure to pay past invoices."}}),
        (
            429,
            {"error": {"message": "Your account is not active", "code": "billing_not_active"}},
        ),  # OpenAI, as the next
        (400, {"error": {"message": "Billing hard limit has been reached", "code": "billing_hard_limit_reached"}}),
        (429, gemini_quota(PER_DAY)),
    ],
    ids=["Anthropic", "LiteLLM", "LiteLLM 429", "xAI", "Fireworks", "OpenAI", "OpenAI 400", "Gemini"],
)
def test_money_or_a_day_s_quota_that_is_used_up(status: int, body: Any) -> None:
    said = json.dumps(body, indent=2).encode()
    assert read_error(status, said, {}).error == "insufficient_quota"
    assert read_error(502, said, {}).error == "server_error"  # what a gateway that is broken says is no word of money


def test_a_quota_of_a_minute_and_a_prompt_about_money_are_not() -> None:
    assert read_error(429, json.dumps(gemini_quota(PER_MINUTE)).encode(), {}).error == "rate_limited"
    for said in ("My credit balance is too low", "Who sets the monthly spending limit?", "We exceeded budget again"):
        assert (
            read_error(400, json.dumps({"error": {"message": f"refused: {said}"}}).encode(), {}).error == "bad_request"
        )


CUT = ["content_filter", "content_filter: RECITATION", "SAFETY", "sensitive", "refusal", "guardrail_intervened"]


@pytest.mark.parametrize("reason", CUT)
def test_an_answer_that_a_filter_cut_is_none(reason: str) -> None:
    fault = read_answer(said("First, unplug the ket", reason))
    assert isinstance(fault, Fault)
    assert fault.error == "content_filter"


def test_gemini_s_wait_is_in_its_body() -> None:
    """As google.rpc.RetryInfo; its OpenAI-compatible endpoint sends a list, and no header."""
    details = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "34.07s"}]
    said = {"code": 429, "message": "You exceeded your quota", "details": details}
    fault = read_error(429, json.dumps([{"error": said}], indent=2).encode(), {})
    assert (fault.error, fault.retry_after_s, fault.message) == ("rate_limited", 34.07, "You exceeded your quota")


@pytest.mark.parametrize(("reset", "waits_s"), [(1_794_000_060_500, 60.5), (1_793_999_999_000, 0.0)])
def test_openrouter_s_wait_is_in_its_body(reset: int, waits_s: float) -> None:
    """The end of the minute or the day, against the server's own clock: 1,794,000,000 s after 1970."""
    said = {"code": 429, "message": "Rate limit exceeded", "metadata": {"headers": {"X-RateLimit-Reset": str(reset)}}}
    headers = {"date": "Fri, 06 Nov 2026 21:20:00 GMT"}
    fault = read_error(429, json.dumps({"error": said}).encode(), headers)
    assert (fault.error, fault.retry_after_s) == ("rate_limited", waits_s)


def test_a_request_larger_than_a_minute_allows_fails_at_once(run: RunDir) -> None:
    """OpenAI. Sent again and again, it held the endpoint back until all others were answered, and five minutes more."""
    words = "Request too large for gpt-4.1 in organization org-x on tokens per min (TPM): Limit 30000, Requested 52000."
    large = error(429, words, "rate_limit_exceeded")
    with misbehaving(lambda asked: large if asked.text == "say 1" else answer()) as server:
        summary = generate(recipe_for(server, 4), run, quiet=True)
    assert (summary.answered, summary.errors, len(server.asked)) == (3, {"bad_request": 1}, 4)


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (
            "<!DOCTYPE html>\n<html><head>\n<title>Just a moment...</title></head></html>",
            "a web page: Just a moment...",
        ),
        ("<html>\r\n<head><title> 502 Bad Gateway </title></head></html>", "a web page: 502 Bad Gateway"),
        ("<html><title></title>Out</html>", "<html><title></title>Out</html>"),
        ("upstream timed out", "upstream timed out"),
    ],
)
def test_of_a_web_page_in_place_of_an_error_its_title_is_told(page: str, message: str) -> None:
    assert read_error(502, page.encode(), {}).message == message
