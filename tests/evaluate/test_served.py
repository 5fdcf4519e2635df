"""A served model: what the client sends to which server, and what is made of the answers. The server is a stand-in."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from aiohttp import web

import evaluate.measure.serving
import generate.jobs as generate_jobs
from evaluate.measure.results import answer_row
from evaluate.measure.serving import (
    answer_probes,
    answer_questions,
    measure_speed,
    serve_subject,
    speed_prompts,
    with_server,
)
from evaluate.models import Subject, name_machine
from generate.run import generate
from pipeline.errors import DistillError
from pipeline.recipe import Recipe
from pipeline.records import Message, Prompt, encode_line
from pipeline.rundir import RunDir
from tests.servers.misbehaving_server import (
    Asked,
    Behaviour,
    MisbehavingServer,
    answer,
    cut_thought,
    error,
    misbehaving,
)
from tests.tiny_student import kept_row, make_recipe

ROWS = [kept_row(i, f"test {i}", "An answer.") for i in range(3)]
PROBES = [Prompt(id=f"probe{i}", messages=kept_row(i, f"probe {i}", "").messages) for i in range(4)]
TIMED, PROBED = 9, 500  # max_tokens by which a request is known


@dataclass
class StandIn:
    """As evaluate sees a serve.server.Server."""

    base_url: str
    served_name: str
    ended: bool
    command: Any = field(default_factory=lambda: SimpleNamespace(device="cpu", dtype="float32"))

    def peak_rss(self) -> int:
        return 5 << 30

    def wait(self, timeout: float) -> int | None:
        return 1 if self.ended else None

    def failure(self, when: str) -> DistillError:
        return DistillError(f"vLLM ended {when}: engine died")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Puts a stand-in for the engine in place; gives the models it was started with."""

    def install(server: MisbehavingServer, ended: bool = False) -> list[str]:
        models: list[str] = []

        @contextmanager
        def serving(model: str, *, served_name: str, **options: Any) -> Iterator[StandIn]:
            models.append(model)
            yield StandIn(server.url, served_name, ended)

        monkeypatch.setattr(evaluate.measure.serving, "serving", serving)
        return models

    return install


@pytest.fixture
def recipe() -> Recipe:
    made = make_recipe("student")
    timing = made.evaluate.model_copy(
        update={
            "speed_requests": 7,
            "speed_concurrency": 2,
            "speed_max_tokens": TIMED,
            "speed_repeats": 2,
            "speed_alone": 3,
        },
    )
    patience = made.generate.model_copy(update={"max_attempts": 1, "request_timeout_s": 5})
    return made.model_copy(update={"evaluate": timing, "generate": patience})


def streamed(asked: Asked) -> Behaviour:
    """Where it is asked to stream: a first token after 20 ms and a second after 20 more, 5 by the server's count."""

    async def behave(request: web.Request, asked: Asked) -> web.StreamResponse:
        if not asked.body.get("stream"):
            return await answer(delay_s=0.01)(request, asked)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for event in (*[{"choices": [{"delta": {"content": "word"}}]}] * 2, {"usage": {"completion_tokens": 5}}):
            await asyncio.sleep(0.02)
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    return behave


def measure(recipe: Recipe, run: RunDir, *, speed: bool = True, probes: bool = False) -> tuple[Any, Any]:
    """Measures one model on one server."""
    subject, timed, probed = Subject("student_after", "student_after", "reference", run.path / "model"), None, None
    with serve_subject(recipe, run, subject) as (server, folder):
        if speed:
            timed = measure_speed(recipe, server, folder, speed_prompts(recipe, run, ROWS))
        if probes:
            probed = answer_probes(with_server(recipe, server), folder / "probes", PROBES, PROBES)
    return timed, probed


def test_timed_requests_of_test_rows_have_the_tools_that_the_others_have(tmp_path: Path, recipe: Recipe) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    prompts = speed_prompts(recipe, RunDir(tmp_path), [msgspec.structs.replace(ROWS[0], tools=tools), ROWS[1]])
    assert [prompt.tools for prompt in prompts] == [tools, []]


