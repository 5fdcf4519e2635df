"""The identity of a request: what changes it, what does not, and what is sent."""

import json
from typing import Any

import pytest

from generate.dialect import Dialect
from generate.jobs import Job, build_jobs
from generate.prompts import iter_prompts
from pipeline.recipe import Recipe
from pipeline.records import Message, Prompt

PROMPT = Prompt(id="p", messages=[Message(role="user", content="토끼")], slots={"a": "b"})


def recipe_with(**sections: Any) -> Recipe:
    given = {
        "name": "t",
        "teacher": {"model": "stub", "base_url": "http://127.0.0.1:1/v1"},
        "prompts": {"count": 1, "template": "x"},
        **sections,
    }
    return Recipe(**given)


def build_job(prompt: Prompt, recipe: Recipe) -> Job:
    (job,) = build_jobs([prompt], recipe)
    return job


def test_the_body_holds_all_sampling_values_and_a_seed_of_its_own() -> None:
    job = build_job(PROMPT, recipe_with(sampling={"temperature": 0.5, "top_p": 0.7, "max_tokens": 9, "seed": 3}))
    body = json.loads(Dialect().body(job))
    assert body == {
        "model": "stub",
        "messages": [{"role": "user", "content": "토끼"}],
        "temperature": 0.5,
        "top_p": 0.7,
        "max_tokens": 9,
        "seed": job.request.sampling["seed"],
    }
    assert 0 <= body["seed"] < 2**31
    assert job.request.sampling == {name: body[name] for name in ("temperature", "top_p", "max_tokens", "seed")}


def test_no_seed_is_sent_if_the_recipe_has_none() -> None:
    recipe = recipe_with(sampling={"seed": None}, prompts={"count": 1, "template": "x", "samples": 2})
    jobs = [*build_jobs([PROMPT], recipe)]
    assert [sorted(json.loads(Dialect().body(job))) for job in jobs] == [
        ["max_tokens", "messages", "model", "temperature", "top_p"]
    ] * 2
    assert "seed" not in jobs[0].request.sampling
    assert len({job.request.id for job in [*jobs, build_job(PROMPT, recipe_with())]}) == 3


def test_the_identity_is_the_same_everywhere() -> None:
    job = build_job(PROMPT, recipe_with())
    assert (job.request.id, job.request.sampling["seed"]) == ("ef2f82f763adbb72", 1953324706)


@pytest.mark.parametrize(
    "changed",
    [
        {"sampling": {"temperature": 0.1}},
        {"sampling": {"top_p": 0.1}},
        {"sampling": {"max_tokens": 1}},
        {"sampling": {"seed": 1}},
        {"teacher": {"model": "other", "base_url": "http://127.0.0.1:1/v1"}},
        {"teacher": {"model": "stub", "base_url": "http://127.0.0.1:2/v1"}},
    ],
)
def test_what_determines_the_answer_changes_id_and_seed(changed: dict[str, Any]) -> None:
    first, second = build_job(PROMPT, recipe_with()).request, build_job(PROMPT, recipe_with(**changed)).request
    assert first.id != second.id
    assert first.sampling["seed"] != second.sampling["seed"]


@pytest.mark.parametrize(
    "changed",
    [
        {"name": "other"},
        {"generate": {"concurrency": 3}},
        {"prompts": {"count": 9, "template": "x", "seed": 4}},
        {"teacher": {"model": "stub", "base_url": "http://127.0.0.1:1/v1/", "api_key_env": "OTHER"}},
    ],
)
def test_what_does_not_leaves_them(changed: dict[str, Any]) -> None:
    assert build_job(PROMPT, recipe_with()).request == build_job(PROMPT, recipe_with(**changed)).request


def test_the_same_question_again_is_another_request_for_the_same_prompt() -> None:
    recipe = recipe_with(prompts={"count": 9, "template": "{a}", "slots": {"a": ["x", "y"]}})
    jobs = list(build_jobs(list(iter_prompts(recipe)), recipe))
    assert len({job.request.id for job in jobs}) == 9
    assert len({job.request.sampling["seed"] for job in jobs}) == 9
    assert len({job.request.prompt_id for job in jobs}) == 2
    assert [job.request.sample for job in jobs] == [0, 0, 1, 1, 2, 2, 3, 3, 4]


def test_two_fillings_with_the_same_words_are_two_requests() -> None:
    slots = {"a": ["x", "x y"], "b": ["y z", "z"]}
    recipe = recipe_with(prompts={"count": 4, "template": "{a} {b}", "slots": slots})
    assert len({job.request.id for job in build_jobs(list(iter_prompts(recipe)), recipe)}) == 4
