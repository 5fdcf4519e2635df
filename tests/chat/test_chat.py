"""The models of a chat: how each is asked, which server it uses, what becomes of an answer, and the terminal."""

import asyncio
import io
import json
import os
import threading
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import chat.models
from chat.__main__ import main
from chat.answer import Answered, answer
from chat.conversation import questions_to_try
from chat.models import Model, beside_others, choose_models, starting
from generate.streaming import Refused
from pipeline.errors import DistillError, RecipeError, UsageError
from pipeline.recipe import Recipe
from pipeline.records import Message, Prompt, encode_line
from pipeline.rundir import RunDir
from pipeline.serve_config import ServeConfig
from pipeline.students import AFTER, BEFORE, TEACHER
from serve.named import name_of_files
from serve.server import free_port
from tests.servers.misbehaving_server import Asked, Behaviour, error, misbehaving, raw, recipe_for
from tests.servers.misbehaving_server import answer as whole_answer
from tests.servers.streaming_server import endless, streaming

TOLD: dict[str, Any] = {"system": "You turn words into JSON.", "examples": [{"prompt": "on", "answer": "{}"}]}


def model_at(url: str, key: str = TEACHER, **sections: Any) -> Model:
    recipe = recipe_for(url, student={"model": "s", "system": "Be brief."}, **sections)
    if key == TEACHER:
        given = recipe.model_dump()
        recipe = Recipe.model_validate({**given, "teacher": given["teacher"] | TOLD})
    model = Model(key, key, recipe)
    model.at(url)
    return model


def hear(model: Model, *said: str) -> tuple[list[str], Answered]:
    """What a model answers to a conversation that the user begins."""
    turns = [Message("user" if number % 2 == 0 else "assistant", text) for number, text in enumerate(said)]

    async def listen() -> list[str | Answered]:
        async with aclosing(answer(model, turns, asyncio.Lock())) as pieces:
            return [piece async for piece in pieces]

    *pieces, last = asyncio.run(listen())
    assert isinstance(last, Answered)
    return [str(piece) for piece in pieces], last


def test_each_is_asked_as_it_must_be_asked() -> None:
    with misbehaving(lambda asked: streaming("fine")) as server:
        models = [model_at(server.url), model_at(server.url, AFTER)]
        hear(models[0], "hello")
        hear(models[1], "hello", "hi", "and now?")
    assert [model.told for model in models] == ["told a system prompt and 1 example", "told its own system prompt"]
    teacher, student = (asked.body for asked in server.asked)
    assert [turn["content"] for turn in teacher["messages"]] == [TOLD["system"], "on", "{}", "hello"]
    assert [turn["content"] for turn in student["messages"]] == ["Be brief.", "hello", "hi", "and now?"]
    assert (teacher["model"], student["model"]) == ("stub", "student")
    assert teacher["max_tokens"] == student["max_tokens"] == 500  # the recipe's own sampling


def test_what_each_is_told_is_said_and_a_prompt_may_bring_a_system_message() -> None:
    prompts = {"template": "Hi", "count": 1, "system": "You are kind."}
    sections: dict[str, Any] = {"name": "x", "teacher": {"model": "t"}, "prompts": prompts}
    ways = ((None, "nothing more than the prompt"), ("", "no system prompt"), ("Be brief.", "its own system prompt"))
    for student, told in ways:
        recipe = Recipe.model_validate({**sections, "student": {"model": "s", "system": student}})
        assert Model(AFTER, "student", recipe).told == f"told {told}"
        assert Model(TEACHER, "teacher", recipe).told == "told nothing more than the prompt"
    taught = {**sections, "prompts": {"template": "Hi", "count": 1}, "teacher": {"model": "t", **TOLD}}
    assert Model(TEACHER, "teacher", Recipe.model_validate(taught)).told == "told a system prompt and 1 example"


def test_an_answer_comes_in_pieces_and_ends_with_its_figures() -> None:
    price = {"teacher": {"model": "m", "price": {"input": 1.0, "output": 2.0}}}
    with misbehaving(lambda asked: streaming("<think>so", "</think>", "Yes.", every_s=0.02)) as server:
        price["teacher"]["base_url"] = server.url
        begin = time.perf_counter()
        pieces, last = hear(model_at(server.url, **price), "why?")
        took = time.perf_counter() - begin
        _, free = hear(model_at(server.url, AFTER), "why?")
    assert pieces == ["<think>so", "</think>", "Yes."]
    assert (last.text, last.reasoning, last.finish_reason, last.tokens) == ("Yes.", "so", "stop", 7)
    assert 0 < last.first_token_s < 7 / last.tokens_per_s < took
    assert last.cost == "0.001014 USD" and free.cost == "own server"  # 1000 tokens at 1 USD per million, 7 at 2


