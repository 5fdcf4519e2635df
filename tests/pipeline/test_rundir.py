"""Run directories, records and lineage: locks, renames, `path:line: reason`."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import DataError, UsageError
from pipeline.lineage import read_lineage, record_lineage
from pipeline.recipe import load_recipe
from pipeline.records import Message, Prompt, encode_line, read_jsonl
from pipeline.rundir import RunDir, replacing


def test_a_second_process_on_a_run_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    code = (
        "import time; from pathlib import Path; from pipeline.rundir import RunDir\n"
        f"with RunDir(Path({str(run.path)!r})).locked(new=True): print('locked', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
    with pytest.raises(UsageError, match=f"pid {holder.pid}"), run.locked():
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with run.locked():
        assert (run.path / ".lock").read_text() == str(os.getpid())


def test_a_name_mistyped_makes_no_run(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "rnu")
    with pytest.raises(UsageError, match="rnu: no such run; give its folder with --run"), run.locked():
        pass
    assert not run.path.exists()


def test_replacing_leaves_the_old_file_when_the_block_fails(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as file:
        file.write(b"new")
    assert path.read_text() == "new"


def test_records_survive_a_round_trip_with_korean_unescaped(tmp_path: Path) -> None:
    prompt = Prompt(id="a", messages=[Message("user", "토끼 토토 🐇")], slots={"keywords": ["비", "달"]})
    line = encode_line(prompt)
    assert "토끼 토토 🐇".encode() in line and line.endswith(b"\n") and line.count(b"\n") == 1
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(line + b"\n" + line)
    assert list(read_jsonl(path, Prompt)) == [prompt, prompt]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"id": "a"}', "missing required field `messages`"),
        (b'{"id": 3, "messages": []}', "Expected `str`, got `int`"),
        (b'{"id": "a", "messages": [', "truncated"),
        (b'{"id": "\xff", "messages": []}', "utf-8"),
    ],
)
def test_a_bad_line_is_named_with_its_place(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(encode_line(Prompt(id="a", messages=[])) + line + b"\n")
    with pytest.raises(DataError) as caught:
        list(read_jsonl(path, Prompt))
    assert str(caught.value).startswith(f"{path}:2: ") and reason in str(caught.value)


def test_each_stage_writes_its_own_section_of_the_lineage(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    record_lineage(run, "generate", {"teacher": "한글"})
    record_lineage(run, "filters", {"kept": 1})
    record_lineage(run, "generate", {"teacher": "b"})
    assert read_lineage(run) == {"name": tmp_path.name, "generate": {"teacher": "b"}, "filters": {"kept": 1}}


def test_a_saved_recipe_loads_as_the_same_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(Path("recipes/demo.yaml"), ["--sampling.seed", "7"])
    run = RunDir(tmp_path)
    run.save_recipe(recipe)
    assert load_recipe(run.recipe) == recipe


def test_a_full_disk_names_the_file_that_did_not_fit(tmp_path: Path) -> None:
    def fill() -> None:
        with replacing(tmp_path / "lineage.json"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as `write` does: it knows no name

    with pytest.raises(OSError, match="No space left") as caught:
        fill()
    assert caught.value.filename == str(tmp_path / "lineage.json")
    assert not list(tmp_path.iterdir())
