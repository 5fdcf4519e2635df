"""A second model plays the user: what it is asked, what comes of it, and what a stop in the middle costs."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from generate.__main__ import main
from generate.context import Run
from generate.run import agenerate, generate, pending
from generate.summary import save
from generate.turns import OPENING, SYSTEM, as_the_user_sees, passes
from pipeline.errors import BudgetReached, DataError, DistillError, RecipeError, UsageError
from pipeline.lineage import read_lineage
from pipeline.prompts_config import PromptsConfig
from pipeline.recipe import Recipe
from pipeline.records import Message, Prompt, read_jsonl
from pipeline.rundir import RunDir
from tests.generate.test_cli import ROOT, until_answered
from tests.servers.misbehaving_server import (
    Asked,
    Behaviour,
    MisbehavingServer,
    answer,
    completions,
    cut_thought,
    error,
    misbehaving,
    recipe_for,
)


def reply_of(side: str) -> Any:
    """Says how many messages it was shown, as that side."""
    return lambda asked: answer(f"{side} {len(asked.body['messages'])} of {asked.body['messages'][-1]['content']}")


def talk(
    teacher: MisbehavingServer, user: MisbehavingServer, count: int = 3, turns: int = 2, **sections: Any
) -> Recipe:
    recipe = recipe_for(teacher, count, **sections)
    config = {"turns": turns, "model": "player", "base_url": user.url, "system": "You are in a hurry.", "max_tokens": 9}
    prompts = recipe.prompts.model_dump() | {"user": config}
    return Recipe.model_validate(recipe.model_dump() | {"prompts": prompts})


def test_a_user_whose_thoughts_leave_no_room_ends_the_run_before_all_are_paid(run: RunDir) -> None:
    with (
        misbehaving(reply_of("teacher")) as teacher,
        misbehaving(lambda asked: cut_thought()) as user,
        pytest.raises(DistillError, match=r"thought_cut_off .* raise prompts\.user\.max_tokens"),
    ):
        generate(talk(teacher, user, 100), run, quiet=True)
    assert len(user.asked) < 50 < len(teacher.asked)


def test_a_user_who_thinks_too_long_about_most_second_messages_ends_nothing(run: RunDir) -> None:
    def player(asked: Asked) -> Behaviour:
        return reply_of("user")(asked) if len(user.asked) <= 40 or len(user.asked) == 80 else cut_thought()

    with misbehaving(reply_of("teacher")) as teacher, misbehaving(player) as user:
        summary = generate(talk(teacher, user, 40), run, quiet=True)
    assert (summary.answered, len(user.asked)) == (1, 80)


def test_the_last_record_holds_the_whole_conversation(run: RunDir) -> None:
    with misbehaving(reply_of("teacher")) as teacher, misbehaving(reply_of("user")) as user:
        summary = generate(talk(teacher, user), run, quiet=True)
    (row,) = [row for row in completions(run) if row.messages[0].content == "say 1"]
    first, second = "teacher 1 of say 1", "user 4 of teacher 1 of say 1"
    third, fourth = f"teacher 3 of {second}", f"user 6 of teacher 3 of {second}"
    assert [(turn.role, turn.content) for turn in row.messages] == [
        *(("user", "say 1"), ("assistant", first), ("user", second), ("assistant", third), ("user", fourth))
    ]
    assert row.text == f"teacher 5 of {fourth}"
    assert (summary.requests, summary.completed, summary.failed) == (3, 3, 0)
    assert (summary.prompt_tokens, len(teacher.asked), len(user.asked)) == (7 * 15, 9, 6)
    assert len({row.id for row in completions(run)}) == 3 and row.prompt_id in {
        p.id for p in read_jsonl(run.prompts, Prompt)
    }
    asked = user.asked[0].body
    assert (asked["model"], asked["max_tokens"]) == ("player", 9)
    assert [turn["role"] for turn in asked["messages"]] == ["system", "user", "assistant", "user"]
    assert [turn["content"] for turn in asked["messages"][:2]] == ["You are in a hurry.", OPENING]


def test_repeats_are_told_of_the_prompts_and_not_again_of_what_comes_of_them(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = {"count": 3, "template": "{a}", "slots": {"a": ["x", "y"]}}
    with misbehaving(reply_of("teacher")) as teacher, misbehaving(reply_of("user")) as user:
        generate(talk(teacher, user, prompts=prompts), run, quiet=True)
    said = " ".join(capsys.readouterr().err.split())
    assert "3 prompts asked for, but only 2 differ" in said and said.count("differ") == 1


def test_roles_are_swapped_and_what_the_user_cannot_see_is_left_out() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    seen = as_the_user_sees(
        [
            Message("system", "Be brief."),
            Message("user", "What time is it?"),
            Message("assistant", "", [call]),
            Message("tool", "12:00", tool_call_id="a"),
            Message("assistant", "It is noon."),
            Message("assistant", "Lunch?"),
        ],
        SYSTEM,
    )
    assert seen == [
        Message("system", SYSTEM),
        Message("user", OPENING),
        Message("assistant", "What time is it?"),
        Message("user", "It is noon.\n\nLunch?"),
    ]


def test_what_a_row_brings_is_kept_and_its_part_is_that_of_the_first_message(run: RunDir, tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "now"}}
    path = tmp_path / "rows.jsonl"
    rows = [{"id": f"r{n}", "prompt": f"say {n}", "reference": n, "topic": "x", "tools": [tool]} for n in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = {"file": path, "system": "All are told."}
    with misbehaving(reply_of("teacher")) as teacher, misbehaving(reply_of("user")) as user:
        recipe = talk(teacher, user, 30, 1, prompts=plain)
        told = recipe.teacher.model_copy(update={"system": "Only you."})
        recipe = recipe.model_copy(update={"teacher": told})
        generate(recipe, run, quiet=True)
        generate(recipe_for(teacher, 30, prompts=plain), RunDir(tmp_path / "plain"), quiet=True)
        path.write_text(path.read_text().replace('"x"', '"newer"'))
        assert generate(recipe, run, quiet=True).answered == 0
    assert {prompt.columns["topic"] for prompt in read_jsonl(run.prompts, Prompt)} == {"newer"}
    answered = completions(run)
    found = {row.prompt_id: (row.reference, row.columns, row.tools, row.messages[0].content) for row in answered}
    assert found == {f"r{n}": (n, {"topic": "x"}, [tool], "All are told.") for n in range(30)}
    assert {asked.body["messages"][0]["content"] for asked in teacher.asked[:60]} == {"Only you.\n\nAll are told."}
    assert not any("tools" in asked.body or "Only you." in str(asked.body) for asked in user.asked)
    parts = [{p.id: p.part for p in read_jsonl(one.prompts, Prompt)} for one in (run, RunDir(tmp_path / "plain"))]
    assert parts[0] == parts[1] and len(set(parts[0].values())) > 1
    assert {row.prompt_id: recipe.prompts.part_of(row) for row in answered} == parts[0]


def test_conversations_of_one_group_are_of_one_part(run: RunDir, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"say {n}", "of": n // 3}) + "\n" for n in range(30)))
    grouped = {"file": path, "group": "of", "test": 0.4}
    with misbehaving(reply_of("teacher")) as teacher, misbehaving(reply_of("user")) as user:
        recipe = talk(teacher, user, 30, 1, prompts=grouped)
        generate(recipe, run, quiet=True)
    prompts = list(read_jsonl(run.prompts, Prompt))
    assert {(prompt.id, prompt.part) for prompt in prompts} == {
        (prompt.id, recipe.prompts.part_of(prompt)) for prompt in prompts
    }
    assert len({(prompt.columns["of"], prompt.part) for prompt in prompts}) == 10


def test_each_sample_is_a_conversation_of_its_own(run: RunDir) -> None:
    def varied(asked: Asked) -> Behaviour:
        return answer(f"answer {asked.body['seed']}")

    with misbehaving(varied) as teacher, misbehaving(reply_of("user")) as user:
        recipe = talk(teacher, user, 2, 1)
        recipe = recipe.model_copy(update={"prompts": recipe.prompts.model_copy(update={"samples": 3})})
        assert generate(recipe, run, quiet=True).completed == 6
    assert len({row.prompt_id for row in completions(run)}) == 6


def test_two_conversations_of_one_name_are_refused_before_anything_is_paid(run: RunDir, tmp_path: Path) -> None:
    rows = [{"id": id_, "prompt": f"about {id_}"} for id_ in ("1", "1.1")]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with misbehaving(reply_of("teacher")) as teacher, misbehaving(reply_of("user")) as user:
        recipe = talk(teacher, user, 2, 1)

        def sampled(samples: int) -> Recipe:
            prompts = PromptsConfig(file=file, samples=samples, user=recipe.prompts.user)
            return recipe.model_copy(update={"prompts": prompts})

        with pytest.raises(DataError, match=r"the prompts '1' and '1\.1' would share the conversation '1\.1'"):
            generate(sampled(2), run, quiet=True)
        assert teacher.asked == []
        assert generate(sampled(1), run, quiet=True).completed == 2


def test_a_budget_is_for_all_passes_and_nothing_is_asked_twice(run: RunDir) -> None:
    """The run is stopped three times, each time in another pass."""
    with misbehaving(reply_of("teacher")) as teacher, misbehaving(reply_of("user")) as user:
        whole = talk(teacher, user, 6, 1, sampling={"max_tokens": 100}, generate={"concurrency": 1})
        for tokens in (300, 420, 600):
            with pytest.raises(BudgetReached):
                generate(Recipe.model_validate(whole.model_dump() | {"budget": {"tokens": tokens}}), run, quiet=True)
            spent = sum(
                read_lineage(folder).get("generate", {}).get("spent", {"tokens": 0})["tokens"]
                for folder in (run, RunDir(run.path / "turns/1-teacher"), RunDir(run.path / "turns/1-user"))
            )
            assert 0 < spent <= tokens and pending(whole, run) > 0
        assert generate(whole, run, quiet=True).completed == 6
        assert pending(whole, run) == 0
        asked = [json.dumps(asked.body) for asked in (*teacher.asked, *user.asked)]
        assert generate(whole, run, quiet=True).resumed == 6
    assert len(asked) == len(set(asked)) == 18 == len(teacher.asked) + len(user.asked)
    user_section = read_lineage(run)["generate"]["user"]
    assert user_section == {
        "model": "player",
        "turns": 1,
        "spent_before": {"tokens": 12 * 12, "usd": None},
    }  # no price is known


def test_a_pass_that_was_killed_before_its_lineage_counts_in_the_budget(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(call: Run) -> None:
        if call.dir.path.name == "1-user":
            raise KeyboardInterrupt
        save(call)

    def limited(count: int) -> Recipe:
        sections = {"sampling": {"max_tokens": 20}, "generate": {"concurrency": 1}, "budget": {"tokens": 2000}}
        return talk(teacher, user, count, 1, **sections)

    with misbehaving(reply_of("teacher")) as teacher, misbehaving(reply_of("user")) as user:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("generate.run.save", killed)
            generate(limited(40), run, quiet=True)
        assert (len(teacher.asked), len(user.asked)) == (40, 40)
        with pytest.raises(BudgetReached):
            generate(limited(200), run, quiet=True)
    assert 1000 < 12 * (len(teacher.asked) + len(user.asked)) <= 2000


def test_after_a_change_of_the_recipe_only_the_new_answers_go_on(run: RunDir) -> None:
    def warm(side: str) -> Any:
        return lambda asked: answer(f"{side} at {asked.body['temperature']}")

    def questions() -> list[str]:
        return [message.content for prompt in read_jsonl(run.prompts, Prompt) for message in prompt.messages[1:]]

    with misbehaving(warm("teacher")) as teacher, misbehaving(warm("user")) as user:
        for temperature, asked in ((0.5, 6), (0.1, 12), (0.1, 12), (0.5, 12)):
            recipe = talk(teacher, user, 2, 1, sampling={"temperature": temperature})
            summary = generate(recipe, run, quiet=True)
            assert (summary.requests, summary.completed, pending(recipe, run)) == (2, 2, 0)
            assert len(teacher.asked) + len(user.asked) == asked
            assert questions() == [f"teacher at {temperature}", f"user at {temperature}"] * 2


@pytest.mark.parametrize(
    "changed",
    [
        [("0", "figs"), ("1", "apples"), ("2", "pears")],
        [("0", "pears"), ("1", "apples")],
        [("b", "apples"), ("a", "pears")],
    ],
    ids=["a row is inserted", "two rows change ids", "the ids are others"],
)
def test_conversations_go_on_under_the_ids_that_their_questions_have_now(
    run: RunDir, tmp_path: Path, changed: list[tuple[str, str]]
) -> None:
    def rows(*named: tuple[str, str]) -> Recipe:
        lines = (json.dumps({"id": id_, "prompt": fruit, "reference": f"{fruit}!"}) + "\n" for id_, fruit in named)
        (tmp_path / "rows.jsonl").write_text("".join(lines))
        return talk(teacher, user, 2, 2, prompts={"file": tmp_path / "rows.jsonl"})

    with misbehaving(reply_of("teacher")) as teacher, misbehaving(reply_of("user")) as user:
        generate(rows(("0", "apples"), ("1", "pears")), run, quiet=True)
        before = len(teacher.asked) + len(user.asked)
        assert generate(rows(*changed), run, quiet=True).completed == len(changed)
        assert len(teacher.asked) + len(user.asked) - before == 5 * (len(changed) - 2)
    prompts = list(read_jsonl(run.prompts, Prompt))
    assert sorted((prompt.id, prompt.messages[0].content) for prompt in prompts) == sorted(changed)
    assert all(prompt.reference == f"{prompt.messages[0].content}!" for prompt in prompts)


@pytest.mark.timeout(120)
def test_killed_in_each_pass_no_answer_is_lost_or_asked_again(run: RunDir) -> None:
    def slow(asked: Asked) -> Behaviour:
        return answer(f"on {asked.text}", delay_s=0.03)

    with misbehaving(slow) as teacher, misbehaving(slow) as user:
        recipe = talk(teacher, user, 20, 1, generate={"concurrency": 2})
        path = run.path.with_name("recipe.yaml")
        path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude={"student"})))
        command = [sys.executable, "-m", "generate", str(path), "--run", str(run.path), "--quiet"]
        folders, before = [*(RunDir(run.path / "turns" / name) for name in ("1-teacher", "1-user")), run], []
        for folder in folders:
            with subprocess.Popen(command, cwd=ROOT) as process:
                until_answered(folder, 5)
                process.kill()
            before.append(folder.completions.read_bytes().rpartition(b"\n")[0])
        assert subprocess.run(command, cwd=ROOT, check=True).returncode == 0
    for folder, kept in zip(folders, before, strict=True):
        assert folder.completions.read_bytes().startswith(kept)
        assert len({row.id for row in completions(folder)}) == len(completions(folder)) == 20
    assert len(teacher.asked) + len(user.asked) <= 60 + len(folders) * 2  # what was in flight is asked again


def test_a_conversation_ends_where_it_cannot_go_on(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    def script(asked: Asked) -> Behaviour:
        if asked.text == "say 0":
            return answer("cut", finish_reason="length")
        return error(400) if asked.text == "say 1" else answer()

    def player(asked: Asked) -> Behaviour:
        return error(400) if "say 2" in asked.text else answer("and then?")

    with misbehaving(script) as teacher, misbehaving(player) as user:
        recipe = talk(teacher, user, 5, 1)
        summary = generate(recipe, run, quiet=True)
        assert "player" in run.recipe.read_text() and "questions.jsonl" not in run.recipe.read_text()
    assert (summary.requests, summary.completed, summary.failed, summary.errors) == (4, 2, 2, {"bad_request": 2})
    assert "1 conversations end here: cut off, or with a tool call" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "model", "key", "team"),
    [
        ({}, "stub", "router", "t"),
        ({"model": "small"}, "small", "router", "t"),
        ({"model": "small", "base_url": "the teacher's"}, "small", "router", "t"),
        ({"model": "small", "api_key_env": "OWN_KEY"}, "small", "own", "t"),
        ({"base_url": "another"}, "stub", "openai", None),
        ({"base_url": "another", "api_key_env": "OWN_KEY"}, "stub", "own", None),
    ],
)
def test_the_teachers_key_and_headers_go_to_the_teachers_url_and_nowhere_else(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, config: dict[str, str], model: str, key: str, team: str | None
) -> None:
    for name, value in (("ROUTER_KEY", "router"), ("OPENAI_API_KEY", "openai"), ("OWN_KEY", "own")):
        monkeypatch.setenv(name, value)
    with misbehaving() as teacher, misbehaving() as another:
        urls = {"the teacher's": teacher.url, "another": another.url}
        user = {name: urls.get(value, value) for name, value in config.items()}
        access = {"api_key_env": "ROUTER_KEY", "headers": {"X-Team": "t"}, "price": {"input": 1, "output": 1}}
        recipe = recipe_for(teacher, 1, teacher={"model": "stub", "base_url": teacher.url, **access})
        prompts = recipe.prompts.model_dump() | {"user": user}
        summary = generate(Recipe.model_validate(recipe.model_dump() | {"prompts": prompts}), run, quiet=True)
    first, *others = ((one.headers["Authorization"], one.headers.get("X-Team")) for one in teacher.asked)
    assert {first, others[-1]} == {("Bearer router", "t")}
    (asked,) = another.asked or teacher.asked[1:2]
    assert (asked.body["model"], asked.headers["Authorization"]) == (model, f"Bearer {key}")
    assert asked.headers.get("X-Team") == team
    assert (summary.cost_usd is not None) == (config == {})  # the teacher's price is not that of another


def test_no_conversation_that_goes_on_is_an_error(run: RunDir) -> None:
    with (
        misbehaving(lambda asked: answer("cut", finish_reason="length")) as teacher,
        misbehaving() as user,
        pytest.raises(DataError, match=r"1-user/questions\.jsonl: no conversation goes on"),
    ):
        generate(talk(teacher, user), run, quiet=True)
    assert not user.asked


def test_a_user_that_refuses_the_key_is_named_and_the_answers_are_kept(run: RunDir) -> None:
    with (
        misbehaving() as teacher,
        misbehaving(lambda asked: error(401)) as user,
        pytest.raises(DistillError, match=f"{user.url} answers 401"),
    ):
        generate(talk(teacher, user), run, quiet=True)
    assert (len(teacher.asked), len(completions(RunDir(run.path / "turns/1-teacher")))) == (3, 3)


def test_a_wrong_url_of_the_user_is_told_before_the_teacher_is_asked(run: RunDir) -> None:
    with misbehaving() as teacher:
        user = MisbehavingServer("http://127.0.0.1:1/v1/chat/completions")
        with pytest.raises(RecipeError, match=r"^prompts\.user\.base_url .* is too long"):
            generate(talk(teacher, user), run, quiet=True)
    assert not teacher.asked


def test_batch_files_are_refused_and_a_dry_run_shows_the_first_pass(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: t\nteacher: {model: m, base_url: 'http://127.0.0.1:1/v1'}\n"
        "prompts: {template: 'say {n}', slots: {n: [a, b]}, count: 2, user: {turns: 2}}\n"
    )
    monkeypatch.setattr("sys.argv", ["generate", str(recipe), "--run", str(run.path), "--dry-run"])
    main()
    said = capsys.readouterr().out
    assert (
        "2 requests" in said
        and "turns of prompts.user depend on it, and those to come cost more" in said
        and not run.path.exists()
    )
    monkeypatch.setattr("sys.argv", ["generate", str(recipe), "--run", str(run.path), "--write-batches"])
    with pytest.raises(UsageError, match=r"prompts\.user has several"):
        main()


async def test_in_a_running_event_loop(run: RunDir) -> None:
    with misbehaving(reply_of("teacher")) as teacher, misbehaving(reply_of("user")) as user:
        assert (await agenerate(talk(teacher, user, 2, 1), run, quiet=True)).completed == 2
    assert completions(run)[0].text.startswith("teacher 3 of user 4 of teacher 1 of say")


def test_without_a_user_there_is_one_pass(run: RunDir) -> None:
    recipe = recipe_for("http://127.0.0.1:1/v1", 2)
    assert list(passes(recipe, run)) == [(recipe, run)]
    assert (
        Counter(recipe.prompts.part_of(Prompt(id="", messages=[Message("user", str(n))])) for n in range(50))["train"]
        > 30
    )


@pytest.mark.parametrize("later", [1, None])
def test_turns_that_were_taken_back_are_paid_all_the_same(later: int | None, run: RunDir) -> None:
    with misbehaving(reply_of("teacher")) as teacher, misbehaving(reply_of("user")) as user:
        given = {"sampling": {"max_tokens": 10}, "budget": {"tokens": 1500}, "generate": {"concurrency": 1}}
        whole = talk(teacher, user, 20, 3, **given)
        with pytest.raises(BudgetReached):
            generate(whole, run, quiet=True)
        prompts = whole.prompts.model_dump() | {"samples": 8}
        prompts["user"] = prompts["user"] | {"turns": later} if later else None
        with pytest.raises(BudgetReached):
            generate(Recipe.model_validate(whole.model_dump() | {"prompts": prompts}), run, quiet=True)
        assert 0 < 12 * (len(teacher.asked) + len(user.asked)) <= 1500


def test_the_end_of_the_budget_and_a_dry_run_name_the_budget_of_the_recipe(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with misbehaving(reply_of("teacher")) as teacher, misbehaving(reply_of("user")) as user:
        given = {"sampling": {"max_tokens": 10}, "generate": {"concurrency": 1}}
        for tokens in (700, 20):  # the second budget is spent before the call
            recipe = talk(teacher, user, 20, 1, budget={"tokens": tokens}, **given)
            with pytest.raises(BudgetReached) as stopped:
                generate(recipe, run, quiet=True)
            spent = 12 * (len(teacher.asked) + len(user.asked))
            assert len(user.asked) > 0 and f"{spent:,} of budget.tokens {tokens} spent" in str(stopped.value)
        price = {"input": 1, "output": 1}
        dry = recipe.model_dump(mode="json", exclude={"student"}) | {"budget": {"tokens": 10**6}}
        dry["teacher"]["price"] = dry["prompts"]["user"]["price"] = price
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(dry))
    monkeypatch.setattr("sys.argv", ["generate", str(path), "--run", str(run.path), "--dry-run"])
    main()
    said = capsys.readouterr().out
    assert f"{spent:,} tokens" in said and "budget.tokens 1,000,000 is enough for all" in said


def test_what_was_spent_in_all_does_not_fall_with_fewer_turns(run: RunDir) -> None:
    with misbehaving(reply_of("teacher")) as teacher:
        about = {"model": "stub", "base_url": teacher.url, "price": {"input": 10**6, "output": 10**6}}
        for turns in (2, 1, None):
            recipe = recipe_for(teacher, 3, teacher=about)
            prompts = recipe.prompts.model_dump() | {"user": turns and {"turns": turns}}
            recipe = Recipe.model_validate(recipe.model_dump() | {"prompts": prompts})
            assert generate(recipe, run, quiet=True).cost_usd == 12 * len(teacher.asked)
            if turns:
                generated = read_lineage(run)["generate"]
                spent = generated["spent"]["usd"] + generated["user"]["spent_before"]["usd"]
                assert spent == 12 * len(teacher.asked)


def test_a_user_without_a_price_is_told_before_anything_is_paid(run: RunDir) -> None:
    with misbehaving(reply_of("teacher")) as teacher, misbehaving(reply_of("user")) as user:
        about = {"model": "stub", "base_url": teacher.url, "price": {"input": 1, "output": 1}}
        recipe = Recipe.model_validate(
            talk(teacher, user, 3, 1).model_dump() | {"budget": {"usd": 5}, "teacher": about}
        )
        with pytest.raises(RecipeError, match=r"the price of player is not known: set prompts\.user\.price: \{input"):
            generate(recipe, run, quiet=True)
        assert teacher.asked == []
