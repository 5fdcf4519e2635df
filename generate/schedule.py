"""Which request goes out next: a retry that is due before a new one, and none when there is nothing left.

A request that waits to be asked again holds no slot: it lies here, and its worker takes another. Every worker draws
from the one schedule, so memory stays flat. Reads an iterator of jobs; writes nothing.
"""

import asyncio
import heapq
from collections.abc import Iterator
from itertools import count
from time import monotonic

from tenacity import AsyncRetrying, RetryCallState, stop_after_attempt, wait_random_exponential

from generate.client import CallFailed, Transient
from generate.requests import Job

BACKOFF = wait_random_exponential(multiplier=0.5, max=60)  # seconds; full jitter: uniform below 0.5, 1, 2, 4, …


class RetryPolicy:
    """Whether and when a failed request is asked again: exponential backoff with full jitter (tenacity)."""

    def __init__(self, max_attempts: int) -> None:
        self._policy = AsyncRetrying(stop=stop_after_attempt(max_attempts), wait=BACKOFF)

    def delay(self, attempts: int, error: CallFailed) -> float | None:
        """Seconds until the next attempt, at least as long as the server asks; None when this was the last."""
        state = RetryCallState(self._policy, None, (), {})
        state.attempt_number = attempts
        if not isinstance(error, Transient) or self._policy.stop(state):
            return None
        return error.retry_after + BACKOFF(state)


class Schedule:
    """New jobs from the iterator, and those that wait to be asked again; at most `max_waiting` of the latter."""

    def __init__(self, jobs: Iterator[Job], max_waiting: int) -> None:
        self._jobs: Iterator[Job] | None = jobs
        self._max_waiting = max_waiting
        self._later: list[tuple[float, int, Job]] = []  # a heap: when it is due, a number that breaks ties, the job
        self._numbers = count()
        self._claimed = 0
        self._stopped = asyncio.Event()

    @property
    def waiting(self) -> int:
        """Jobs that wait to be asked again."""
        return len(self._later) + self._claimed

    def retry(self, job: Job, delay_s: float) -> None:
        """Puts a job back; it is due after `delay_s` seconds."""
        heapq.heappush(self._later, (monotonic() + delay_s, next(self._numbers), job))

    def stop(self) -> None:
        """From now on there is no next job."""
        self._stopped.set()

    async def next_job(self) -> Job | None:
        """The next job, once it is due. None when all that is left is out: a worker whose job fails comes back here."""
        if self._stopped.is_set():
            return None
        if self._later and self._later[0][0] <= monotonic():
            return heapq.heappop(self._later)[2]
        if self.waiting < self._max_waiting and (job := self._draw()) is not None:
            return job
        if not self._later:
            return None
        due, _, job = heapq.heappop(self._later)
        self._claimed += 1
        try:
            await asyncio.wait_for(self._stopped.wait(), due - monotonic())
        except TimeoutError:
            return job
        finally:
            self._claimed -= 1
        return None

    def _draw(self) -> Job | None:
        if self._jobs is None:
            return None
        job = next(self._jobs, None)
        if job is None:
            self._jobs = None
        return job
