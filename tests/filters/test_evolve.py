"""Prompts that write prompts, against a real local server: what is asked, what is kept, what a second call asks."""

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import filters.diversity
from filters.diversity import Distinct, diversity
from filters.evolve import HARDER, NEW, WAYS, describe, evolve, question, read_prompt
from filters.minhash import jaccard
from generate.prompts import iter_prompts
from pipeline.errors import BudgetReached, DistillError, UsageError
from pipeline.prompts_config import PromptsConfig
from pipeline.recipe import Recipe
from pipeline.records import Completion, Prompt, read_jsonl
from pipeline.rundir import RunDir
from pipeline.teacher_config import TeacherConfig
from tests.completion_fields import completion_fields
from tests.servers.misbehaving_server import (
    Asked,
    Behaviour,
    MisbehavingServer,
    answer,
    cut_thought,
    error,
    misbehaving,
    recipe_for,
)

SEEDS = 12


def words(key: str) -> str:
    """A text of its own for each key."""
    rng = random.Random(key)
    return "Ask for " + " ".join("".join(rng.choices("abcdefghij", k=6)) for _ in range(12))


def rewriting(asked: Asked) -> Behaviour:
    return answer(words(asked.text))


def recipe_of(server: MisbehavingServer, folder: Path, **sections: object) -> Recipe:
    file = folder / "seeds.jsonl"
    rows = [{"prompt": words(str(n)), "reference": n, "id": f"s{n}", "topic": "t"} for n in range(SEEDS)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return recipe_for(server, prompts={"file": file, "system": "Be kind."}, **sections)


def made(run: RunDir) -> list[Prompt]:
    return list(read_jsonl(run.path / "evolved.jsonl", Prompt))


def test_thoughts_that_leave_no_room_for_a_prompt_end_the_first_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SEEDS", 100)
    words = r"thought_cut_off .* raise sampling\.max_tokens"
    with misbehaving(lambda asked: cut_thought()) as server, pytest.raises(DistillError, match=words):
        evolve(recipe_of(server, tmp_path), RunDir(tmp_path / "run"), rounds=2, quiet=True)
    assert len(server.asked) < 50


def test_each_round_asks_about_every_prompt_and_the_file_is_one_of_prompts(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with misbehaving(rewriting) as server:
        recipe = recipe_of(server, tmp_path)
        report = evolve(recipe, run, rounds=2, quiet=True)
        asked, first = len(server.asked), (run.path / "evolved.jsonl").read_bytes()
        evolve(recipe, run, rounds=2, quiet=True)
        assert len(server.asked) == asked == len(server.attempts) == 3 * SEEDS  # nothing is bought twice
    assert (run.path / "evolved.jsonl").read_bytes() == first
    assert [(one.asked, one.new) for one in report.rounds] == [(SEEDS, SEEDS), (2 * SEEDS, 2 * SEEDS)]
    following = PromptsConfig(file=run.path / "evolved.jsonl", system="Be kind.", group="family", test=0.4)
    read = list(iter_prompts(recipe.model_copy(update={"prompts": following})))
    assert read == made(run)
    assert len({prompt.id for prompt in read}) == 4 * SEEDS
    assert (read[3].reference, read[3].columns) == (3, {"topic": "t", "family": "s3"})
    child = read[SEEDS]
    assert child.reference is None  # a reference is of its own prompt
    assert child.columns["evolved"].keys() == {"from", "way", "round"}
    families = {(prompt.columns["family"], following.part_of(prompt)) for prompt in read}
    assert len(families) == SEEDS and {part for _, part in families} > {"train"}  # a family is in one part
    assert [message.role for message in child.messages] == ["system", "user"]
    assert "48 prompts, 12 of them the recipe's own" in "\n".join(describe(report, Path("x")))


def test_fields_that_go_with_tools_or_shape_an_answer_are_not_asked_with(tmp_path: Path) -> None:
    """OpenAI and vLLM refuse `tool_choice` in a request that has no tools."""

    def script(asked: Asked) -> Behaviour:
        return error(400) if {*asked.body} & {"tool_choice", "structured_outputs"} else rewriting(asked)

    extra = {"tool_choice": "required", "structured_outputs": {"choice": ["yes", "no"]}, "top_k": 7}
    with misbehaving(script) as server:
        recipe = recipe_of(server, tmp_path, sampling={"extra": extra})
        report = evolve(recipe, RunDir(tmp_path / "run"), rounds=1, quiet=True)
    assert (report.rounds[0].failed, report.rounds[0].new) == (0, SEEDS)
    assert {asked.body["top_k"] for asked in server.asked} == {7}


def test_a_setting_that_is_changed_back_brings_its_own_prompts_back(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with misbehaving(lambda asked: answer(words(f"{asked.body['temperature']} {asked.text}"))) as server:
        found = []
        for temperature in (0.1, 0.9, 0.1):
            evolve(recipe_of(server, tmp_path, sampling={"temperature": temperature}), run, rounds=1, quiet=True)
            found.append(made(run))
        assert len(server.asked) == 2 * SEEDS
    assert found[0] == found[2] != found[1]


def test_one_question_in_two_rows_is_of_one_family(tmp_path: Path) -> None:
    """Else the file would be refused where it is asked: one question in two groups."""
    file, run = tmp_path / "twins.jsonl", RunDir(tmp_path / "run")
    rows = [{"prompt": "What is 2+2?", "id": "a"}, {"prompt": "what  is 2+2?", "id": "b"}, {"prompt": words("c")}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with misbehaving(rewriting) as server:
        recipe = recipe_for(server, prompts={"file": file})
        evolve(recipe, run, rounds=1, quiet=True)
    following = PromptsConfig(file=run.path / "evolved.jsonl", group="family")
    read = list(iter_prompts(recipe.model_copy(update={"prompts": following})))
    assert [prompt.columns["family"] for prompt in read[:2]] == ["a", "a"] and len(read) > 3


def test_the_recipes_own_groups_are_the_families(tmp_path: Path) -> None:
    """And prompts that were evolved already stay in theirs."""
    run = RunDir(tmp_path / "run")
    with misbehaving(rewriting) as server:
        recipe = recipe_of(server, tmp_path)
        grouped = recipe.prompts.model_copy(update={"group": "topic"})
        evolve(recipe.model_copy(update={"prompts": grouped}), run, rounds=1, quiet=True)
        assert {prompt.columns["topic"] for prompt in made(run)} == {"t"}
        assert not any("family" in prompt.columns for prompt in made(run))
        file = tmp_path / "again.jsonl"
        file.write_text(json.dumps({"prompt": words("more"), "family": "s1"}))
        again = recipe.model_copy(update={"prompts": PromptsConfig(file=file)})
        evolve(again, RunDir(tmp_path / "again"), rounds=1, quiet=True)
    assert [prompt.columns["family"] for prompt in made(RunDir(tmp_path / "again"))] == ["s1", "s1"]


def test_a_conversation_is_rewritten_at_its_last_request_and_not_at_a_result(tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    talk = [("user", "Hello."), ("assistant", "Hi! What is it?"), ("user", words("asked"))]
    rows = [
        {"messages": [{"role": role, "content": content} for role, content in talk]},
        {
            "messages": [
                {"role": "user", "content": "Call f."},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "7", "tool_call_id": "1"},
            ]
        },
    ]
    file, run = tmp_path / "seeds.jsonl", RunDir(tmp_path / "run")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with misbehaving(rewriting) as server:
        report = evolve(recipe_for(server, prompts={"file": file}), run, rounds=1, quiet=True)
        assert "user: Hello.\nassistant: Hi! What is it?" in server.asked[0].text
    assert (report.prompts, report.rounds[0].asked) == (3, 1)
    assert [turn.content for turn in made(run)[-1].messages[:-1]] == ["Hello.", "Hi! What is it?"]


def test_the_pool_ends_at_its_size(tmp_path: Path) -> None:
    with misbehaving(rewriting) as server:
        report = evolve(recipe_of(server, tmp_path), RunDir(tmp_path / "run"), rounds=9, most=SEEDS + 15, quiet=True)
        assert (report.prompts, len(server.asked)) == (SEEDS + 15, 15)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rounds": 0}, "--rounds must be at least 1, got 0"),
        ({"most": SEEDS}, f"--most counts the recipe's own {SEEDS} prompts, too, and must be over that; got {SEEDS}"),
    ],
)
def test_limits_that_leave_nothing_to_ask_are_refused(tmp_path: Path, wrong: dict[str, int], message: str) -> None:
    run = RunDir(tmp_path / "run")
    with misbehaving(rewriting) as server:
        with pytest.raises(UsageError, match=message):
            evolve(recipe_of(server, tmp_path), run, **wrong, quiet=True)
        assert not server.asked
    assert not run.path.exists()


def test_prompts_that_end_with_a_result_are_all_there_is(tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [
        {"role": "user", "content": "Call f."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "7", "tool_call_id": "1"},
    ]
    file, run = tmp_path / "seeds.jsonl", RunDir(tmp_path / "run")
    file.write_text(json.dumps({"messages": turns}))
    with misbehaving(rewriting) as server:
        report = evolve(recipe_for(server, prompts={"file": file}), run, quiet=True)
    assert (report.prompts, report.rounds, len(made(run))) == (1, [], 1)


def test_what_is_no_prompt_or_like_another_is_left_out(tmp_path: Path) -> None:
    texts = iter(["", "Sorry, no.", words("3"), f'"{words("3")}!"', "Here is the rewritten prompt.", words("own")])
    with misbehaving(lambda asked: answer(next(texts, words("own")))) as server:
        recipe = recipe_of(server, tmp_path, generate={"concurrency": 1})
        run = RunDir(tmp_path / "run")
        report = evolve(recipe, run, rounds=1, quiet=True)
    (only,) = report.rounds
    assert only.left_out == {"refusal": 1, "near_duplicate": 8, "talks_of_the_task": 1}
    assert (only.asked, only.failed, only.new) == (SEEDS, 1, 1)  # an empty answer fails in `generate`
    assert made(run)[-1].messages[-1].content == words("own")


@pytest.mark.parametrize(
    ("said", "reason", "prompt", "wrong"),
    [
        ("Name three birds.", "stop", "Name three birds.", None),
        ("<request>\nName three birds.\n</request>", "stop", "Name three birds.", None),
        ("Sure, here it is:\n<request>Name three birds.</request>\nBye.", "stop", "Name three birds.", None),
        ("<request>Name three birds.", "stop", "Name three birds.", None),
        ("Sure! Name three birds.", "stop", "Sure! Name three birds.", "talks_of_the_task"),
        ("#Rewritten Prompt#: Name three birds.", "stop", "Name three birds.", None),
        ('"Name three birds."', "stop", "Name three birds.", None),
        ("Name three", "length", "Name three", "cut"),
        ("<request></request>", "stop", "", "empty"),
        ("The given prompt is good.", "stop", "The given prompt is good.", "talks_of_the_task"),
        ("I'm sorry, I cannot.", "stop", "I'm sorry, I cannot.", "refusal"),
        ("Why do people say sorry?", "stop", "Why do people say sorry?", None),
    ],
)
def test_a_reply_is_a_prompt_or_why_not(said: str, reason: str, prompt: str, wrong: str | None) -> None:
    fields = {**completion_fields("a", said), "finish_reason": reason}
    assert read_prompt(Completion(**fields)) == (prompt, wrong)


def test_the_question_holds_what_the_teacher_is_told_and_depends_on_nothing_else(tmp_path: Path) -> None:
    with misbehaving() as server:
        recipe = recipe_of(server, tmp_path)
    recipe = recipe.model_copy(update={"teacher": TeacherConfig(model="m", system="The tables are {a} and b.")})
    seeds = list(iter_prompts(recipe))
    ways = Counter[str]()
    for number in range(1, 11):
        for seed in seeds:
            one = question(seed, seeds, number, recipe)
            assert one == question(seed, seeds, number, recipe)
            text = one.asked.messages[0].content
            assert "The tables are {a} and b.\n\nBe kind." in text
            assert seed.messages[-1].content in text
            assert one.way == NEW or HARDER[one.way] in text
            ways[one.way] += 1
    assert set(ways) == set(WAYS)


def test_the_rounds_keep_to_one_budget_and_what_there_is_is_written(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with misbehaving(rewriting) as server:  # 12 tokens each by its count, of which a request reserves some 1,300
        recipe = recipe_of(server, tmp_path, budget={"tokens": 1550}, generate={"concurrency": 1})
        with pytest.raises(BudgetReached, match=r"prompts are in .*evolved.jsonl"):
            evolve(recipe, run, rounds=5, quiet=True)
        asked = len(server.asked)
        assert asked * 12 <= 1550
        assert len(made(run)) == SEEDS + asked
        assert SEEDS < asked < 3 * SEEDS  # it ends in the second round
        with pytest.raises(BudgetReached):
            evolve(recipe, run, rounds=5, quiet=True)
        assert len(server.asked) == asked
        more = recipe.model_copy(update={"budget": recipe.budget.model_copy(update={"tokens": 10**6})})
        assert evolve(more, run, rounds=2, quiet=True).prompts == 4 * SEEDS
        assert len(server.asked) == 3 * SEEDS


def test_killed_at_any_moment_no_prompt_is_bought_twice(tmp_path: Path) -> None:
    run, at_once, most = RunDir(tmp_path / "run"), 4, 0

    def script(asked: Asked) -> Behaviour:
        return answer(words(asked.text), delay_s=0.05 if len(server.asked) <= most else 1000)

    with misbehaving(script) as server:
        recipe = recipe_of(server, tmp_path, generate={"concurrency": at_once})
        file = tmp_path / "recipe.yaml"
        file.write_text(recipe.model_dump_json(exclude_unset=True))  # JSON is YAML, too
        command = [sys.executable, "-m", "filters.evolve", str(file), "--run", str(run.path), "--quiet"]
        kills = 0
        for wanted in (5, SEEDS + 6):
            most = wanted  # what is asked beyond is not answered: it cannot end before it is killed
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while len(server.asked) < wanted and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
        most = 1000
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert kills == 2
    assert "round 2: 24 asked, 24 new" in done.stdout
    for number, count in (("1", SEEDS), ("2", 2 * SEEDS)):
        journal = run.path / "evolve" / number / "completions.jsonl"
        answered = Counter(one.prompt_id for one in read_jsonl(journal, Completion))
        assert (len(answered), max(answered.values())) == (count, 1)
    assert len(server.asked) <= 3 * SEEDS + kills * at_once  # those in flight at a kill


def test_thoughts_that_are_too_long_in_the_second_round_alone_end_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SEEDS", 15)
    with misbehaving(lambda asked: rewriting(asked) if len(server.asked) <= 15 else cut_thought()) as server:
        report = evolve(recipe_of(server, tmp_path), RunDir(tmp_path / "run"), rounds=2, quiet=True)
    assert [(one.asked, one.failed, one.new) for one in report.rounds] == [(15, 0, 15), (30, 30, 0)]


def test_it_says_how_many_replies_it_has_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipeline.progress.REPORT_S", 0)
    with misbehaving(rewriting) as server:
        recipe = recipe_of(server, tmp_path)
        for quiet in (True, False):
            evolve(recipe, RunDir(tmp_path / str(quiet)), rounds=1, quiet=quiet)
            said = "1 replies looked at so far\n" in capsys.readouterr().err
            assert said is not quiet


def test_a_near_duplicate_is_found_and_another_text_is_not() -> None:
    distinct = Distinct(0.7)
    assert distinct.add("Tell a story about a small rabbit who finds a red balloon.")
    assert not distinct.add("Tell a story about a small rabbit who finds a red  BALLOON!")
    assert not distinct.add("Tell a story about a small rabbit who finds a red balloons.")
    assert distinct.add("Explain how a steam engine turns heat into motion.")
    assert distinct.add("Tell a story about a small rabbit who finds a red balloon.", always=True)


def test_few_texts_that_share_words_are_compared_truly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of one template are all somewhat alike: the time of comparing every pair would be quadratic."""
    pairs, rng, shared = list[object](), random.Random(0), words("shared").split()[2:]

    def counted(*pair: Any) -> float:
        pairs.append(pair)
        return jaccard(*pair)

    monkeypatch.setattr(filters.diversity, "jaccard", counted)
    distinct = Distinct(0.7)
    texts = [" ".join([*rng.sample(shared, 6), words(str(n))[8:50]]) for n in range(300)]
    assert sum(map(distinct.add, texts)) == len(texts)
    assert len(pairs) < len(texts)


def test_diversity_falls_with_repetition() -> None:
    alike = diversity([f"Tell a story about a rabbit, number {n}." for n in range(40)], 40)
    other = diversity([words(str(n)) for n in range(40)], 40)
    assert alike.distinct and other.distinct and alike.similarity and other.similarity
    assert alike.distinct < 0.5 < other.distinct
    assert other.similarity < 0.5 < alike.similarity
    japanese = diversity([f"うさぎと{thing}についての短い童話を書いてください。" for thing in "花月雨川山海空星"], 8)
    assert japanese.distinct and japanese.distinct < 0.5  # no spaces: by character
    assert diversity(["one"], 1).similarity is None
    assert diversity([words(str(n)) for n in range(40)], 10).texts == 10
