"""One check of a run: what was looked at, what was found, and what to do about it.

`train.checks` (before a training) and the checklist of `evaluate.report` fill it; both and the report show it.

    pass      as it should be                    note   advice: never stops anything
    warn      stops a training, unless accepted  fail   always stops a training
    unknown   cannot be known at this stage
"""

from collections.abc import Collection
from typing import Literal

import msgspec

Status = Literal["pass", "note", "warn", "fail", "unknown"]
COLOURS: dict[Status, str] = {"pass": "green", "note": "cyan", "warn": "yellow", "fail": "red", "unknown": "dim"}


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One finding."""

    name: str
    status: Status
    finding: str
    wanted: str = ""  # what a good run has; empty if the name says it
    value: float | None = None  # the number that was compared, if any
    fix: str = ""  # what to do about it; empty for a pass

    def stops(self, accepted: Collection[str]) -> bool:
        """Whether it stops a training; `accepted`: the names in `train.accept`."""
        return self.status == "fail" or (self.status == "warn" and self.name not in accepted)


class Checklist(msgspec.Struct, frozen=True, kw_only=True):
    """The eight points of a good run, and the six common failures."""

    points: list[Check] = []
    failures: list[Check] = []

    @property
    def all(self) -> list[Check]:
        """Both, in their order."""
        return [*self.points, *self.failures]
