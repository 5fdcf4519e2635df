"""One budget for several runs, an attempt of the judge or a round of prompts each: what a killed one spent counts."""

import json
from hashlib import sha256
from pathlib import Path

import pytest

from filters.evolve import evolve
from filters.judge import Judge, judge_rows
from generate.context import Run
from generate.summary import save
from pipeline.errors import BudgetReached
from pipeline.recipe import Recipe
from pipeline.records import Completion, Message
from pipeline.rundir import RunDir
from tests.completion_fields import completion_fields
from tests.servers.misbehaving_server import Asked, Behaviour, MisbehavingServer, answer, misbehaving, recipe_for

TOKENS = 12  # of each request, as the server counts them


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    return run


@pytest.fixture
def dies_in_two(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The run in the folder 2 is killed when all is answered, and before its lineage is written."""

    def killed(call: Run) -> None:
        if call.dir.path.name == "2":
            raise KeyboardInterrupt
        save(call)

    monkeypatch.setattr("generate.run.save", killed)
    return monkeypatch


def row(number: int) -> Completion:
    return Completion(**completion_fields(f"row{number}", "A story.", messages=[Message("user", f"Story {number}.")]))


def test_of_the_judge(run: RunDir, dies_in_two: pytest.MonkeyPatch) -> None:
    with misbehaving(lambda asked: answer("?")) as server:  # no verdict: each row is asked about twice
        judge = {"base_url": server.url, "rubric": {"fit": "fits"}, "attempts": 2, "max_tokens": 50}
        recipe = recipe_for(server, filters={"judge": {**judge, "budget": {"tokens": 7000}}})
        with pytest.raises(KeyboardInterrupt):
            judge_rows(Judge.of_filters(recipe, run), run, map(row, range(200)), quiet=True)
        assert len(server.asked) == 400
        dies_in_two.undo()
        with pytest.raises(BudgetReached):
            judge_rows(Judge.of_filters(recipe, run), run, map(row, range(600)), quiet=True)
    assert len(server.asked) * TOKENS <= 7000


def seeds(server: MisbehavingServer, folder: Path, count: int) -> Recipe:
    file = folder / "seeds.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": f"Name {n} things that are not {n * n}."}) + "\n" for n in range(count))
    )
    return recipe_for(server, prompts={"file": file}, sampling={"max_tokens": 20}, budget={"tokens": 6000})


def test_of_the_rounds_of_evolve(run: RunDir, tmp_path: Path, dies_in_two: pytest.MonkeyPatch) -> None:
    def rewriting(asked: Asked) -> Behaviour:
        digits = sha256(asked.text.encode()).hexdigest()
        return answer(" ".join(digits[start : start + 6] for start in range(0, 60, 6)))

    with misbehaving(rewriting) as server:
        with pytest.raises(KeyboardInterrupt):
            evolve(seeds(server, tmp_path, 100), run, rounds=2, quiet=True)
        assert len(server.asked) == 300
        dies_in_two.undo()
        with pytest.raises(BudgetReached):
            evolve(seeds(server, tmp_path, 600), run, rounds=1, quiet=True)
    assert len(server.asked) * TOKENS <= 6000
