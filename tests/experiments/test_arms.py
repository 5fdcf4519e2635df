"""What the arms of an experiment are given: rows that nothing is tested by, what goes with them, another teacher."""

import json
import os
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

import experiments.runs
from evaluate.measure.probes import choose_questions
from experiments.__main__ import share_measurements
from experiments.arms import EXPERIMENTS
from experiments.runs import Arm, Setup
from experiments.teachers import second_teacher
from pipeline.errors import UsageError
from pipeline.recipe import load_recipe
from pipeline.records import Completion, Kept, Prompt, encode_line, question_text, read_jsonl
from pipeline.rundir import RunDir, write_jsonl
from pipeline.section import PriceConfig
from tests.completion_fields import completion_fields
from tests.tiny_student import kept_row, make_run, story_rows
from train.rows import read_parts


def test_people_are_taught_nothing_that_is_tested(tmp_path: Path) -> None:
    """Neither a question whose answers were all dropped, nor a sister of one; a group is said, or that of the run."""
    (tmp_path / "rows.jsonl").write_text("{}\n")
    path = tmp_path / "recipe.yaml"
    prompts = {"file": "rows.jsonl", "group": "topic", "test": 0.2, "validation": 0.1}
    path.write_text(json.dumps({"name": "x", "teacher": {"model": "t"}, "student": {"model": "s"}, "prompts": prompts}))
    recipe = load_recipe(path)
    rows = [
        msgspec.structs.replace(kept_row(n, f"Question {n}", f"{n}"), columns={"topic": n % 40}) for n in range(200)
    ]
    run = make_run(tmp_path / "run", rows[::2])
    run.dropped.write_bytes(b"")
    run.lineage.write_text("{}")
    asked = [Prompt(id=row.prompt_id, messages=row.messages, columns=row.columns) for row in rows]
    run.prompts.write_bytes(b"".join(map(encode_line, asked)))
    human = tmp_path / "human.jsonl"
    lines: list[dict[str, Any]] = [{"prompt": f"Question {n}", "completion": f"{n}."} for n in range(150)]
    lines += [{"prompt": f"Other {n}", "completion": f"{n}.", "topic": n % 40} for n in range(80)]
    lines += [{"prompt": f"Question {n}", "completion": f"{n}!", "topic": n} for n in range(151, 200, 2)]  # not kept
    human.write_text("".join(json.dumps(line) + "\n" for line in lines))
    setup = Setup(recipe, path, [], run, tmp_path / "experiment", Namespace(human=human), path.read_bytes())
    sizes = set()
    for arm in EXPERIMENTS["human"].prepare(setup).arms:
        own = load_recipe(path, arm.flags)
        parts = read_parts(own, arm.run)
        sizes.add((len(parts.train), len(parts.validation)))
        learned = [*parts.train, *parts.validation]
        tested = [prompt for prompt in asked if recipe.prompts.part_of(prompt) == "test"]
        for key in (recipe.prompts.position_of, lambda asks: question_text(asks.messages)):
            assert not set(map(key, learned)) & set(map(key, tested))
        assert len(parts.train) > 20
    assert len(sizes) == 1  # as many rows to learn from, and so as many steps


def test_people_who_answer_the_questions_of_the_run_leave_them_their_references(tmp_path: Path) -> None:
    path, people = tmp_path / "recipe.yaml", tmp_path / "human.jsonl"
    prompts = {"template": "Hi", "count": 1, "test": 0.3}
    verify = {"verify": [{"rule": "matches"}], "category": "topic"}
    sections = {"teacher": {"model": "t"}, "student": {"model": "s"}, "prompts": prompts, "evaluate": verify}
    path.write_text(json.dumps({"name": "x", **sections}))
    recipe = load_recipe(path)
    rows = [msgspec.structs.replace(kept_row(n, f"Question {n}", f"{n}"), columns={"topic": "a"}) for n in range(40)]
    run = make_run(tmp_path / "run", rows)
    run.dropped.write_bytes(b"")
    run.lineage.write_text("{}")
    asked = [Prompt(id=row.prompt_id, messages=row.messages, reference=row.text, columns=row.columns) for row in rows]
    write_jsonl(run.prompts, asked)
    people.write_text("".join(f'{{"prompt": "question  {n}", "completion": "{n}."}}\n' for n in range(60)))
    setup = Setup(recipe, path, [], run, tmp_path / "experiment", Namespace(human=people), path.read_bytes())
    tested = {prompt.id: prompt.reference for prompt in asked if recipe.prompts.part_of(prompt) == "test"}
    assert len(tested) > 5
    for arm in EXPERIMENTS["human"].prepare(setup).arms:
        assert {prompt.id: prompt.reference for prompt in choose_questions(recipe, arm.run).seen} == tested


def test_an_arm_has_the_pairs_and_the_logprobs_of_its_rows(tmp_path: Path) -> None:
    path, run = tmp_path / "recipe.yaml", make_run(tmp_path / "run", story_rows(20))
    path.write_text(json.dumps({"name": "x", "teacher": {"model": "t"}, "prompts": {"template": "Hi", "count": 1}}))
    run.dropped.write_bytes(b"")
    run.preferences.write_text("pairs")
    run.logprobs.write_text("logprobs")
    setup = Setup(
        load_recipe(path), path, [], run, tmp_path / "experiment", Namespace(seeds=2, no_speed=True), path.read_bytes()
    )
    arm = EXPERIMENTS["seeds"].prepare(setup).arms[0]
    assert (arm.run.preferences.read_text(), arm.run.logprobs.read_text()) == ("pairs", "logprobs")
    run.preferences.write_text("other pairs")
    arm = EXPERIMENTS["seeds"].prepare(setup).arms[0]
    assert arm.run.preferences.read_text() == "other pairs"
    run.preferences.unlink()
    run.logprobs.unlink()
    arm = EXPERIMENTS["seeds"].prepare(setup).arms[0]
    assert not arm.run.preferences.exists() and not arm.run.logprobs.exists()


