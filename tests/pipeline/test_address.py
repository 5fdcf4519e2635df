"""Addresses: which are this machine's, which are private, what goes through a proxy; and what is never printed."""

import socket
from base64 import b64encode

import pytest

from pipeline.address import (
    Redactor,
    is_loopback,
    is_port_open,
    is_private,
    is_this_machine,
    proxy_of,
)
from pipeline.teacher_config import TeacherConfig

PROXY = "http://user:pa%40ss-word@proxy.example:3128"


@pytest.mark.parametrize(
    ("url", "loopback", "private"),
    [
        ("http://127.0.0.1:8000/v1", True, True),
        ("http://localhost/v1", True, True),
        ("http://[::1]:8000/v1", True, True),
        ("http://0.0.0.0:8000/v1", True, True),
        ("http://10.1.2.3/v1", False, True),
        ("http://gpu-box:8000/v1", False, True),
        ("http://gpu.internal/v1", False, True),
        ("https://api.openai.com/v1", False, False),
        ("http://8.8.8.8/v1", False, False),
    ],
)
def test_where_a_url_leads(url: str, loopback: bool, private: bool) -> None:
    assert (is_loopback(url), is_private(url)) == (loopback, private)


def test_this_machine_is_known_by_its_own_name_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "gpu-box")
    assert is_this_machine("http://gpu-box:8000/v1")
    assert is_this_machine("http://127.0.0.1:8000/v1")
    assert not is_this_machine("http://203.0.113.9/v1")  # an address that this machine does not have
    assert not is_this_machine("https://api.openai.com/v1")


def test_an_open_port_is_seen_behind_a_proxy_and_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        assert is_port_open(url)  # nothing was sent, so no key was asked for
    assert not is_port_open(url)


def test_a_url_without_a_port_has_the_port_of_its_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[str, int]] = []

    def refuse(address: tuple[str, int], timeout: float) -> None:
        tried.append(address)
        raise OSError

    monkeypatch.setattr(socket, "create_connection", refuse)
    assert not is_port_open("https://h/v1") and not is_port_open("http://h/v1")
    assert tried == [("h", 443), ("h", 80)]


def test_a_proxy_is_never_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "proxy.example:3128")
    monkeypatch.setenv("no_proxy", "internal.example")
    assert proxy_of("http://api.example/v1") == "http://proxy.example:3128"
    assert proxy_of("http://internal.example/v1") is None
    assert proxy_of("http://127.0.0.1:8000/v1") is None


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("Incorrect API key provided: sk-proj-abcDEF123456. See", "sk-proj-abcDEF123456"),
        ("Incorrect API key provided: sk-abcd********************wxyz.", "wxyz"),
        ("token hf_abcdefghijklmnopqrstuvwxyzABCDEFGH is invalid", "hf_abc"),
        ("key AIzaSyA1234567890abcdefghijklmnopqrstuv", "AIzaSy"),
        ("Authorization: Bearer 0123456789abcdef", "0123456789abcdef"),
        ("jwt eyJhbGciOi.eyJzdWIi.SflKxwRJ expired", "eyJhbGciOi"),
        (f"cannot connect to {PROXY}", "pa%40ss-word"),
    ],
)
def test_what_is_shaped_like_a_secret_is_hidden(text: str, hidden: str) -> None:
    assert hidden in text
    assert hidden not in Redactor()(text)
    assert "[secret]" in Redactor()(text)


@pytest.mark.parametrize(
    "text",
    [
        "call hf_hub_download(...) first",
        "a risk-averse task-oriented model",
        "max_tokens is not supported",
        "기본 sk 값",
    ],
)
def test_ordinary_words_stay(text: str) -> None:
    assert Redactor(["a", ""])(text) == text  # and a secret of one letter is not looked for


def test_all_that_a_teachers_requests_carry_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "plain-words-as-a-key")
    monkeypatch.setenv("TEAM", "team-seven")
    monkeypatch.setenv("https_proxy", PROXY)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    teacher = TeacherConfig(
        model="m", base_url="https://api.example/v1", api_key_env="MY_KEY", headers={"X-Team": "x ${TEAM}"}
    )
    redact = Redactor.of(teacher)
    basic = b64encode(b"user:pa@ss-word").decode()
    for secret in ("plain-words-as-a-key", "team-seven", "pa%40ss-word", "pa@ss-word", basic):
        assert redact(f"the server says: {secret}!") == "the server says: [secret]!"
