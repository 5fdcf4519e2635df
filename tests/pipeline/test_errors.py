"""Errors that go from one process to another: pickled, or told as the name of a class and a message."""

import pickle
import re
from pathlib import Path

import pytest

from chain.stages import StageFailed
from filters.run import LowKeepRate
from generate.reply import Fault
from generate.streaming import Refused
from pipeline.errors import KINDS, DistillError, by_name
from scale.run_lease import TakenOver
from scale.storage import TryAgain

ROOT = Path(__file__).parents[2]
ERRORS = [
    *(kind("what: value; fix") for kind in (*KINDS, LowKeepRate, TakenOver, TryAgain)),
    *(StageFailed("train", code) for code in (4, -9)),
    Refused("http://a/v1", Fault("busy", "come later", 503)),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_an_error_is_the_same_in_another_process(error: DistillError, protocol: int) -> None:
    other = pickle.loads(pickle.dumps(error, protocol))
    assert type(other) is type(error)
    assert (str(other), other.exit_code, vars(other)) == (str(error), error.exit_code, vars(error))


def test_these_are_all_errors() -> None:
    known = "|".join(type(error).__name__ for error in ERRORS)
    pattern = re.compile(rf"^class (\w+)\((?:{known})\)", re.MULTILINE)
    files = [path for path in ROOT.glob("*/**/*.py") if path.relative_to(ROOT).parts[0] not in (".venv", "tests")]
    found = {name for path in files for name in pattern.findall(path.read_text("utf-8"))}
    assert found | {"DistillError"} == set(known.split("|"))


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_is_found_by_the_name_of_its_class(kind: type[DistillError]) -> None:
    error = by_name(kind.__name__, "no")
    assert (type(error), str(error)) == (kind, "no")


def test_an_error_of_an_unknown_name_is_a_plain_one() -> None:
    assert type(by_name("first_line", "no")) is type(by_name("OSError", "no")) is DistillError