def test_arms_are_not_made_of_rows_that_change_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, run = tmp_path / "recipe.yaml", make_run(tmp_path / "run", story_rows(20))
    path.write_text(json.dumps({"name": "x", "teacher": {"model": "t"}, "prompts": {"template": "Hi", "count": 1}}))
    run.dropped.write_bytes(b"")
    setup = Setup(
        load_recipe(path), path, [], run, tmp_path / "experiment", Namespace(seeds=2, no_speed=True), path.read_bytes()
    )

    def filtered_meanwhile(*_: object) -> None:
        write_jsonl(run.kept, story_rows(19))

    with (
        monkeypatch.context() as patched,
        pytest.raises(UsageError, match=r"kept\.jsonl: filtered again while the arms"),
    ):
        patched.setattr(experiments.runs, "write_lineage", filtered_meanwhile)  # the end of the first arm
        EXPERIMENTS["seeds"].prepare(setup)
    arms = EXPERIMENTS["seeds"].prepare(setup).arms
    assert [len(list(read_jsonl(arm.run.kept, Kept))) for arm in arms] == [19, 19]


@pytest.mark.parametrize(
    ("options", "teacher"),
    [
        ({}, {"base_url": "https://a.example/v1", "price": None, "api_key_env": "A_KEY", "headers": {"x-org": "a"}}),
        (
            {"b_url": "https://b.example/v1", "b_price": '{"input": 0.1, "output": 0.2}'},
            {"base_url": "https://b.example/v1", "api_key_env": "OPENAI_API_KEY", "urls_file": None},
        ),
        ({"b_key_env": "B_KEY"}, {"api_key_env": "B_KEY", "headers": {"x-org": "a"}}),
    ],
)
def test_the_other_teacher_has_its_own_price_and_at_its_url_nothing_of_the_first(
    options: dict[str, str], teacher: dict[str, Any], tmp_path: Path
) -> None:
    first = {"model": "a", "base_url": "https://a.example/v1", "price": {"input": 10, "output": 30}}
    first |= {"api_key_env": "A_KEY", "headers": {} if "b_url" in options else {"x-org": "a"}}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"name": "x", "teacher": first, "prompts": {"template": "Hi", "count": 1}}))
    given = {"b_model": "b", "b_url": None, "b_price": None, "b_key_env": None, **options}
    recipe = load_recipe(path)
    found = load_recipe(path, second_teacher(recipe.teacher, Namespace(**given))).teacher
    assert found.model == "b" and found.model_dump(include=set(teacher)) == teacher
    assert found.price == (PriceConfig(input=0.1, output=0.2) if "b_price" in options else None)
    for sent in ("headers", "query"):
        first_only = recipe.teacher.model_copy(update={"headers": {}, sent: {"x-org": "a"}})
        with pytest.raises(UsageError, match=r"--b-url https://b: teacher\.headers and teacher\.query are"):
            second_teacher(first_only, Namespace(**{**given, "b_url": "https://b"}))


def test_a_stage_waits_for_one_that_was_started_by_hand(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, run = tmp_path / "recipe.yaml", RunDir(tmp_path / "run")
    path.write_text(json.dumps({"name": "x", "teacher": {"model": "t"}, "prompts": {"template": "Hi", "count": 1}}))
    run.path.mkdir()
    run.completions.write_bytes(encode_line(Completion(**completion_fields("one", "An answer."))))
    setup, said = Setup(load_recipe(path), path, [], run, tmp_path, Namespace(), path.read_bytes()), ""
    with ThreadPoolExecutor() as pool:
        with run.locked():
            filtered = pool.submit(setup.stage, "filters", run)
            while "waiting up to 60 s for it" not in said and not filtered.done():
                said += capfd.readouterr().err
                time.sleep(0.05)
        assert filtered.result() == 0
    assert run.kept.is_file()


@pytest.mark.parametrize(
    ("student", "before"),
    [
        ("s", ["one", "one", "one"]),
        ("prune:2", ["one", "one", "other"]),  # of each teacher
        ("new:1m", ["one", "two", "other"]),  # of each seed
    ],
)
def test_arms_share_the_newest_measurements_but_not_those_of_other_weights(
    student: str, before: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    sections = {"teacher": {"model": "t"}, "student": {"model": student}, "prompts": {"template": "Hi", "count": 1}}
    path.write_text(json.dumps({"name": "x", **sections, "train": {"method": "full"}}))
    setup = Setup(load_recipe(path), path, [], RunDir(tmp_path), tmp_path, Namespace(), path.read_bytes())
    flags: dict[str, list[str]] = {"one": [], "two": ["--train.seed", "2"], "other": ["--teacher.model", "o"]}
    arms = [Arm(name, RunDir(tmp_path / name), own) for name, own in flags.items()]
    for age, arm in enumerate(arms):
        (arm.run.path / "evaluation").mkdir(parents=True)
        for key in ("teacher", "student_before", "student_after"):
            file = arm.run.path / "evaluation" / f"probes-{key}.json"
            file.write_text(arm.name)
            os.utime(file, (1000 - age, 1000 - age))  # the first arm's are the newest
    for arm in arms:
        share_measurements(setup, arm, arms)
    found = {
        arm.name: [
            (arm.run.path / f"evaluation/probes-{key}.json").read_text()
            for key in ("teacher", "student_before", "student_after")
        ]
        for arm in arms
    }
    teachers, students = ["one", "one", "other"], ["one", "two", "other"]
    assert found == {name: list(own) for name, *own in zip(flags, teachers, before, students, strict=True)}
