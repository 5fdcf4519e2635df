"""Which request goes out next: a retry that is due, else a new one. And how long a tenacity policy waits.

A request that waits for its retry holds no slot: it lies here, and others go out. Jobs are drawn from the iterator one
at a time, so memory stays flat. Writes nothing.
"""

import heapq
from collections import deque
from collections.abc import Iterator
from itertools import count
from math import inf

from tenacity import RetryCallState, Retrying, wait_random_exponential
from tenacity.wait import wait_base

from generate.jobs import Job

MOST_WAITING = 4096  # jobs that may wait for a retry before no new ones go out
BACKOFF = wait_random_exponential(multiplier=0.5, max=60)  # seconds; full jitter: uniform below 0.5, 1, 2, 4, …


def wait_s(policy: wait_base, step: int) -> float:
    """Seconds that a tenacity policy waits at a step of its backoff: the first is 1, and at 0 there is no wait."""
    state = RetryCallState(Retrying(), None, (), {})
    state.attempt_number = step
    return float(policy(state)) if step else 0.0


class Feed(Iterator[Job]):
    """Jobs that arrive while the run goes on. To have none now is not the end: that is `close`."""

    def __init__(self) -> None:
        self.open = True
        self._jobs: deque[Job] = deque()

    def add(self, job: Job) -> None:
        self._jobs.append(job)

    def close(self) -> None:
        """No job will follow those that are here."""
        self.open = False

    def __next__(self) -> Job:
        if not self._jobs:
            raise StopIteration
        return self._jobs.popleft()

    def __len__(self) -> int:
        return len(self._jobs)


class Schedule:
    """New jobs from the iterator, and those that wait for a retry."""

    def __init__(self, jobs: Iterator[Job | None]) -> None:
        """`jobs` gives None where it has looked for a while and goes on looking."""
        self._jobs, self._looking = jobs, False
        self._later: list[tuple[float, int, Job]] = []  # a heap: when it is due, a number that breaks ties, the job
        self._numbers = count()
        self._held: deque[Job] = deque()  # drawn already, and given back

    @property
    def waiting(self) -> int:
        """Jobs that wait for a retry."""
        return len(self._later)

    @property
    def open(self) -> bool:
        """Whether jobs may still arrive."""
        return self._looking or (isinstance(self._jobs, Feed) and self._jobs.open)

    def put_back(self, job: Job, due: float) -> None:
        """The job is due again at `due` (time.monotonic)."""
        heapq.heappush(self._later, (due, next(self._numbers), job))

    def hold(self, job: Job) -> None:
        """The job cannot go out yet. It comes again before any new one, but after the retries that are due then."""
        self._held.appendleft(job)

    def due_in(self, now: float) -> float:
        """Seconds until the next retry is due, or `next_job` is to look further; infinite when neither will be."""
        if self._looking:
            return 0.0
        return max(self._later[0][0] - now, 0.0) if self._later else inf

    def next_job(self, now: float) -> Job | None:
        """The next job that may go out now; None when there is none, or none yet (see `due_in`)."""
        self._looking = False
        if self._later and self._later[0][0] <= now:
            return heapq.heappop(self._later)[2]
        if self._held:
            return self._held.popleft()
        if len(self._later) >= MOST_WAITING:
            return None
        for job in self._jobs:
            self._looking = job is None
            return job
        return None
