"""Where prompts come from: each format, what its columns become, and what a wrong one says."""

import csv
import datetime
import decimal
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from generate.prompts import iter_prompts
from generate.run import generate
from pipeline.errors import DataError, RecipeError
from pipeline.recipe import load_recipe
from pipeline.records import Prompt, read_jsonl
from pipeline.rundir import RunDir
from tests.generate.test_prompts import recipe_with
from tests.servers.misbehaving_server import completions, misbehaving, recipe_for

ROWS: list[dict[str, Any]] = [
    {"question": "eins", "gold": "1", "nr": "a", "topic": "x, y", "note": "two\nlines"},
    {"question": "zwei", "gold": '{"n": 2}', "nr": "b", "topic": '"z"', "note": None},
]
DEEP = "[" * 60_000 + "]" * 60_000
ROW = "def rows():\n    yield {'prompt': 'a', "
COLUMNS = {"prompt": "question", "reference": "gold", "id": "nr"}


def prompts_of(path: Path | str, **settings: Any) -> list[Prompt]:
    return list(iter_prompts(recipe_with(file=path, **settings)))


def write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def write_csv(path: Path, delimiter: str = ",") -> None:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=1)


def write_folder(path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(path))


def write_python(path: Path) -> None:
    path.write_text(f"def rows():\n    yield from {ROWS!r}\n")


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("p.jsonl", write_jsonl),
        ("p.ndjson", write_jsonl),
        ("p.csv", write_csv),
        ("p.CSV", lambda path: write_csv(path, ";")),
        ("p.tsv", lambda path: write_csv(path, "\t")),
        ("p.parquet", write_parquet),
        ("folder", write_folder),
        ("p.py", write_python),
    ],
)
def test_every_source_gives_the_same_prompts(tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
    write(tmp_path / name)
    first, second = prompts_of(tmp_path / name, columns=COLUMNS)
    assert (first.id, first.messages[0].content, first.reference) == ("a", "eins", "1")
    assert first.columns == {"topic": "x, y", "note": "two\nlines"}
    assert (second.reference, second.columns) == ('{"n": 2}', {"topic": '"z"', "note": None})
    (decoded, *_) = prompts_of(tmp_path / name, columns={**COLUMNS, "reference": None}, json_columns=["gold"])
    assert (decoded.reference, decoded.columns["gold"]) == (None, 1)
    assert len(prompts_of(tmp_path / name, columns=COLUMNS, count=1)) == 1


def test_by_default_the_columns_are_called_as_the_parts_and_nothing_is_dropped(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "now"}}
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    turns = [
        {"role": "user", "content": "Wie spät?", "name": "Kim"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "12:00", "tool_call_id": "1"},
    ]
    row = {
        "messages": turns,
        "reference": {"a": [None]},
        "id": 7,
        "tools": [tool],
        "big": 10**30,
        "columns": {"k": None},
    }
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    (prompt,) = prompts_of(tmp_path / "p.jsonl")
    assert (prompt.id, prompt.reference, prompt.tools) == ("7", {"a": [None]}, [tool])
    assert [message.content for message in prompt.messages] == ["Wie spät?", "", "12:00"]
    assert (prompt.messages[1].tool_calls, prompt.messages[2].tool_call_id) == ([call], "1")
    assert prompt.columns == {"messages": turns, "big": 10**30, "k": None}  # a name is no part of a Message: kept here
    plain = {"messages": [{"role": "user", "content": "a"}], "id": None, "reference": None}
    (tmp_path / "p.jsonl").write_text(json.dumps(plain) + "\n")
    (prompt,) = prompts_of(tmp_path / "p.jsonl", tools=[tool])
    assert (len(prompt.id), prompt.reference, prompt.tools, prompt.columns) == (16, None, [tool], {})


