"""Why vLLM stopped, by its log: the one line that names the cause, without the tracebacks around it."""

import re
from pathlib import Path

TAIL = 1 << 18  # bytes read from the end of a log

_PREFIX = re.compile(r"^\([^)]*pid=\d+\)\s*|^(?:ERROR|WARNING|INFO|CRITICAL) \d\d-\d\d [\d:]+ \[[^\]]*\]\s*")
_ERROR = re.compile(r"^(?:[\w.]*\.)?(?:\w*(?:Error|Exception|Exit|Interrupt|Killed))\b(?::\s*(?P<what>.*))?$")
_USAGE = re.compile(r"^\S+\.py: error: (?P<what>.+)$")
# What one of vLLM's processes says when another failed.
_WRAPPERS = re.compile(r"See (?:root cause|stack trace)|initialization failed due to|failed to start|leaked .* objects")


def cause(log: str) -> str | None:
    """The last error in a vLLM log: a cause, or else what only repeats one; None if there is no error."""
    lines = [_strip(line) for line in log.splitlines()]
    found = repeats = None
    for number, line in enumerate(lines):
        match = _USAGE.match(line) or _ERROR.match(line)
        if not match:
            continue
        if _WRAPPERS.search(line):
            repeats = line
            continue
        found = line if match.re is _ERROR else match["what"]
        if re.search(r"validation errors? for \w+$", line) and number + 1 < len(lines):
            found = re.sub(r"\s*\[type=.*", "", lines[number + 1]).removeprefix("Value error, ")
    return found or repeats


def last_line(log: str) -> str:
    """The last line that is not blank, without vLLM's prefix; empty for an empty log."""
    return next((text for line in reversed(log.splitlines()) if (text := _strip(line))), "")


def tail(path: Path) -> str:
    """The end of a log file; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _strip(line: str) -> str:
    line = line.rpartition("\r")[2]  # a progress bar writes over itself
    while (shorter := _PREFIX.sub("", line, count=1)) != line:
        line = shorter
    return line.strip()
