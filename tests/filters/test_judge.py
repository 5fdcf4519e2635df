"""The judge against a real local server: what is asked, what a verdict is, and what becomes of one that is none."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from evaluate.measure.pairwise import find_judge
from filters.__main__ import main
from filters.judge import Judge, judge_rows, question, read_verdict
from filters.judgements import Judgement, judge_reason, read_judgements, undiscerning
from filters.reasons import describe
from filters.run import Machine, filter_run
from generate.run import generate
from pipeline.errors import BudgetReached, DataError, DistillError, RecipeError, RequestsFailed
from pipeline.filters_config import DedupConfig, FiltersConfig, JudgeConfig
from pipeline.lineage import read_lineage
from pipeline.recipe import Recipe
from pipeline.records import Completion, Dropped, Kept, Message, Reason, encode_line, read_jsonl
from pipeline.rundir import RunDir
from tests.completion_fields import completion_fields
from tests.servers.misbehaving_server import Asked, Behaviour, answer, cut_thought, error, misbehaving, recipe_for

CONFIG = JudgeConfig(rubric={"fluency": "natural", "fit": "for a child"})


def row(number: int, text: str = "A story.") -> Completion:
    turns = [Message(role="system", content="Be kind."), Message(role="user", content=f"Tell story {number}.")]
    return Completion(**completion_fields(f"row{number}", text, messages=turns))


def judging(server: Any, **judge: Any) -> Recipe:
    config = {"model": "judge", "base_url": server.url, "rubric": CONFIG.rubric, **judge}
    return recipe_for("http://127.0.0.1:1/v1", filters={"judge": config})


def verdict(score: int, fluency: int = 4, fit: int = 4) -> str:
    return json.dumps({"fluency": fluency, "fit": fit, "score": score})


def judged(recipe: Recipe, run: RunDir, rows: Iterable[Completion], *, quiet: bool = True) -> dict[str, Judgement]:
    return judge_rows(Judge.of_filters(recipe, run), run, rows, quiet=quiet)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    return run


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ('{"fluency": 5, "fit": 1, "score": 2}', {"fluency": 5, "fit": 1, "score": 2}),
        ('```json\n{"fluency": 5, "fit": 1, "score": 2}\n```', {"fluency": 5, "fit": 1, "score": 2}),
        ('{"fluency": 5, "fit": 1, "score": 2, "reason": "short"}', {"fluency": 5, "fit": 1, "score": 2}),
        ('{"fluency": 5, "score": 2}', None),
        ('{"fluency": 5, "fit": 6, "score": 2}', None),
        ('{"fluency": 5, "fit": 1.0, "score": "2"}', {"fluency": 5, "fit": 1, "score": 2}),
        ('{"fluency": "5점", "fit": "1 점", "score": "２"}', {"fluency": 5, "fit": 1, "score": 2}),
        ('{"fluency": "5/5", "fit": "1 / 5", "score": "2점"}', {"fluency": 5, "fit": 1, "score": 2}),
        ('{"fluency": "4分", "fit": "4点", "score": "4/5分"}', {"fluency": 4, "fit": 4, "score": 4}),
        ('{"fluency": "4 из 5", "fit": "3 балла", "score": "4,0"}', {"fluency": 4, "fit": 3, "score": 4}),
        ('{"fluency": "٤", "fit": "५", "score": "4 điểm"}', {"fluency": 4, "fit": 5, "score": 4}),
        ('{"fluency": "4 out of 5", "fit": "3 of 5", "score": 4}', {"fluency": 4, "fit": 3, "score": 4}),
        ('{"fluency": "2 out of 10", "fit": 1, "score": 2}', None),
        ('{"fluency": "4 or 5 points", "fit": 1, "score": 2}', None),
        ('{"fluency": "5점", "fit": 1, "score": "8점"}', None),
        ('{"fluency": "4/10", "fit": 1, "score": 2}', None),
        ('{"fluency": "10점 만점에 5점", "fit": 1, "score": 2}', None),
        ('{"fluency": 5, "fit": 1.5, "score": 2}', None),
        ('{"fluency": 5, "fit": true, "score": 2}', None),
        ('{"fluency": 5, "fit": "four", "score": 2}', None),
        ('{"fluency": 5, "fit": [4], "score": 2}', None),
        ('Here is my verdict:\n{"fluency": 5, "fit": 1, "score": 2}', {"fluency": 5, "fit": 1, "score": 2}),
        ('{"fluency": 5, "fit": 1, "score": 2}\n\nReason: {short}.', {"fluency": 5, "fit": 1, "score": 2}),
        ('```JSON\n{"fluency": 5, "fit": 1, "score": 2}\n```', {"fluency": 5, "fit": 1, "score": 2}),
        ('\ufeff{"fluency": 5, "fit": 1, "score": 2}', {"fluency": 5, "fit": 1, "score": 2}),
        ("I would give it a 4.", None),
        ("[4, 4, 4]", None),
        ("[" * 100_000, None),
        ('{"fluency": 5,' + " " * (1 << 20) + '"fit": 1, "score": 2}', {"fluency": 5, "fit": 1, "score": 2}),
        ("", None),
    ],
)
def test_a_verdict_is_read_or_none(text: str, read: dict[str, int] | None) -> None:
    assert read_verdict(text, CONFIG) == read


def test_the_question_holds_rubric_request_and_answer() -> None:
    (asked,) = question(row(1, text='{"score": 5} {braces}'), CONFIG)
    for words in ("- fluency: natural", "- fit: for a child", "Be kind.\n\nTell story 1.", '{"score": 5} {braces}'):
        assert words in asked.content


def test_the_judge_sees_who_said_what_and_the_tools() -> None:
    turns = [Message("system", "Be kind."), Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "Ok")]
    tools = [{"type": "function", "function": {"name": "now"}}]
    (asked,) = question(msgspec.structs.replace(row(1), messages=turns), CONFIG)
    assert "system: Be kind.\n\nuser: Hi\n\nassistant: Hello\n\nuser: Ok\n</request>" in asked.content
    (asked,) = question(msgspec.structs.replace(row(1), messages=turns[1:2], tools=tools), CONFIG)
    assert '<request>\ntools: [{"type":"function","function":{"name":"now"}}]\n\nuser: Hi\n' in asked.content


def test_every_row_is_judged_once_with_a_schema(run: RunDir) -> None:
    def script(asked: Asked) -> Behaviour:
        return answer(verdict(2 if "story 3" in asked.text else 4, fit=1 if "story 3" in asked.text else 5))

    with misbehaving(script) as server:
        recipe = judging(server)
        found = judged(recipe, run, map(row, range(6)))
        again = judged(recipe, run, map(row, range(8)))  # two are new
        assert len(server.asked) == 8
    assert {id_: judgement.score for id_, judgement in found.items()} == {
        f"row{n}": 2 if n == 3 else 4 for n in range(6)
    }
    assert len(again) == 8
    assert read_judgements(run) == again
    schema = server.asked[0].body["response_format"]["json_schema"]["schema"]
    assert schema["required"] == ["fluency", "fit", "score"]
    assert (server.asked[0].body["model"], server.asked[0].body["temperature"]) == ("judge", 0.0)
    config = recipe.filters.judge
    assert config is not None
    low = judge_reason(found["row3"], config)
    assert low == Reason(rule="judge", value=2, at_least=3, scores={"fit": 1})
    assert describe(low) == "score 2, at least 3 wanted (fit 1)"
    assert judge_reason(found["row2"], config) is None


def test_a_verdict_that_cannot_be_read_is_asked_again_and_then_none(run: RunDir) -> None:
    def script(asked: Asked) -> Behaviour:
        if "story 1" in asked.text:
            return answer("I like it!")
        if "story 2" in asked.text and asked.body["temperature"] == 0:
            return answer('{"fluency": 9}')
        return answer(verdict(5))

    with misbehaving(script) as server:
        recipe = judging(server)
        found = judged(recipe, run, map(row, range(4)))
        seeds = [asked.body["seed"] for asked in server.asked if "story 1" in asked.text]
    assert {id_: (one.score, one.attempts) for id_, one in found.items()} == {
        "row0": (5, 1),
        "row1": (None, 3),
        "row2": (5, 2),
        "row3": (5, 1),
    }
    assert len(set(seeds)) == 3
    config = recipe.filters.judge
    assert config is not None
    unread = judge_reason(found["row1"], config)
    assert unread is not None and describe(unread) == "no verdict could be read, in 3 attempts"


def test_a_request_that_failed_is_no_verdict_and_is_made_again(run: RunDir) -> None:
    well = False

    def script(asked: Asked) -> Behaviour:
        return answer(verdict(5)) if well or "story 1" not in asked.text else error(400, "no")

    with misbehaving(script) as server:
        recipe = judging(server, attempts=2)
        found = judged(recipe, run, map(row, range(3)))
        config = recipe.filters.judge
        assert config is not None and found["row1"].score is None
        failed = judge_reason(found["row1"], config)
        assert failed is not None and describe(failed) == "not judged: bad_request 400: no"
        well = True
        assert judged(recipe, run, map(row, range(3)))["row1"].score == 5
    assert len(server.asked) == 3 + 1  # another attempt of the same call would bring the same


def test_a_request_that_failed_and_was_answered_later_has_not_failed(run: RunDir) -> None:
    replies = iter([error(400, "no"), answer("hm")])
    with misbehaving(lambda _: next(replies)) as server:
        recipe = judging(server, attempts=1)
        assert judged(recipe, run, [row(1)])["row1"].error == "bad_request 400: no"
        found = judged(recipe, run, [row(1)])["row1"]
    assert (found.score, found.error) == (None, None)


def test_a_row_with_a_verdict_is_left_alone(run: RunDir) -> None:
    """Its request failed in the first attempt, and the second brought the verdict: no later call asks again."""

    def script(asked: Asked) -> Behaviour:
        broken = "story 1" in asked.text and asked.body["temperature"] == 0
        return error(500, "broken") if broken and first else answer(verdict(1 if broken else 5))

    with misbehaving(script) as server:
        first, recipe = True, judging(server)
        found = judged(recipe, run, map(row, range(3)))
        assert (found["row1"].score, found["row1"].attempts) == (5, 2)
        first, asked = False, len(server.asked)
        assert judged(recipe, run, map(row, range(3))) == found
        assert len(server.asked) == asked


def test_a_verdict_is_of_the_question_not_of_the_row(run: RunDir) -> None:
    with misbehaving(lambda asked: answer(verdict(5 if "better" in asked.text else 2))) as server:
        recipe = judging(server)
        copy = msgspec.structs.replace(row(1), id="copy")
        found = judged(recipe, run, [row(1), copy])
        assert {id_: (one.id, one.score) for id_, one in found.items()} == {"row1": ("row1", 2), "copy": ("copy", 2)}
        assert len(server.asked) == 1
        assert judged(recipe, run, [row(1, "A better story.")])["row1"].score == 5
        assert len(server.asked) == 2


def test_rows_that_are_not_asked_about_are_no_strangers(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    """A rule drops them now, or they are judged: no later stage reads the judge's own runs."""
    with misbehaving(lambda asked: answer(verdict(4))) as server:
        judged(judging(server), run, map(row, range(4)))
        judged(judging(server), run, map(row, range(2, 6)))
    assert "does not ask for" not in capsys.readouterr().err


