"""What happens when a verifier itself fails: the row is dropped as `unverified`, and the stage goes on."""

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

from filters.answer import UNVERIFIED, Answer, RuleSettings, Verified
from pipeline.records import Reason

Settings = TypeVar("Settings", bound=RuleSettings)


class Unverified(Exception):
    """The verifier cannot say whether the answer is right: it failed, or it has nothing to hold the answer against."""


class Unreadable(Exception):
    """The answer has no part that could be checked: what was looked for, and what is there."""

    def __init__(self, what: str, found: str) -> None:
        self.what, self.found = what, found


def guarded(verifier: Callable[[Answer, Settings], Verified]) -> Callable[[Answer, Settings], Verified]:
    """The verifier, which never raises: Unreadable drops the answer, anything else is the reason `unverified`."""

    @wraps(verifier)
    def check(answer: Answer, settings: Settings) -> Verified:
        try:
            return verifier(answer, settings)
        except Unreadable as error:
            return Verified(Reason(rule=verifier.__name__, what=error.what, found=error.found))
        except Unverified as error:
            note = str(error)
        except Exception as error:  # a library that an answer breaks must not take the stage down
            note = f"{type(error).__name__}: {error}"[:300]
        return Verified(Reason(rule=UNVERIFIED, what=verifier.__name__, note=note))

    return check
