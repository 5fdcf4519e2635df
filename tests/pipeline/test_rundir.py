"""Run directories, records and lineage: locks, renames, `path:line: reason`."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import DataError, DistillError, RecipeError, UsageError
from pipeline.lineage import read_lineage, record_lineage, write_lineage
from pipeline.recipe import load_recipe
from pipeline.records import Message, Prompt, encode_line, read_jsonl
from pipeline.rundir import CHAIN_LOCK, RunDir, replacing, replacing_folder, waiting_lock, writing_weights
from tests.full_disk import without_locks


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


def test_a_stage_of_a_chain_waits_for_one_that_was_started_by_hand(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    code = (
        "from pathlib import Path; from pipeline.rundir import RunDir\n"
        f"with RunDir(Path({str(run.path)!r})).locked(): print('locked')"
    )
    with run.locked(new=True, name=CHAIN_LOCK):
        with run.locked():
            stage = subprocess.Popen(
                [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            assert stage.stderr is not None
            said = stage.stderr.readline()
            assert said == f"{run.path}: another process works on this run; waiting up to 60 s for it\n"
        assert stage.communicate() == ("locked\n", "")


def test_a_name_mistyped_makes_no_run(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "rnu")
    with pytest.raises(UsageError, match="rnu: no such run; give its folder with --run"), run.locked():
        pass
    assert not run.path.exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_that_cannot_lock_is_not_taken_for_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    said = f"cannot lock this run .{os.strerror(number)}"
    with pytest.raises(DistillError, match=said) as caught, RunDir(tmp_path).locked():
        pass
    assert "another process" not in str(caught.value)


def test_a_file_given_as_a_run_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "kept.jsonl").touch()
    run = RunDir(tmp_path / "kept.jsonl")
    for new in (False, True):
        with pytest.raises(UsageError, match=r"kept\.jsonl: a file, but a run is a folder"), run.locked(new=new):
            pass
    command = [sys.executable, "-m", "generate", "recipes/stories_demo.yaml", "--run", str(run.path), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=60)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "a file, but a run is a folder" in done.stderr


def test_a_link_that_leads_nowhere_is_one_line(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.path.symlink_to(tmp_path / "gone")
    with pytest.raises(UsageError, match=r"run: a link to .*gone, which is not there"), run.locked(new=True):
        pass


def test_a_lock_on_a_full_disk_names_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left") as caught, RunDir(tmp_path).locked():
        pass
    assert caught.value.filename == str(tmp_path / ".lock")


def test_a_file_system_without_locks_names_the_lock_that_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", without_locks)
    with pytest.raises(OSError, match="No locks available") as caught, waiting_lock(tmp_path / "lock"):
        pass
    assert caught.value.filename == str(tmp_path / "lock")


def test_a_new_name_is_on_disk_before_the_block_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder's entry is synced after the rename: without it a power cut can bring the old file back."""
    steps: list[str] = []
    rename, sync = Path.replace, os.fsync

    def note_rename(self: Path, target: Path) -> Path:
        steps.append("rename")
        return rename(self, target)

    def note_sync(handle: int) -> None:
        steps.append("sync folder" if Path(f"/proc/self/fd/{handle}").resolve() == tmp_path else "sync file")
        sync(handle)

    monkeypatch.setattr(Path, "replace", note_rename)
    monkeypatch.setattr(os, "fsync", note_sync)
    with replacing(tmp_path / "kept.jsonl") as file:
        file.write(b"new")
    assert steps == ["sync file", "rename", "sync folder"]