def test_values_that_json_does_not_have_become_text(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    moment = datetime.datetime(2026, 3, 1, 12, 30, 0, 250000, tzinfo=datetime.UTC)
    row = {
        "prompt": "a",
        "day": datetime.date(2026, 3, 1),
        "moment": moment,
        "price": decimal.Decimal("12345678901234567890.10"),
        "blob": b"\x00\xff",
        "missing": float("nan"),
        "far": [float("inf")],
        "deep": {"when": [moment], "n": 2**63 - 1},
    }
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "p.parquet")
    (prompt,) = prompts_of(tmp_path / "p.parquet")
    assert prompt.columns == {
        "day": "2026-03-01",
        "moment": "2026-03-01T12:30:00.250000Z",
        "price": "12345678901234567890.10",
        "blob": "AP8=",
        "missing": None,
        "far": ["inf"],
        "deep": {"when": ["2026-03-01T12:30:00.250000Z"], "n": 2**63 - 1},
    }
    nanoseconds = pyarrow.array([1], pyarrow.timestamp("ns")), pyarrow.array([1], pyarrow.duration("ns"))
    table = pyarrow.table({"prompt": ["a"], "at": nanoseconds[0], "took": nanoseconds[1]})
    pyarrow.parquet.write_table(table, tmp_path / "ns.parquet")
    (tmp_path / "np.py").write_text(
        "import numpy as np\n\n"
        "def rows():\n    yield {'prompt': 'a', 'x': np.int64(3), 'y': np.arange(2), 'z': {1: (2,)}}\n"
    )
    (prompt,) = prompts_of(tmp_path / "np.py")
    assert prompt.columns == {"x": 3, "y": [0, 1], "z": {"1": [2]}}
    (tmp_path / "pd.py").write_text(
        "import pandas as pd\n\n"
        "def rows():\n    yield {'prompt': 'a', 'x': pd.NA, 'y': pd.NaT, 'z': [float('nan'), float('-inf')]}\n"
    )
    (prompt,) = prompts_of(tmp_path / "pd.py")
    assert prompt.columns == {"x": None, "y": None, "z": [None, "-inf"]}
    (prompt,) = prompts_of(tmp_path / "ns.parquet")
    assert prompt.columns == {"at": "1970-01-01T00:00:00.000000001", "took": "P0DT0H0M0.000000001S"}


def test_conversations_and_tools_of_arrow_have_no_nulls_of_other_rows(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    tools = [
        {"type": "function", "function": {"name": "f", "strict": True}},
        {"type": "function", "function": {"name": "g", "parameters": {"type": "object"}}},
    ]
    rows = [
        {"messages": [{"role": "user", "content": "a"}], "tools": tools[:1]},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}], "tools": tools[1:]},
    ]
    rows[1]["messages"].append({"role": "tool", "content": "b", "tool_call_id": "1"})  # type: ignore[attr-defined]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "rows"))
    first, second = prompts_of(tmp_path / "rows")
    assert (first.tools, second.tools) == (rows[0]["tools"], rows[1]["tools"])
    assert (second.messages[0].tool_calls, second.columns) == ([call], {})


@pytest.mark.parametrize("kind", ["parquet", "folder", "jsonl"])
def test_only_of_arrow_an_object_loses_its_nulls(tmp_path: Path, kind: str) -> None:
    """Arrow gives each object all keys that any row has: a right {"a": 1} would not match {"a": 1, "b": null}."""
    import datasets

    references: list[Any] = [{"a": 1, "deep": [{"x": [1, None]}]}, {"b": 2, "deep": [{"y": None}, None]}, None]
    rows = [{"prompt": str(number), "reference": value} for number, value in enumerate(references)]
    path = tmp_path / f"p.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert [prompt.reference for prompt in prompts_of(path)] == references
        return
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(str(path)) if kind == "parquet" else table.save_to_disk(str(path))
    arrows: list[Any] = [references[0], {"b": 2, "deep": [{}, None]}, None]
    assert [prompt.reference for prompt in prompts_of(path)] == arrows


