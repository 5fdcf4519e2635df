"""Several samples of a prompt, and what only the teacher is told: ids, bodies, counts, resume, dry run."""

import json
from pathlib import Path
from typing import Any

import pytest

from generate.budget import Budget
from generate.dialect import Dialect
from generate.dry_run import describe, dry_run
from generate.jobs import Partition, build_jobs
from generate.journal import Contents
from generate.prompts import iter_prompts
from generate.run import generate, pending
from generate.tokens import bound, counter
from pipeline.errors import BudgetReached, RecipeError
from pipeline.recipe import Recipe
from pipeline.records import Message, Prompt, read_jsonl
from pipeline.rundir import RunDir
from tests.generate.test_requests import PROMPT, build_job, recipe_with
from tests.generate.test_tokens import folder
from tests.servers.misbehaving_server import completions, misbehaving, recipe_for

CHAT = Prompt(
    id="c",
    messages=[
        Message("system", "Be kind."),
        Message("user", "안녕"),
        Message("assistant", "Hi"),
        Message("user", "<b>"),
    ],
)
TOLD = {"system": "Answer in SQL.", "examples": [{"prompt": "count", "answer": "SELECT 1"}]}
TOOL = {"type": "function", "function": {"name": "now", "parameters": {}}}


def told(recipe: Recipe, prompt: Prompt = PROMPT) -> list[dict[str, str]]:
    """The messages that are sent."""
    body: dict[str, Any] = json.loads(Dialect().body(build_job(prompt, recipe)))
    messages: list[dict[str, str]] = body["messages"]
    return messages


def teacher(**settings: Any) -> dict[str, Any]:
    return {"model": "stub", "base_url": "http://127.0.0.1:1/v1", **settings}


def test_ids_of_plain_requests_are_those_of_earlier_versions() -> None:
    """Written down before samples, tools, and messages for the teacher alone existed: old runs go on."""
    recipe = recipe_with(sampling={"extra": {"top_k": 5}})
    jobs = [job.request for job in build_jobs([PROMPT, CHAT, PROMPT, PROMPT], recipe)]
    assert [(job.id, job.sampling["seed"]) for job in jobs] == [
        ("1373f62c0f485952", 1740317262),
        ("bffd587c17c46cf7", 550486445),
        ("98e4b90b2b9a6de0", 2083192693),
        ("52d964bc84d7729f", 223305219),
    ]


def test_samples_have_ids_and_seeds_of_their_own_and_repeats_follow_them() -> None:
    recipe = recipe_with(prompts={"count": 5, "samples": 3, "template": "{a}", "slots": {"a": ["x", "y"]}})
    jobs = [job.request for job in build_jobs(iter_prompts(recipe), recipe)]
    assert [job.sample for job in jobs] == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8]
    assert len({job.id for job in jobs}) == len({job.sampling["seed"] for job in jobs}) == 15
    assert len({job.prompt_id for job in jobs}) == 2
    fewer = recipe.model_copy(update={"prompts": recipe.prompts.model_copy(update={"samples": 1})})
    assert {job.request.id for job in build_jobs(iter_prompts(fewer), fewer)} <= {job.id for job in jobs}


