"""Records as Parquet: nothing is lost on the way, and the file serves as prompts again."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from generate.prompts import iter_prompts
from pipeline import parquet
from pipeline.errors import DataError, UsageError
from pipeline.parquet import main, to_parquet
from pipeline.recipe import Recipe
from pipeline.records import Completion, Dropped, Failure, Kept, Message, Preference, Prompt, Reason
from pipeline.rundir import RunDir, write_jsonl
from tests.completion_fields import completion_fields

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
TURNS = [Message("user", "q"), Message("assistant", "", [CALL]), Message("tool", "r", tool_call_id="1")]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
FIELDS: dict[str, Any] = {
    "messages": TURNS,
    "slots": {"a": ["x"]},
    "reference": {"label": None},
    "columns": {"topic": "t", "n": 1},
    "tools": TOOLS,
    "sampling": {"seed": 1, "temperature": 0.5},
}


def rows_of(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    return rows


def test_every_field_of_every_kind_of_record_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, answer = RunDir(tmp_path), completion_fields("a", "text", **FIELDS, sample=2, tool_calls=[CALL])
    asked = {name: answer[name] for name in ("id", "prompt_id", "messages", "sampling", "endpoint", "model", "created")}
    write_jsonl(run.completions, [Completion(**answer), Completion(**completion_fields("b", ""))])
    write_jsonl(run.kept, [Kept(**answer, scores={"judge": 4.5})])
    write_jsonl(run.dropped, [Dropped(**answer, rule="length", detail=[Reason(rule="length", value=3)])])
    write_jsonl(run.failures, [Failure(**asked, error="timeout", status=None, message="m", attempts=3)])
    write_jsonl(run.prompts, [Prompt(id="p", messages=TURNS, part="test")])
    better, worse = ([Message("assistant", text)] for text in ("yes", "no"))
    write_jsonl(run.preferences, [Preference(id="a:b", prompt=TURNS[:1], chosen=better, rejected=worse)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["parquet", str(tmp_path)])
        main()
    assert len(capsys.readouterr().out.splitlines()) == 6
    for path, kind in (
        (run.completions, Completion),
        (run.kept, Kept),
        (run.dropped, Dropped),
        (run.failures, Failure),
    ):
        (row, *_) = rows_of(path.with_suffix(".parquet"))
        assert set(row) == set(kind.__struct_fields__)
        assert json.loads(row["sampling"]) == FIELDS["sampling"]
        assert [turn["content"] for turn in row["messages"]] == ["q", "", "r"]
    row, plain = rows_of(run.completions.with_suffix(".parquet"))
    assert (row["sample"], row["latency_s"], row["tool_calls"]) == (2, 0.1, [CALL])
    assert (row["messages"][1]["tool_calls"], json.loads(row["reference"])) == ([CALL], FIELDS["reference"])
    assert (json.loads(row["columns"]), plain["reference"], plain["tool_calls"]) == (FIELDS["columns"], None, [])
    assert json.loads(rows_of(run.kept.with_suffix(".parquet"))[0]["scores"]) == {"judge": 4.5}
    assert rows_of(run.prompts.with_suffix(".parquet"))[0]["part"] == "test"
    (pair,) = rows_of(run.preferences.with_suffix(".parquet"))
    assert [pair[side][0]["content"] for side in ("prompt", "chosen", "rejected")] == ["q", "yes", "no"]


def test_exported_prompts_are_the_same_prompts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "ROWS_AT_ONCE", 2)
    fields = {name: FIELDS[name] for name in ("messages", "slots", "reference", "columns", "tools")}
    prompts = [Prompt(id=f"p{number}", **fields) for number in range(4)] + [
        Prompt(id="p", messages=[Message("user", "q")])
    ]
    write_jsonl(RunDir(tmp_path).prompts, prompts)
    file = to_parquet(RunDir(tmp_path).prompts)
    settings = {"file": file, "json_columns": ["reference", "columns", "slots", "tools"]}
    read = list(iter_prompts(Recipe(name="t", teacher={"model": "m"}, prompts=settings)))
    assert [msgspec.structs.replace(prompt, columns={}) for prompt in read] == [
        msgspec.structs.replace(prompt, columns={}) for prompt in prompts
    ]
    assert [prompt.columns for prompt in read] == [prompt.columns | {"part": None} for prompt in prompts]


def test_what_is_no_file_of_records_is_refused_and_a_bad_line_leaves_the_old_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a file of records"):
        to_parquet(tmp_path / "lineage.json")
    for path, said in (
        (tmp_path, "no files of records in it"),
        (tmp_path / "typo", "typo: no such file or folder; give"),
    ):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(UsageError, match=said):
            patch.setattr("sys.argv", ["parquet", str(path)])
            main()
    run = RunDir(tmp_path)
    write_jsonl(run.prompts, [Prompt(id="p", messages=TURNS)])
    old = to_parquet(run.prompts).read_bytes()
    with run.prompts.open("ab") as file:
        file.write(b"{}\n")
    with pytest.raises(DataError, match=r"prompts\.jsonl:2"):
        to_parquet(run.prompts)
    assert (tmp_path / "prompts.parquet").read_bytes() == old