@pytest.mark.parametrize("kind", ["folder", "hub", "stream"])
def test_a_class_is_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The rule `choice` names labels, which no number is."""
    datasets = pytest.importorskip("datasets")
    label = datasets.ClassLabel(names=["neg", "pos"])
    features = {"prompt": datasets.Value("string"), "reference": label, "tags": datasets.Sequence(label)}
    columns = {"prompt": list("abcd"), "reference": [1, 0, None, -1], "tags": [[0, 1], [], None, [-1]]}
    saved = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    saved.save_to_disk(str(tmp_path / "rows"))
    loaded = saved.to_iterable_dataset() if kind == "stream" else saved
    monkeypatch.setattr("datasets.load_dataset", lambda *names, streaming: {"train": loaded})
    found = prompts_of(tmp_path / "rows" if kind == "folder" else "hub:some/reviews")
    assert [prompt.reference for prompt in found] == ["pos", "neg", None, None]
    assert [prompt.columns["tags"] for prompt in found] == [["neg", "pos"], [], None, [None]]
    untyped = saved.to_iterable_dataset().map(lambda row: row)  # features: None
    assert untyped.features is None
    monkeypatch.setattr("datasets.load_dataset", lambda *names, streaming: {"train": untyped})
    assert len(prompts_of("hub:some/reviews")) == 4


@pytest.mark.parametrize("kind", ["folder", "hub", "stream"])
def test_columns_of_images_and_sound_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """No stage reads them. They are not decoded either: these are no images."""
    datasets = pytest.importorskip("datasets")
    image, features = {"bytes": b"none", "path": None}, {"prompt": datasets.Value("string"), "image": datasets.Image()}
    features |= {"pages": datasets.Sequence(datasets.Image()), "sound": datasets.Audio(), "n": datasets.Value("int64")}
    columns = {"prompt": ["a"], "image": [image], "pages": [[image]], "sound": [None], "n": [3]}
    saved = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    saved.save_to_disk(str(tmp_path / "rows"))
    loaded = saved.to_iterable_dataset() if kind == "stream" else saved
    monkeypatch.setattr("datasets.load_dataset", lambda *names, streaming: {"train": loaded})
    (prompt,) = prompts_of(tmp_path / "rows" if kind == "folder" else "hub:some/pictures")
    assert prompt.columns == {"n": 3}


def test_splits_are_named_in_the_recipe(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    train, test = (datasets.Dataset.from_dict({"prompt": [name]}) for name in ("one", "two"))
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(str(tmp_path / "both"))
    datasets.DatasetDict({"only": train}).save_to_disk(str(tmp_path / "one"))
    train.save_to_disk(str(tmp_path / "plain"))
    assert [prompt.messages[0].content for prompt in prompts_of(tmp_path / "both", split="test")] == ["two"]
    assert [prompt.messages[0].content for prompt in prompts_of(tmp_path / "one")] == ["one"]
    for name, split in (("both", None), ("both", "tset"), ("one", "test")):
        with pytest.raises(DataError, match=rf"holds the splits .*; set prompts\.split, got {split!r}"):
            prompts_of(tmp_path / name, split=split)
    with pytest.raises(DataError, match=r"has no splits; remove prompts\.split, which is 'x'"):
        prompts_of(tmp_path / "plain", split="x")
    with pytest.raises(RecipeError, match=r"prompts\.split is for a `datasets` folder or the Hub"):
        prompts_of(tmp_path / "p.jsonl", split="x")


def test_a_data_set_of_the_hub_is_streamed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(*names: Any, streaming: bool) -> Any:
        asked.append((*names, streaming))
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})

    monkeypatch.setattr("datasets.load_dataset", load)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: t\nteacher: {model: m}\nprompts: {file: 'hub:some/questions/main'}\n")
    loaded = load_recipe(recipe)
    assert [prompt.id for prompt in prompts_of(str(loaded.prompts.file), columns=COLUMNS)] == ["a", "b"]
    prompts_of("hub:some/questions", columns=COLUMNS, split="train")
    assert asked == [("some/questions", "main", True), ("some/questions", None, True)]


def test_a_hub_that_cannot_be_reached_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"prompts\.file hub:some/questions: .*check the name, the subset and the net"):
        prompts_of("hub:some/questions")


def test_the_names_of_csv_may_have_blanks_around_them(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt, reference ,\tid\na, b,c\n")
    (prompt,) = prompts_of(tmp_path / "p.csv")
    assert (prompt.messages[0].content, prompt.reference, prompt.id, prompt.columns) == ("a", " b", "c", {})


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_rows_that_cannot_be_read_are_one_line(tmp_path: Path, kind: str) -> None:
    """A picture that is none, within an object, and years that Python does not have."""
    datasets = pytest.importorskip("datasets")
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / kind
    if kind == "folder":
        features = {"prompt": datasets.Value("string"), "of": {"picture": datasets.Image()}}
        columns = {"prompt": ["a"], "of": [{"picture": {"bytes": b"none", "path": None}}]}
        datasets.Dataset.from_dict(columns, features=datasets.Features(features)).save_to_disk(str(path))
    else:
        path = path.with_suffix(".parquet")
        far = pyarrow.array([2**60], pyarrow.timestamp("us"))
        pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"], "at": far}), path)
    with pytest.raises(DataError, match=r"prompts\.file .*Error: .*, without columns that cannot be read$") as caught:
        prompts_of(path)
    assert "\n" not in str(caught.value)


def test_a_damaged_folder_is_one_line(tmp_path: Path) -> None:
    write_folder(tmp_path / "rows")
    (file,) = (tmp_path / "rows").glob("*.arrow")
    content = bytearray(file.read_bytes())
    content[8:200] = b"\xff" * 192
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"prompts\.file .*rows: .*; give a folder that `datasets` saved"):
        prompts_of(tmp_path / "rows")


def test_a_folder_of_files_is_told_what_reads_several(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"give a folder that .*; rows\(\) of a \.py file may read several other"):
        prompts_of(tmp_path)


def test_two_columns_of_one_name_are_refused_in_parquet_too(tmp_path: Path) -> None:
    """Arrow's rows would have the later one only."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table([["a"], ["b"]], names=["prompt", "prompt"])
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    with pytest.raises(DataError, match=r"p\.parquet: each column needs a name of its own, got 'prompt', 'prompt'"):
        prompts_of(tmp_path / "p.parquet")


