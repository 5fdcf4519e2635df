"""kept.jsonl to rows: what is refused, and the shape TRL is given."""

import json
from pathlib import Path

import pytest

from pipeline.errors import DataError
from pipeline.records import Message, encode_line
from pipeline.rundir import RunDir
from tests.tiny_student import kept_row, make_run, story_rows
from train.rows import read_rows, to_examples


def test_a_row_becomes_prompt_and_completion_with_the_teachers_messages() -> None:
    row = kept_row(0, "Hi?", "Hello.", messages=[Message("system", "Be kind."), Message("user", "Hi?")])
    assert to_examples([row]) == [
        {
            "prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi?"}],
            "completion": [{"role": "assistant", "content": "Hello."}],
            "tools": None,
        }
    ]


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
