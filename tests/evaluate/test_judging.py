"""A judge of the models' answers, on a real local server: scores, choices in both orders, and its bias for a place."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from evaluate.document import WinRate
from evaluate.figures.quality import measure_quality, win_rates
from evaluate.measure.pairwise import find_judge, judge_answers, judged_fingerprint, read_choice
from evaluate.measure.probes import ProbePrompts
from evaluate.measure.results import JudgeResult, answer_row
from filters.ruleset import RuleSet
from pipeline.errors import BudgetReached
from pipeline.recipe import Recipe
from pipeline.records import Kept, Message, Prompt
from pipeline.rundir import RunDir
from tests.servers.misbehaving_server import Asked, Behaviour, answer, misbehaving, recipe_for

PROMPTS = [Prompt(id=f"p{i}", messages=[Message("user", f"Tell story {i}.")]) for i in range(8)]
SHOWN = re.compile(r"<answer_A>\n(.*?)\n</answer_A>.*<answer_B>\n(.*?)\n</answer_B>", re.DOTALL)


def judging(url: str, **judge: Any) -> Recipe:
    config = {"model": "judge", "base_url": url, "rubric": {"fit": "for a child"}, "attempts": 2, **judge}
    return recipe_for("http://127.0.0.1:1/v1", evaluate={"judge": config})


def texts(**models: Callable[[int], str]) -> dict[str, dict[str, Kept]]:
    return {key: {p.id: answer_row(key, p, text(i)) for i, p in enumerate(PROMPTS)} for key, text in models.items()}


def judge_of(choose: Callable[[str, str], str], score: Callable[[str], int] = lambda text: 3) -> Any:
    """A script: which of two answers it finds better, and what it gives one."""

    def script(asked: Asked) -> Behaviour:
        shown = SHOWN.search(asked.text)
        if shown:
            return answer(json.dumps({"better": choose(*shown.groups())}))
        return answer(json.dumps({"fit": 3, "score": score(asked.text.rsplit("<answer>")[-1])}))

    return script


def rates(result: JudgeResult, answers: dict[str, dict[str, Kept]]) -> dict[str, WinRate]:
    quality = measure_quality(
        judging("http://127.0.0.1:1/v1"), RuleSet(()), ProbePrompts("slots", PROMPTS), answers, result.scores
    )
    return {win.against: win for win in win_rates(result, quality) if win.part == "all"}


def ask(script: Any, path: Path, answers: dict[str, dict[str, Kept]], **judge: Any) -> tuple[JudgeResult, int]:
    with misbehaving(script) as server:
        found = find_judge(judging(server.url, **judge), RunDir(path))
        assert found and found.endpoint.model == "judge" and not found.is_teacher
        return judge_answers(found, RunDir(path), answers), len(server.asked)


def better(first: str, second: str) -> str:
    """Prefers good, in whatever place."""
    if ("good" in first) == ("good" in second):
        return "tie"
    return "A" if "good" in first else "B"


def test_a_fair_judge_is_counted(tmp_path: Path) -> None:
    answers = texts(
        teacher=lambda i: f"good t{i}",
        student_before=lambda i: f"bad b{i}",
        student_after=lambda i: f"{'good' if i < 6 else 'bad'} a{i}",
    )
    result, asked = ask(judge_of(better, lambda text: 5 if "good" in text else 2), tmp_path, answers)
    assert asked == 3 * 8 + 2 * 2 * 8  # every answer once, every pair in both orders
    assert result.scores["student_after"] == {f"p{i}": 5 if i < 6 else 2 for i in range(8)}
    found = rates(result, answers)
    teacher, before = found["teacher"], found["student_before"]
    assert (teacher.wins, teacher.ties, teacher.losses, teacher.pairs) == (0, 6, 2, 8)
    assert teacher.rate and teacher.rate.value == pytest.approx(3 / 8)  # 6 ties, half a point each
    assert (before.wins, before.ties, before.losses) == (6, 2, 0)
    assert (
        before.rate and before.rate.value == pytest.approx(7 / 8) and before.rate.low < 7 / 8 < before.rate.high + 0.2
    )
    assert (before.first_chosen, before.flipped, before.unjudged) == (0.5, 0, 0)


def test_a_judge_that_takes_the_first_makes_ties_and_its_bias_is_told(tmp_path: Path) -> None:
    answers = texts(teacher=lambda i: f"t{i}", student_after=lambda i: f"a{i}")

    def choose(first: str, second: str) -> str:
        return "B" if first.endswith("0") and first.startswith("t") else "A"  # the student really wins one

    result, _ = ask(judge_of(choose), tmp_path, answers)
    win = rates(result, answers)["teacher"]
    assert (win.wins, win.ties, win.losses) == (1, 7, 0)
    assert win.flipped == 7 and win.first_chosen == pytest.approx(15 / 16)
    assert win.rate and win.rate.value == pytest.approx((1 + 7 / 2) / 8)


def test_a_choice_in_one_order_only_is_no_win(tmp_path: Path) -> None:
    answers = texts(teacher=lambda i: f"t{i}", student_after=lambda i: f"a{i}")
    # Shown first, the student wins; shown second, it is a tie.
    result, _ = ask(judge_of(lambda first, second: "A" if first.startswith("a") else "tie"), tmp_path, answers)
    win = rates(result, answers)["teacher"]
    assert (win.wins, win.ties, win.losses, win.flipped, win.first_chosen) == (0, 8, 0, 0, 1.0)


def test_a_choice_that_cannot_be_read_is_asked_again_and_then_none(tmp_path: Path) -> None:
    answers = texts(teacher=lambda i: f"t{i}", student_after=lambda i: f"a{i}")
    result, asked = ask(judge_of(lambda first, second: "C" if "a3" in first + second else "A"), tmp_path, answers)
    win = rates(result, answers)["teacher"]
    assert (win.pairs, win.unjudged) == (7, 1)
    assert asked == 16 + 16 + 2  # scores, pairs, and the unreadable two once more


def test_an_empty_answer_loses_without_a_question(tmp_path: Path) -> None:
    answers = texts(teacher=lambda i: "same" if i else "", student_after=lambda i: "same" if i < 7 else "")
    result, asked = ask(judge_of(lambda first, second: "A"), tmp_path, answers)
    assert asked == 8  # the score of each text that was said to a prompt; no pair has a question in it
    assert result.scores["teacher"]["p0"] == 1 and result.scores["student_after"]["p7"] == 1
    win = rates(result, answers)["teacher"]
    assert (win.wins, win.ties, win.losses) == (1, 6, 1)


def test_a_pair_shows_who_said_what_and_the_tools(tmp_path: Path) -> None:
    turns = [Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "Ok")]
    tools = [{"type": "function", "function": {"name": "now"}}]
    prompt = Prompt(id="p", messages=turns, tools=tools)
    answers = {key: {"p": answer_row(key, prompt, f"by the {key}")} for key in ("teacher", "student_after")}
    told = "user: Hi\n\nassistant: Hello\n\nuser: Ok\n</request>"
    shown = f'<request>\ntools: [{{"type":"function","function":{{"name":"now"}}}}]\n\n{told}'
    with misbehaving(judge_of(better)) as server:
        judge = find_judge(judging(server.url), RunDir(tmp_path))
        assert judge
        judge_answers(judge, RunDir(tmp_path), answers)
        assert [shown in asked.text for asked in server.asked] == [True] * 4  # two answers, one pair in both orders
        alone = {"teacher": {"p": msgspec.structs.replace(answers["teacher"]["p"], messages=turns[:1])}}
        assert judged_fingerprint(judge, {"teacher": answers["teacher"]}) != judged_fingerprint(judge, alone)


def test_what_was_judged_is_not_asked_again_and_a_new_answer_is(tmp_path: Path) -> None:
    answers = texts(teacher=lambda i: f"t{i}", student_after=lambda i: f"a{i}")
    other = texts(teacher=lambda i: f"t{i}", student_after=lambda i: "new" if i == 0 else f"a{i}")
    with misbehaving(judge_of(better)) as server:
        judge = find_judge(judging(server.url), RunDir(tmp_path))
        assert judge
        first = judge_answers(judge, RunDir(tmp_path), answers)
        asked = len(server.asked)
        assert judge_answers(judge, RunDir(tmp_path), answers) == first and len(server.asked) == asked
        second = judge_answers(judge, RunDir(tmp_path), other)
        assert len(server.asked) == asked + 3  # one score, one pair in both orders
        stricter = find_judge(judging(server.url, rubric={"fit": "for a grown-up"}), RunDir(tmp_path))
        patient = find_judge(judging(server.url, attempts=5), RunDir(tmp_path))
        assert stricter and patient
        prints = {judged_fingerprint(judge, answers), judged_fingerprint(judge, other)}
        assert len({*prints, judged_fingerprint(stricter, answers), judged_fingerprint(patient, answers)}) == 4
    assert second.scores["teacher"] == first.scores["teacher"]


def test_with_more_attempts_only_what_could_not_be_read_is_asked_again(tmp_path: Path) -> None:
    def script(asked: Asked) -> Behaviour:
        hesitant = asked.text.rsplit("<answer>")[-1].startswith("\na1\n") and asked.body["temperature"] == 0
        return answer("I cannot say." if hesitant else json.dumps({"fit": 3, "score": 4}))

    answers = texts(student_after=lambda i: f"a{i}")
    with misbehaving(script) as server:
        for attempts, requests, scored in ((1, 8, 7), (2, 9, 8)):
            judge = find_judge(judging(server.url, attempts=attempts), RunDir(tmp_path))
            assert judge
            result = judge_answers(judge, RunDir(tmp_path), answers)
            assert (len(server.asked), len(result.scores["student_after"])) == (requests, scored)


def spent_in(folder: Path) -> int:
    sections = (json.loads(file.read_bytes()) for file in folder.rglob("lineage.json"))
    return sum(section["generate"]["spent"]["tokens"] for section in sections)


def test_scores_and_pairs_of_all_students_share_the_judge_s_budget(tmp_path: Path) -> None:
    both = json.dumps({"fit": 3, "score": 3, "better": "A"})
    with misbehaving(lambda asked: answer(both, usage=False)) as server:  # each is charged in full

        def judge(student: str, tokens: int) -> None:
            found = find_judge(judging(server.url, budget={"tokens": tokens}), RunDir(tmp_path))
            assert found
            judge_answers(found, RunDir(tmp_path), texts(teacher=str, student_after=lambda i: f"{student} {i}"))

        judge("first", 10_000_000)
        asked = len(server.asked)
        with pytest.raises(BudgetReached):
            judge("second", spent_in(tmp_path))  # it has scores to ask for
        shutil.rmtree(tmp_path / "evaluation/pairs")
        with pytest.raises(BudgetReached, match=r"the judge \(evaluate.judge\): .* of evaluate.judge.budget.tokens "):
            judge("first", spent_in(tmp_path))  # it has pairs to ask about
        assert len(server.asked) == asked == 2 * 8 + 2 * 8


def test_the_judge_is_the_evaluation_s_else_the_filters(tmp_path: Path) -> None:
    assert find_judge(recipe_for("http://127.0.0.1:1/v1"), RunDir(tmp_path)) is None
    own = find_judge(recipe_for("http://127.0.0.1:1/v1", filters={"judge": {}}), RunDir(tmp_path))
    assert own and own.is_teacher and own.endpoint.url == "http://127.0.0.1:1/v1"
    both = recipe_for("http://127.0.0.1:1/v1", filters={"judge": {}}, evaluate={"judge": {"model": "other"}})
    found = find_judge(both, RunDir(tmp_path))
    assert found and found.endpoint.model == "other" and not found.is_teacher


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ('{"better": "A"}', "A"),
        ('```json\n{"better": "tie"}\n```', "tie"),
        ('Here it is:\n{"better": "B"}\nThe first one rambles.', "B"),
        ('{"better": "C"}', None),
        ('{"better": ["A"]}', None),
        ("A", None),
        ('["A"]', None),
        ("", None),
    ],
)
def test_a_choice_is_read_or_none(text: str, choice: str | None) -> None:
    assert read_choice(answer_row("judge", PROMPTS[0], text)) == choice
