"""What the benchmarks share: flags, a question, a call measured in a process of its own, a run's steady part, a table.

Imports little, so that it adds nothing to the memory that is measured.
"""

import argparse
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.resources import peak_bytes


def flags(about: str | None, **defaults: Any) -> argparse.Namespace:
    """Parses the command line: every keyword is a flag of its default's type. False: a switch; []: many paths."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        kind: dict[str, Any] = {"type": type(default), "help": f"default: {default}"}
        if default is False:
            kind = {"action": "store_true"}
        elif default == []:
            kind = {"nargs": "*", "type": Path}
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, **kind)
    return parser.parse_args()


def question(number: int) -> str:
    """A prompt of the usual length, another one for each number."""
    return f"Write a short story for a small child, 60 to 100 words. About: rabbit number {number}. It ends well."


class Measured(NamedTuple):
    """What a call returned, and what it used."""

    value: Any
    seconds: float
    cpu_s: float  # with the processes that it started and waited for
    peak_mib: float  # resident memory of its own process


def measured(function: Callable[..., Any], *arguments: Any) -> Measured:
    """Calls a module's function in a new Python process, and measures the call there. What it raises is raised here.

    The arguments and the value are pickled. What the function's module imports at the top is not measured.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measure, function, arguments).result()


def _measure(function: Callable[..., Any], arguments: Sequence[Any]) -> Measured:
    started, cpu_s = time.perf_counter(), sum(os.times()[:4])
    value = function(*arguments)
    return Measured(value, time.perf_counter() - started, sum(os.times()[:4]) - cpu_s, peak_bytes() / 2**20)


def steady_seconds(ends: Sequence[float], cut: int) -> float:
    """Seconds in which all answers but the first and the last `cut` ended; `ends` need no order.

    No client can keep an engine full while the first requests fill it and the last ones leave it. Both sides of a
    comparison are cut at the same answers. Raises ValueError if no answer is left.
    """
    if not 0 < cut < len(ends) / 2:
        raise ValueError(f"nothing is left of {len(ends)} answers without the first and the last {cut}")
    ends = sorted(ends)
    return ends[-1 - cut] - ends[cut - 1]


def show(rows: Sequence[Sequence[str]]) -> str:
    """The rows as a Markdown table; the first is its head, all columns but the first are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        return f"| {' | '.join(cells)} |"

    rule = f"|{'-' * (widths[0] + 2)}|" + "".join(f"{'-' * (width + 1)}:|" for width in widths[1:])
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])


def show_records(records: Sequence[Mapping[str, Any]]) -> str:
    """The same of records with the same keys, which are the head."""
    return show([tuple(records[0]), *(tuple(map(str, one.values())) for one in records)])
