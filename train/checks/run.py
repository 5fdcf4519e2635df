"""Checks before training: how they are shown and kept, and what stops a training.

Writes checks.json. The checks are in the modules beside this one: data, pair and licences.
"""

from collections.abc import Sequence

from rich.text import Text

from pipeline.checks import COLOURS, Check, Status
from pipeline.errors import DataError, UsageError
from pipeline.rundir import RunDir, write_json
from train.setting import Setting


def graded(name: str, value: float, finding: str, *, passes: bool, otherwise: Status, fix: str) -> Check:
    """A check of what was found: it passes, or it has another status and a fix."""
    status: Status = "pass" if passes else otherwise
    return Check(name=name, status=status, value=value, finding=finding, fix="" if passes else fix)


def settle(
    checks: Sequence[Check], run: RunDir, setting: Setting, *, force: bool, earlier: Sequence[Check] = ()
) -> list[Check]:
    """Shows a line per check, and writes them after the `earlier` ones as checks.json, unless another process does.

    Returns all of them; of two with one name the later one. Raises DataError if a check failed, UsageError if one warns
    that is neither in `train.accept` nor forced.
    """
    width = max((len(check.name) for check in checks), default=0)
    for check in checks:
        colour = COLOURS[check.status]
        setting.console.print(Text.assemble("  ", (check.status, colour), f"  {check.name:<{width}}  {check.finding}"))
    stopping = [c for c in checks if c.status == "warn" and not force and c.name not in setting.config.accept]
    failed = [check for check in checks if check.status == "fail"]
    names = {check.name for check in checks}
    whole = [*(check for check in earlier if check.name not in names), *checks]
    table = {
        "checks": whole,
        "accepted": [c.name for c in whole if c.status == "warn" and c not in stopping],
        "stopped_by": [check.name for check in (*failed, *stopping)],
    }
    if setting.processes.lead:
        write_json(run.checks, table)
    if failed:
        raise DataError(f"{_named(failed)}; nothing was trained")
    if stopping:
        warned = ", ".join(check.name for check in stopping)
        raise UsageError(f"{_named(stopping)}; or continue as it is with --force, or train.accept: [{warned}]")
    return whole


def _named(checks: Sequence[Check]) -> str:
    """The first of the checks with its fix, and the names of the others."""
    first, *others = checks
    more = f" (and {', '.join(check.name for check in others)}, see checks.json)" if others else ""
    return "; ".join(filter(None, (f"check {first.name}: {first.finding}", first.fix))) + more