def test_a_thought_in_which_an_answer_was_stopped_is_not_sent_back() -> None:
    with misbehaving(lambda asked: streaming("fine")) as server:
        hear(model_at(server.url, AFTER), "hello", "<think>so", "why?", "<think>so</think>\n\nBeca", "go on")
    assert [turn["content"] for turn in server.asked[0].body["messages"]] == ["Be brief.", "why?", "Beca", "go on"]


def test_each_asking_has_a_seed_of_its_own() -> None:
    with misbehaving(lambda asked: streaming("fine")) as server:
        model = model_at(server.url)
        hear(model, "hello")
        hear(model, "hello")
    assert len({asked.body["seed"] for asked in server.asked}) == 2


def test_a_server_that_does_not_stream_or_count_is_heard_too() -> None:
    answers = iter([whole_answer("All at once."), streaming("a", "b", usage=None)])
    with misbehaving(lambda asked: next(answers)) as server:
        assert hear(model_at(server.url), "hello")[0] == ["All at once."]
        assert hear(model_at(server.url), "hello")[1].tokens == 2


def test_a_usage_that_is_no_count_and_a_text_of_parts_lose_no_answer() -> None:
    price = {"teacher": {"model": "m", "price": {"input": 1.0, "output": 2.0}}}
    parts = [{"type": "text", "text": "of "}, {"type": "text", "text": "parts"}]
    usages: list[dict[str, Any]] = [{"completion_tokens": "many"}, {"completion_tokens": 1}, {"prompt_tokens": 1}]
    replies = iter([streaming(parts, usage=usage) for usage in usages])
    with misbehaving(lambda asked: next(replies)) as server:
        price["teacher"]["base_url"] = server.url
        pieces, last = hear(model_at(server.url, **price), "hello")
        for _ in usages[1:]:  # nothing is said of the prompt's tokens, then nothing of the answer's
            assert hear(model_at(server.url, **price), "hello")[1].cost == last.cost
    assert (pieces, last.text, last.tokens, last.cost) == (["of parts"], "of parts", 1, "tokens not counted")
    thought = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}]
    with misbehaving(lambda asked: streaming(thought, parts)) as server:
        last = hear(model_at(server.url), "hello")[1]
    assert (last.reasoning, last.text) == ("hm", "of parts")


def test_half_a_surrogate_pair_is_replaced_and_the_talk_goes_on() -> None:
    with misbehaving(lambda asked: streaming("\ud83d")) as server:
        text = hear(model_at(server.url), "hello")[1].text
        assert text == "\ufffd"
        hear(model_at(server.url), "hello", text, "and now?")


def test_a_refused_setting_is_left_out_and_other_refusals_are_said() -> None:
    def script(asked: Asked) -> Behaviour:
        return error(400, "Unsupported parameter: 'top_p'") if "top_p" in asked.body else streaming("fine")

    with misbehaving(script) as server:
        model = model_at(server.url)
        assert hear(model, "hello")[1].text == "fine"
        hear(model, "hello")
        assert len(server.asked) == 3  # it remembers
    with misbehaving(lambda asked: streaming("half", error="out of memory")) as server, pytest.raises(Refused) as said:
        hear(model_at(server.url), "hello")
    assert "out of memory" in str(said.value)


def test_an_answer_that_nobody_waits_for_is_stopped_at_the_server() -> None:
    left = threading.Event()

    async def leave(model: Model) -> None:
        async with aclosing(answer(model, [Message("user", "go")], asyncio.Lock())) as pieces:
            async for _ in pieces:
                return

    with misbehaving(lambda asked: endless(left)) as server:
        asyncio.run(leave(model_at(server.url)))
        assert left.wait(100)


