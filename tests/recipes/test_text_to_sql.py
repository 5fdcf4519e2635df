"""The recipe text_to_sql: its shop, its questions, and who stays of a few made answers."""

import importlib.util
import json
from collections import Counter
from itertools import islice
from pathlib import Path
from random import Random
from types import ModuleType

import pytest

HERE = Path(__file__).parents[2] / "recipes" / "text_to_sql"


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


questions = module("questions")


def lines(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (HERE / name).read_text(encoding="utf-8").splitlines()]


def test_the_scripts_write_the_committed_files() -> None:
    dump = "\n".join(module("make_shop").make_shop(Random(0)).iterdump()) + "\n"
    assert dump == (HERE / "shop.sql").read_text(encoding="utf-8")
    assert lines("unseen.jsonl") == list(islice(questions.questions("unseen", 30), 240))


def test_twenty_thousand_different_questions() -> None:
    every = list(questions.rows())
    assert len({row["prompt"] for row in every}) == len(every)
    assert every[:50] == list(islice(questions.rows(), 50))  # the same each time
    rows = [row for row in every if "reference" in row]
    assert len(rows) == 20_000
    first = Counter(row["template"] for row in rows[:3000])
    assert len(first) == 60
    assert max(first.values()) < 60  # a fair draw
    assert set(Counter(row["category"] for row in rows)) == {"count", "filter", "join", "group", "date", "nested"}
    unseen = lines("unseen.jsonl")
    assert not {row["prompt"] for row in unseen} & {row["prompt"] for row in every}
    assert len({row["template"] for row in unseen}) == 12


def test_what_the_teacher_wrote_comes_early_and_brings_no_gold() -> None:
    written = [row for row in questions.rows() if row["category"] == "written"]
    assert written == lines("evolved.jsonl") and not any("reference" in row for row in written)
    kinds = ["reference" in row for row in islice(questions.rows(), 700)]
    assert kinds == [True, True, True, True, True, False, False] * 100


@pytest.mark.parametrize("part", ["seen", "unseen"])
def test_every_gold_query_finds_the_same_rows_whatever_the_order_of_the_table(part: str) -> None:
    shop, reverse = questions.open_shop(), questions.open_shop()
    reverse.execute("PRAGMA reverse_unordered_selects = ON")
    for row in islice(questions.questions(part, 12), 600):
        found = shop.execute(row["reference"]).fetchall()
        assert found, row
        assert Counter(found) == Counter(reverse.execute(row["reference"]).fetchall()), row
