"""Refusals: of one prompt, of every prompt, for money; and what a record says of the request that was sent."""

import json
from pathlib import Path

import pytest

from generate.run import generate
from generate.verdict import REFUSED_ALIKE
from pipeline.errors import DistillError
from pipeline.rundir import RunDir
from tests.servers.misbehaving_server import (
    Asked,
    Behaviour,
    answer,
    completions,
    cut_thought,
    error,
    failures,
    misbehaving,
    one_bad,
    raw,
    recipe_for,
)

SLOTS = 8

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.parametrize(
    "bad",
    [
        error(402, "Insufficient Balance"),
        error(429, "pay first", "insufficient_quota"),
        error(400, "Your credit balance is too low to access the Anthropic API."),
    ],
    ids=["402", "quota", "Anthropic"],
)
def test_out_of_money_ends_the_run_at_once_and_it_goes_on_later(run: RunDir, bad: Behaviour) -> None:
    paid = 12
    with misbehaving(lambda asked: answer() if len(server.asked) <= paid else bad) as server:
        with pytest.raises(DistillError, match="the quota is used up") as caught:
            generate(recipe_for(server, 300), run, quiet=True)
        assert caught.value.exit_code == 1
        assert len(server.asked) <= paid + SLOTS
        assert not failures(run)
        paid = 10**6
        summary = generate(recipe_for(server, 300), run, quiet=True)
    assert (summary.completed, summary.resumed, summary.failed) == (300, paid and 12, 0)


@pytest.mark.parametrize(
    "bad",
    [error(400, "top_k: no such field"), error(403, "not for your country"), raw(b'{"odd": 1}')],
    ids=["400", "403", "no chat"],
)
def test_when_the_first_requests_are_all_refused_alike_the_run_ends_and_they_have_not_failed(
    run: RunDir, bad: Behaviour
) -> None:
    broken = True
    with misbehaving(lambda asked: bad if broken else answer()) as server:
        with pytest.raises(
            DistillError, match=f"gives no answers: {REFUSED_ALIKE} requests in a row end with"
        ) as caught:
            generate(recipe_for(server, 300), run, quiet=True)
        assert any(words in str(caught.value) for words in ("no such field", "not for your country", "odd"))
        assert caught.value.exit_code == 1
        assert REFUSED_ALIKE <= len(server.asked) <= REFUSED_ALIKE + SLOTS
        assert not failures(run)
        broken = False
        assert generate(recipe_for(server, 300), run, quiet=True).answered == 300


def test_an_answer_after_that_end_makes_no_failures(run: RunDir) -> None:
    """`say 3` is in flight when the run ends, and has a moment to end: its answer is kept, and nothing else."""
    script = lambda asked: answer(delay_s=1) if asked.text == "say 3" else error(400, "no")  # noqa: E731
    with misbehaving(script) as server, pytest.raises(DistillError, match="gives no answers"):
        generate(recipe_for(server, 30, generate={"concurrency": 30}), run, quiet=True)
    assert [record.slots["n"] for record in completions(run)] == ["3"]
    assert not failures(run)


def test_refusals_before_the_first_answer_are_their_own(run: RunDir) -> None:
    """Held back until an answer comes, then written: the first 15 are refused, and the others are answered."""

    def script(asked: Asked) -> Behaviour:
        return error(400, "too long") if len(server.asked) <= 15 else answer()

    with misbehaving(script) as server:
        summary = generate(recipe_for(server, 40, generate={"concurrency": 1}), run, quiet=True)
    assert (summary.answered, summary.failed, summary.errors) == (25, 15, {"bad_request": 15})
    assert len(failures(run)) == 15


def test_a_key_that_reaches_its_limit_in_the_middle_ends_the_run_and_nothing_has_failed(run: RunDir) -> None:
    """OpenRouter's 403. One prompt that is flagged before, between two answers, has failed all the same."""
    limit, flagged = 30, list[str]()

    def script(asked: Asked) -> Behaviour:
        if len(server.asked) == 10:
            flagged.append(asked.text)
            return error(403, "flagged")
        return answer() if len(server.asked) <= limit else error(403, "Key limit exceeded (total limit)")

    words = rf"{REFUSED_ALIKE} requests in a row end with forbidden \(status 403\): Key limit exceeded"
    with misbehaving(script) as server:
        recipe = recipe_for(server, 300, generate={"concurrency": 1})
        with pytest.raises(DistillError, match=words) as caught:
            generate(recipe, run, quiet=True)
        assert caught.value.exit_code == 1
        assert len(server.asked) <= limit + REFUSED_ALIKE
        assert [failure.messages[-1].content for failure in failures(run)] == flagged
        limit = 10**6
        summary = generate(recipe, run, quiet=True)
    assert (summary.completed, summary.answered) == (299, 270)


def test_the_last_refusals_of_a_run_that_had_answers_are_their_own(run: RunDir) -> None:
    def script(asked: Asked) -> Behaviour:
        return answer() if len(server.asked) <= 25 else error(403, "flagged")

    with misbehaving(script) as server:
        summary = generate(recipe_for(server, 30, generate={"concurrency": 1}), run, quiet=True)
    assert (summary.answered, summary.failed, len(failures(run))) == (25, 5, 5)


def test_prompts_that_are_too_long_in_a_row_do_not_end_a_run(run: RunDir) -> None:
    def script(asked: Asked) -> Behaviour:
        return error(400, "too long") if 10 <= int(asked.text.split()[-1]) < 50 else answer()

    with misbehaving(script) as server:
        summary = generate(recipe_for(server, 60, generate={"concurrency": 1}), run, quiet=True)
    assert (summary.answered, summary.failed) == (20, 40)


