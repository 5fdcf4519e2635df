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


def test_the_scripts_write_the_committed_files() -> None:
    dump = "\n".join(module("make_shop").make_shop(Random(0)).iterdump()) + "\n"
    assert dump == (HERE / "shop.sql").read_text(encoding="utf-8")
    unseen = [json.loads(line) for line in (HERE / "unseen.jsonl").read_text(encoding="utf-8").splitlines()]
    assert unseen == list(islice(questions.questions("unseen", 30), 240))


def test_twenty_thousand_different_questions() -> None:
    rows = list(questions.rows())
    assert len({row["prompt"] for row in rows}) == len(rows) == 20_000
    assert rows[:50] == list(islice(questions.rows(), 50))  # the same each time
    first = Counter(row["template"] for row in rows[:3000])
    assert len(first) == 60
    assert max(first.values()) < 60  # a fair draw
    assert set(Counter(row["category"] for row in rows)) == {"count", "filter", "join", "group", "date", "nested"}
    unseen = [json.loads(line) for line in (HERE / "unseen.jsonl").read_text(encoding="utf-8").splitlines()]
    assert not {row["prompt"] for row in unseen} & {row["prompt"] for row in rows}
    assert len({row["template"] for row in unseen}) == 12


@pytest.mark.parametrize("part", ["seen", "unseen"])
def test_every_gold_query_finds_the_same_rows_whatever_the_order_of_the_table(part: str) -> None:
    shop, reverse = questions.open_shop(), questions.open_shop()
    reverse.execute("PRAGMA reverse_unordered_selects = ON")
    for row in islice(questions.questions(part, 12), 600):
        found = shop.execute(row["reference"]).fetchall()
        assert found, row
        assert Counter(found) == Counter(reverse.execute(row["reference"]).fetchall()), row
