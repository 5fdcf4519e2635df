"""docs/your_own_data.md: its recipe is valid, and does what the page says."""

import csv
import re
from pathlib import Path

import pytest
import yaml

from filters.run import filter_run
from generate.run import generate
from pipeline.instructions import asked_of_student
from pipeline.recipe import load_recipe
from pipeline.records import Dropped, Kept, read_jsonl
from pipeline.rundir import RunDir
from tests.servers.misbehaving_server import Asked, Behaviour, answer, misbehaving

PAGE = Path(__file__).parents[2] / "docs" / "your_own_data.md"


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
