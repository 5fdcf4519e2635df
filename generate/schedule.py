"""Which request goes out next: a retry that is due before a new one, and none when there is nothing left.

A request that waits to be asked again holds no slot: it lies here, and others go out. Jobs are drawn from the iterator
one at a time, so memory stays flat. Writes nothing.
"""

import heapq
from collections.abc import Iterator
from itertools import count

from tenacity import RetryCallState, Retrying, wait_random_exponential
from tenacity.wait import wait_base

from generate.jobs import Job
from generate.verdict import CallFailed, Transient

BACKOFF = wait_random_exponential(multiplier=0.5, max=60)  # seconds; full jitter: uniform below 0.5, 1, 2, 4, …


def retry_delay(attempts: int, max_attempts: int, error: CallFailed) -> float | None:
    """Seconds until the next attempt, at least as long as the server asks; None when this was the last."""
    if not isinstance(error, Transient) or attempts >= max_attempts:
        return None
    return error.retry_after + wait_s(BACKOFF, attempts)


def wait_s(policy: wait_base, attempts: int) -> float:
    """Seconds that a tenacity policy waits after so many attempts."""
    state = RetryCallState(Retrying(), None, (), {})
    state.attempt_number = max(attempts, 1)
    return float(policy(state))


class Schedule:
    """New jobs from the iterator, and those that wait to be asked again; at most `max_waiting` of the latter."""

    def __init__(self, jobs: Iterator[Job], max_waiting: int) -> None:
        self._jobs: Iterator[Job] | None = jobs
        self._max_waiting = max_waiting
        self._later: list[tuple[float, int, Job]] = []  # a heap: when it is due, a number that breaks ties, the job
        self._numbers = count()

    @property
    def waiting(self) -> int:
        """Jobs that wait to be asked again."""
        return len(self._later)

    @property
    def due(self) -> float | None:
        """When (time.monotonic) the next of those is due; None when none waits."""
        return self._later[0][0] if self._later else None

    def put_back(self, job: Job, due: float) -> None:
        """The job is due again at `due`."""
        heapq.heappush(self._later, (due, next(self._numbers), job))

    def next_job(self, now: float) -> Job | None:
        """The next job that may go out now; None when there is none, or none yet (see `due`)."""
        if self._later and self._later[0][0] <= now:
            return heapq.heappop(self._later)[2]
        if self._jobs is None or len(self._later) >= self._max_waiting:
            return None
        job = next(self._jobs, None)
        if job is None:
            self._jobs = None
        return job
