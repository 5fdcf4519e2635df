"""`keep-rate` on tiny models, by the real stages: the arms make equal steps, also where rows are too long."""

import json
import re
from argparse import Namespace
from pathlib import Path

import pytest
import yaml

from experiments.arms import EXPERIMENTS
from experiments.runs import Setup
from filters.judgements import Judgement
from filters.rows import as_dropped, as_kept
from pipeline.lineage import record_lineage
from pipeline.recipe import load_recipe
from pipeline.records import Completion, Dropped, Kept, Message, Reason, encode_line, read_jsonl
from pipeline.rundir import RunDir, write_jsonl
from tests.completion_fields import completion_fields
from tests.tiny_student import tiny_model
from train.run import rows_to_train, train_run

SHORT, LONG = 20, 12  # answers; the rule drops the long ones, each of which is a token longer than the one before


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    settings = {"method": "full", "epochs": 2, "batch_size": 2, "max_length": 84, "learning_rate": 1e-3}
    data = {
        "name": "tiny",
        "teacher": {"model": "teacher", "base_url": "https://teacher.example/v1"},
        "student": {"model": str(tiny_model(tmp_path / "student"))},
        "prompts": {"template": "Hi", "count": 1, "validation": 0.1, "test": 0.1},
        "filters": {"rules": [{"rule": "length", "max_chars": 20}]},
        "train": {**settings, "accept": ["licence", "size_ratio", "chain"]},
    }
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    lines = []
    for number in range(SHORT + LONG):
        text = f"Answer {number}." if number < SHORT else f"Answer {number}, " + "x" * (number + 16)
        own = {"messages": [Message("user", f"Question {number}?")], "prompt_id": f"p{number}", "model": "teacher"}
        lines.append(encode_line(Completion(**completion_fields(f"r{number}", text, **own))))
    run.completions.write_bytes(b"".join(lines))
    record_lineage(run, "generate", {"prompts": {"distinct": len(lines)}, "teacher": {"asked": "teacher"}})
    return run


@pytest.fixture
def setup(recipe: Path, run: RunDir, monkeypatch: pytest.MonkeyPatch) -> Setup:
    monkeypatch.setattr("experiments.runs.pending", lambda *given: 0)
    options = Namespace(shares="30,90", match="steps", kind="keep-rate")
    folder = run.path / "experiments" / "keep-rate"
    return Setup(load_recipe(recipe), recipe, [], run, folder, options, recipe.read_bytes())


def test_a_share_has_what_the_teacher_said_of_its_answers(run: RunDir, setup: Setup) -> None:
    run.logprobs.write_text("what the teacher said")
    arms = EXPERIMENTS["keep-rate"].prepare(setup).arms
    assert [arm.run.logprobs.read_text() for arm in arms] == ["what the teacher said"] * 2
    pool, part_of = RunDir(setup.folder / "pool"), setup.recipe.prompts.part_of
    tested = {row.id for row in read_jsonl(run.completions, Completion) if part_of(row) == "test"}
    assert len(tested & {row.id for row in read_jsonl(run.dropped, Dropped)}) == 2  # the rules drop some of them
    assert not tested & {row.id for row in (*read_jsonl(pool.kept, Kept), *read_jsonl(pool.dropped, Dropped))}


def test_it_says_how_many_rows_it_has_measured(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a large run this takes minutes: each row of each arm is tokenised."""
    monkeypatch.setattr("pipeline.progress.REPORT_S", 0)
    arms = EXPERIMENTS["keep-rate"].prepare(setup).arms
    assert len(re.findall(r"^1 of \d+ rows measured so far$", capsys.readouterr().err, re.MULTILINE)) == len(arms)


def test_of_what_the_judge_dropped_the_better_scored_comes_first(run: RunDir, setup: Setup) -> None:
    rows = list(read_jsonl(run.completions, Completion))
    judged = {row.id: 1 if number < 6 else 2 for number, row in enumerate(rows[SHORT:])}
    dropped = [as_dropped(row, Reason(rule="judge", value=judged[row.id], at_least=3)) for row in rows[SHORT:]]
    verdicts = [Judgement(id=id_, score=score, version="v", attempts=1) for id_, score in judged.items()]
    write_jsonl(run.kept, [as_kept(row, {"judge": 5}) for row in rows[:SHORT]])
    write_jsonl(run.dropped, dropped)
    write_jsonl(run.judgements, verdicts)
    share = EXPERIMENTS["keep-rate"].prepare(setup).arms[1].run
    left_out = {row.id for row in read_jsonl(share.dropped, Dropped)}
    assert {judged[id_] for id_ in left_out} == {1}
    scores = {row.id: row.scores for row in read_jsonl(share.kept, Kept)}
    assert scores["r31"] == {"judge": 2}


def test_rows_that_are_too_long_count_for_no_step(recipe: Path, setup: Setup) -> None:
    design = EXPERIMENTS["keep-rate"].prepare(setup)
    steps, left_out = [], []
    for arm in design.arms:
        train_run(load_recipe(recipe, arm.flags), arm.run, force=True)
        section = json.loads(arm.run.lineage.read_bytes())["train"]
        steps.append(section["steps"])
        left_out.append(section["too_long_dropped"])
        assert rows_to_train(load_recipe(recipe, arm.flags), arm.run) == section["rows"]
    assert left_out[0] == 0 < left_out[1] < LONG - 4
    assert steps[0] == steps[1]
