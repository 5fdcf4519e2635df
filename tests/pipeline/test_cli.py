"""The exit codes: each kind of end has its own, and one line that says why."""

import errno
import os

import pytest

from pipeline.cli import run_stage
from pipeline.errors import BudgetReached, DataError, DistillError, RecipeError, RequestsFailed


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
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x"), 1, "error: runs/x: No space left on device\n"),
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
