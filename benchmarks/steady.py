"""The steady part of a run: the first fill and the last drain left out, where no client can keep an engine full.

Both sides of a comparison are cut at the same answers, so that what these are like weighs on neither.
"""

from collections.abc import Sequence
from datetime import datetime

from pipeline.records import Completion, read_jsonl
from pipeline.rundir import RunDir


def answer_ends(run: RunDir) -> list[float]:
    """When each answer of the run came in, in seconds."""
    return [datetime.fromisoformat(line.created).timestamp() for line in read_jsonl(run.completions, Completion)]


def steady_seconds(ends: Sequence[float], cut: int) -> float:
    """Seconds in which all answers but the first and the last `cut` came in; `ends` need no order."""
    if not 0 < cut < len(ends) / 2:
        raise ValueError(f"nothing is left of {len(ends)} answers without the first and the last {cut}")
    ends = sorted(ends)
    return ends[-1 - cut] - ends[cut - 1]
