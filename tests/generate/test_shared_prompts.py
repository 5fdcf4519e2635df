"""`generate.share_prompt`: the samples of a prompt as the choices of one request."""

import json
from collections import Counter
from typing import Any

import pytest
from msgspec.structs import replace
from pydantic import ValidationError

from generate.budget import Budget, Spend
from generate.dialect import Dialect
from generate.dry_run import describe, dry_run
from generate.endpoint import Endpoint
from generate.jobs import build_jobs, shared
from generate.journal import Journal
from generate.prompts import iter_prompts
from generate.reply import Answer, Choices, read_choices
from generate.run import generate
from generate.streaming import stream, streaming_session
from generate.tokens import TEMPLATE_TOKENS, bound
from pipeline.errors import BudgetReached, DistillError, RecipeError
from pipeline.recipe import Recipe
from pipeline.records import Message, Usage
from pipeline.rundir import RunDir
from pipeline.section import BudgetConfig
from tests.generate.test_requests import PROMPT, recipe_with
from tests.servers.misbehaving_server import (
    Asked,
    Behaviour,
    MisbehavingServer,
    answer,
    choice,
    choices,
    completions,
    error,
    failures,
    misbehaving,
    recipe_for,
)

PRICE = {"input": 1.0, "output": 10.0}  # USD per million tokens


pytestmark = pytest.mark.usefixtures("quick")


def recipe_of(
    server: MisbehavingServer | str, count: int = 3, samples: int = 4, share: bool = True, **sections: Any
) -> Recipe:
    slots = {"n": [str(n) for n in range(count)]}
    config = {"concurrency": 8, "max_attempts": 3, "request_timeout_s": 5, **sections.pop("generate", {})}
    return recipe_for(
        server,
        prompts={"count": count, "samples": samples, "template": "say {n}", "slots": slots},
        generate={**config, "share_prompt": share},
        **sections,
    )


def asked_n(server: MisbehavingServer) -> list[int]:
    return sorted(asked.body.get("n", 1) for asked in server.asked)


def lines_kept(run: RunDir, kept: int) -> None:
    """Leaves the first lines of the answers, as if the run had been killed then."""
    lines = run.completions.read_bytes().splitlines(keepends=True)
    run.completions.write_bytes(b"".join(lines[:kept]))


def spent(run: RunDir) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run.lineage.read_text())["generate"]["spent"]
    return found


def test_the_samples_of_a_prompt_are_the_choices_of_one_request(run: RunDir) -> None:
    with misbehaving() as server:
        recipe = recipe_of(server, teacher={"model": "stub", "base_url": server.url, "price": PRICE})
        summary = generate(recipe, run, quiet=True)
    jobs = {job.request.id: job.request for job in build_jobs(iter_prompts(recipe), recipe)}
    rows = completions(run)
    assert asked_n(server) == [4, 4, 4]
    assert (summary.prompts, summary.requests, summary.answered) == (3, 12, 12)
    assert {row.id for row in rows} == jobs.keys()  # what they are without it
    assert sorted(row.sample for row in rows) == sorted([*range(4)] * 3)
    assert len({row.text for row in rows}) == 12
    seeds = {asked.text: asked.body["seed"] for asked in server.asked}
    for row in rows:
        question = row.messages[0].content
        assert row.sampling == {**jobs[row.id].sampling, "seed": seeds[question], "n": 4}
        assert row.sample or row.sampling["seed"] == jobs[row.id].sampling["seed"]
    assert (summary.prompt_tokens, summary.completion_tokens) == (3 * 7, 12 * 5)
    assert spent(run) == {"tokens": 81, "usd": pytest.approx((21 * 1.0 + 60 * 10.0) / 1e6)}


@pytest.mark.parametrize("share", [True, False])
def test_no_answer_is_bought_twice_when_the_key_is_switched(run: RunDir, share: bool) -> None:
    with misbehaving() as server:
        generate(recipe_of(server, share=share), run, quiet=True)
        lines_kept(run, 6)
        server.asked.clear()
        summary = generate(recipe_of(server, share=not share), run, quiet=True)
    assert (summary.resumed, summary.answered) == (6, 6)
    assert sum(asked_n(server)) == 6
    assert len({row.id for row in completions(run)}) == len(completions(run)) == 12