def test_prompts_that_were_timed_before_come_last(tmp_path: Path, recipe: Recipe) -> None:
    run, count = RunDir(tmp_path), 8 + 3 + 2 * 7  # a warm-up, alone, and two bursts
    others = [Prompt(id=f"{i}", messages=ROWS[0].messages) for i in range(30)]
    run.prompts.write_bytes(b"".join(map(encode_line, others)))
    first = speed_prompts(recipe, run, ROWS)
    second = speed_prompts(recipe, run, ROWS, taken=first)
    assert [prompt.id for prompt in first] == [*(row.prompt_id for row in ROWS), *(f"{i}" for i in range(count - 3))]
    assert second == [*others[count - 3 :], *first[: 2 * count - 33]]


def test_one_server_gives_speed_and_probes(tmp_path: Path, recipe: Recipe, started: Callable[..., list[str]]) -> None:
    run = RunDir(tmp_path)
    others = [kept_row(i, f"other {i}", "") for i in range(3, 6)]
    prompts = [Prompt(id=row.prompt_id, messages=row.messages) for row in (ROWS[2], *others)]
    run.prompts.write_bytes(b"".join(map(encode_line, prompts)))
    with misbehaving(streamed) as server:
        models = started(server)
        speed, probes = measure(recipe, run, probes=True)
    assert models == [str(run.path / "model")]  # one start for both
    assert {asked.body["model"] for asked in server.asked} == {"student_after"}
    tested = [row.messages[0].content for row in ROWS]
    timed = [asked for asked in server.asked if asked.body["max_tokens"] == TIMED]
    alone = [asked.text for asked in timed if asked.body.get("stream")]
    assert alone == ["test 2", "other 3", "other 4"]  # 6 prompts, and the warm-up had 8: the next three, in turn
    assert {asked.text for asked in timed} == {*tested, "other 3", "other 4", "other 5"}
    assert len(timed) == 3 + 2 * 7 and server.most_at_once <= 8
    assert [(burst.requests, burst.failed, burst.completion_tokens) for burst in speed.bursts] == [(7, 0, 35)] * 2
    assert {burst.machine for burst in speed.bursts} == {name_machine()}
    assert all(lone.tokens == 5 and 0.02 <= lone.first_token_s < lone.wall_s for lone in speed.alone)
    assert (speed.peak_rss_bytes, speed.dtype) == (5 << 30, "float32")
    # The probes are asked with the recipe's own limit.
    assert sorted(asked.text for asked in server.asked if asked.body["max_tokens"] == PROBED) == [
        f"probe {i}" for i in range(4)
    ]
    assert probes.answers == [
        answer_row("student_after", probe, f"answer to probe {i}") for i, probe in enumerate(PROBES)
    ]


