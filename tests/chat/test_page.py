"""The chat page in a real browser, against real servers that stream."""

import os
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from playwright.sync_api import Page, sync_playwright

from chat.models import LABELS, Model
from chat.page import chat_page
from pipeline.records import Message, Prompt, encode_line
from pipeline.rundir import RunDir
from serve.named import KEYS
from tests.servers.misbehaving_server import Asked, Behaviour, Script, error, misbehaving, recipe_for
from tests.servers.streaming_server import endless, streaming

CHROMIUM = "/usr/bin/chromium"
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync", "--no-first-run"]
NASTY = '<img src=x onerror="document.title=\'stolen\'"><script>document.title="stolen"</script> & </article>'
TOKEN = "token"


@pytest.fixture(scope="module")
def browser_page() -> Iterator[Page]:
    assert Path(CHROMIUM).exists(), "the page is tested in a real browser: install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
        context.set_default_timeout(60_000)
        yield context.new_page()
        browser.close()


@contextmanager
def chatting(run: RunDir, **scripts: Script) -> Iterator[tuple[str, dict[str, Any]]]:
    """The page of models that answer by these scripts; yields its address and the servers by model."""
    with ExitStack() as stack:
        servers = {name: stack.enter_context(misbehaving(script)) for name, script in scripts.items()}
        models = []
        for name, server in servers.items():
            recipe = recipe_for(server, student={"model": "small"})
            tested = recipe.prompts.model_copy(update={"test": 0.99, "validation": 0.001})
            recipe = recipe.model_copy(update={"prompts": tested})
            models.append(Model(KEYS[name], LABELS[KEYS[name]], recipe))
            models[-1].at(server.url)
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))  # connections wait for the server
        app = chat_page(models[0].recipe, run, models, TOKEN)
        page = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=page.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/{TOKEN}/", servers
        finally:
            page.should_exit = True
            thread.join()


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run with one prompt, of the test part of the recipe above."""
    made = RunDir(tmp_path)
    prompt = Prompt(id="a", messages=[Message("system", "JSON."), Message("user", "Lamp on!")], reference={"on": 1})
    made.prompts.write_bytes(encode_line(prompt))
    return made


def say(page: Page, text: str, *, wait: bool = True) -> None:
    page.fill("#words", text)
    page.keyboard.press("Enter")
    if wait:
        page.wait_for_function("() => !document.querySelector('.going') && !document.querySelector('#send').disabled")


def said(page: Page, model: str, turn: int = -1) -> str:
    return page.query_selector_all(f".answer[data-model={model}] .said")[turn].inner_text()


def asked(server: Any) -> list[list[str]]:
    return [[turn["content"] for turn in one.body["messages"]] for one in server.asked]


def test_three_answer_side_by_side_over_several_turns(run: RunDir, browser_page: Page) -> None:
    page = browser_page
    scripts: dict[str, Script] = {
        "teacher": lambda one: streaming("Well", ", yes.", reasoning="Hm."),
        "before": lambda one: streaming("dunno"),
        "student": lambda one: streaming("Yes."),
    }
    with chatting(run, **scripts) as (url, servers):
        page.goto(url)
        page.wait_for_selector(".model.ready")
        assert [part.inner_text() for part in page.query_selector_all(".model strong")] == list(LABELS.values())
        say(page, "Is it?")
        say(page, "Sure?")
        assert [said(page, name) for name in scripts] == ["Well, yes.", "dunno", "Yes."]
        figures = page.inner_text(".answer[data-model=student] footer .quiet")
        assert "7 tokens, " in figures and "tokens/s" in figures and "own server" in figures
        assert "Hm." in (page.text_content(".answer[data-model=teacher] details") or "")
        assert asked(servers["student"])[1] == ["Is it?", "Yes.", "Sure?"]
        assert asked(servers["teacher"])[1] == ["Is it?", "Well, yes.", "Sure?"]
        page.click(".turn:last-child .answer[data-model=before] .copy")
        assert page.evaluate("navigator.clipboard.readText()") == "dunno"
        page.reload()
        page.wait_for_selector(".answer")
        assert said(page, "student", 0) == "Yes."  # what was said outlives the page
        for width, name in ((1280, "wide"), (390, "phone")):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            if folder := os.environ.get("SCREENSHOTS"):
                page.screenshot(path=f"{folder}/chat-{name}.png", full_page=True)
        page.dispatch_event("body", "keydown", {"key": "b", "code": "KeyN", "altKey": True})  # Dvorak's B
        assert page.query_selector(".turn")
        page.dispatch_event("body", "keydown", {"key": "n", "code": "KeyL", "altKey": True})
        assert page.query_selector(".turn") is None
        page.fill("#words", "ما هي عاصمة فرنسا؟")
        assert page.evaluate("getComputedStyle(document.getElementById('words')).direction") == "rtl"
        page.fill("#words", "にほんご")
        for composing in ({"isComposing": True}, {"keyCode": 229}):  # as Chromium and Safari say it
            page.dispatch_event("#words", "keydown", {"key": "Enter", **composing})
            assert page.query_selector(".turn") is None and page.input_value("#words") == "にほんご"


def test_an_error_stays_in_its_column_and_the_model_can_be_asked_again(run: RunDir, browser_page: Page) -> None:
    page, broken = browser_page, [error(500, f"no memory {NASTY}"), streaming("half", error="engine died")]

    def teacher(one: Asked) -> Behaviour:
        return broken.pop(0) if broken else streaming("Here.")

    with chatting(run, teacher=teacher, student=lambda one: streaming("Fine.")) as (url, servers):
        page.goto(url)
        page.wait_for_selector(".model.ready")
        say(page, "Hello")
        column = ".answer[data-model=teacher]"
        assert "no memory" in page.inner_text(f"{column} .error") and page.query_selector(".error img") is None
        assert said(page, "student") == "Fine."
        page.click(f"{column} .again")
        page.wait_for_function(
            "() => document.querySelector('.answer[data-model=teacher] .said').textContent === 'half'"
        )
        page.wait_for_selector(f"{column} .error:has-text('engine died')")
        page.click(f"{column} .again")
        page.wait_for_function(
            "() => document.querySelector('.answer[data-model=teacher] .said').textContent === 'Here.'"
        )
        assert page.inner_text(f"{column} .error") == ""
        assert len(servers["student"].asked) == 1
        servers["teacher"].die()
        say(page, "Still there?")
        assert page.query_selector_all(f"{column} .error")[-1].inner_text() != ""
        assert said(page, "student") == "Fine." and said(page, "teacher", 0) == "Here."


def test_the_end_of_a_long_answer_is_seen_unless_one_reads_further_up(run: RunDir, browser_page: Page) -> None:
    page, left = browser_page, threading.Event()
    with chatting(run, student=lambda one: endless(left)) as (url, _):
        page.goto(url)
        page.wait_for_selector(".model.ready")
        say(page, "Go on", wait=False)
        page.wait_for_function("() => document.body.scrollHeight > 1.5 * innerHeight")
        assert page.evaluate("document.body.scrollHeight - innerHeight - scrollY") < 40
        page.evaluate("scrollTo(0, 0)")
        height = page.evaluate("document.body.scrollHeight")
        page.wait_for_function(f"() => document.body.scrollHeight > {height}")
        assert page.evaluate("scrollY") == 0
        page.keyboard.press("Escape")


def test_hostile_text_is_text(run: RunDir, browser_page: Page) -> None:
    page = browser_page
    with chatting(run, student=lambda one: streaming(NASTY, reasoning=NASTY)) as (url, _):
        page.goto(url)
        page.wait_for_selector(".model.ready")
        say(page, NASTY)
        assert said(page, "student") == NASTY and page.inner_text(".question") == NASTY
        assert page.query_selector("#turns img, #turns script") is None
        page.reload()
        page.wait_for_selector(".answer")
        assert said(page, "student") == NASTY
        assert page.title() == "Chat"


def test_an_answer_is_stopped_at_its_server(run: RunDir, browser_page: Page) -> None:
    page, left = browser_page, threading.Event()
    with chatting(run, student=lambda one: endless(left)) as (url, _):
        page.goto(url)
        page.wait_for_selector(".model.ready")
        say(page, "Go on", wait=False)
        page.wait_for_function("() => document.querySelector('.said')?.textContent.includes('more more')")
        page.keyboard.press("Escape")
        assert left.wait(60)
        page.wait_for_function("() => document.querySelector('.answer .quiet').textContent === 'stopped'")
        assert "more more" in said(page, "student")


def test_a_test_question_brings_its_instructions_and_its_right_answer(run: RunDir, browser_page: Page) -> None:
    page = browser_page
    with chatting(run, student=lambda one: streaming('{"on": 1}')) as (url, servers):
        page.goto(url)
        page.wait_for_selector(".model.ready")
        page.keyboard.press("Alt+t")
        assert page.input_value("#words") == "Lamp on!"
        page.keyboard.press("Enter")
        page.wait_for_selector(".answer .quiet:has-text('tokens')")
        assert 'right answer: {"on":1}' in page.inner_text(".turn")
        assert asked(servers["student"]) == [["JSON.", "Lamp on!"]]


def test_the_page_says_when_its_server_is_gone_and_keeps_what_was_said(run: RunDir, browser_page: Page) -> None:
    page = browser_page
    with chatting(run, student=lambda one: streaming("Fine.")) as (url, _):
        page.goto(url)
        page.wait_for_selector(".model.ready")
        say(page, "Hello")
    say(page, "Hello?")
    assert "is `make chat` still running?" in page.query_selector_all(".error:not(:empty)")[-1].inner_text()
    assert said(page, "student", 0) == "Fine."


def test_nothing_is_shown_without_the_token(run: RunDir) -> None:
    with chatting(run, student=lambda one: streaming("Fine.")) as (url, servers):
        base = url.removesuffix(f"{TOKEN}/")
        for path, body in (("guess/state", None), ("guess/ask", b"{}"), ("", None), ("docs", None)):
            request = urllib.request.Request(base + path, body, {"Content-Type": "application/json"})
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(request)
            assert refused.value.code == 404
        evil = urllib.request.Request(url, headers={"Host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(evil)
        assert servers["student"].asked == []
