"""docs/your_own_data.md: its recipe is valid, and does what the page says."""

import csv
import json
import re
from pathlib import Path

import pytest
import yaml

from filters.run import filter_run
from generate.prompts import iter_prompts
from generate.run import generate
from pipeline.instructions import asked_of_student
from pipeline.recipe import Recipe, load_recipe
from pipeline.records import Completion, Dropped, Kept, Message, read_jsonl
from pipeline.rundir import RunDir
from tests.servers.misbehaving_server import Asked, Behaviour, answer, misbehaving

PAGE = Path(__file__).parents[2] / "docs" / "your_own_data.md"


def program_of_page(words: str) -> str:
    """The program of the page that has these words."""
    programs = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (found,) = (program for program in programs if words in program)
    assert isinstance(found, str)
    return found


def test_the_recipe_of_the_page_takes_a_csv_to_kept_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "not-a-key")
    found = re.search(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    data = yaml.safe_load(found[1])
    path, run = tmp_path / "mine.yaml", RunDir(tmp_path / "run")
    with (tmp_path / "tickets.csv").open("w", newline="") as file:
        rows = [
            ("1", "Where is my parcel?", "delivery", "lamp"),
            ("2", "I was charged twice, please.", "billing", "phone"),
        ]
        csv.writer(file).writerows([("ticket_id", "text", "label", "product"), *rows])

    def script(asked: Asked) -> Behaviour:
        assert [message["role"] for message in asked.body["messages"]] == ["system", *["user", "assistant"] * 2, "user"]
        return answer("Delivery." if asked.body["seed"] % 2 or "parcel" in asked.text else "other")

    with misbehaving(script) as server:
        path.write_text(yaml.safe_dump({**data, "teacher": {**data["teacher"], "base_url": server.url}}))
        recipe = load_recipe(path)
        assert recipe.evaluate.ask_teacher  # so that the report has its right answers, as the page says
        assert generate(recipe, run, quiet=True).answered == 8
    filter_run(recipe, run, path)
    (kept,) = read_jsonl(run.kept, Kept)
    assert (kept.prompt_id, kept.reference, kept.columns) == ("1", "delivery", {"product": "lamp"})
    assert [message.content for message in asked_of_student(kept.messages, recipe.student)] == ["Where is my parcel?"]
    assert {row.prompt_id for row in read_jsonl(run.dropped, Dropped) if row.rule == "choice"} == {"2"}


def test_the_function_of_the_page_makes_rows_of_other_shapes(tmp_path: Path) -> None:
    (tmp_path / "rows.py").write_text(program_of_page("def rows"), encoding="utf-8")
    asked, told = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}
    given = [
        {"instruction": "Translate.", "input": "Der Öltank", "output": "the oil tank"},
        {"instruction": "Say a word.", "input": "", "output": "Word"},
        {"instruction": "Say two.", "input": None, "output": "Two"},
        {"instruction": "Say three.", "output": "Three"},
        {"conversations": []},
        {"conversations": [{"from": "system", "value": "Be kind."}, told]},
        {"conversations": [{"from": "system", "value": "Be kind."}, asked, told, {**asked, "value": "Bye"}, told]},
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, given)))
    recipe = Recipe(name="x", teacher={"model": "m"}, prompts={"file": tmp_path / "rows.py"})
    alpaca, *alone, shared = iter_prompts(recipe)
    assert (alpaca.messages, alpaca.reference) == ([Message("user", "Translate.\n\nDer Öltank")], "the oil tank")
    assert [turn.content for row in alone for turn in row.messages] == ["Say a word.", "Say two.", "Say three."]
    assert [(turn.role, turn.content) for turn in shared.messages] == [
        ("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")
    ]  # fmt: skip


def test_the_recipe_of_the_page_takes_in_answers_that_are_there(tmp_path: Path) -> None:
    """Each row gets its own, and nobody is asked."""
    (found,) = re.findall(r"```yaml\n(teacher: .*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "mine.yaml").write_text(f"name: mine\n{found}")
    rows = [("I paid twice.", "어떤 청구서인가요?"), ("I paid twice.", "billing"), ("It broke.", "returns, please")]
    with (tmp_path / "tickets.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "output"), *rows])
    run = RunDir(tmp_path / "run")
    assert generate(tmp_path / "mine.yaml", run, quiet=True).answered == 3
    answers = [*read_jsonl(run.completions, Completion)]
    assert [(row.messages[0].content, row.text) for row in answers] == rows
    assert {row.model for row in answers} == {"gpt-4.1"}
