"""Timing a model: what the client sends to which server, and what is made of the answers. The server is a stand-in."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from misbehaving_server import MisbehavingServer, answer, error, misbehaving
from tiny_student import kept_row, make_recipe

import evaluate.speed
from evaluate.models import Subject
from evaluate.results import Measurement
from evaluate.run import answers
from evaluate.speed import measure_speed
from pipeline.errors import DistillError
from pipeline.recipe import Recipe
from pipeline.records import Prompt, encode_line
from pipeline.rundir import RunDir
from serve.server import free_port

ROWS = [kept_row(i, f"held out {i}", "An answer.") for i in range(3)]


@dataclass
class StandIn:
    """As evaluate.speed sees a serve.server.Server."""

    base_url: str
    served_name: str
    ended: bool
    startup_s: float = 2.5

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

        monkeypatch.setattr(evaluate.speed, "serving", serving)
        return models

    return install


@pytest.fixture
def recipe() -> Recipe:
    made = make_recipe("student")
    timing = made.evaluate.model_copy(
        update={"speed_requests": 7, "speed_concurrency": 2, "speed_max_tokens": 9},
    )
    patience = made.generate.model_copy(update={"max_attempts": 1, "request_timeout_s": 5})
    return made.model_copy(update={"evaluate": timing, "generate": patience})


def measurement(run: RunDir, key: str = "student_after") -> Measurement:
    subject = Subject(key, key, "reference", run.path / "model")
    return Measurement(subject, run.path / "evaluation" / f"speed-{key}.json", "f")


def test_prompts_are_sent_as_the_recipe_says_and_counted(
    tmp_path: Path, recipe: Recipe, started: Callable[..., list[str]]
) -> None:
    run = RunDir(tmp_path)
    others = [kept_row(i, f"other {i}", "") for i in range(3, 6)]
    prompts = [Prompt(id=row.prompt_id, messages=row.messages) for row in (ROWS[2], *others)]
    run.prompts.write_bytes(b"".join(map(encode_line, prompts)))
    with misbehaving(lambda asked: answer(delay_s=0.01)) as server:
        models = started(server)
        result = measure_speed(measurement(run), recipe, run, ROWS)
    assert models == [str(run.path / "model")]
    timed = [asked for asked in server.asked if asked.body["max_tokens"] == 9]
    assert [asked.text for asked in timed].count("held out 0") == 2  # 7 requests, 6 prompts: the held-out ones first
    assert {asked.text for asked in timed} == {
        *(row.messages[0].content for row in ROWS),
        "other 3",
        "other 4",
        "other 5",
    }
    assert {asked.body["model"] for asked in server.asked} == {"student_after"}
    assert server.most_at_once == 2
    assert (result.requests, result.failed, result.completion_tokens) == (7, 0, 35)  # 5 tokens an answer
    assert result.wall_s > 0 and result.startup_s == 2.5
    assert result.peak_rss_bytes == (5 << 30 if result.device == "cpu" else None)
    # The samples are held-out prompts, asked with the recipe's own limit; the warm-up counts for nothing.
    assert {asked.text for asked in server.asked if asked.body["max_tokens"] == recipe.sampling.max_tokens} == {
        row.messages[0].content for row in ROWS
    }
    assert result.answers == {f"p{i}": f"answer to held out {i}" for i in range(3)}
    assert len(server.asked) == 3 + 7 + 3


def test_the_teacher_is_not_asked_for_samples_and_a_timing_starts_anew(
    tmp_path: Path, recipe: Recipe, started: Callable[..., list[str]]
) -> None:
    run = RunDir(tmp_path)
    with misbehaving() as server:
        started(server)
        first = measure_speed(measurement(run, "teacher"), recipe, run, ROWS)
        again = measure_speed(measurement(run, "teacher"), recipe, run, ROWS)
    assert first.answers == {} and again.completion_tokens == first.completion_tokens == 35
    assert len(server.asked) == 2 * (3 + 7)


def test_failed_requests_are_counted_apart(tmp_path: Path, recipe: Recipe, started: Callable[..., list[str]]) -> None:
    run = RunDir(tmp_path)
    with misbehaving(lambda asked: error(400) if asked.text == "held out 1" else answer()) as server:
        started(server)
        result = measure_speed(measurement(run, "teacher"), recipe, run, ROWS)
    assert (result.requests, result.failed, result.completion_tokens) == (7, 2, 25)


def test_a_server_that_died_says_why(tmp_path: Path, recipe: Recipe, started: Callable[..., list[str]]) -> None:
    run = RunDir(tmp_path)
    with misbehaving(lambda asked: answer()) as server:
        server.die()
        started(server, ended=True)
        with pytest.raises(DistillError, match="vLLM ended while the student_after was timed: engine died"):
            measure_speed(measurement(run), recipe, run, ROWS)


def test_a_teacher_that_is_still_served_is_noticed() -> None:
    with misbehaving() as server:
        assert answers(server.url)
    assert not answers(f"http://127.0.0.1:{free_port()}/v1")
    assert not answers("https://api.example.com/v1")