def test_questions_that_a_timing_repeats_are_no_fault_of_the_users(
    tmp_path: Path, recipe: Recipe, started: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Seven requests over three prompts."""
    with misbehaving(streamed) as server:
        started(server)
        measure(recipe, RunDir(tmp_path))
    assert "differ" not in capsys.readouterr().err


def test_what_a_student_thinks_is_no_part_of_its_answer(
    tmp_path: Path, recipe: Recipe, started: Callable[..., list[str]]
) -> None:
    with misbehaving(lambda asked: answer(f"<think>\nhm\n</think>\n\nanswer to {asked.text}")) as server:
        started(server)
        _, probes = measure(recipe, RunDir(tmp_path), speed=False, probes=True)
    assert [(row.reasoning, row.text) for row in probes.answers] == [("hm", f"answer to probe {i}") for i in range(4)]


def test_a_timing_starts_anew_and_probes_alone_are_not_timed(
    tmp_path: Path, recipe: Recipe, started: Callable[..., list[str]]
) -> None:
    run = RunDir(tmp_path)
    with misbehaving(streamed) as server:
        started(server)
        first, _ = measure(recipe, run)
        again, _ = measure(recipe, run)
        asked = len(server.asked)
        assert asked == 2 * (3 + 3 + 2 * 7)
        measure(recipe, run, speed=False, probes=True)
        assert len(server.asked) == asked + 4
    assert [burst.completion_tokens for burst in (*first.bursts, *again.bursts)] == [35] * 4


def test_failed_requests_are_counted_apart(tmp_path: Path, recipe: Recipe, started: Callable[..., list[str]]) -> None:
    def script(asked: Asked) -> Behaviour:
        return error(400) if asked.text == "test 1" and not asked.body.get("stream") else streamed(asked)

    with misbehaving(script) as server:
        started(server)
        speed, _ = measure(recipe, RunDir(tmp_path))
    # 7 requests over three prompts: 2 0 1 2 0 1 2, and then 0 1 2 0 1 2 0.
    assert [(burst.requests, burst.failed, burst.completion_tokens) for burst in speed.bursts] == [(7, 2, 25)] * 2


def test_a_model_whose_thoughts_fill_the_timed_answers_is_timed_by_them(
    tmp_path: Path, recipe: Recipe, started: Callable[..., list[str]]
) -> None:
    """With 64 tokens a timed answer ends in the middle of what most models think."""
    with misbehaving(lambda asked: streamed(asked) if asked.body.get("stream") else cut_thought(0.02)) as server:
        started(server)
        speed, _ = measure(recipe, RunDir(tmp_path))
    assert [(burst.requests, burst.failed, burst.completion_tokens) for burst in speed.bursts] == [(7, 0, 35)] * 2
    assert all(burst.wall_s > 3.5 * 0.02 for burst in speed.bursts)  # 7 requests, two in flight


def test_a_model_that_says_nothing_has_answered(
    tmp_path: Path, recipe: Recipe, started: Callable[..., list[str]]
) -> None:
    def script(asked: Asked) -> Behaviour:
        said = {"probe 1": answer(""), "probe 2": error(400), "probe 3": cut_thought()}
        return said.get(asked.text, answer("Words."))

    with misbehaving(script) as server:
        started(server)
        _, probes = measure(recipe, RunDir(tmp_path), speed=False, probes=True)
    assert [(one.prompt_id, one.text, one.finish_reason) for one in probes.answers] == [
        ("probe0", "Words.", "stop"),
        ("probe1", "", "empty_answer"),
        ("probe3", "", "thought_cut_off"),
    ]


def test_a_server_that_died_says_why(tmp_path: Path, recipe: Recipe, started: Callable[..., list[str]]) -> None:
    with misbehaving() as server:
        server.die()
        started(server, ended=True)
        with pytest.raises(DistillError, match="vLLM ended while the student_after was measured: engine died"):
            measure(recipe, RunDir(tmp_path))


@pytest.mark.parametrize("at", [1, 6])  # in the warm-up; in the timing
def test_a_server_that_dies_while_it_is_asked_is_not_waited_for(
    at: int, tmp_path: Path, recipe: Recipe, started: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = set[float]()

    def noted(asking: Recipe, *given: Any, **options: Any) -> Any:
        waits.add(asking.generate.give_up_s)
        return generate(asking, *given, **options)

    def dies(asked: Asked) -> Behaviour:
        if len(server.asked) == at:
            server.die()
        return answer()

    monkeypatch.setattr(evaluate.measure.serving, "generate", noted)
    monkeypatch.setattr(evaluate.measure.serving, "GONE_S", 0.5)
    subject = Subject("teacher", "teacher", "reference", tmp_path / "model")
    with misbehaving(dies) as server:
        started(server, ended=True)
        with (
            pytest.raises(DistillError, match="vLLM ended while the teacher was measured: engine died"),
            serve_subject(recipe, RunDir(tmp_path), subject) as (ours, folder),
        ):
            answer_questions(with_server(recipe, ours), folder, PROBES, PROBES, PROBES)
    assert waits == {0.5}  # and not the recipe's, which is for a server that somebody may start again


def test_a_clock_that_is_set_during_a_timing_changes_no_speed(
    tmp_path: Path, recipe: Recipe, started: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_another_clock(*given: Any, **options: Any) -> Any:
        return msgspec.structs.replace(generate(*given, **options), wall_s=99.0)

    def clock() -> float:
        return time.time() + (3600 if len(server.asked) > 6 else 0)  # an hour on, in the first of two timings

    times = SimpleNamespace(time=clock, monotonic=time.monotonic)
    monkeypatch.setattr(evaluate.measure.serving, "generate", by_another_clock)
    monkeypatch.setattr(evaluate.measure.serving, "time", times, raising=False)
    monkeypatch.setattr(generate_jobs, "_now", lambda: datetime.fromtimestamp(clock(), UTC).isoformat())
    subject = Subject("teacher", "teacher", "reference", tmp_path / "model")
    with misbehaving(lambda asked: answer(delay_s=0.01)) as server:
        started(server)
        with serve_subject(recipe, RunDir(tmp_path), subject) as (at, folder):
            first, second = answer_questions(with_server(recipe, at), folder, PROBES, PROBES, PROBES[:3]).bursts
    assert first.wall_s == 99 and 0.03 < second.wall_s < 99


def test_questions_are_answered_greedily_and_timed_as_long_as_they_come(
    tmp_path: Path, recipe: Recipe, started: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow_to_start(*given: Any, **options: Any) -> Any:
        return msgspec.structs.replace(generate(*given, **options), wall_s=99.0)

    monkeypatch.setattr(evaluate.measure.serving, "generate", slow_to_start)
    told = [msgspec.structs.replace(p, messages=[Message("system", "Add."), *p.messages]) for p in PROBES]
    with misbehaving(lambda asked: answer(delay_s=0.01)) as server:
        started(server)
        subject = Subject("teacher", "teacher", "reference", tmp_path / "model")
        with serve_subject(recipe, RunDir(tmp_path), subject) as (at, folder):
            found = answer_questions(with_server(recipe, at), folder, PROBES, told, told[:3])
    assert [(burst.requests, burst.failed) for burst in found.bursts] == [(7, 0)] * 2 and min(found.rates) > 0
    # Two at a time, each after 10 ms; what the client does before the first and after the last is no part of it.
    assert all(0.03 < burst.wall_s < 99 for burst in found.bursts)
    assert [row.prompt_id for row in found.answers] == [p.id for p in PROBES]
    assert found.answers[0].messages == PROBES[0].messages  # what is judged is the bare question
    assert {asked.body["temperature"] for asked in server.asked} == {0}
    assert {asked.body["max_tokens"] for asked in server.asked} == {PROBED}
    assert all(asked.body["messages"][0] == {"role": "system", "content": "Add."} for asked in server.asked)
    assert len(server.asked) == 3 + 2 * 7 + 4


def test_a_teacher_elsewhere_is_asked_again_what_failed_and_nothing_twice(tmp_path: Path, recipe: Recipe) -> None:
    refused, heard = 4, list[str]()

    def script(asked: Asked) -> Behaviour:
        heard.append(asked.text)
        return error(400) if len(heard) <= refused else answer(f"Answer number {len(heard)}.")

    with misbehaving(script) as server:
        away = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"base_url": server.url})})
        with pytest.raises(DistillError, match="no probe was answered"):
            answer_probes(away, tmp_path, PROBES, PROBES)
        refused = 5
        assert len(answer_probes(away, tmp_path, PROBES, PROBES).answers) == 3
        first = answer_probes(away, tmp_path, PROBES, PROBES)
        assert len(first.answers) == 4 and len(heard) == 4 + 4 + 1
        cooler = away.model_copy(update={"sampling": away.sampling.model_copy(update={"temperature": 0.1})})
        other = answer_probes(cooler, tmp_path, PROBES, PROBES)
        assert not {row.text for row in other.answers} & {row.text for row in first.answers}
        assert answer_probes(away, tmp_path, PROBES, PROBES) == first and len(heard) == 9 + 4
        more = [*PROBES, Prompt(id="more", messages=[Message("user", "more")])]
        assert answer_probes(away, tmp_path, more, more).answers[:4] == first.answers and len(heard) == 14
        renamed = [msgspec.structs.replace(prompt, id=f"renamed {prompt.id}") for prompt in PROBES]
        assert len(answer_probes(away, tmp_path, renamed, renamed).answers) == 4 and len(heard) == 14
