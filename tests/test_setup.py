"""The set-up's errors: one line that names the cause, and no stamp left behind."""

import fcntl
import platform
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
setup_venv = runpy.run_path(str(ROOT / "setup_venv.py"))


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What the set-up needs of the repository, with no virtual environment yet."""
    for name in ("Makefile", "setup_venv.py", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_a_missing_python_is_named(clone: Path) -> None:
    done = subprocess.run(["make", "generate", "PYTHON=python-none"], cwd=clone, capture_output=True, text=True)
    assert done.returncode
    assert "set-up failed: no python-none here; install Python 3.11 to 3.14" in done.stderr


@pytest.mark.parametrize("version", [(3, 9, 2), (3, 15, 0)])
def test_a_python_without_builds_is_named(version: tuple[int, int, int], clone: Path) -> None:
    code = (
        f"import runpy, sys; sys.version_info = {version}; sys.argv = ['setup_venv.py', 'base'];"
        "runpy.run_path('setup_venv.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=clone, capture_output=True, text=True)
    assert done.returncode == 1
    named = f"{sys.executable} is {'.'.join(map(str, version))}; name another"
    assert done.stderr.startswith(f"set-up failed: Python 3.11 to 3.14 is needed, {named}")
    assert not (clone / ".venv").exists()


def test_no_network_is_one_line_and_leaves_no_stamp(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: nobody listens
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    done = subprocess.run(["make", "generate"], cwd=clone, capture_output=True, text=True)
    assert done.returncode
    assert "set-up failed: no network, or no package index reachable" in done.stderr
    assert not list(clone.glob(".venv/.ready-*"))


def test_the_virtual_environment_is_made_under_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two `make` on a fresh clone at once: the second waits, and finds it made."""
    lock, made = tmp_path / ".venv.lock", []

    def make_venv() -> None:
        with lock.open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        made.append(lock)

    changed = {"LOCK": str(lock), "VENV": str(tmp_path), "make_venv": make_venv, "install": lambda group: None}
    for name, value in changed.items():
        monkeypatch.setitem(setup_venv["main"].__globals__, name, value)
    monkeypatch.setattr(sys, "argv", ["setup_venv.py", "base"])
    setup_venv["main"]()
    assert made == [lock]


def test_git_ignores_the_lock() -> None:
    lock = Path(setup_venv["LOCK"]).name
    assert lock in (ROOT / ".gitignore").read_text().splitlines()


def test_a_killed_pip_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python"  # as the kernel ends it when memory is out
    python.write_text("#!/bin/sh\necho Installing collected packages: numpy, openai\nkill -9 $$\n")
    python.chmod(0o755)
    for name, value in {"VENV_PYTHON": str(python), "LOG": str(tmp_path / "log")}.items():
        monkeypatch.setitem(setup_venv["install"].__globals__, name, value)
    with pytest.raises(SystemExit):
        setup_venv["install"]("collect")
    assert (
        "set-up failed: pip was killed (signal 9; out of memory?); run the same command again"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("output", "cause"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "the disk is full"),
        ("ERROR: No matching distribution found for torch==9.9.9", "no build of torch==9.9.9 for this Python"),
        ("WARNING: Retrying … Temporary failure in name resolution\nERROR: No matching distribution", "no network"),
        ("noise\nERROR: something else\nnoise", "ERROR: something else; see .venv/setup.log"),
    ],
)
def test_the_cause_is_found_in_what_pip_printed(output: str, cause: str) -> None:
    assert setup_venv["explain"](output).startswith(cause)


def test_a_wheelhouse_that_does_not_fit_is_no_matter_of_the_network() -> None:
    output = (
        "ERROR: Could not find a version that satisfies the requirement vllm===0.32.0 (from versions: none)\n"
        "ERROR: No matching distribution found for vllm===0.32.0"
    )
    said = setup_venv["misfit"](output)
    assert said.startswith(f"it has no build of vllm===0.32.0 for Python {platform.python_version()} and ")
    assert setup_venv["misfit"]("[Errno 28] No space left on device").startswith("the disk is full")