def test_the_teacher_is_told_more_than_the_prompt_and_the_record_is_bare(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with misbehaving() as server:
        recipe = recipe_for(server, 2, teacher={"model": "stub", "base_url": server.url, **TOLD})
        generate(recipe, run, quiet=True)
        assert {json.dumps(asked.body["messages"][:3]) for asked in server.asked} == {json.dumps(told(recipe)[:3])}
    assert told(recipe) == [
        {"role": "system", "content": "Answer in SQL."},
        {"role": "user", "content": "count"},
        {"role": "assistant", "content": "SELECT 1"},
        {"role": "user", "content": "토끼"},
    ]
    for record in [*completions(run), *read_jsonl(run.prompts, Prompt)]:
        assert [message.role for message in record.messages] == ["user"]


def test_what_the_teacher_is_told_and_tools_change_the_id_but_reference_and_columns_do_not() -> None:
    plain = build_job(PROMPT, recipe_with()).request
    ids = {plain.id}
    for settings in ({"system": "a"}, {"system": ""}, {"examples": TOLD["examples"]}, TOLD):
        ids.add(build_job(PROMPT, recipe_with(teacher=teacher(**settings))).request.id)
    values = {"id": "p", "messages": PROMPT.messages}
    tools = Prompt(**values, tools=[TOOL])
    ids.add(build_job(tools, recipe_with()).request.id)
    assert len(ids) == 6
    known = build_job(Prompt(**values, reference={"answer": 4}, columns={"topic": "x"}), recipe_with()).request
    assert (known.id, known.reference, known.columns) == (plain.id, {"answer": 4}, {"topic": "x"})
    assert json.loads(Dialect().body(build_job(tools, recipe_with())))["tools"] == [TOOL]


def test_two_system_prompts_are_one_clear_error() -> None:
    with pytest.raises(ValueError, match=r"prompts\.system and teacher\.system are both set"):
        recipe_with(teacher=teacher(system="a"), prompts={"count": 1, "template": "x", "system": "b"})


def test_samples_that_cannot_differ_are_refused() -> None:
    prompts = {"count": 1, "template": "x", "samples": 2}
    with pytest.raises(ValueError, match=r"prompts\.samples is 2, but with sampling\.temperature 0"):
        recipe_with(prompts=prompts, sampling={"temperature": 0})


def test_prompts_and_samples_are_counted_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(tmp_path / "run")
    prompts = {"count": 3, "samples": 4, "template": "{a}", "slots": {"a": ["x", "y"]}}
    with misbehaving() as server:
        recipe = recipe_for(server, prompts=prompts)
        assert pending(recipe, run) == 12
        summary = generate(recipe, run, quiet=True)
        assert (summary.prompts, summary.requests, summary.answered) == (3, 12, 12)
        lines = run.completions.read_bytes().splitlines(keepends=True)
        run.completions.write_bytes(b"".join(lines[:5]))
        summary = generate(recipe, run, quiet=True)
        assert (summary.resumed, summary.answered, len(server.asked)) == (5, 7, 19)
    words = " ".join(capsys.readouterr().err.split())
    assert "3 prompts asked for, but only 2 differ: 1 ask the same again" in words
    assert "12 requests (3 prompts, 4 samples each), 5 answered already, 7 to ask" in words
    assert len(list(read_jsonl(run.prompts, Prompt))) == 3
    assert sorted(row.sample for row in completions(run)) == sorted([*range(8), *range(4)])
    asked = json.loads(run.lineage.read_text())["generate"]["prompts"]
    assert asked == {"asked": 3, "distinct": 2, "samples": 4, "grammar": 2}
    assert describe(recipe, dry_run(recipe, run))[0].startswith("t: 12 requests (3 prompts, 4 samples each), 12 ans")


def test_samples_are_shared_among_processes() -> None:
    recipe = recipe_with(prompts={"count": 5, "samples": 3, "template": "{a}", "slots": {"a": list("vwxyz")}})
    parts = [{job.request.id for job in build_jobs(iter_prompts(recipe), recipe, Partition(n, 2))} for n in range(2)]
    whole = {job.request.id for job in build_jobs(iter_prompts(recipe), recipe)}
    assert parts[0] | parts[1] == whole and not parts[0] & parts[1]


def test_the_dry_run_and_the_budget_count_what_the_teacher_is_told(tmp_path: Path) -> None:
    model = folder(tmp_path, "{{ tools }}{% for m in messages %}{{ m.content }}{% endfor %}")
    recipe = recipe_for("http://127.0.0.1:1/v1", 5, teacher=teacher(model=model, **TOLD))
    dry = dry_run(recipe, RunDir(tmp_path / "run"))
    words = len("None" + "Answer in SQL." + "count" + "SELECT 1" + "say 0")
    assert (dry.counted, dry.prompt_tokens) == (True, 5 * words)
    job = next(build_jobs(iter_prompts(recipe), recipe))
    body = Dialect().body(job)
    assert b"Answer in SQL." in body and b"SELECT 1" in body
    budget = recipe.model_copy(update={"budget": recipe.budget.model_copy(update={"tokens": bound(len(body)) + 499})})
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    assert Budget.open(budget, run, Contents()).reserve(len(body), 500) is None
    with misbehaving() as server, pytest.raises(BudgetReached):
        asking = recipe_for(server, 5, teacher=teacher(base_url=server.url, **TOLD), budget={"tokens": 600})
        generate(asking, run, quiet=True)


def test_tools_are_counted_by_the_template(tmp_path: Path) -> None:
    count = counter(folder(tmp_path, "{{ tools | tojson }}|{{ messages[0].content }}"))
    assert count is not None
    assert count([Message("user", "hi")], [TOOL]) == len(json.dumps([TOOL]) + "|hi")


def test_a_reference_is_filled_with_the_slots() -> None:
    reference = {"room": "{room}", "all": ["{{{room}}} {n}", 3, None, {"deep": "{n}"}]}
    slots = {"room": ["kitchen"], "n": {"choose": 2, "from": ["1", "2"]}}
    recipe = recipe_with(prompts={"count": 1, "template": "{room} {n}", "slots": slots, "reference": reference})
    (prompt,) = iter_prompts(recipe)
    numbers = ", ".join(prompt.slots["n"])
    assert prompt.reference == {"room": "kitchen", "all": ["{kitchen} " + numbers, 3, None, {"deep": numbers}]}


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ({"a": ["{b}"]}, "prompts.reference names `b`, which prompts.slots does not have; there are: a"),
        ("{", r"prompts.reference: .*write a literal brace as {{ or }}"),
    ],
)
def test_a_reference_that_does_not_fit_is_refused(reference: Any, said: str) -> None:
    prompts = {"count": 1, "template": "{a}", "slots": {"a": ["x"]}, "reference": reference}
    with pytest.raises(RecipeError, match=said):
        list(iter_prompts(recipe_with(prompts=prompts)))
