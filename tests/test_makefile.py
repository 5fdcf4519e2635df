"""What the Makefile gives to Python: each variable as one word, ARGS as the words of the shell."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from experiments.arms import EXPERIMENTS

ROOT = Path(__file__).parents[1]
ODD = "http://a/v1?b=1&c='2',http://d/v1 4"
OF_MAKE = ("MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "MFLAGS", "ARGS")
GROUPS = ("base", "train", "serve", "ray", "review", "dev", "collect")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder that is set up, with a Python that only prints its arguments, one per line."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    python.chmod(0o755)
    for group in GROUPS:
        (tmp_path / f".venv/.ready-{group}").touch()
    return tmp_path


def make(clone: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if name not in OF_MAKE}  # `make test` runs this
    return subprocess.run(["make", *command], cwd=clone, capture_output=True, text=True, env=own | variables)


def given(clone: Path, *command: str, **variables: str) -> list[str]:
    """The arguments that Python got, without `-m <module>`."""
    done = make(clone, *command, **variables)
    done.check_returncode()
    return done.stdout.splitlines()[2:]


@pytest.mark.parametrize("odd", [ODD, "two words", "it's; $(HOME)".replace("$", "$$"), "''~/x"])
def test_a_variable_is_one_word(clone: Path, odd: str) -> None:
    word = odd.replace("$$", "$")
    common = [word, "--run", word, "--teacher.base_url", word, "--teacher.model", word]
    variables = [f"{name}={odd}" for name in ("RECIPE", "RUN", "TEACHER_URL", "TEACHER_MODEL")]
    assert given(clone, "generate", *variables, f"CLUSTER={odd}") == [*common, "--cluster", word]
    assert given(clone, "serve", *variables, f"MODEL={odd}") == [*common, "--model", word]
    assert given(clone, "push", *variables, f"REPO={odd}") == [*common, "--push", word]
    assert given(clone, "fetch", f"RUN={odd}", f"TO={odd}") == [word, word]
    assert given(clone, "nodes", *variables) == [word, "--run", word]
    assert given(clone, "demo", *variables) == ["recipes/demo.yaml", "--run", word]


def test_a_variable_that_is_not_given_is_no_word(clone: Path) -> None:
    assert given(clone, "generate", "RECIPE=r.yaml") == ["r.yaml"]
    assert given(clone, "fetch", "RUN=s3://b/r") == ["s3://b/r"]


def test_the_home_folder_may_be_short(clone: Path) -> None:
    assert given(clone, "generate", "RECIPE=~/a b.yaml", "RUN=~/r", HOME="/h") == ["/h/a b.yaml", "--run", "/h/r"]


@pytest.mark.parametrize("from_environment", [False, True])
def test_args_are_the_words_of_the_shell_and_a_variable_in_them_stays(clone: Path, from_environment: bool) -> None:
    args = """--teacher.headers '{"X-Key": "${TEAM_KEY}"}' "two words" 'costs $5'"""
    words = ["--teacher.headers", '{"X-Key": "${TEAM_KEY}"}', "two words", "costs $5"]
    command, variables = ([], {"ARGS": args}) if from_environment else ([f"ARGS={args}"], {})
    assert given(clone, "generate", "RECIPE=r", *command, TEAM_KEY="secret", **variables) == ["r", *words]
    assert given(clone, "serve", "RECIPE=r", *command, TEAM_KEY="secret", **variables) == ["r", f"--args={args}"]


def test_an_experiment_without_a_name_is_told_the_names(clone: Path) -> None:
    done = make(clone, "experiment", "RECIPE=r")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"give its name, EXP={'|'.join(EXPERIMENTS)}." in done.stderr
    assert given(clone, "experiment", "EXP=seeds", "RECIPE=r") == ["seeds", "r"]


@pytest.mark.parametrize("name", ["ARG", "RECIPES", "recipe"])
def test_a_misspelt_variable_is_named_and_nothing_is_run(clone: Path, name: str) -> None:
    done = make(clone, "generate", f"{name}=--budget.usd 1")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert f"{name}: no such variable; there are RECIPE RUN ARGS " in line


def test_variables_of_make_itself_and_of_the_environment_may_be_set(clone: Path) -> None:
    assert given(clone, "generate", "RECIPE=r", "SHELL=/bin/sh", "MAKEFLAGS=-s", ARG="of others") == ["r"]


def test_all_variables_that_are_read_or_documented_may_be_set() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (stated,) = re.findall(r"^VARIABLES := (.*)", makefile, re.MULTILINE)
    read = set(re.findall(r"\$\((?:value )?([A-Z_]+)\)", makefile))
    made = set(re.findall(r"^([A-Z_]+) :=", makefile, re.MULTILINE)) | {"MAKEFILE_LIST"}
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/*.yaml")]
    commands = [command for page in pages for command in re.findall(r"\bmake [a-z][^`\n]*", page.read_text())]
    documented = {name for command in commands for name in re.findall(r" ([A-Z_]+)=", command)}
    assert len(documented) > 10 and documented <= set(stated.split())
    assert (read - made) | {"TORCH_INDEX_URL"} == set(stated.split())
