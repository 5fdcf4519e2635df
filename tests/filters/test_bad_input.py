"""What `python -m filters` does with files that are not as `generate` leaves them: one line, code 2, nothing lost."""

from pathlib import Path

import msgspec
import pytest

import filters.stream
from pipeline.errors import DataError
from pipeline.records import Kept, encode_line
from tests.filters.test_run import GOOD, ROWS, Stage


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


LINES = GOOD.splitlines(keepends=True)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b'{"id": "x", \n', "malformed|truncated"),
        (b"not JSON\n", "malformed"),
        (b"[]\n", "Expected `object`"),
        (LINES[0].replace(b'"text":', b'"txt":'), "unknown field `txt`"),
        (b'{"id":"x"}\n', "missing required field"),
        (LINES[0].replace(b'"attempts":1', b'"attempts":"1"'), r"Expected `int`, got `str` - at `\$\.attempts`"),
        (LINES[0].replace("토끼".encode(), b"\xff\xfe"), "can't decode byte 0xff"),
        (LINES[0].replace("토끼".encode(), rb"\ud83d"), "surrogate|truncated"),
        (LINES[0].replace("토끼".encode(), rb"\udc00 x"), "surrogate"),
        (LINES[0].replace("토끼".encode(), rb"\ud83dabc\ud83d"), "surrogate"),
        (b"\xef\xbb\xbf" + LINES[0], "malformed"),
        (b'{"id":"' + b"x" * 5000 + b'"}\n', "over 16 MiB in one line"),
        (
            encode_line(Kept(**msgspec.structs.asdict(ROWS[0]), scores={"judge": 4.0})),
            "field `scores`",
        ),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_overwritten(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, bad: bytes, reason: str
) -> None:
    monkeypatch.setattr(filters.stream, "LONGEST_LINE", 4000)
    stage.completions()
    stage.filter()
    old = stage.files()
    stage.completions(b"".join([*LINES[:2], b"\n", bad, *LINES[2:]]))
    where = rf"^{stage.run.completions}:4: .*({reason}).*--skip-bad$"
    with pytest.raises(DataError, match=where) as error:
        stage.filter()
    assert error.value.exit_code == 2 and "\n" not in str(error.value)
    assert stage.files() | {"completions.jsonl": b""} == old | {"completions.jsonl": b""}

    stage.filter("--skip-bad")
    report = stage.report()
    assert (report["rows"], report["kept"], report["dropped"], report["bad_lines"]) == (5, 2, 3, 1)
    assert report["first_bad_lines"][0]["line"] == 4
    assert stage.run.kept.read_bytes() == old["kept.jsonl"] and stage.run.dropped.read_bytes() == old["dropped.jsonl"]


def test_skipped_lines_are_told(stage: Stage) -> None:
    stage.completions(b"oops\n" + GOOD + b"oops\n")
    refused = stage.command()
    assert refused.returncode == 2 and f"error: {stage.run.completions}:1: " in refused.stderr
    assert stage.outputs() == {}
    done = stage.command("--skip-bad")
    assert done.returncode == 0
    assert f"notice: 2 bad lines left out, listed in {stage.run.filter_report}; the first is " in done.stderr
    assert [line["line"] for line in stage.report()["first_bad_lines"]] == [1, 7]


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (None, (), "completions.jsonl: no such file; run `python -m generate` first"),
        (b"", (), "completions.jsonl:1: the file is empty; run"),
        (b"\n\n", (), "completions.jsonl:1: none of its 2 lines is a completion; run"),
        (b"oops\n", ("--skip-bad",), "completions.jsonl:1: none of its 1 lines is a completion; run"),
    ],
)
def test_nothing_to_judge(stage: Stage, content: bytes | None, flags: tuple[str, ...], message: str) -> None:
    stage.completions()
    stage.filter()
    old = stage.outputs()
    if content is None:
        stage.run.completions.unlink()
    else:
        stage.run.completions.write_bytes(content)
    done = stage.command(*flags)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert stage.outputs() == old


def test_no_run_is_not_made_by_asking(stage: Stage) -> None:
    assert stage.command().returncode == 2
    assert not stage.run.path.exists()


@pytest.mark.parametrize("cut", [1, 30, 400])
def test_a_torn_last_line_is_left_out_with_a_notice(stage: Stage, capsys: pytest.CaptureFixture[str], cut: int) -> None:
    stage.completions(GOOD + LINES[0].rstrip()[:-cut])
    stage.filter()
    assert f"notice: the last line of {stage.run.completions} is cut off" in capsys.readouterr().err
    report = stage.report()
    assert (report["rows"], report["torn_last_line"], report["bad_lines"]) == (5, True, 0)
    stage.filter("--dry-run")
    assert capsys.readouterr().err == ""  # it is no answer that came since


def test_a_torn_line_over_the_end_of_a_block(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters.stream, "BLOCK", len(GOOD) + 20)
    stage.completions(GOOD + LINES[0][:-9])
    stage.filter()
    assert (stage.report()["rows"], stage.report()["torn_last_line"]) == (5, True)


def test_a_last_line_without_newline_counts_if_it_is_whole(stage: Stage) -> None:
    stage.completions(GOOD.rstrip())
    stage.filter()
    assert (stage.report()["rows"], stage.report()["torn_last_line"]) == (5, False)
    assert stage.run.kept.read_bytes().endswith(b'"scores":{}}\n')
