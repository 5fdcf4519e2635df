"""Every error that a stage raises on purpose, and the exit code of each.

    DistillError        1  failed
    ├── UsageError      2  wrong usage, recipe or data: one clear line, no traceback
    │   ├── RecipeError
    │   └── DataError
    ├── AllRefused
    ├── BudgetReached   3  stopped at a budget, resumable
    └── RequestsFailed  4  finished, but some requests failed for good

An interrupt (Ctrl-C, SIGTERM, a closed terminal) ends with 130, resumable. A message names the thing, its value and
the fix.
"""

from typing import Any

INTERRUPTED = 130


class DistillError(Exception):
    """The stage failed: what, with which value, and how to fix it."""

    exit_code = 1

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled with its message and attributes, whatever the constructor of its class takes."""
        return type(self).__new__, (type(self), *self.args), self.__dict__


class UsageError(DistillError):
    """The command, the recipe or the data is wrong; nothing was overwritten."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe value is wrong: names the file (or flag, or variable), the key and the value."""


class DataError(UsageError):
    """A line or a file of data is wrong: `path:line: reason`."""


class AllRefused(DistillError):
    """Every request was forbidden: the access is wrong, and none of them counts as failed."""


class BudgetReached(DistillError):
    """The next request could pass the budget. Raise it and run again: finished answers are kept."""

    exit_code = 3


class RequestsFailed(DistillError):
    """The run is finished, but some requests failed for good (they are in failures.jsonl)."""

    exit_code = 4


KINDS = (DistillError, UsageError, RecipeError, DataError, AllRefused, BudgetReached, RequestsFailed)


def by_name(kind: str, message: str) -> DistillError:
    """The error that another process told by the name of its class; a DistillError if that is none of KINDS."""
    return {one.__name__: one for one in KINDS}.get(kind, DistillError)(message)


def first_line(error: BaseException | str) -> str:
    """The first line of another package's message; the name of the error if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def file_error(error: OSError, unnamed: str = "a file") -> str:
    """Which file could not be read or written, and why. Of a copy it is the target; `unnamed`: where none is named."""
    return f"{error.filename2 or error.filename or unnamed}: {error.strerror or error}"