def test_refusals_of_different_kinds_are_their_own(run: RunDir) -> None:
    def script(asked: Asked) -> Behaviour:
        return error(400 if len(server.asked) % 2 else 422, "no")

    with misbehaving(script) as server:
        summary = generate(recipe_for(server, 30), run, quiet=True)
    assert (summary.answered, summary.failed) == (0, 30)


def test_a_model_that_says_nothing_is_not_a_refusal_of_all(run: RunDir) -> None:
    with misbehaving(lambda asked: answer("")) as server:
        assert generate(recipe_for(server, 30), run, quiet=True).errors == {"empty_answer": 30}


def test_thoughts_that_all_leave_no_room_for_an_answer_end_the_run_and_none_has_failed(run: RunDir) -> None:
    """A model that thinks behind the API, with a recipe for one that does not: each such reply is charged."""
    with misbehaving(lambda asked: cut_thought()) as server:
        words = f"{REFUSED_ALIKE} requests in a row end with thought_cut_off .* raise sampling.max_tokens"
        with pytest.raises(DistillError, match=words):
            generate(recipe_for(server, 300), run, quiet=True)
        assert REFUSED_ALIKE <= len(server.asked) <= REFUSED_ALIKE + SLOTS
    assert not failures(run)


def test_thoughts_without_room_are_their_own_where_others_had_room(run: RunDir) -> None:
    """In the call, or in an earlier one: what thinks longest ends last, and is what a run that was killed leaves."""
    with misbehaving(lambda asked: answer() if asked.text == "say 3" else cut_thought()) as server:
        generate(recipe_for(server, 4), run, quiet=True)
        summary = generate(recipe_for(server, 40), run, quiet=True)
    assert (summary.completed, summary.failed) == (1, 39)


def test_a_stage_that_measures_a_model_hears_that_it_never_comes_to_an_answer(tmp_path: Path) -> None:
    with misbehaving(lambda asked: cut_thought()) as server:
        summary = generate(recipe_for(server, 30), RunDir(tmp_path, internal=True), quiet=True)
    assert summary.errors == {"thought_cut_off": 30}


def test_one_prompt_that_a_gateway_flags_fails_alone_at_every_resume(run: RunDir) -> None:
    with misbehaving(one_bad(error(403, "flagged"))) as server:
        summary = generate(recipe_for(server, 10), run, quiet=True)
        assert (summary.answered, summary.failed) == (9, 1)
        assert [(failure.error, failure.status) for failure in failures(run)] == [("forbidden", 403)]
        again = generate(recipe_for(server, 10), run, quiet=True, retry_failures=True)  # it is the only one left
    assert (again.completed, again.failed) == (9, 1)


def test_a_short_run_that_is_forbidden_altogether_has_no_failures(run: RunDir) -> None:
    words = r"5 requests in a row end with forbidden \(status 403\): not for you"
    with misbehaving(lambda asked: error(403, "not for you")) as server, pytest.raises(DistillError, match=words):
        generate(recipe_for(server, 5), run, quiet=True)
    assert not failures(run)


def test_each_record_has_the_sampling_that_was_sent_with_it(run: RunDir) -> None:
    """`say 0` is on its way when another request teaches that `seed` is refused: its record has its own seed."""

    def script(asked: Asked) -> Behaviour:
        if asked.text == "say 0" and asked.attempt == 1:
            return answer(delay_s=0.5)
        return error(400, "Unrecognized request argument supplied: seed") if "seed" in asked.body else answer()

    with misbehaving(script) as server:
        generate(recipe_for(server, 8), run, quiet=True)
    sent = {asked.text: asked.body for asked in server.asked if asked.text == "say 0" or "seed" not in asked.body}
    for record in completions(run):
        body = sent[record.messages[0].content]
        assert record.sampling == {name: body[name] for name in body if name not in ("model", "messages")}
    assert sorted("seed" in record.sampling for record in completions(run)) == [False] * 7 + [True]


def test_a_failure_has_the_sampling_that_was_sent_with_it(run: RunDir) -> None:
    def script(asked: Asked) -> Behaviour:
        if asked.text == "say 0":
            return raw(json.dumps({"choices": []}).encode())
        return error(400, "Unrecognized request argument supplied: seed") if "seed" in asked.body else answer()

    with misbehaving(script) as server:
        generate(recipe_for(server, 8, generate={"concurrency": 1, "max_attempts": 1}), run, quiet=True)
    (failure,) = failures(run)
    (body,) = (asked.body for asked in server.asked if asked.text == "say 0")
    assert ("seed" in failure.sampling) == ("seed" in body)


@pytest.mark.parametrize("share", [False, True])
def test_thoughts_about_one_prompt_that_is_too_hard_end_no_run(run: RunDir, share: bool) -> None:
    """Its samples, alone or as the choices of one reply, are no sign that the others need more room, too."""

    def script(asked: Asked) -> Behaviour:
        return cut_thought() if asked.text == server.asked[0].text else answer()

    prompts = {"count": 2, "samples": 25, "template": "say {n}", "slots": {"n": ["0", "1"]}}
    with misbehaving(script) as server:
        recipe = recipe_for(server, prompts=prompts, generate={"concurrency": 1, "share_prompt": share})
        summary = generate(recipe, run, quiet=True)
    assert (summary.completed, summary.failed) == (25, 25)
