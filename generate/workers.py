"""The workers: each draws a job, asks, and hands the answer or the failure to its journal, until nothing is left.

Writes the two journals it is given, and nothing else. What goes out next is generate.schedule's, what an error means
generate.client's. There is a task for every request in flight and none for a prompt, so memory stays flat.
"""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from time import monotonic
from typing import Any

from generate.client import Answer, CallFailed, Client, Rejected
from generate.journal import Journal
from generate.progress import Counters
from generate.requests import Job
from generate.schedule import RetryPolicy, Schedule
from pipeline.errors import DistillError
from pipeline.records import Completion, Failure, Request

GRACE_S = 5.0  # how long requests in flight may still end when the run is to stop
SYNC_INTERVAL_S = 1.0  # at most this much is lost in a power cut
TICK_INTERVAL_S = 0.25


class Workers:
    """Up to `concurrency` requests at once."""

    def __init__(
        self,
        client: Client,
        schedule: Schedule,
        policy: RetryPolicy,
        completions: Journal,
        failures: Journal,
        counters: Counters,
    ) -> None:
        self._client, self._schedule, self._policy = client, schedule, policy
        self._completions, self._failures, self._counters = completions, failures, counters
        self._stopping, self._stopping_now = asyncio.Event(), asyncio.Event()
        self._error: DistillError | None = None
        self._answered_at = 0.0
        self.interrupted = False

    async def run(self, concurrency: int, tick: Callable[[], None]) -> None:
        """Asks everything. Raises the DistillError that ended the run early; an interrupt only sets `interrupted`."""
        workers = [asyncio.create_task(self._work()) for _ in range(concurrency)]
        beside = [asyncio.create_task(self._sync_regularly()), asyncio.create_task(self._tick(tick))]
        everything: asyncio.Future[Any] = asyncio.gather(*workers)
        stopping: list[asyncio.Future[Any]] = [
            asyncio.create_task(event.wait()) for event in (self._stopping, self._stopping_now)
        ]
        try:
            await asyncio.wait({everything, stopping[0], *beside}, return_when=asyncio.FIRST_COMPLETED)
            if not everything.done():
                await asyncio.wait({everything, stopping[1]}, timeout=GRACE_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (*workers, *beside, *stopping):
                task.cancel()
            ends = await asyncio.gather(*workers, *beside, *stopping, everything, return_exceptions=True)
        if self._error:
            raise self._error
        for end in ends:
            if isinstance(end, BaseException) and not isinstance(end, asyncio.CancelledError):
                raise end

    def interrupt(self) -> bool:
        """Ends the run: nothing new, and a short grace for what is in flight; a second call ends it at once.

        True for the first call.
        """
        first = not self.interrupted
        self.interrupted = True
        self._stop(now=not first)
        return first

    def _stop(self, error: DistillError | None = None, *, now: bool = False) -> None:
        self._error = self._error or error
        self._schedule.stop()
        self._stopping.set()
        if now:
            self._stopping_now.set()

    async def _work(self) -> None:
        try:
            while (job := await self._schedule.next_job()) is not None:
                await self._ask(job)
        except DistillError as error:  # the disk is full, or a prompt of a file is wrong: no worker can go on
            self._stop(error, now=True)

    async def _ask(self, job: Job) -> None:
        job.attempts += 1
        job.sent_before, job.sent = job.sent, monotonic()
        self._counters.in_flight += 1
        try:
            answer = await self._client.ask(job.body)
        except Rejected as error:
            await self._reject(error)
        except CallFailed as error:
            self._fail(job, error)
        else:
            self._answered_at = monotonic()
            completion = _completion(job, answer, self._answered_at - job.sent)
            self._completions.append(completion)
            self._counters.count(completion.model, completion.usage)
        finally:
            self._counters.in_flight -= 1

    async def _reject(self, error: Rejected) -> None:
        """Ends the run; of many rejections at once the first is told."""
        if self._stopping.is_set():
            return
        message = error.message
        self._stop(DistillError(message))
        if error.error == "not_found":
            models = await self._client.models()
            message += (
                f"; it lists {', '.join(models)}: set teacher.model to one of them"
                if models
                else ("; it lists no models: check teacher.base_url")
            )
            self._error = DistillError(message)

    def _fail(self, job: Job, error: CallFailed) -> None:
        """Puts the job back, or writes its failure."""
        delay = self._policy.delay(job.attempts, error)
        if delay is None and error.error == "unreachable":
            # Never the request's own fault: were it written as a failure, the rest of the run would follow it.
            if self._answered_at < job.sent_before:
                message = f"{self._client.url} has stopped answering ({error.message}); start it and run this again"
                self._stop(DistillError(message), now=True)
                return
            job.attempts -= 1  # others are answered: this one's turn will come
            delay = self._policy.delay(job.attempts, error)
        if delay is not None:
            self._schedule.retry(job, delay)
            return
        self._failures.append(_failure(job, error))
        self._counters.failed += 1
        self._counters.errors[error.error] += 1

    async def _sync_regularly(self) -> None:
        while True:
            await asyncio.sleep(SYNC_INTERVAL_S)
            try:
                for journal in (self._completions, self._failures):
                    await asyncio.to_thread(journal.sync)
            except DistillError as error:
                self._stop(error, now=True)
                return

    async def _tick(self, tick: Callable[[], None]) -> None:
        while True:
            await asyncio.sleep(TICK_INTERVAL_S)
            self._counters.waiting = self._schedule.waiting
            tick()


def _completion(job: Job, answer: Answer, latency_s: float) -> Completion:
    return Completion(
        **_identity(job.request),
        text=answer.text,
        finish_reason=answer.finish_reason,
        model=answer.model or job.model,
        usage=answer.usage,
        latency_s=round(latency_s, 4),
        attempts=job.attempts,
        created=_now(),
    )


def _failure(job: Job, error: CallFailed) -> Failure:
    return Failure(
        **_identity(job.request),
        model=job.model,
        error=error.error,
        status=error.status,
        message=error.message,
        attempts=job.attempts,
        created=_now(),
    )


def _identity(request: Request) -> dict[str, Any]:
    return {name: getattr(request, name) for name in Request.__struct_fields__}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
