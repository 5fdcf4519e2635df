"""The client against a real server that misbehaves: what becomes of each answer and each fault."""

import asyncio
import json
import re
from io import StringIO
from pathlib import Path

import httpx2
import pytest
from aiohttp import web
from rich.console import Console

from generate.dry_run import dry_run
from generate.progress import Counters, Display
from generate.reply import retry_after, shortened
from generate.run import generate, pending
from pipeline.errors import UsageError
from pipeline.lineage import answered_by
from pipeline.recipe import Recipe
from pipeline.records import Prompt, read_jsonl
from pipeline.rundir import RunDir
from tests.servers.misbehaving_server import (
    Asked,
    Behaviour,
    answer,
    completions,
    cut,
    drip,
    error,
    failures,
    html,
    misbehaving,
    one_bad,
    raw,
    recipe_for,
    reply,
    reset,
    whole,
)

pytestmark = pytest.mark.usefixtures("quick")


def test_every_prompt_is_answered_once_and_all_is_recorded(run: RunDir) -> None:
    with misbehaving() as server:
        recipe = recipe_for(server, 200)
        summary = generate(recipe, run, quiet=True)
    records = completions(run)
    assert (summary.requests, summary.completed, summary.answered, summary.failed) == (200, 200, 200, 0)
    assert (summary.prompt_tokens, summary.completion_tokens) == (1400, 1000)
    assert len({record.id for record in records}) == len(records) == len(server.asked) == 200
    for record in records:
        assert record.text == f"answer to {record.messages[0].content}" == f"answer to say {record.slots['n']}"
        assert (record.finish_reason, record.model, record.endpoint) == ("stop", "stub-2026", server.url)
        assert (record.attempts, record.usage.completion_tokens) == (1, 5)
    sent = {asked.text: asked.body for asked in server.asked}
    assert all(sent[record.messages[0].content]["seed"] == record.sampling["seed"] for record in records)
    prompts = list(read_jsonl(run.prompts, Prompt))
    assert {prompt.id for prompt in prompts} == {record.prompt_id for record in records}
    assert all(prompt.part == recipe.prompts.part_of(prompt) for prompt in prompts)
    assert {prompt.part for prompt in prompts} == {"train", "validation", "test"}
    assert not failures(run)
    lineage = json.loads(run.lineage.read_text())["generate"]
    assert lineage["teacher"] == {"asked": "stub", "served": ["stub-2026"]}
    assert (lineage["completed"], lineage["prompts"]["grammar"], lineage["completion_tokens"]) == (200, 200, 1000)
    assert run.recipe.exists()


