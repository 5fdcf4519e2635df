"""What the benchmarks share: flags, a question, a call measured in a process of its own, a run's steady part, a table.

Imports little, so that it adds nothing to the memory that is measured.
"""

import argparse
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import suppress
from math import inf
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import UsageError
from pipeline.resources import peak_bytes

SAMPLE_S = 0.2
WHOLE = "a whole number from 1 on"
Kind = Callable[[str], Any]  # reads a flag's value


def flags(about: str | None, kinds: Mapping[str, Kind] | None = None, /, **defaults: Any) -> argparse.Namespace:
    """Parses the command line: every keyword is a flag with its default, read as `kinds` says.

    Without a kind the default decides: False is a switch, [] takes many files, a number but 0 takes numbers above 0.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        kind = type(default)
        usual = {int: whole, float: positive}.get(kind, kind) if default else kind
        settings: dict[str, Any] = {"help": f"default: {default}", "type": (kinds or {}).get(name, usual)}
        if default is False:
            settings = {"action": "store_true"}
        elif default == []:
            settings = {"nargs": "*", "type": existing_file}
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, **settings)
    return parser.parse_args()


def checked(read: Kind, fits: Callable[[Any], bool], wanted: str) -> Kind:
    def kind(text: str) -> Any:
        with suppress(ValueError):
            if fits(value := read(text)):
                return value
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")

    return kind


def between(low: float, high: float) -> Kind:
    return checked(float, lambda value: low <= value <= high, f"from {low:g} to {high:g}")


def one_of(*names: str) -> Kind:
    return checked(str, names.__contains__, f"one of {', '.join(names)}")


def several(kind: Kind) -> Kind:
    """With commas between them."""
    return lambda text: [kind(part) for part in text.split(",")]


whole = checked(int, lambda value: value >= 1, WHOLE)
positive = checked(float, lambda value: 0 < value < inf, "a number above 0")
existing_file = checked(Path, Path.is_file, "a file that is there")
auto_or_whole = checked(str, lambda text: text == "auto" or (text.isdecimal() and int(text) > 0), "auto or " + WHOLE)


def question(number: int) -> str:
    """A prompt of the usual length, another one for each number."""
    return f"Write a short story for a small child, 60 to 100 words. About: rabbit number {number}. It ends well."


class Measured(NamedTuple):
    """What a call returned, and what it used."""

    value: Any
    seconds: float
    cpu_s: float  # with the processes that it started and waited for
    peak_mib: float  # resident memory of its own process


def measured(function: Callable[..., Any], *arguments: Any, sample: Callable[[], object] | None = None) -> Measured:
    """Calls a module's function in a new Python process, and measures the call there. What it raises is raised here.

    The arguments and the value are pickled. What the function's module imports at the top is not measured. `sample` is
    called here meanwhile, every 0.2 s.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        call = pool.submit(_measure, function, arguments)
        while sample and wait([call], SAMPLE_S).not_done:
            sample()
        return call.result()


def _measure(function: Callable[..., Any], arguments: Sequence[Any]) -> Measured:
    started, cpu_s = time.perf_counter(), sum(os.times()[:4])
    value = function(*arguments)
    return Measured(value, time.perf_counter() - started, sum(os.times()[:4]) - cpu_s, peak_bytes() / 2**20)


def steady_seconds(ends: Sequence[float], cut: int) -> float:
    """Seconds in which all answers but the first and the last `cut` ended; `ends` need no order.

    No client can keep an engine full while the first requests fill it and the last ones leave it. Both sides of a
    comparison are cut at the same answers. Raises UsageError if no answer is left.
    """
    if not 0 < cut < len(ends) / 2:
        raise UsageError(f"nothing is left of {len(ends)} answers without the first and the last {cut}; ask for more")
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