def test_what_is_in_a_new_folder_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, synced, sync = tmp_path / "merged", list[str](), os.fsync

    def note_sync(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").resolve()
        synced.append(f"{path.relative_to(tmp_path)} {'named' if folder.exists() else 'unnamed'}")
        sync(handle)

    monkeypatch.setattr(os, "fsync", note_sync)
    with replacing_folder(folder) as building:
        (building / "data").mkdir()
        (building / "data" / "weights").write_bytes(b"new")
    inside = [f"merged.tmp{part} unnamed" for part in ("", "/data", "/data/weights")]
    assert sorted(synced) == [". named", *inside]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_who_may_open_a_folder_may_read_the_weights_in_it(tmp_path: Path, umask: int, mode: int) -> None:
    from safetensors.numpy import save_file

    before = os.umask(umask)
    try:
        with replacing_folder(tmp_path / "model") as building:
            save_file({"weight": np.zeros(1)}, building / "model.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "model" / "model.safetensors").stat().st_mode & 0o777 == mode


KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline.rundir import replacing_folder

calls = []

def dies_at(real):
    def call(*args, **named):
        calls.append(real)
        if len(calls) == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **named)
    return call

with replacing_folder(Path(sys.argv[1])) as building:
    for name in "abc":
        (building / name).write_text("new")
    os.unlink, os.rename = dies_at(os.unlink), dies_at(os.rename)
"""


@pytest.mark.parametrize("call", range(1, 6))
def test_a_folder_whose_replacement_is_killed_is_whole_the_old_or_the_new_one(tmp_path: Path, call: int) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in "abc":
        (folder / name).write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(call)], check=False)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(RuntimeError), replacing_folder(folder):
        raise RuntimeError
    found = {path.name: path.read_text() for path in folder.iterdir()}
    assert found in (dict.fromkeys("abc", "old"), dict.fromkeys("abc", "new"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rename = tmp_path / "model", Path.rename
    folder.mkdir()
    (folder / "a").write_text("old")

    def refuse(source: Path, target: Path) -> Path:
        if source.name == "model.tmp":
            raise KeyboardInterrupt
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(KeyboardInterrupt), replacing_folder(folder) as building:
        (building / "a").write_text("new")
    assert (folder / "a").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_is_linked_is_replaced_where_the_link_leads(tmp_path: Path) -> None:
    folder, target = tmp_path / "export" / "model", tmp_path / "disk" / "model"
    folder.parent.mkdir()
    target.mkdir(parents=True)
    folder.symlink_to(target)
    for text in ("one", "two"):
        with replacing_folder(folder) as building:
            (building / "a").write_text(text)
        assert folder.is_symlink() and not target.is_symlink() and (target / "a").read_text() == text
    assert [path.name for path in (*folder.parent.iterdir(), *target.parent.iterdir())] == ["model", "model"]


def test_a_file_in_the_place_of_a_folder_stays_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine")
    refused = pytest.raises(UsageError, match="/model: a file, but a folder is written there; move it away")
    with refused, replacing_folder(tmp_path / "model"):
        pass
    assert (tmp_path / "model").read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["model"]


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


@pytest.mark.parametrize("given", [".", "sub/..", "../mine"])
def test_a_run_has_its_folders_name_however_its_path_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    (tmp_path / "mine" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine")
    record_lineage(RunDir(Path(given)), "filters", {"kept": 1})
    assert read_lineage(RunDir(Path(given))) == {"name": "mine", "filters": {"kept": 1}}


@pytest.mark.parametrize(("name", "written"), [("한글".encode(), "한글"), ("한".encode("euc-kr"), "��")])
def test_the_lineage_names_a_folder_of_any_bytes(tmp_path: Path, name: bytes, written: str) -> None:
    """Bytes that are not UTF-8 are replaced. Under the C locale a name comes as such bytes even where it is UTF-8."""
    write_lineage(RunDir(tmp_path), {"name": name.decode("ascii", "surrogateescape")})
    assert read_lineage(RunDir(tmp_path)) == {"name": written}


def test_a_saved_recipe_loads_as_the_same_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(Path("recipes/stories_demo.yaml"), ["--sampling.seed", "7"])
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


LIMITED = """
import resource, shutil, signal, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from pipeline.rundir import replacing_folder, writing_weights

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
tensors, folder, whole = {"a": torch.zeros(1 << 20)}, Path(sys.argv[1]), Path(sys.argv[2])
for save in (save_file, torch.save):
    try:
        with writing_weights(folder):
            save(tensors, str(folder / "weights"))
    except OSError as error:
        print(error.filename, error.errno)
try:
    with replacing_folder(folder / "new") as building:
        shutil.copytree(whole, building, dirs_exist_ok=True)
except OSError as error:
    print(error.filename, error.errno)
"""


def test_weights_that_do_not_fit_are_an_error_of_the_disk(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk: the libraries raise the same, but for the number."""
    folder, whole = tmp_path / "small", tmp_path / "whole"
    folder.mkdir()
    whole.mkdir()
    for name in "ab":
        (whole / name).write_bytes(bytes(2 << 20))
    command = [sys.executable, "-c", LIMITED, str(folder), str(whole)]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [line.split() for line in said.stdout.splitlines()] == [
        [str(folder), str(errno.EFBIG)],
        [str(folder), str(errno.ENOSPC)],
        [str(folder / "new"), str(errno.EFBIG)],
    ]


@pytest.mark.parametrize("error", [ValueError("other"), RecipeError("cannot load this model: (os error 2)")])
def test_other_errors_are_not_those_of_the_disk(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error), match=r"other|load"), writing_weights(tmp_path):
        raise error


def test_the_runs_of_one_folder_are_equal() -> None:
    assert RunDir(Path("run"), internal=True) == RunDir(Path("run")) != RunDir(Path("other"))