def test_what_runs_already_is_used_but_for_an_earlier_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, folder = RunDir(tmp_path), tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    served = ["other"]
    with misbehaving() as teacher, misbehaving(models=served) as before:
        recipe = recipe_for(teacher, student={"model": str(folder)})
        address = chat.models.address_of(recipe, BEFORE)._replace(port=int(before.url.split(":")[2].split("/")[0]))
        monkeypatch.setattr(chat.models, "address_of", lambda *_: address)
        assert [model.state for model in choose_models(recipe, run, [BEFORE])] == ["starting"]
        assert capsys.readouterr().err == ""  # it is of no run's student
        served[:] = ["before", name_of_files("before", str(folder))]
        models = choose_models(recipe, run, [BEFORE, TEACHER])
        assert [(model.name, model.state) for model in models] == [("teacher", "ready"), ("before", "ready")]
        assert models[1].recipe.teacher.url == before.url and models[1].recipe.teacher.model == "before"
        assert capsys.readouterr().err == ""
        (folder / "config.json").write_text('{"trained": "again"}')
        assert [model.state for model in choose_models(recipe, run, [BEFORE])] == ["starting"]
        assert f"warning: {before.url}: its 'before' is not {folder} as it is now" in capsys.readouterr().err
    assert [model.state for model in choose_models(recipe, run, [TEACHER])] == ["starting"]
    away = recipe_for("https://api.example/v1")
    assert [model.state for model in choose_models(away, run, [TEACHER])] == ["ready"]


def test_a_server_that_wants_another_key_is_told_before_a_second_one_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    with misbehaving(models=["before", name_of_files("before", str(tmp_path))], key="right") as server:
        recipe = recipe_for(server, student={"model": str(tmp_path)})
        address = chat.models.address_of(recipe, BEFORE)._replace(port=int(server.url.split(":")[2].split("/")[0]))
        monkeypatch.setattr(chat.models, "address_of", lambda *_: address)
        for key, state, said in (
            ("wrong", "starting", f"warning: {server.url}/models: answers 401; set VLLM_API_KEY "),
            ("right", "ready", ""),
        ):
            monkeypatch.setenv("VLLM_API_KEY", key)
            assert [model.state for model in choose_models(recipe, RunDir(tmp_path), [BEFORE])] == [state]
            heard = capsys.readouterr().err
            assert heard.startswith(said) and heard.count("\n") == bool(said)


def test_a_teacher_whose_servers_come_and_go_is_asked_where_it_is_now(tmp_path: Path) -> None:
    urls = tmp_path / "urls.txt"
    gone = f"http://127.0.0.1:{free_port()}/v1"
    with misbehaving(lambda asked: streaming("fine")) as server:
        urls.write_text(f"{gone}\n{server.url} 4\n")
        recipe = recipe_for(gone, teacher={"model": "stub", "urls_file": str(urls)})
        [model] = choose_models(recipe, RunDir(tmp_path), [TEACHER])
        assert (model.state, model.recipe.teacher.url) == ("ready", server.url)
        assert hear(model, "hello")[0] == ["fine"]
    urls.unlink()
    with pytest.raises(RecipeError, match=r"teacher.urls_file .*urls.txt: No such file"):
        choose_models(recipe, RunDir(tmp_path), [TEACHER])


def test_a_student_that_is_not_trained_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no student yet; run train first"):
        choose_models(recipe_for("http://127.0.0.1:1/v1", student={"model": "s"}), RunDir(tmp_path), [AFTER])


def test_a_server_that_cannot_start_is_said_by_its_model(tmp_path: Path) -> None:
    recipe = recipe_for("http://127.0.0.1:1/v1", student={"model": str(tmp_path / "gone")})
    models = choose_models(recipe, RunDir(tmp_path), [BEFORE])
    with chat.models.starting(models, RunDir(tmp_path)), pytest.raises(DistillError, match="is not there"):
        hear(models[0], "hello")


