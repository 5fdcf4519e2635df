"""What a checklist is made of. `evaluate.report.checklist` fills it; the report and the terminal show it."""

from typing import Literal

import msgspec

Status = Literal["pass", "warn", "fail", "unknown"]


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One point of the checklist, or one common failure that is looked for."""

    name: str
    wanted: str
    status: Status
    value: float | None = None  # the number that was compared; None where there is none
    finding: str
    mend: str = ""  # what to do about it; empty for a pass


class Checklist(msgspec.Struct, frozen=True, kw_only=True):
    """The eight points of a good run, and the six common failures."""

    points: list[Point] = []
    failures: list[Point] = []

    @property
    def all(self) -> list[Point]:
        """Both, in their order."""
        return [*self.points, *self.failures]
