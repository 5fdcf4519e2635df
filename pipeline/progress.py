"""What long work says of how far it is: a line now and then, on stderr unless told otherwise; of short work nothing.

The requests of a run (generate.progress) and the steps of a training (train.progress) have displays of their own.
"""

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TypeVar

REPORT_S = 10.0  # between lines, at least
Item = TypeVar("Item")


def until_next_line(passed_s: float, least_s: float) -> float:
    """Seconds from a line to the next: at least `least_s`, later a 20th of the time so far, at most a minute."""
    return max(least_s, min(passed_s / 20, 60.0))


def say_on_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def reporting(
    items: Iterable[Item], line: Callable[[int], str], say: Callable[[str], object] = say_on_stderr
) -> Iterator[Item]:
    """The items. If they take long, `line` of their number so far is said: every 10 s, later less often."""
    began = monotonic()
    due = began + REPORT_S
    for count, item in enumerate(items, start=1):
        yield item
        if (now := monotonic()) >= due:
            say(line(count))
            due = now + until_next_line(now - began, REPORT_S)


@contextmanager
def reporting_time(what: str, say: Callable[[str], object] = say_on_stderr) -> Iterator[None]:
    """Says how long the block has taken so far, as often as `reporting`; for work that shows no steps."""
    over, began = threading.Event(), monotonic()

    def report() -> None:
        while not over.wait(until_next_line(monotonic() - began, REPORT_S)):
            say(f"{what}: {monotonic() - began:.0f} s so far")

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
