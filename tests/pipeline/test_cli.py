"""The exit codes: each kind of end has its own, and one line that says why."""

import errno
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cli import parse_stage, run_stage, stage_parser
from pipeline.errors import BudgetReached, DataError, DistillError, RecipeError, RequestsFailed, UsageError


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        (None, 0, ""),
        (DistillError("the server ended"), 1, "error: the server ended\n"),
        (RecipeError("x.yaml: no such recipe"), 2, "error: x.yaml: no such recipe\n"),
        (DataError("kept.jsonl:3: not JSON"), 2, "error: kept.jsonl:3: not JSON\n"),
        (BudgetReached("budget.usd 1.00"), 3, "stopped: budget.usd 1.00\n"),
        (RequestsFailed("2 of 9 requests failed"), 4, "stopped: 2 of 9 requests failed\n"),
        (KeyboardInterrupt(), 130, "interrupted: run the same command again to go on\n"),
        (
            ModuleNotFoundError("No module named 'torch'"),
            2,
            "error: No module named 'torch'; `make setup` installs the packages of all stages\n",
        ),
        (DataError("a.csv:1: no column \x1b[31mq\x07\x9b"), 2, "error: a.csv:1: no column \\x1b[31mq\\x07\\x9b\n"),
        (RecipeError("x.yaml: a\ny.yaml: b\tc"), 2, "error: x.yaml: a\ny.yaml: b\tc\n"),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/\x1bx"),
            1,
            "error: runs/\\x1bx: No space left on device\n",
        ),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x"), 1, "error: runs/x: No space left on device\n"),
        (  # of a copy, whose source is named first
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/y", None, "runs/x"),
            1,
            "error: runs/x: No space left on device\n",
        ),
    ],
)
def test_each_end_has_its_code_and_its_line(
    end: BaseException | None, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        if end is not None:
            raise end

    with pytest.raises(SystemExit) as caught:
        run_stage(main)
    assert caught.value.code == code
    assert capsys.readouterr().err == said


def test_a_bug_keeps_its_traceback() -> None:
    def main() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_stage(main)


def _code(main: str) -> list[str]:
    """A command: a stage with this main."""
    return [sys.executable, "-c", f"import signal, time\nfrom pipeline.cli import run_stage\n{main}\nrun_stage(main)"]


def test_a_terminal_that_cannot_show_a_character_gets_its_number() -> None:
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(_code("def main(): print('5 → kept')"), capture_output=True, env=env, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"5 \\u2192 kept\n", b"")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_standard_output_on_a_full_disk_is_one_line(unbuffered: str) -> None:
    env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            _code("def main(): print('5 kept')"), stdout=full, stderr=subprocess.PIPE, env=env, check=False
        )
    said = b"error: standard output or a file: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_a_reader_that_has_gone_is_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    env = os.environ | {"PYTHONUNBUFFERED": ""}
    done = subprocess.run(
        _code("def main(): print('5 kept')"), stdout=writing, stderr=subprocess.PIPE, env=env, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_terminal_that_closes_interrupts() -> None:
    main = "def main():\n    print('begun', flush=True)\n    time.sleep(60)"
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
        os.execv(sys.executable, _code(main))
    assert os.read(terminal, 5) == b"begun"
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130


def test_a_hangup_ends_a_stage_as_sigterm_does() -> None:
    """A training, for one, has a handler of its own, which leaves a checkpoint. Shell and kernel send a hangup each."""
    main = """def main():
        signal.signal(signal.SIGTERM, lambda *_: print("in order", flush=True))
        for _ in range(2):
            signal.raise_signal(signal.SIGHUP)"""
    hear = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)"  # the tests may run under nohup
    *python, code = _code(main)
    done = subprocess.run([*python, f"{hear}\n{code}"], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"in order\n", b"")


@pytest.mark.parametrize("run", ["s3:/bucket/path", "gs:bucket", "file:/folder"])
def test_a_url_of_a_store_without_its_slashes_is_no_folder(run: str) -> None:
    with pytest.raises(UsageError, match=rf"^{run}: a store's URL begins with {run.split(':')[0]}://, as"):
        parse_stage(stage_parser("generate", ""), ["recipes/demo.yaml", "--run", run])
