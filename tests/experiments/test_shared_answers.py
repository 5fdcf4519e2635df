"""What arms ask of a judge and of a teacher elsewhere is in one folder of the experiment: once, with one budget."""

import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest

from evaluate.measure.pairwise import find_judge, judge_answers
from evaluate.measure.results import JudgeResult
from evaluate.measure.serving import answer_probes
from experiments.__main__ import share_answers
from experiments.runs import Arm, Setup
from pipeline.errors import BudgetReached
from pipeline.recipe import load_recipe
from pipeline.rundir import RunDir
from tests.evaluate.test_judging import PROMPTS, spent_in, texts
from tests.servers.misbehaving_server import Asked, Behaviour, answer, error, misbehaving

OTHER_TEACHER = ["--teacher.model", "o"]


def make_setup(folder: Path, url: str) -> Setup:
    path = folder / "recipe.yaml"
    data = {"name": "x", "teacher": {"model": "t", "base_url": url}, "prompts": {"template": "Hi", "count": 1}}
    judge = {"model": "judge", "base_url": url, "rubric": {"fit": "for a child"}}
    path.write_text(json.dumps({**data, "evaluate": {"judge": judge}}))
    return Setup(load_recipe(path), path, [], RunDir(folder), folder / "experiment", Namespace(), path.read_bytes())


def arm_of(setup: Setup, name: str, *flags: str) -> Arm:
    arm = Arm(name, RunDir(setup.folder / name), [*flags])
    arm.run.path.mkdir(parents=True, exist_ok=True)
    share_answers(setup, arm)
    return arm


def judged(setup: Setup, arm: Arm) -> JudgeResult:
    """Only the trained students differ; each answer of an arm's own begins with its name."""
    answers = texts(teacher=str, student_before=lambda i: f"b {i}", student_after=lambda i: f"{arm.name} {i}")
    judge = find_judge(setup.recipe_of(arm), arm.run)
    assert judge
    return judge_answers(judge, arm.run, answers)


def test_a_judge_is_asked_once_about_what_arms_share_and_its_budget_is_the_experiments(tmp_path: Path) -> None:
    def script(asked: Asked) -> Behaviour:
        score = 5 if "two" in asked.text.rsplit("<answer>")[-1] else 3
        return answer(json.dumps({"fit": 3, "score": score, "better": "A"}), usage=False)  # each is charged in full

    count = len(PROMPTS)
    with misbehaving(script) as server:
        setup = make_setup(tmp_path, server.url)
        first = judged(setup, arm_of(setup, "one"))
        assert len(server.asked) == 3 * count + 4 * count  # scores; two pairs for each prompt, in both orders
        second = judged(setup, arm_of(setup, "two", *OTHER_TEACHER))
        assert len(server.asked) == 7 * count + 5 * count  # of its own student alone
        assert {*first.scores["student_after"].values()} == {3} and {*second.scores["student_after"].values()} == {5}
        assert first.scores["teacher"] == second.scores["teacher"]
        budget = ["--evaluate.judge.budget.tokens", str(spent_in(setup.folder / "asked"))]
        with pytest.raises(BudgetReached):
            judged(setup, arm_of(setup, "three", *budget))
        assert len(server.asked) == 12 * count
        moved = RunDir(shutil.move(setup.folder, tmp_path / "moved"))
        assert (moved.path / "one" / "evaluation" / "judge" / "judgements.jsonl").is_file()


def test_a_teachers_answers_are_those_of_all_its_arms_when_one_request_fails_for_good(tmp_path: Path) -> None:
    def script(asked: Asked) -> Behaviour:
        return error(400, "no") if "story 3" in asked.text else answer("fine")

    with misbehaving(script) as server:
        setup = make_setup(tmp_path, server.url)
        for arm, failed in ((arm_of(setup, "one"), 1), (arm_of(setup, "two"), 1)):
            folder = arm.run.path / "evaluation" / "asked-teacher" / "probes"
            found = answer_probes(setup.recipe_of(arm), folder, PROMPTS, PROMPTS)
            assert (len(found.answers), found.failed) == (len(PROMPTS) - failed, failed)
        assert len(server.asked) == len(PROMPTS) + 1
        assert not (arm_of(setup, "b", *OTHER_TEACHER).run.path / "evaluation" / "asked-teacher").exists()


def test_an_arm_of_an_earlier_experiment_keeps_its_folders(tmp_path: Path) -> None:
    setup = make_setup(tmp_path, "http://127.0.0.1:1/v1")
    earlier = setup.folder / "one" / "evaluation" / "judge"
    earlier.mkdir(parents=True)
    arm_of(setup, "one")
    arm_of(setup, "one")
    assert not earlier.is_symlink() and (earlier.parent / "pairs").is_symlink()