def test_an_answer_says_that_its_student_was_trained_again_since(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.student.mkdir()
    (run.student / "config.json").write_text("{}")
    save_file({"weight": np.zeros(1)}, run.student / "model.safetensors")
    with misbehaving(lambda asked: streaming("Yes.")) as server:
        (model,) = choose_models(recipe_for("http://127.0.0.1:1/v1", student={"model": "s"}), run, [AFTER])
        model.at(server.url)
        before = hear(model, "hello")[1].figures
        (run.student / "config.json").write_text('{"trained": "again"}')
        after = hear(model, "hello")[1].figures
    assert "trained again" not in before
    assert after.endswith("; the student was trained again meanwhile: start the chat again to ask the new one")


@pytest.mark.parametrize("writable", [True, False])
def test_a_run_that_can_only_be_read_keeps_no_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writable: bool
) -> None:
    logs, of_teacher = dict[str, Path | None](), ["--quantization", "awq"]  # by the name that the model is asked by

    def serving(*_: Any, log: Path | None, served_name: str, config: ServeConfig, **__: Any) -> Any:
        logs[served_name] = log
        assert config == beside_others(ServeConfig(args=of_teacher if served_name == "stub" else []), 2)
        raise DistillError("no server")

    monkeypatch.setattr(os, "access", lambda path, mode: writable or path != tmp_path)
    monkeypatch.setattr(chat.models, "serving", serving)
    monkeypatch.setattr(chat.models, "reference_of", lambda *_: "folder")
    recipe = recipe_for("http://127.0.0.1:1/v1", serve={"args": of_teacher})
    models = [Model(key, "", recipe) for key in (TEACHER, AFTER)]
    with starting(models, RunDir(tmp_path)):
        for model in models:
            with pytest.raises(DistillError, match="no server"):
                hear(model, "hello")
    names = {"stub": "teacher", "student": "student"}
    assert logs == {asked: tmp_path / f"chat-{name}.log" if writable else None for asked, name in names.items()}


def test_several_servers_share_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert beside_others(ServeConfig(device="cpu"), 3).kv_cache_gib == 1
    assert beside_others(ServeConfig(device="cpu", kv_cache_gib=4), 3).kv_cache_gib == 4
    assert beside_others(ServeConfig(device="gpu"), 3).args == ["--gpu-memory-utilization", "0.30"]
    for own in (["--gpu-memory-utilization=0.2"], ["--gpu_memory_utilization", "0.2"], ["--kv-cache-memory-bytes=1G"]):
        assert beside_others(ServeConfig(device="gpu", args=own), 3).args == own


def event(**choice: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, **choice}]}).encode() + b"\n\n"


@pytest.mark.parametrize(
    ("body", "kind", "says"),
    [
        (b'{"error": {"message": "model crashed"}}', "application/json", "model crashed"),
        (b'{"choices": []}', "application/json", "no `choices`"),
        (b"<html>Sign in</html>", "text/html", "no JSON"),
        (event(delta={"content": "half"}), "text/event-stream", "the answer was cut off"),
        (event(finish_reason="content_filter"), "text/event-stream", "content filter"),
        (event(finish_reason="abort"), "text/event-stream", "finish_reason abort"),
        (event(error={"message": "out of memory"}), "text/event-stream", "out of memory"),
        (b'data: {"choices": [null]}\n\n', "text/event-stream", "not a chat completion"),
        (b'data: {"choices": [{"delta"\n\n', "text/event-stream", "no JSON, or cut short"),
    ],
)
def test_what_is_no_answer_is_not_taken_for_an_empty_one(body: bytes, kind: str, says: str) -> None:
    with misbehaving(lambda asked: raw(body, content_type=kind)) as server, pytest.raises(Refused, match=says):
        hear(model_at(server.url), "hello")


def test_questions_to_try_are_of_the_test_part(tmp_path: Path) -> None:
    """As the recipe parts them now; none, if the student was trained when they were parted otherwise."""
    recipe, run = recipe_for("http://127.0.0.1:1/v1"), RunDir(tmp_path)
    recipe = recipe.model_copy(update={"prompts": recipe.prompts.model_copy(update={"test": 0.5})})
    assert questions_to_try(recipe, run) == []
    system = Message("system", "SQL.")
    prompts = [Prompt(id=str(n), messages=[system, Message("user", f"{n}?")], reference=n) for n in range(9)]
    talk = [system, Message("user", "Hi"), Message("assistant", "Two.")]
    talks = [Prompt(id=f"talk {n}", messages=[*talk, Message("user", f"{n} more?")]) for n in range(9)]
    run.prompts.write_bytes(b"".join(map(encode_line, [*talks, *prompts])))
    tested = [prompt for prompt in prompts if recipe.prompts.part_of(prompt) == "test"]
    assert 1 < len(tested) < 9
    begin = [{"role": "system", "content": "SQL."}]
    found = questions_to_try(recipe, run)
    assert found == [{"text": f"{one.id}?", "begin": begin, "right": one.id} for one in tested][: len(found)] != []
    run.student.mkdir()
    (run.student / "lineage.json").write_text('{"train": {"parts": {"seed": 9}}}')
    assert questions_to_try(recipe, run) == []


