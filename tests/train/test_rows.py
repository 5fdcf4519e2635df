"""kept.jsonl to rows: what is refused, and the shape TRL is given."""

import json
import tracemalloc
from pathlib import Path

import pytest

from pipeline.errors import DataError
from pipeline.records import Message, encode_line
from pipeline.rundir import RunDir
from tests.tiny_student import kept_row, make_recipe, make_run, story_rows, tiny_tokenizer
from train.checks.data import row_checks
from train.checks.pair import markup_check
from train.lazy import joined, stored_rows
from train.rows import read_parts, read_rows, to_examples


def test_a_row_becomes_prompt_and_completion_with_the_teachers_messages() -> None:
    row = kept_row(0, "Hi?", "Hello.", messages=[Message("system", "Be kind."), Message("user", "Hi?")])
    assert [*to_examples([row])] == [
        {
            "prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi?"}],
            "completion": [{"role": "assistant", "content": "Hello."}],
            "tools": None,
        }
    ]


def test_rows_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    run = make_run(tmp_path, story_rows(2))
    run.kept.write_bytes(b"\xef\xbb\xbf" + run.kept.read_bytes())
    assert [*read_rows(run)] == story_rows(2)


def test_a_missing_file_names_itself(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"kept\.jsonl: no such file; run the stage"):
        read_rows(RunDir(tmp_path))


def test_an_empty_file_points_at_the_filters(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"kept\.jsonl: no rows; no answer passed the filters: see filter_report\.json"):
        read_rows(make_run(tmp_path, []))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"text": ""}, "row 2 .id bad.: the answer is empty"),
        ({"text": " \n"}, "the answer is empty"),
        ({"messages": []}, "must end with a user message or a tool's result, the last one is 'none'"),
        ({"messages": [Message("user", "Hi"), Message("assistant", "Yes")]}, "the last one is 'assistant'"),
        ({"messages": [Message("user", " ")]}, "the question is empty"),
    ],
)
def test_a_faulty_row_is_named(tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    run = make_run(tmp_path, [kept_row(0, "Hi?", "Hello."), kept_row(1, "Hi?", "Hello.", id="bad", **changes)])
    with pytest.raises(DataError, match=reason):
        read_rows(run)


def test_a_content_that_is_not_text_is_refused_with_its_line(tmp_path: Path) -> None:
    run = make_run(tmp_path, story_rows(2))
    line = json.loads(encode_line(kept_row(2, "Hi?", "Hello.")))
    line["messages"][0]["content"] = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}]
    with run.kept.open("a") as file:
        file.write(json.dumps(line) + "\n")
    with pytest.raises(DataError, match=r"kept\.jsonl:3: Expected `str`, got `array`.*content"):
        read_rows(run)


def test_rows_are_read_from_the_file_each_time(tmp_path: Path) -> None:
    rows = story_rows(5)
    run = make_run(tmp_path, rows)
    run.kept.write_bytes(b"\n" + run.kept.read_bytes().rstrip(b"\n"))  # a blank line, and no end of the last
    found = read_rows(run)
    assert [*found] == rows and found[-1] == rows[-1] and [*found[1:4:2]] == rows[1:4:2]
    assert [*joined(found[:2], [], rows[2:])] == rows
    assert [*to_examples(found)] == [*to_examples(rows)]


def test_memory_does_not_grow_with_the_texts(tmp_path: Path) -> None:
    """1,000 rows of 12 kB are 12 MB; they are read, checked, and written for the trainer in a third of that."""
    run = make_run(tmp_path, [])
    with run.kept.open("wb") as file:
        file.writelines(encode_line(kept_row(n, "W" * 2000 + str(n), "Because. " + "b" * 10_000)) for n in range(1000))
    recipe = make_recipe("student", validation=0.1, test=0.1)
    tokenizer = tiny_tokenizer()
    stored_rows(to_examples(read_rows(run)[:2]), tmp_path / "first", "train")  # imports are not counted
    tracemalloc.start()
    try:
        parts = read_parts(recipe, run)
        assert len([*row_checks(parts, {}, recipe)]) > 3
        assert markup_check(tokenizer, parts.all).status == "pass"
        stored = stored_rows(to_examples(parts.train), tmp_path / "work", "train")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(stored) == len(parts.train) > 700
    assert stored[1] == to_examples(parts.train[:2])[1]
    assert peak < 4e6