@pytest.mark.parametrize(
    ("name", "content", "settings", "said"),
    [
        ("p.csv", "prompt,id\nhello\n", {}, "p.csv:2: 1 cells for 2 columns, beginning with 'hello'"),
        ("p.csv", 'prompt,id\nok,1\n"no end,2\n', {}, "p.csv:3: unexpected end of data"),
        ("p.csv", 'prompt,id\n"two\nlines",1\n,2\n', {}, "p.csv:4: the prompt is empty"),
        ("p.csv", "prompt,prompt\na,b\n", {}, "p.csv:1: each column needs a name of its own"),
        ("p.csv", "prompt, prompt\na,b\n", {}, "p.csv:1: each column needs a name of its own"),
        ("p.csv", "prompt,\na,b\n", {}, "p.csv:1: each column needs a name of its own"),
        (
            "p.csv",
            b"prompt\ncaf\xe9\n",
            {},
            "0xe9 in position 3: invalid continuation byte; save it as CSV UTF-8",
        ),
        ("p.csv", "", {}, "p.csv: no prompts in it"),
        ("p.csv", "\nprompt\na\n", {}, "p.csv:1: the line is empty, but the first line names the columns; remove it"),
        ("p.csv.gz", gzip.compress(b"prompt\na\n", mtime=0), {}, "unpack a .gz or .zst first"),
        ("p.csv", "question,gold\na,b\n", {}, "p.csv:2: give either `messages` or `prompt`, or name its column"),
        ("p.csv", "question,gold\na,b\n", {"columns": {"prompt": "qestion"}}, "p.csv:2: no column 'qestion', which"),
        (
            "p.csv",
            'talk\n"[{""role"": ""user"", ""content"": ""a""}]"\n',
            {"columns": {"messages": "talk"}},
            'p.csv:2: `talk` is text, \'[{"role": "user"',
        ),
        ("p.jsonl", '{"messages": "[]"}\n', {}, "is JSON, add it to prompts.json_columns; if it is a question, name"),
        ("p.csv", "prompt,r\na,{b\n", {"json_columns": ["r"]}, "p.csv:2: column 'r' is not JSON"),
        ("p.csv", "prompt,r\na,1\n", {"json_columns": ["s"]}, "p.csv:2: no column 's', which prompts.json_columns"),
        ("p.jsonl", '{"prompt": "a", "columns": {"x": 1}, "x": 2}\n', {}, "p.jsonl:1: x stands both in `columns`"),
        ("p.jsonl", '{"prompt": "a", "tools": "f"}\n', {}, "p.jsonl:1: tools must be a list of"),
        ("p.jsonl", f'{{"prompt": "a", "n": {DEEP}}}\n', {}, "p.jsonl:1: a value is nested too deeply"),
        ("p.csv", f"prompt,r\na,{DEEP}\n", {"json_columns": ["r"]}, "p.csv:2: column 'r': a value is nested too"),
        (
            "p.py",
            f"x = []\nfor _ in range(5000):\n    x = [x]\n{ROW}'n': x}}\n",
            {},
            "row 0: column 'n': a value is nested",
        ),
        ("p.py", f"{ROW}'id': '\\ud83d'}}\n", {}, "p.py: row 0: column 'id': half of a surrogate pair"),
        ("p.py", f"{ROW}'n': ['\\ud83d']}}\n", {}, "p.py: row 0: column 'n': half of a surrogate pair"),
        ("p.py", "def rows():\n    yield {'prompt': float('nan')}\n", {}, "p.py: row 0: the prompt is empty"),
        ("p.parquet", b"PAR1\x15\x04", {}, "p.parquet: ArrowInvalid: Parquet file size is 6"),
        ("p.py", "def rows():\n    yield {'prompt': 'a'}\n    1/0\n", {}, "p.py: ZeroDivisionError: division by zero"),
        ("p.py", "def rows():\n    yield {'prompt': 'a'}\n    raise SystemExit(0)\n", {}, "p.py: SystemExit: 0"),
        ("p.py", "def rows():\n    yield 'a'\n", {}, "p.py: row 0: a row is a dict, got str"),
        (
            "p.py",
            "def rows():\n    return [{'prompt': 'a', 'x': str}]\n",
            {},
            "p.py: row 0: column 'x': JSON has no type",
        ),
    ],
)
def test_a_wrong_row_is_named_with_its_place_and_the_fix(
    tmp_path: Path, name: str, content: str | bytes, settings: dict[str, Any], said: str
) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError) as caught:
        prompts_of(tmp_path / name, **settings)
    assert said in str(caught.value)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_pipe_is_told_what_to_do() -> None:
    reading, writing = os.pipe()
    try:
        os.write(writing, b'{"prompt": "a"}\n')
        os.close(writing)
        with pytest.raises(DataError, match=rf"^prompts\.file /dev/fd/{reading}: no ordinary file, .* in one$"):
            prompts_of(Path(f"/dev/fd/{reading}"))
    finally:
        os.close(reading)