def recipe_file(folder: Path, url: str = "http://127.0.0.1:1/v1", **prompts: Any) -> str:
    path = folder / "recipe.yaml"
    given = {"template": "x", "count": 1, **prompts}
    path.write_text(json.dumps({"name": "t", "teacher": {"model": "m", "base_url": url}, "prompts": given}))
    return str(path)


def test_whatever_a_server_fails_with_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(*_: Any) -> str:
        raise RuntimeError("incomplete metadata")

    monkeypatch.setattr(chat.models, "reference_of", damaged)
    model = Model(AFTER, "student after", recipe_for("http://127.0.0.1:1/v1"))
    with starting([model], RunDir(tmp_path)):
        while model.state == "starting":
            time.sleep(0.01)
    assert (model.state, model.said) == ("failed", "incomplete metadata")


def test_one_answer_to_a_question_needs_no_temperature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    with misbehaving(lambda asked: streaming("Hello.")) as server:
        recipe = recipe_file(tmp_path, server.url, samples=3)
        flags = ["--terminal", "--only", "teacher", "--sampling.temperature", "0"]
        main([recipe, "--run", str(tmp_path / "run"), *flags])
        assert [asked.body["temperature"] for asked in server.asked] == [0]
    assert "Hello." in capsys.readouterr().out


def test_a_conversation_in_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = iter(
        [streaming("Hello", "\x1b[2J there."), error(500, "too \x1b]0;hot"), streaming("Yes."), streaming("A.")]
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n\nhow?\nand?\n/clear\nlast\n"))
    with misbehaving(lambda asked: next(said)) as server:
        main([recipe_file(tmp_path, server.url), "--run", str(tmp_path / "run"), "--terminal", "--only", "teacher"])
        asked = [[turn["content"] for turn in one.body["messages"]] for one in server.asked]
    shown = capsys.readouterr().out
    assert "Hello[2J there." in shown and "\x1b" not in shown
    assert "answers 500: too ]0;hot" in shown and "tokens/s" in shown
    first = ["hi", "Hello\x1b[2J there."]
    assert asked == [["hi"], [*first, "how?"], [*first, "and?"], ["last"]]  # what was not answered is not repeated


def test_the_terminal_shows_the_system_message_that_all_rows_of_the_training_brought(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path / "run")
    run.student.mkdir(parents=True)
    (run.student / "lineage.json").write_text('{"train": {"system_of_rows": "Be Kim, id:x:y."}}')
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    with misbehaving(lambda asked: streaming("Hello.")) as server:
        main([recipe_file(tmp_path, server.url), "--run", str(run.path), "--terminal", "--only", "teacher"])
        assert [turn["content"] for turn in server.asked[0].body["messages"]] == ["Be Kim, id:x:y.", "hi"]
    assert "system: Be Kim, id:x:y.\n" in capsys.readouterr().out


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_bytes_that_are_no_text_do_not_end_a_talk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, errors: str) -> None:
    typed = io.BytesIO("hi\n안".encode()[:-1] + b"\nlast\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(typed, encoding="utf-8", errors=errors))
    with misbehaving(lambda asked: streaming("Hello.")) as server:
        main([recipe_file(tmp_path, server.url), "--run", str(tmp_path / "run"), "--terminal", "--only", "teacher"])
        assert [one.body["messages"][-1]["content"] for one in server.asked] == ["hi", "\ufffd", "last"]


def test_a_closed_input_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UsageError, match="--terminal: standard input is closed"):
        main([recipe_file(tmp_path), "--run", str(tmp_path / "run"), "--terminal", "--only", "teacher"])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--only", "pupil"], "no model 'pupil'; there are teacher, before, student"),
        (["--terminal", "--only", "teacher,before"], "--terminal is for one model, not 2"),
        (["--only", "student"], "the recipe names no student"),
    ],
)
def test_wrong_words_are_one_line(tmp_path: Path, flags: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        main([recipe_file(tmp_path), "--run", str(tmp_path / "run"), *flags])