def test_a_torn_last_verdict_is_asked_for_again(run: RunDir) -> None:
    with misbehaving(lambda asked: answer(verdict(4))) as server:
        judged(judging(server), run, map(row, range(3)))
        (file,) = run.path.glob("judge/*/1/completions.jsonl")
        file.write_bytes(file.read_bytes()[:-30])
        (file.parent / "failures.jsonl").write_bytes(b'{"id": "cut')
        assert len(judged(judging(server), run, map(row, range(3)))) == 3
        assert len(server.asked) == 4


def test_the_budget_is_of_all_attempts_together(run: RunDir) -> None:
    """No verdict can be read, so four rows are asked about three times; there is money for about half of that."""
    with misbehaving(lambda asked: answer("?")) as server:
        judged(judging(server), run, map(row, range(4)))
        assert len(server.asked) == 12
        (version,) = (run.path / "judge").iterdir()
        runs = [RunDir(version / str(attempt)) for attempt in (1, 2, 3)]
        spent = sum(read_lineage(attempt)["generate"]["spent"]["tokens"] for attempt in runs)
        with pytest.raises(BudgetReached) as stopped:
            judged(judging(server, seed=1, budget={"tokens": 1}), run, map(row, range(4)))
        said = re.search(r"can cost up to ([\d,]+) tokens", str(stopped.value))
        assert said is not None
        most = int(said[1].replace(",", ""))
        recipe = judging(server, seed=2, budget={"tokens": spent + most + 5 * spent // 12})
        for _ in range(2):  # again, it is still spent
            with pytest.raises(BudgetReached, match=r"the judge \(filters\.judge\): .*the verdicts so far are in"):
                judged(recipe, run, map(row, range(4)))
    assert 16 < len(server.asked) <= 18


@pytest.mark.parametrize("change", [{"rubric": {"other": "thing"}}, {"attempts": 1}], ids=["rubric", "fewer attempts"])
def test_the_budget_counts_what_another_version_or_attempt_has_cost(run: RunDir, change: dict[str, Any]) -> None:
    with misbehaving(lambda asked: answer("?")) as server:
        judged(judging(server), run, map(row, range(60)))
        assert len(server.asked) == 180
        with pytest.raises(BudgetReached):
            judged(judging(server, **change, budget={"tokens": 180 * 12}), run, map(row, range(61)))
    assert len(server.asked) == 180


@pytest.mark.parametrize("section", ["filters", "evaluate"])
def test_a_judge_is_named_by_the_section_that_it_is_in(run: RunDir, section: str) -> None:
    config = {"model": "judge", "base_url": "http://127.0.0.1:1/v1", "rubric": CONFIG.rubric}
    judge = find_judge(recipe_for("http://127.0.0.1:1/v1", **{section: {"judge": config}}), run)
    assert judge is not None
    with pytest.raises(DistillError, match=rf"^the judge \({section}\.judge\): .*set {section}\.judge\.base_url"):
        judge_rows(judge, run, [row(1)], quiet=True)
    judge = find_judge(
        recipe_for("http://127.0.0.1:1/v1", **{section: {"judge": {**config, "budget": {"usd": 1}}}}), run
    )
    assert judge is not None
    with pytest.raises(RecipeError, match=rf"set {section}\.judge\.price: "):
        judge_rows(judge, run, [row(1)], quiet=True)


@pytest.mark.parametrize("section", ["filters", "evaluate"])
def test_a_fix_is_named_by_the_judges_own_key(run: RunDir, section: str) -> None:
    def asked_of(count: int, reply: Behaviour) -> dict[str, Judgement]:
        with misbehaving(lambda asked: reply) as server:
            config = {"model": "judge", "base_url": server.url, "rubric": CONFIG.rubric}
            judge = find_judge(recipe_for("http://127.0.0.1:1/v1", **{section: {"judge": config}}), run)
            assert judge is not None
            return judge_rows(judge, run, map(row, range(count)), quiet=True)

    thinking = answer("<think>Let me see", finish_reason="length")
    assert (asked_of(1, thinking)["row0"].error or "").endswith(f"thinking; raise {section}.judge.max_tokens")
    refused, fix = error(400, "no response_format here"), f"; {section}.judge.schema: false leaves response_format out"
    assert (asked_of(1, refused)["row0"].error or "").endswith(fix)
    with pytest.raises(DistillError, match=f"gives no answers: .*{re.escape(fix)}; the verdicts so far"):
        asked_of(30, refused)
    with pytest.raises(DistillError, match=rf"20 requests .* thinking; raise {section}\.judge\.max_tokens"):
        asked_of(40, thinking)


def test_a_judge_that_never_comes_to_a_second_verdict_ends_nothing(run: RunDir) -> None:
    """It can answer, and what it is asked again may be what it thinks longest about."""
    with misbehaving(lambda asked: answer("?") if asked.body["temperature"] == 0 else cut_thought()) as server:
        found = judged(judging(server), run, map(row, range(30)))
    assert {one.score for one in found.values()} == {None}


def test_a_judge_that_is_gone_half_way_is_named_and_asked_about_the_rest(run: RunDir) -> None:
    well = False

    def script(asked: Asked) -> Behaviour:
        return answer(verdict(4)) if well or len(server.asked) <= 4 else error(401, "bad key")

    with misbehaving(script) as server:
        recipe = judging(server)
        recipe = recipe.model_copy(update={"generate": recipe.generate.model_copy(update={"concurrency": 1})})
        with pytest.raises(DistillError, match=r"the judge \(filters\.judge\): .* answers 401 .*verdicts so far"):
            judged(recipe, run, map(row, range(9)))
        well, asked = True, len(server.asked)
        assert len(judged(recipe, run, map(row, range(9)))) == 9
    assert len(server.asked) == asked + 5


def test_another_rubric_or_judge_judges_anew(run: RunDir) -> None:
    with misbehaving(lambda asked: answer(json.dumps({"fluency": 3, "fit": 3, "other": 3, "score": 3}))) as server:
        first = judging(server)
        for recipe in (first, judging(server, rubric={"other": "thing"}), judging(server, model="judge2"), first):
            judged(recipe, run, map(row, range(3)))
        assert len(server.asked) == 9
    assert {one.version for one in read_judgements(run).values()} == {Judge.of_filters(first, run).version}


@pytest.mark.parametrize("url", ["http://h:1/v1", "http://h:1/v1/", "http://h:1/v1 4", "http://h:1/v1,http://b/v1"])
def test_another_server_of_the_judge_judges_nothing_anew(url: str) -> None:
    config = JudgeConfig(model="judge", base_url=url, rubric=CONFIG.rubric)
    recipe = recipe_for("http://h:1/v1")
    judge = Judge(recipe, config, recipe.teacher.another(config, "filters.judge"), ())
    assert (judge.endpoint.model, judge.endpoint.url) == ("judge", "http://h:1/v1")
    assert judge.version == "460f4164"  # a change here buys every verdict again


def test_a_judge_that_is_the_teacher_served_elsewhere_is_told(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    with misbehaving(lambda asked: answer(verdict(5))) as server:
        recipe = judging(server)
        judged(recipe, run, map(row, range(1)))
        assert "the judge is the teacher" not in capsys.readouterr().err
        judged(judging(server, model=recipe.teacher.model), run, map(row, range(1)))
    assert "the judge is the teacher itself" in capsys.readouterr().err


def test_another_model_at_the_teachers_url_is_asked_with_the_teachers_key(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROUTER_KEY", "router")
    monkeypatch.setenv("OPENAI_API_KEY", "of another provider")
    access = {"api_key_env": "ROUTER_KEY", "headers": {"X-Team": "t"}}
    with misbehaving(lambda asked: answer(verdict(5))) as server:
        teacher = {"model": "stub", "base_url": server.url, **access}
        judge = {"model": "judge", "rubric": CONFIG.rubric}
        judged(recipe_for(server, teacher=teacher, filters={"judge": judge}), run, map(row, range(1)))
    (asked,) = server.asked
    assert (asked.body["model"], asked.headers["Authorization"]) == ("judge", "Bearer router")
    assert asked.headers["X-Team"] == "t"


def test_a_judge_that_is_the_teacher_is_told(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    with misbehaving(lambda asked: answer(verdict(5))) as server:
        recipe = recipe_for(server, filters={"judge": {"rubric": CONFIG.rubric, "schema": False}})
        judged(recipe, run, map(row, range(2)))
        assert "response_format" not in server.asked[0].body
    assert "the judge is the teacher itself" in capsys.readouterr().err


def test_a_judge_that_tells_no_criteria_apart_is_told() -> None:
    def judged(scores: list[tuple[int, int, int]]) -> list[Judgement]:
        return [
            Judgement(id=str(n), score=score, criteria={"fluency": fluency, "fit": fit}, version="v", attempts=1)
            for n, (score, fluency, fit) in enumerate(scores)
        ]

    alike = [(5, 5, 5)] * 12 + [(1, 1, 1)] * 7
    assert "19 of 20 answers the same" in (undiscerning(judged([*alike, (3, 4, 2)])) or "")
    assert undiscerning(judged([*alike, (3, 4, 2), (4, 5, 4)])) is None  # 19 of 21 are under 95%
    assert undiscerning(judged(alike)) is None  # too few to tell
    one = [Judgement(id=str(n), score=5, criteria={"fit": 5}, version="v", attempts=1) for n in range(30)]
    assert undiscerning(one) is None  # a single criterion is the score


@pytest.mark.parametrize(("unread", "told"), [(2, False), (3, True)])
def test_a_judge_whose_replies_cannot_be_read_is_told(
    run: RunDir, capsys: pytest.CaptureFixture[str], unread: int, told: bool
) -> None:
    def script(asked: Asked) -> Behaviour:
        return answer("I like it!" if any(f"story {n}" in asked.text for n in range(unread)) else verdict(4))

    with misbehaving(script) as server:
        judged(judging(server), run, map(row, range(4)))
    said = capsys.readouterr().err
    assert (f"no verdict could be read for {unread} of 4 answers" in said) == told
    assert ("raise filters.judge.max_tokens" in said) == told


def test_a_wrong_file_is_one_line(run: RunDir) -> None:
    run.judgements.write_text('{"id": 3}\n')
    with pytest.raises(DataError, match=r"judgements\.jsonl:1: .*made again"):
        read_judgements(run)
    assert Judgement(id="a", score=None, version="v", attempts=1).criteria == {}


def test_a_rubric_s_names_are_plain() -> None:
    with pytest.raises(ValueError, match="must be a plain word"):
        JudgeConfig(rubric={"score": "x"})


def test_the_stage_keeps_what_the_judge_finds_good_enough(tmp_path: Path) -> None:
    """All of `filters`: the rules first, then the judge about what is left, its scores in kept.jsonl."""
    with misbehaving() as server:
        recipe = recipe_for(server, 12)
        run = RunDir(tmp_path / "run")
        generate(recipe, run, quiet=True)
    asked: list[str] = []

    def script(request: Asked) -> Behaviour:
        asked.append(request.text)
        return answer(verdict(2, fluency=1) if "say 5\n" in request.text else verdict(4))

    with misbehaving(script) as judge:
        config = {"model": "judge", "base_url": judge.url, "rubric": CONFIG.rubric}
        rules = [{"rule": "banned_words", "words": ["say 7"]}]
        recipe = recipe.model_copy(update={"filters": FiltersConfig(rules=rules, judge=config)})
        report = filter_run(recipe, run, tmp_path / "r.yaml")
        again = filter_run(recipe, run, tmp_path / "r.yaml")
    kept, dropped = list(read_jsonl(run.kept, Kept)), list(read_jsonl(run.dropped, Dropped))
    assert len(asked) == 11  # not about what a rule has dropped, and once each
    assert (report.kept, report.dropped, again.kept) == (10, 2, 10)
    assert {row.slots["n"]: row.rule for row in dropped} == {"7": "banned_words", "5": "judge"}
    assert dropped[1].detail == [Reason(rule="judge", value=2, at_least=3, scores={"fluency": 1})]
    assert all(row.scores == {"judge": 4, "fluency": 4, "fit": 4} for row in kept)
    assert [(rule.rule, rule.dropped) for rule in report.rules] == [("banned_words", 1), ("judge", 1)]
    assert report.scores == {
        "judge": {"2": 1, "4": 10},
        "fluency": {"1": 1, "4": 10},
        "fit": {"4": 11},
    }
    assert json.loads(run.filter_report.read_bytes())["scores"]["judge"] == {"2": 1, "4": 10}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"budget": {"usd": 1}}, r"^filters\.judge\.budget\.usd is 1, but the price of judge is not known: "),
        ({"base_url": "http://127.0.0.1:1/v1?key=x"}, r"^filters\.judge\.base_url .* holds a query"),
    ],
)
def test_what_is_wrong_with_a_judge_is_told_before_a_rule_runs(
    run: RunDir, section: dict[str, Any], message: str
) -> None:
    run.completions.write_bytes(encode_line(row(1)))
    recipe = recipe_for("http://127.0.0.1:1/v1", filters={"judge": {"model": "judge", **section}})

    def in_blocks(*_: Any, **__: Any) -> Any:
        raise AssertionError("a rule has run")

    with pytest.raises(RecipeError, match=message):
        filter_run(recipe, run, run.path / "r.yaml", machine=Machine(in_blocks))


def test_a_judge_is_checked_without_its_verdicts_and_the_teachers_variables(run: RunDir) -> None:
    verdicts = run.path / "judge" / "version" / "1"
    verdicts.mkdir(parents=True)
    (verdicts / "completions.jsonl").write_text("not read\n")
    teacher = {"model": "gpt-4.1", "headers": {"X-Key": "${NOT_SET_HERE}"}}
    filters = {"judge": {"budget": {"usd": 1}, "price": {"input": 1, "output": 1}}}
    recipe = recipe_for("http://127.0.0.1:1/v1", teacher=teacher, filters=filters)
    Judge.of_filters(recipe, run).check()


def test_the_scores_are_shown_and_answers_that_could_not_be_judged_end_with_4(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.completions.write_bytes(b"".join(encode_line(row(number)) for number in range(6)))

    def script(asked: Asked) -> Behaviour:
        said = {0: "I like it!", 1: verdict(2, fluency=1)}
        number = int(asked.text.split("story ")[1][0])
        return error(400, "too long") if number == 2 else answer(said.get(number, verdict(5)))

    with misbehaving(script) as server:
        recipe = judging(server).model_dump(mode="json", exclude_none=True)
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
        with pytest.raises(RequestsFailed, match=r"about 1 of 6 answers .*dropped\.jsonl.*run the filters again"):
            main([str(tmp_path / "r.yaml"), "--run", str(run.path)])
    shown = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines()]
    cells = {cell[0].strip(): [part.strip() for part in cell[1:]] for cell in shown if len(cell) == 9}
    assert cells["judge"] == ["", "1", "", "", "3", "1", "1", "4.25"]
    assert cells["fluency"] == ["1", "", "", "3", "", "", "", "3.25"]
    details = {row.id: describe(row.detail[0]) for row in read_jsonl(run.dropped, Dropped)}
    assert details["row0"] == "no verdict could be read, in 3 attempts"
    assert details["row2"] == "not judged: bad_request 400: too long"


def test_where_the_judge_fails_no_keep_rate_is_looked_at(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.completions.write_bytes(encode_line(row(0)))
    with misbehaving(lambda asked: error(400, "too long")) as server:
        recipe = judging(server).model_dump(mode="json", exclude_none=True)
        recipe["filters"]["min_keep_rate"] = 0.5
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
        with pytest.raises(RequestsFailed, match="the judge gave no answer about 1 of 1 answers"):
            main([str(tmp_path / "r.yaml"), "--run", str(run.path)])


def judged_and_deduplicated(
    folder: Path, texts: list[str], scores: list[int], *against: Path
) -> tuple[RunDir, list[int]]:
    """A run whose answers have these texts and would get these scores; and which of them the judge was asked about."""
    run, asked = RunDir(folder / "run"), list[int]()
    run.path.mkdir()
    run.completions.write_bytes(b"".join(encode_line(row(number, text)) for number, text in enumerate(texts)))

    def script(request: Asked) -> Behaviour:
        asked.append(int(request.text.split("story ")[1].split(".")[0]))
        return answer(verdict(scores[asked[-1]]))

    with misbehaving(script) as server:
        recipe = judging(server)
        filters = recipe.filters.model_copy(update={"dedup": DedupConfig(against=list(against))})
        filter_run(recipe.model_copy(update={"filters": filters}), run, folder / "r.yaml")
    return run, sorted(asked)


def fates(run: RunDir) -> dict[str, tuple[str, str]]:
    """Of each dropped row the rule, and the row that it is like."""
    return {row.id: (row.rule, row.detail[0].of) for row in read_jsonl(run.dropped, Dropped)}


def test_what_is_done_around_the_requests_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipeline.progress.REPORT_S", 0)
    judged_and_deduplicated(tmp_path, ["A bear.", "Two frogs.", "A fox in the snow."], [3, 4, 5])
    said = capsys.readouterr().err.splitlines()
    for done in ("answers looked at for the judge", "replies of the judge read", "answers written"):
        assert f"1 {done} so far" in said


def test_of_exact_copies_one_is_judged_and_stays(tmp_path: Path) -> None:
    """A copy tells nothing new: nobody pays for it."""
    run, asked = judged_and_deduplicated(
        tmp_path, ["The same story.", "the SAME story!", "The same  story."], [4, 5, 1]
    )
    assert asked == [0]
    (kept,) = read_jsonl(run.kept, Kept)
    assert (kept.id, kept.scores["judge"]) == ("row0", 4)
    assert fates(run) == {"row1": ("exact_duplicate", "row0"), "row2": ("exact_duplicate", "row0")}
    report = json.loads(run.filter_report.read_bytes())
    assert (report["kept"], report["dropped"], report["scores"]["judge"]) == (1, 2, {"4": 1})


def test_what_another_run_kept_is_not_judged(tmp_path: Path) -> None:
    other = RunDir(tmp_path / "other")
    other.path.mkdir()
    other.kept.write_bytes(encode_line(Kept(**completion_fields("theirs", "a good story"))))
    run, asked = judged_and_deduplicated(tmp_path, ["A good story.", "Another tale."], [5, 5], other.path)
    assert asked == [1] and [row.id for row in read_jsonl(run.kept, Kept)] == ["row1"]
    assert fates(run) == {"row0": ("exact_duplicate", "theirs")}


def test_copies_of_what_the_judge_drops_are_dropped(tmp_path: Path) -> None:
    run, asked = judged_and_deduplicated(tmp_path, ["A bad story.", "A good story.", "a bad story"], [2, 5, 5])
    assert asked == [0, 1]
    assert fates(run) == {"row0": ("judge", ""), "row2": ("exact_duplicate", "row0")}


def test_of_two_that_are_nearly_alike_the_better_scored_stays(tmp_path: Path) -> None:
    """Judged before near duplicates are looked for, so in the first run already."""
    story = "Once a small fox lived by the river and looked for blue stones under the old bridge every single morning."
    run, asked = judged_and_deduplicated(tmp_path, [story, story + " Yes!", story], [3, 5, 5])
    assert asked == [0, 1]
    assert [row.id for row in read_jsonl(run.kept, Kept)] == ["row1"]
    assert fates(run) == {"row0": ("near_duplicate", "row1"), "row2": ("near_duplicate", "row1")}


def test_a_copy_stays_where_its_original_loses_to_another_answer(tmp_path: Path) -> None:
    """One answer per prompt: row 0 loses to row 1. Its copy, the only answer to row 2's prompt, is like none left."""
    rows = [row(0, "Some short story."), row(1, "Another tale of a fox."), row(2, "Some short story.")]
    rows[1] = msgspec.structs.replace(rows[1], messages=rows[0].messages)
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.completions.write_bytes(b"".join(map(encode_line, rows)))

    def script(request: Asked) -> Behaviour:
        return answer(verdict(5 if "a fox" in request.text else 3))

    with misbehaving(script) as server:
        recipe = judging(server)
        filters = recipe.filters.model_copy(update={"dedup": DedupConfig(prompts=1)})
        filter_run(recipe.model_copy(update={"filters": filters}), run, tmp_path / "r.yaml")
        assert len(server.asked) == 2
    assert {row.id: row.scores["judge"] for row in read_jsonl(run.kept, Kept)} == {"row1": 5, "row2": 3}
    assert fates(run) == {"row0": ("similar_prompt", "row1")}