def test_only_the_missing_samples_are_asked_again(run: RunDir) -> None:
    with misbehaving() as server:
        recipe = recipe_of(server, count=1, samples=5)
        generate(recipe, run, quiet=True)
        whole = run.completions.read_bytes()
        first, second, *_ = whole.splitlines(keepends=True)
        run.completions.write_bytes(first + second + b'{"id": "torn')  # a kill in the middle of the one write
        generate(recipe, run, quiet=True)
    assert asked_n(server) == [3, 5]
    rows = completions(run)
    assert [row.sample for row in rows] == [0, 1, 2, 3, 4]
    assert rows[2].sampling["seed"] == server.asked[1].body["seed"]
    assert {row.sampling["n"] for row in rows[2:]} == {3}


def test_the_answers_of_a_reply_are_appended_in_one_write(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    write = Journal._write

    def spied(journal: Journal, lines: bytes) -> None:
        written.append(lines)
        write(journal, lines)

    monkeypatch.setattr(Journal, "_write", spied)
    with misbehaving() as server:
        generate(recipe_of(server), run, quiet=True)
    assert [lines.count(b"\n") for lines in written] == [4, 4, 4]


def test_a_choice_that_is_no_answer_is_a_failure_of_its_own(run: RunDir) -> None:
    mixed = choices(
        choice("good"),
        choice("half", "content_filter"),
        choice(""),
        choice(None, refusal="I cannot."),
        choice("long", "length"),
    )
    with misbehaving(lambda asked: mixed if asked.body.get("n") == 5 else answer()) as server:
        recipe = recipe_of(server, 1, 5, budget={"tokens": 10**6})
        summary = generate(recipe, run, quiet=True)
        assert [(row.sample, row.text, row.finish_reason) for row in completions(run)] == [
            (0, "good", "stop"),
            (4, "long", "length"),
        ]
        assert [(row.sample, row.error) for row in failures(run)] == [
            (1, "content_filter"),
            (2, "empty_answer"),
            (3, "refusal"),
        ]
        assert (summary.answered, summary.failed) == (2, 3)
        assert spent(run)["tokens"] == 7 + 25  # what the failed choices cost is counted, too
        assert sum(row.usage.prompt_tokens or 0 for row in completions(run)) < 7
        again = generate(recipe, run, quiet=True, retry_failures=True)
    assert asked_n(server) == [3, 5]
    assert (again.resumed, again.answered, again.failed) == (2, 3, 0)
    assert spent(run)["tokens"] == 7 + 25 + 7 + 15


def test_choices_that_did_not_come_are_asked_again(run: RunDir) -> None:
    """At once, and without counting an attempt: each reply brings some."""

    def script(asked: Asked) -> Behaviour:
        return answer(n=min(2, asked.body.get("n", 1)))

    with misbehaving(script) as server:
        summary = generate(recipe_of(server, 2, 7, generate={"max_attempts": 1}), run, quiet=True)
    assert (summary.answered, summary.failed) == (14, 0)
    assert asked_n(server) == sorted([7, 5, 3, 1] * 2)
    assert {row.attempts for row in completions(run)} == {1}
    assert summary.prompt_tokens == 8 * 7


def test_a_server_that_does_not_know_n_is_sent_a_request_per_sample(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    with misbehaving(lambda asked: answer(n=1)) as server:
        summary = generate(recipe_of(server, 5, 4, generate={"max_attempts": 1}), run, quiet=True)
    assert (summary.answered, summary.failed) == (20, 0)
    assert len(server.asked) == 20
    assert Counter(asked_n(server))[4] <= 2  # those in flight before the first reply
    words = " ".join(capsys.readouterr().err.split())
    assert words.count("(1 of 4 choices came): from here on this run sends a request for each sample") == 1


def test_a_server_that_refuses_n_is_told_once(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    def script(asked: Asked) -> Behaviour:
        return error(400, "n must be 1", param="n") if "n" in asked.body else answer()

    with misbehaving(script) as server:
        generate(recipe_of(server, 5, 4, generate={"max_attempts": 1}), run, quiet=True)
    assert len(completions(run)) == 20 and not failures(run)
    assert Counter(asked_n(server))[4] <= 2
    assert len({row.sampling["seed"] for row in completions(run)}) == 20  # each its own again
    assert " ".join(capsys.readouterr().err.split()).count("sends a request for each sample") == 1


def test_a_shared_request_that_failed_is_sent_again_as_it_was(run: RunDir) -> None:
    with misbehaving(lambda asked: error(500) if asked.attempt == 1 else answer()) as server:
        generate(recipe_of(server), run, quiet=True)
    assert asked_n(server) == [4] * 6
    assert {row.attempts for row in completions(run)} == {2}


def test_a_prompt_that_is_refused_counts_once_however_many_samples_it_has(run: RunDir) -> None:
    """20 different refusals would end the run."""
    seen: list[Asked] = []

    def script(asked: Asked) -> Behaviour:
        seen.append(asked)
        return error(400) if len(seen) <= 2 else answer()

    with misbehaving(script) as server:
        summary = generate(recipe_of(server, 3, 24), run, quiet=True)
    assert (summary.answered, summary.failed) == (24, 48)
    assert len(server.asked) == 3


def test_the_size_of_a_request_is_that_of_its_answers(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []
    begin = Endpoint.begin

    def spied(endpoint: Endpoint, tokens: int, choices: int, now: float) -> None:
        sizes.append((tokens, choices))
        begin(endpoint, tokens, choices, now)

    monkeypatch.setattr(Endpoint, "begin", spied)
    with misbehaving(lambda asked: answer(delay_s=0.05)) as server:
        recipe = recipe_of(server, 6, 4, sampling={"max_tokens": 1000}, generate={"concurrency": 11})
        generate(recipe, run, quiet=True)
        assert server.most_at_once == 2
        assert all(choices == 4 and 4000 < tokens < 4200 for tokens, choices in sizes)
        few = recipe_of(server, 2, 5, generate={"concurrency": 3})  # one that is larger than the limit goes alone
        assert generate(few, RunDir(run.path / "few"), quiet=True).answered == 10


def test_the_budget_reserves_the_prompt_once_and_each_answer() -> None:
    budget = Budget(BudgetConfig(tokens=1000), None, Spend())
    reservation = budget.reserve(100, 50, answers=4)
    assert reservation is not None
    assert reservation.most.tokens == 100 + TEMPLATE_TOKENS + 4 * 50
    said = [Usage(prompt_tokens=5, completion_tokens=60) for _ in range(4)]  # beyond max_tokens
    budget.settle(reservation, Usage(prompt_tokens=20, completion_tokens=240), billed=True, journaled=said)
    assert budget.spent == Spend(260, 0)
    later = budget.reserve(100, 50, answers=2)
    assert later is not None and later.most.tokens == 100 + TEMPLATE_TOKENS + 2 * 60


def test_a_budget_that_covers_no_second_prompt_ends_the_run(run: RunDir) -> None:
    with misbehaving() as server:
        recipe = recipe_of(server, 3, 4, sampling={"max_tokens": 100})
        first = next(filter(None, shared(build_jobs(iter_prompts(recipe), recipe))))
        enough = bound(len(Dialect().body(first))) + 4 * 100 + 10  # the first answers take 27, so it covers no second
        with pytest.raises(BudgetReached):
            generate(recipe.model_copy(update={"budget": BudgetConfig(tokens=enough)}), run, quiet=True)
    assert len(completions(run)) == 4 and asked_n(server) == [4]


def test_the_dry_run_counts_a_shared_prompt_once(run: RunDir) -> None:
    teacher = {"model": "stub", "base_url": "http://127.0.0.1:1/v1", "price": PRICE}
    plain, dry = (dry_run(recipe_of("x", share=share, teacher=teacher), run) for share in (False, True))
    assert (plain.sent, dry.sent, plain.to_ask, dry.to_ask) == (12, 3, 12, 12)
    assert dry.completion_tokens == plain.completion_tokens
    assert dry.prompt_tokens == pytest.approx(plain.prompt_tokens / 4 + 3 * len('"n":4,'), abs=10)  # seeds differ
    said = describe(recipe_of("x", teacher=teacher), dry)[0]
    assert said.startswith("t: 12 requests (3 prompts, 4 samples each)")
    assert said.endswith("sent as 3 (generate.share_prompt)")
    assert "sent as" not in describe(recipe_of("x", share=False, teacher=teacher), plain)[0]


def test_what_is_joined_asks_the_same() -> None:
    other = replace(PROMPT, messages=[Message("user", "another")])  # with the same id, as a user's own may be
    recipe = recipe_with(prompts={"count": 1, "template": "x", "samples": 100})
    jobs = list(filter(None, shared(build_jobs([PROMPT, PROMPT, other, PROMPT], recipe))))
    assert [job.choices for job in jobs] == [128, 72, 100, 100]
    ids = [request.id for job in jobs for request in job.requests]
    assert ids == [job.request.id for job in build_jobs([PROMPT, PROMPT, other, PROMPT], recipe)]


CALL = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("usage", "messages", "parts"),
    [
        ({"prompt_tokens": 10, "completion_tokens": 12}, ["a" * 10, "a" * 22], [(5, 4, None), (5, 8, None)]),
        ({"prompt_tokens": 10, "completion_tokens": 1}, ["a", "a", "a"], [(3, 0, None), (3, 0, None), (4, 1, None)]),
        ({"completion_tokens": 9}, ["a", "a", "a"], [(None, 3, None)] * 3),
        ({"prompt_tokens": 2}, ["a", "a"], [(1, None, None)] * 2),
        (None, ["a", "a"], [(None, None, None)] * 2),
        (  # thoughts that are not shown are divided evenly
            {"prompt_tokens": 2, "completion_tokens": 16, "completion_tokens_details": {"reasoning_tokens": 10}},
            ["", "aa"],
            [(1, 7, 5), (1, 9, 5)],
        ),
    ],
)
def test_the_tokens_of_a_reply_are_divided_and_nothing_is_lost(
    usage: Any, messages: list[str], parts: list[tuple[Any, ...]]
) -> None:
    body = {"choices": [choice(text) for text in messages], "usage": usage}
    found = read_choices(json.dumps(body).encode(), most=9)
    assert isinstance(found, Choices)
    usages = [outcome.usage for outcome in found.outcomes]
    assert [(one.prompt_tokens, one.completion_tokens, one.reasoning_tokens) for one in usages if one] == parts


def test_more_choices_than_were_asked_for_are_left_out_and_paid() -> None:
    body = {"choices": [choice("a"), choice("b"), choice("c")], "usage": {"prompt_tokens": 4, "completion_tokens": 9}}
    found = read_choices(json.dumps(body).encode(), most=2)
    assert isinstance(found, Choices) and all(isinstance(one, Answer) for one in found.outcomes)
    assert [one.usage for one in found.outcomes] == [
        Usage(prompt_tokens=2, completion_tokens=4),
        Usage(prompt_tokens=2, completion_tokens=5),
    ]


def test_a_choice_may_call_a_tool() -> None:
    body = {"choices": [choice(None, "tool_calls", tool_calls=[CALL]), choice("text")]}
    found = read_choices(json.dumps(body).encode(), most=2)
    assert isinstance(found, Choices)
    assert [isinstance(one, Answer) and len(one.tool_calls) for one in found.outcomes] == [1, 0]


def test_batches_have_a_request_for_each_sample(run: RunDir) -> None:
    with pytest.raises(ValidationError, match="share_prompt is for mode online"):
        recipe_of("http://127.0.0.1:1/v1", generate={"mode": "batch"})
    with pytest.raises(RecipeError, match="batch files have a request for each sample"):
        generate(recipe_of("http://127.0.0.1:1/v1"), run, quiet=True, write_batches=True)


async def test_a_streamed_request_asks_for_one_answer() -> None:
    teacher = recipe_for("http://127.0.0.1:1/v1").teacher
    async with streaming_session(teacher, timeout_s=5) as session:
        with pytest.raises(DistillError, match="asks for one answer, this one for n=2"):
            await stream(session, teacher, b'{"messages": [], "n": 2}')