def test_a_server_that_changes_its_model_is_told_once(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    names = iter(["big", "big", "tiny", "tiny"])
    with misbehaving(lambda asked: raw(json.dumps(reply("fine") | {"model": next(names)}).encode())) as server:
        generate(recipe_for(server, 4, generate={"concurrency": 1}), run)
    told = [line for line in capsys.readouterr().err.splitlines() if "names its model" in line]
    assert len(told) == 1 and "names its model tiny; answers before are of big" in told[0]


def test_what_is_no_recipe_is_named(run: RunDir) -> None:
    with pytest.raises(UsageError, match="a Recipe or its path is needed, got dict"):
        generate({"name": "x"}, run)  # type: ignore[arg-type]


def test_a_run_remembers_every_teacher_whose_answers_it_holds(run: RunDir) -> None:
    def teacher_of(recipe: Recipe) -> dict[str, object]:
        generate(recipe, run, quiet=True)
        found: dict[str, object] = json.loads(run.lineage.read_text())["generate"]["teacher"]
        return found

    with misbehaving() as server:
        first = recipe_for(server)
        second = recipe_for(server, teacher={"model": "other", "base_url": server.url})
        assert teacher_of(first) == {"asked": "stub", "served": ["stub-2026"]}
        assert teacher_of(second) == {"asked": "other", "earlier": ["stub"], "served": ["stub-2026"]}
        assert teacher_of(second)["earlier"] == ["stub"]
        assert teacher_of(first)["earlier"] == ["other"]
        run.completions.unlink()  # begun anew
        assert "earlier" not in teacher_of(second)


def test_a_teacher_that_gave_no_answer_is_none_of_the_run(run: RunDir) -> None:
    def teacher_of(model: str, behaviour: Behaviour) -> object:
        with misbehaving(lambda asked: behaviour) as server:
            generate(recipe_for(server, 2, teacher={"model": model, "base_url": server.url}), run, quiet=True)
        return json.loads(run.lineage.read_text())["generate"]["teacher"]

    failing = error(400, "no")
    assert teacher_of("mistyped", failing) == {"asked": "mistyped", "served": []}
    assert teacher_of("stub", answer("fine")) == {"asked": "stub", "served": ["stub-2026"]}
    assert teacher_of("dear", failing) == {"asked": "stub", "served": ["stub-2026"]}
    assert teacher_of("other", answer("fine")) == {"asked": "other", "earlier": ["stub"], "served": ["stub-2026"]}
    assert teacher_of("dear", failing) == {"asked": "other", "earlier": ["stub"], "served": ["stub-2026"]}


def test_a_teacher_whose_call_was_killed_is_one_of_the_run_if_it_answered(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def teachers_of(model: str, behaviour: Behaviour, *, killed: bool) -> tuple[object, list[str]]:
        with misbehaving(lambda asked: behaviour) as server, monkeypatch.context() as patch:
            if killed:  # nothing is saved when it ends
                patch.setattr("generate.run.save", lambda _: None)
            recipe = recipe_for(server, 2, teacher={"model": model, "base_url": server.url})
            generate(recipe, run, quiet=True)
        lineage = json.loads(run.lineage.read_text())
        return lineage["generate"]["teacher"], answered_by(recipe.teacher.model, lineage)

    fine, failing, served = answer("fine"), error(400, "no"), {"served": ["stub-2026"]}
    of_stub = {"asked": "stub", "served": [], "asking": {"model": "stub", "answers": 0}}
    assert teachers_of("stub", fine, killed=True) == (of_stub, ["stub"])
    of_dear = {"asked": "stub", **served, "asking": {"model": "dear", "answers": 2}}
    # Nothing says yet that this one gave no answer.
    assert teachers_of("dear", failing, killed=True) == (of_dear, ["dear", "stub"])
    filtered = {"generate": {"teacher": of_dear}, "filters": {"rows": 2}}
    assert answered_by("stub", filtered) == ["stub"]
    then = {"asked": "other", "earlier": ["stub"], **served}
    assert teachers_of("other", fine, killed=False) == (then, ["other", "stub"])
    assert teachers_of("third", fine, killed=True)[1] == ["third", "other", "stub"]
    then = {"asked": "third", "earlier": ["other", "stub"], **served}
    assert teachers_of("mistyped", failing, killed=False) == (then, ["third", "other", "stub"])


def test_nothing_is_asked_twice(run: RunDir) -> None:
    with misbehaving() as server:
        recipe = recipe_for(server)
        assert pending(recipe, run) == 10
        generate(recipe, run, quiet=True)
        lines = run.completions.read_bytes().splitlines(keepends=True)
        run.completions.write_bytes(b"".join(lines[:4]) + lines[4][:30])
        assert pending(recipe, run) == 6
        summary = generate(recipe, run, quiet=True)
        assert (summary.resumed, summary.answered, summary.completed) == (4, 6, 10)
        assert generate(recipe, run, quiet=True).answered == 0
        assert len(server.asked) == 16
    assert whole(run, 10)
    assert json.loads(run.lineage.read_text())["generate"]["completion_tokens"] == 50
    assert pending(recipe, run) == 0


def test_a_finished_run_needs_no_endpoint(run: RunDir) -> None:
    with misbehaving() as server:
        recipe = recipe_for(server)
        generate(recipe, run, quiet=True)
    assert generate(recipe, run, quiet=True).resumed == 10


def test_a_changed_recipe_takes_no_old_answer_and_says_so(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    with misbehaving() as server:
        generate(recipe_for(server), run, quiet=True)
        summary = generate(recipe_for(server, sampling={"temperature": 0.1}), run, quiet=True)
    assert (summary.resumed, summary.answered, len(completions(run))) == (0, 10, 20)
    assert "holds 10 answers that this recipe does not ask for" in capsys.readouterr().err


def test_more_prompts_add_to_the_run(run: RunDir) -> None:
    with misbehaving() as server:
        recipe = recipe_for(server, 10)
        few = recipe.model_copy(update={"prompts": recipe.prompts.model_copy(update={"count": 4})})
        generate(few, run, quiet=True)
        assert generate(recipe, run, quiet=True).resumed == 4


def test_repeats_are_asked_each_and_told_with_both_counts(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = {"count": 7, "template": "{a}", "slots": {"a": ["x", "y"]}}
    with misbehaving() as server:
        assert generate(recipe_for(server, prompts=prompts), run, quiet=True).answered == 7
    assert len({record.id for record in completions(run)}) == 7
    assert "7 prompts asked for, but only 2 differ: 5 ask the same again" in " ".join(capsys.readouterr().err.split())


def test_questions_with_several_references_are_counted(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [("x", 1), ("x", 2), ("x", 3), ("y", 1), ("y", 1), ("z", 1), ("z", None), ("u", 1)]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "reference": value}) + "\n" for text, value in pairs))
    with misbehaving() as server:
        generate(recipe_for(server, prompts={"file": str(path), "samples": 2}), run, quiet=True)
    said = " ".join(capsys.readouterr().err.split())
    assert "2 questions have several different references" in said and said.count("different references") == 1


def test_a_file_with_fewer_rows_than_the_count_is_asked_once(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n{"prompt": "y"}\n')
    with misbehaving() as server:
        recipe = recipe_for(server, prompts={"count": 50, "file": tmp_path / "p.jsonl"})
        assert generate(recipe, run, quiet=True).answered == 2
    words = " ".join(capsys.readouterr().err.split())
    assert f"prompts.count is 50, but {tmp_path}/p.jsonl has only 2 rows" in words and "differ" not in words


@pytest.mark.parametrize(
    "bad",
    [
        error(408),
        error(500),
        error(502, retry_after="nonsense"),
        html(),
        html(502),
        raw(b'{"choices": [{"message": {"con'),
        raw(b""),
        raw(b'{"error": {"message": "upstream", "code": 502}}'),
        cut(),
        reset(),
    ],
    ids=["408", "500", "502", "html", "html-502", "half", "nothing", "error-200", "cut", "reset"],
)
def test_what_can_heal_is_asked_again(run: RunDir, bad: Behaviour) -> None:
    with misbehaving(one_bad(bad, times=2)) as server:
        summary = generate(recipe_for(server), run, quiet=True)
    assert (summary.answered, summary.failed, len(server.asked)) == (10, 0, 12)
    assert [record.attempts for record in completions(run) if record.slots["n"] == "3"] == [3]
    assert {record.attempts for record in completions(run) if record.slots["n"] != "3"} == {1}


@pytest.mark.parametrize("bad", [error(429, "no", "rate_limit_exceeded"), error(429, retry_after="0.01"), error(503)])
def test_a_429_and_a_503_are_asked_again_and_do_not_count(run: RunDir, bad: Behaviour) -> None:
    with misbehaving(one_bad(bad, times=2)) as server:
        summary = generate(recipe_for(server), run, quiet=True)
    assert (summary.answered, summary.failed, len(server.asked)) == (10, 0, 12)
    assert {record.attempts for record in completions(run)} == {1}


@pytest.mark.parametrize(
    ("bad", "kind", "status", "words", "attempts"),
    [
        (error(400, "max_tokens is too large"), "bad_request", 400, "max_tokens is too large", 1),
        (error(422, "no such field"), "bad_request", 422, "no such field", 1),
        (raw(b"plain words", 400, "text/plain"), "bad_request", 400, "plain words", 1),
        (answer(""), "empty_answer", 200, "finish_reason stop", 1),
        (answer(" \n"), "empty_answer", 200, "no text", 1),
        (raw(json.dumps(reply(None, finish_reason="length")).encode()), "thought_cut_off", 200, "length", 1),
        (raw(json.dumps(reply(None, finish_reason="length", usage=False)).encode()), "empty_answer", 200, "length", 1),
        (raw(b'{"choices": []}'), "no_choices", 200, "no `choices`", 1),
        (raw(b'{"object": "odd"}'), "no_choices", 200, "odd", 1),
        (raw(b'{"choices": [{"message": {"content": 3}}]}'), "wrong_shape", 200, "$.choices[0]", 1),
        (raw(b"[]"), "wrong_shape", 200, "[]", 1),
        (error(500, "it broke"), "server_error", 500, "it broke", 3),
        (error(429, "slow down"), "rate_limited", 429, "slow down", 3),
        (html(), "not_json", 200, "<html><body>Bad gateway", 3),
        (cut(), "connection_lost", None, "", 3),
        (reset(), "connection_lost", None, "", 3),
    ],
)
def test_what_does_not_is_a_failure_with_its_type_and_never_text(
    run: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    bad: Behaviour,
    kind: str,
    status: int | None,
    words: str,
    attempts: int,
) -> None:
    monkeypatch.setattr("generate.verdict.QUIET_S", 0.0)  # a 429 counts at once
    with misbehaving(one_bad(bad)) as server:
        summary = generate(recipe_for(server), run, quiet=True)
    (failure,) = failures(run)
    assert (failure.error, failure.status, failure.attempts, failure.slots) == (kind, status, attempts, {"n": "3"})
    assert words in failure.message
    assert (summary.answered, summary.failed, summary.errors) == (9, 1, {kind: 1})
    assert len(server.asked) == 9 + attempts
    assert "3" not in {record.slots["n"] for record in completions(run)}


@pytest.mark.timeout(60, method="thread")  # if it breaks it never ends
@pytest.mark.parametrize("bad", [drip(0.05), answer(delay_s=60)], ids=["drip", "stuck"])
def test_an_answer_that_never_ends_is_a_timeout(run: RunDir, bad: Behaviour) -> None:
    config = {"concurrency": 8, "max_attempts": 2, "request_timeout_s": 0.4}
    with misbehaving(one_bad(bad)) as server:
        summary = generate(recipe_for(server, generate=config), run, quiet=True)
    (failure,) = failures(run)
    assert (failure.error, failure.status, failure.attempts) == ("timeout", None, 2)
    assert summary.answered == 9


def test_cut_off_at_max_tokens_is_an_answer(run: RunDir) -> None:
    with misbehaving(one_bad(answer("half a", finish_reason="length"))) as server:
        generate(recipe_for(server), run, quiet=True)
        assert len(server.asked) == 10
    assert [record.text for record in completions(run) if record.finish_reason == "length"] == ["half a"]


def test_answers_that_lack_usage_or_finish_reason_or_hold_strange_text(run: RunDir) -> None:
    odd = raw(b'{"choices": [{"message": {"content": "emoji \\ud83d\\ude00, half \\ud83d."}}]}')
    with misbehaving(lambda asked: odd) as server:
        assert generate(recipe_for(server, 1), run, quiet=True).completion_tokens == 0
    (record,) = completions(run)
    assert (record.text, record.finish_reason, record.model) == ("emoji 😀, half \ufffd.", "unknown", "stub")
    assert (record.usage.prompt_tokens, record.usage.completion_tokens) == (None, None)


def test_an_answer_of_a_million_characters(run: RunDir) -> None:
    with misbehaving(lambda asked: answer("가" * 1_000_000)) as server:
        generate(recipe_for(server, 3), run, quiet=True)
    assert [len(record.text) for record in completions(run)] == [1_000_000] * 3


def test_a_request_that_waits_holds_no_slot(run: RunDir) -> None:
    """One slot, and a request told to wait: the others are answered meanwhile, and it when its time has come."""
    with misbehaving(one_bad(error(503, retry_after="1"), times=1)) as server:
        generate(recipe_for(server, generate={"concurrency": 1, "max_attempts": 3}), run, quiet=True)
    assert [record.slots["n"] for record in completions(run)][-1] == "3"
    order = [asked.text for asked in server.asked]
    assert order.index("say 3") < len(order) - 2


def test_a_retry_that_is_due_goes_before_new_requests(run: RunDir) -> None:
    def script(asked: Asked) -> Behaviour:
        return error(500) if asked.attempt == 1 and asked.text == "say 3" else answer(delay_s=0.05)

    with misbehaving(script) as server:
        generate(recipe_for(server, 30, generate={"concurrency": 1}), run, quiet=True)
    order = [asked.text for asked in server.asked]
    first = order.index("say 3")
    assert order.index("say 3", first + 1) <= first + 2


def test_as_many_at_once_as_asked_for(run: RunDir) -> None:
    """More than 100: the limit that HTTP libraries hide."""

    async def behave(request: web.Request, asked: Asked) -> web.StreamResponse:
        for _ in range(200):  # 10 s: a busy machine takes a while to send them all
            if server.most_at_once < 300:
                await asyncio.sleep(0.05)
        return web.json_response(reply("yes"))

    with misbehaving(lambda asked: behave) as server:
        recipe = recipe_for(server, 300, generate={"concurrency": 300, "request_timeout_s": 60})
        generate(recipe, run, quiet=True)
    assert server.most_at_once == 300


def test_a_proxy_is_not_asked_for_a_server_on_this_machine(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    with misbehaving() as server:
        assert generate(recipe_for(server, 3), run, quiet=True).answered == 3


def test_plain_progress_goes_to_stderr(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("generate.progress.PLAIN_INTERVAL_S", 0.1)
    with misbehaving(lambda asked: answer(delay_s=0.5)) as server:
        summary = generate(recipe_for(server, 60), run)
        told = capsys.readouterr()
        generate(recipe_for(server, 60, sampling={"seed": 5}), RunDir(run.path / "quiet"), quiet=True)
    assert summary.answered == 60
    assert told.out == ""
    lines = [line for line in told.err.splitlines() if "/60 · " in line]
    first = next(line for line in lines if "8 in flight" in line)  # a slow machine may tell of fewer before
    assert re.match(r"0/60 · no answer yet after 0:\d\d · 8 in flight", first)
    line = next(line for line in lines if not line.startswith("0/") and "8 in flight" in line)
    for part in ("tok/s", "0 failed", "left"):
        assert part in line
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("quiet", [False, True])
def test_a_long_look_at_the_prompts_is_told(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quiet: bool
) -> None:
    monkeypatch.setattr("pipeline.progress.REPORT_S", 0)
    with misbehaving() as server:
        recipe = recipe_for(server, 3)
        generate(recipe, run, quiet=quiet)
        assert ("1 requests looked at so far\n" in capsys.readouterr().err) is not quiet
        dry_run(recipe, run)
    assert "1 requests looked at so far\n" in capsys.readouterr().err


def test_the_log_of_a_long_night_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    now, written = 0.0, StringIO()
    monkeypatch.setattr("time.monotonic", lambda: now)
    with Display(Counters(total=1, started=0.0), Console(file=written), quiet=False) as display:
        for second in range(1, 10 * 3600 + 1):
            now = float(second)
            display.tick()
            if second == 60:
                assert written.getvalue().count("\n") == 12  # each 5 s
    # 20 lines in 100 s, then ln(1200/100) / ln(1.05) = 51 until 1200 s, then one a minute: 580; it was 7,200
    assert 640 < written.getvalue().count("\n") < 660


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "2"}, 2),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": "Thu, 01 Jan 2026 00:00:10 GMT"}, 10),
        ({"retry-after": "Wed, 31 Dec 2025 00:00:00 GMT"}, 0),
        ({"retry-after": "-3"}, 0),
        ({"retry-after": "inf"}, 0),
        ({"retry-after": "nan"}, 0),
        ({"retry-after": "soon"}, 0),
        ({}, 0),
        ({"retry-after": "Fri, 31 Dec 99999999999999 23:59:59 GMT"}, 0),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float) -> None:
    assert retry_after(httpx2.Headers({"date": "Thu, 01 Jan 2026 00:00:00 GMT", **headers})) == seconds


def test_a_long_message_is_shortened_and_says_so() -> None:
    assert shortened("a\n b\t c") == "a b c"
    assert shortened("x" * 2000) == "x" * 1000 + "… (2000 characters)"
