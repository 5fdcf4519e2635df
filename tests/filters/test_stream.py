"""Blocks of lines: every line is in one block; several processes give the same; a worker that fails or dies is told."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from filters import stream
from filters.stream import Line, in_blocks, read_lines
from pipeline.errors import DistillError
from tests.filters.test_run import GOOD, Stage

LINES = b"a\nb\nc\nd\n"


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small file that is worked on by two processes, a line a block."""
    path = tmp_path / "lines"
    path.write_bytes(LINES)
    monkeypatch.setattr(stream, "BLOCK", 2)
    monkeypatch.setattr(stream, "PARALLEL_FROM", 0)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    return path


def texts(lines: Iterator[Line]) -> list[bytes | None]:
    return [line for _, line in lines]


@pytest.mark.parametrize("size", range(1, 12))
@pytest.mark.parametrize("longest", [4, 100])
def test_every_line_is_in_one_block(tmp_path: Path, size: int, longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "LONGEST_LINE", longest)
    data = b"a\n\nbcdefghijkl\nm\n\n\nno\np"
    (tmp_path / "f").write_bytes(data)
    with (tmp_path / "f").open("rb") as file:
        spans = [(start, min(start + size, len(data))) for start in range(0, len(data), size)]
        found = [line for start, stop in spans for line in read_lines(file, start, stop)]
    wanted = data.splitlines(keepends=True)
    assert [line for _, line in found] == [line if len(line) <= longest else None for line in wanted]
    assert [start for start, _ in found] == [sum(map(len, wanted[:index])) for index in range(len(wanted))]


def test_results_come_in_order_from_several_processes(path: Path) -> None:
    parent = os.getpid()

    def work(lines: Iterator[Line]) -> tuple[list[bytes | None], bool]:
        return texts(lines), os.getpid() != parent

    assert list(in_blocks(path, work)) == [([line], True) for line in (b"a\n", b"b\n", b"c\n", b"d\n")]


def test_what_a_worker_raises_is_raised_here(path: Path) -> None:
    def work(lines: Iterator[Line]) -> int:
        if texts(lines) == [b"c\n"]:
            raise DistillError("full moon")
        return 1

    found = []
    with pytest.raises(DistillError, match="full moon"):
        found.extend(in_blocks(path, work))
    assert found == [1, 1]


def test_a_worker_that_is_killed_ends_with_one_clear_error(path: Path) -> None:
    def work(lines: Iterator[Line]) -> int:
        if texts(lines) == [b"c\n"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return 1

    with pytest.raises(DistillError, match=r"a filter process was killed .*nothing was replaced, run again"):
        list(in_blocks(path, work))


def test_a_run_whose_worker_is_killed_keeps_its_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(tmp_path)
    stage.completions()
    stage.filter()
    old = stage.files()
    (tmp_path / "mine.py").write_text("import os\ndef die(answer):\n    os.kill(os.getpid(), 9)\n")
    stage.rules([{"rule": "function", "file": "mine.py", "name": "die"}])
    monkeypatch.setattr(stream, "PARALLEL_FROM", 0)
    monkeypatch.setattr(stream, "SMALLEST_BLOCK", len(GOOD) // 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    with pytest.raises(DistillError, match="a filter process was killed"):
        stage.filter()
    assert stage.files() == old


def test_a_users_rule_may_use_torch_as_it_is_imported(tmp_path: Path) -> None:
    """OpenMP's threads do not live on in the processes of the filters, which would wait for them for ever."""
    stage = Stage(tmp_path)
    stage.completions(GOOD * 40)  # several blocks
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "square = torch.ones(600, 600)\n"
        "square @ square\n"
        "def score(answer):\n"
        "    return None, float((square @ square)[0, 0])\n"
    )
    stage.rules([{"rule": "function", "file": "mine.py", "name": "score"}])
    command = [sys.executable, "-m", "filters", str(stage.recipe), "--run", str(stage.run.path)]
    usual = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(command, env=usual, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert stage.report()["kept"] == 200


def test_a_worker_in_the_midst_of_a_block_ends_with_a_parent_that_is_killed(path: Path) -> None:
    def work(_: Iterator[Line]) -> None:
        (path.parent / str(os.getpid())).touch()
        time.sleep(60)

    parent = os.fork()
    if parent == 0:
        list(in_blocks(path, work))
        os._exit(0)
    end = time.monotonic() + 60
    while len(workers := [int(file.name) for file in path.parent.iterdir() if file.name.isdecimal()]) < 2:
        assert time.monotonic() < end, "no workers"
        time.sleep(0.05)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    end = time.monotonic() + 60
    while any(map(is_alive, workers)):
        assert time.monotonic() < end, "a worker is left"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Not where it has ended, and whoever inherited it has not asked for its end."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def test_no_worker_outlives_the_caller(path: Path) -> None:
    pids: list[int] = []
    blocks = in_blocks(path, lambda lines: os.getpid())
    pids.append(next(blocks))
    pids.append(next(blocks))
    blocks.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
