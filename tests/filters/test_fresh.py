"""References and columns that came after the answers were bought: they are joined, and nothing else moves."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

import filters.fresh
import filters.stream
from generate.run import generate
from pipeline.errors import DataError
from pipeline.records import Dropped, Kept, Message, Prompt, encode_line, read_jsonl
from tests.filters.test_run import GOOD, ROWS, Stage, completion
from tests.servers.misbehaving_server import misbehaving, recipe_for

QUESTION = ROWS[0].messages


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def prompts(stage: Stage, *rows: Prompt) -> None:
    stage.run.path.mkdir(exist_ok=True)
    stage.run.prompts.write_bytes(b"".join(map(encode_line, rows)))


def filtered(stage: Stage) -> dict[str, Kept | Dropped]:
    rows = [*read_jsonl(stage.run.kept, Kept), *read_jsonl(stage.run.dropped, Dropped)]
    return {row.prompt_id: row for row in rows}


def test_newer_values_are_joined_by_question_and_other_lines_stay_as_they_are(stage: Stage) -> None:
    asked = [[Message("user", f"{number}번 이야기를 써 주세요.")] for number in range(5)]
    rows = [msgspec.structs.replace(row, messages=asked[number]) for number, row in enumerate(ROWS)]
    stage.completions(b"".join(map(encode_line, rows)))
    stage.filter()
    old = stage.run.kept.read_bytes().splitlines(), stage.run.dropped.read_bytes().splitlines()
    prompts(
        stage,
        Prompt(id="p4", messages=asked[4], slots=rows[4].slots, reference={"n": [1]}, columns={"topic": "x"}),
        Prompt(id="of the user's own", messages=asked[1], slots={"who": "곰"}, reference="토끼"),
        Prompt(id="p2", messages=[Message("user", "another question under the same id")], reference="no"),
        Prompt(id="p3", messages=asked[3], slots=rows[3].slots),
        Prompt(id="never answered", messages=[Message("user", "?")], reference=5),
    )
    stage.filter()
    filtered_rows = filtered(stage)
    assert (filtered_rows["p4"].reference, filtered_rows["p4"].columns) == ({"n": [1]}, {"topic": "x"})
    assert "p1" not in filtered_rows
    named = filtered_rows["of the user's own"]
    assert (named.slots, named.reference, named.text) == ({"who": "곰"}, "토끼", rows[1].text)
    assert [filtered_rows[f"p{number}"].reference for number in (0, 2, 3)] == [None] * 3
    new = stage.run.kept.read_bytes().splitlines(), stage.run.dropped.read_bytes().splitlines()
    assert [a == b for a, b in zip(old[0], new[0], strict=True)] == [True, False]  # of p0 and p4
    assert [a == b for a, b in zip(old[1], new[1], strict=True)] == [False, True, True]  # of p1, p2 and p3


def test_of_a_question_that_stands_there_several_times_an_answer_gets_the_row_with_its_id(stage: Stage) -> None:
    rows = [msgspec.structs.replace(completion(n, f"{n}"), reference="old") for n in (1, 2, 3)]
    stage.rules([{"rule": "length", "min_chars": 1}], dedup=None)
    stage.completions(b"".join(map(encode_line, rows)))
    new = [Prompt(id=f"p{n}", messages=QUESTION, reference=f"of p{n}") for n in (2, 1, 0)]
    prompts(stage, *new)
    stage.filter()
    kept = read_jsonl(stage.run.kept, Kept)
    assert [(row.prompt_id, row.reference) for row in kept] == [("p1", "of p1"), ("p2", "of p2"), ("p0", "of p0")]


def test_ids_that_are_given_later_are_joined_where_prompts_have_nothing_else(stage: Stage, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    recipe = yaml.safe_load(stage.recipe.read_text(encoding="utf-8"))
    path.write_text('{"prompt": "say 1"}\n')
    recipe |= {"prompts": {"file": str(path)}, "filters": {"rules": [{"rule": "length", "min_chars": 1}]}}
    stage.recipe.write_text(yaml.safe_dump(recipe))
    stage.completions(encode_line(msgspec.structs.replace(ROWS[0], messages=QUESTION)))
    prompts(stage, Prompt(id="mine", messages=QUESTION))
    stage.filter()
    assert [*filtered(stage)] == ["mine"]


def test_the_rules_see_the_newest_values(stage: Stage) -> None:
    stage.rules([{"rule": "matches"}])
    rows = [completion(number, text) for number, text in enumerate(["4", "5", "6"])]
    stale = msgspec.structs.replace(rows[2], reference="6")
    stage.completions(b"".join(map(encode_line, [*rows[:2], stale])))
    prompts(stage, *(Prompt(id=f"p{number}", messages=QUESTION, reference="4") for number in range(3)))
    stage.filter()
    assert [row.prompt_id for row in read_jsonl(stage.run.kept, Kept)] == ["p0"]
    assert [row.reference for row in read_jsonl(stage.run.dropped, Dropped)] == ["4", "4"]


def test_values_in_another_order_are_the_same(stage: Stage) -> None:
    row = completion(0, "토끼 토토가 당근을 먹었어요.")
    known = msgspec.structs.replace(row, columns={"a": 1, "b": 2})
    stage.completions(encode_line(known))
    prompts(stage, Prompt(id="p0", messages=QUESTION, columns={"b": 2, "a": 1}))
    stage.filter()
    assert stage.run.kept.read_bytes().startswith(encode_line(known)[:-2])


def test_a_question_that_stands_there_several_times_leaves_each_answer_the_values_of_its_own_row(stage: Stage) -> None:
    values: list[dict[str, Any]] = [{"reference": n, "columns": {"from": f"row {n}", "n": n}} for n in range(40)]
    rows = [msgspec.structs.replace(completion(n, f"{n}"), prompt_id="p", **values[n]) for n in range(40)]
    questions = QUESTION, [Message("user", "another question that stands there several times")]
    rows += [msgspec.structs.replace(row, messages=questions[1]) for row in rows]
    changed = msgspec.structs.replace(rows[3], id="of a row that is there no more", reference="old")
    stage.rules([{"rule": "length", "min_chars": 1}], dedup=None)
    stage.completions(b"".join(map(encode_line, [*rows, changed])))
    prompts(stage, *(Prompt(id="p", messages=asked, **values[n]) for n in range(40) for asked in questions))
    stage.filter()
    kept = list(read_jsonl(stage.run.kept, Kept))
    assert [(row.reference, row.columns) for row in kept[:-1]] == [(n, values[n]["columns"]) for n in range(40)] * 2
    assert (kept[-1].reference, kept[-1].columns) == (39, values[39]["columns"])  # the last one's


def test_every_process_joins(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters.stream, "PARALLEL_FROM", 0)
    monkeypatch.setattr(filters.stream, "BLOCK", 4000)
    rows = [completion(number, f"토끼 {number}번이 당근을 먹었어요.") for number in range(300)]
    stage.rules([{"rule": "length", "min_chars": 1}], dedup=None)
    stage.completions(b"".join(map(encode_line, rows)))
    prompts(stage, *(Prompt(id=f"p{number}", messages=QUESTION, reference=number) for number in reversed(range(300))))
    stage.filter()
    assert [row.reference for row in read_jsonl(stage.run.kept, Kept)] == [*range(300)]


def test_values_that_were_removed_decide_nothing(stage: Stage) -> None:
    stage.rules([{"rule": "matches"}])
    old = msgspec.structs.replace(completion(0, "4"), reference="4", columns={"topic": "x"})
    stage.completions(encode_line(old))
    stage.filter()
    assert filtered(stage)["p0"].reference == "4"
    prompts(stage, Prompt(id="p0", messages=QUESTION))
    stage.filter()
    row = filtered(stage)["p0"]
    assert (row.reference, row.columns) == (None, {})
    assert isinstance(row, Dropped) and row.rule == "unverified"


def test_no_index_is_made_if_there_is_nothing_to_join(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.completions()
    prompts(stage, Prompt(id="p1", messages=QUESTION))
    monkeypatch.setattr(filters.fresh, "FreshValues", None)
    stage.filter()
    prompts(stage, Prompt(id="p1", messages=[Message("user", 'says "reference": and "columns":')]))
    monkeypatch.undo()
    stage.filter()
    assert stage.report()["rows"] == len(GOOD.splitlines())


def test_a_bad_line_of_prompts_is_named_and_nothing_is_replaced(stage: Stage) -> None:
    stage.completions()
    stage.filter()
    old = stage.outputs()
    prompts(stage, Prompt(id="p1", messages=QUESTION, reference=1))
    with stage.run.prompts.open("ab") as file:
        file.write(b"{}\n")
    with pytest.raises(DataError, match=r"prompts\.jsonl:2: .*`python -m generate` writes it again"):
        stage.filter()
    assert stage.outputs() == old


def test_a_column_that_is_added_later_buys_nothing_twice(stage: Stage, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    rows: list[dict[str, Any]] = [{"prompt": f"say {number}"} for number in range(5)]
    stage.rules([{"rule": "length", "min_chars": 1}], dedup=None)
    with misbehaving() as server:
        recipe = recipe_for(server, prompts={"file": str(path), "samples": 2})
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert generate(recipe, stage.run, quiet=True).answered == 10
        rows = [{**row, "reference": number, "topic": "x"} for number, row in enumerate(rows)]
        path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "say 5", "reference": 5}]))
        again = generate(recipe, stage.run, quiet=True)
        assert (again.resumed, again.answered, len(server.asked)) == (10, 2, 12)
    stage.filter()
    kept = list(read_jsonl(stage.run.kept, Kept))
    assert len(kept) == 12
    assert all(row.reference == int(row.messages[0].content.removeprefix("say ")) for row in kept)
    assert {row.columns.get("topic") for row in kept if row.reference != 5} == {"x"}


def test_a_dry_run_holds_answers_against_the_newest_reference(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [msgspec.structs.replace(completion(n, f"{n}"), reference=9) for n in (1, 2)]
    stage.rules([{"rule": "matches", "as": "number"}])
    stage.completions(b"".join(map(encode_line, rows)))
    stage.filter()
    prompts(stage, *(Prompt(id=f"p{n}", messages=QUESTION, reference=n) for n in (1, 2)))
    capsys.readouterr()
    stage.filter("--dry-run")
    assert "0 kept (0.0%), with these rules 2 (100.0%)" in capsys.readouterr().out