@pytest.mark.parametrize(
    ("content", "said"),
    [("", "has no function `rows`"), ("rows = 1/0", "ZeroDivisionError"), ("rows = 3", "has no function `rows`")],
)
def test_a_python_file_that_cannot_serve(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "p.py").write_text(content)
    with pytest.raises(RecipeError, match=said):
        prompts_of(tmp_path / "p.py")


def test_reference_columns_and_tools_reach_every_record(tmp_path: Path) -> None:
    run, tool = RunDir(tmp_path / "run"), {"type": "function", "function": {"name": "f"}}
    row = {"prompt": "say 3", "reference": {"n": 3}, "tools": [tool], "topic": "x"}
    other = {"prompt": "say 4", "reference": 4}
    (tmp_path / "p.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(other)}\n")
    with misbehaving() as server:
        generate(recipe_for(server, prompts={"file": str(tmp_path / "p.jsonl"), "samples": 2}), run, quiet=True)
        assert [asked.body.get("tools") for asked in server.asked if asked.text == "say 3"] == [[tool], [tool]]
    records = [*completions(run), *read_jsonl(run.prompts, Prompt)]
    found = [(record.reference, record.columns, record.tools) for record in records]
    assert found.count(({"n": 3}, {"topic": "x"}, [tool])) == 3
    assert found.count((4, {}, [])) == 3
