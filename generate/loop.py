"""The dispatcher: sends each request to an endpoint that has room, and hands its answer or failure to its journal.

Writes the two journals it is given, and nothing else. What goes out next is generate.schedule's, where it may go and
when generate.endpoint's, what an error means generate.verdict's, what it may cost generate.budget's. There is a task
for each request in flight and none for a prompt, so memory stays flat.
"""

import asyncio
from collections.abc import Callable, Sequence
from time import monotonic

from generate.budget import Budget, Reservation
from generate.dialect import Dialect
from generate.endpoint import Endpoint
from generate.jobs import Job, completed, failed
from generate.journal import Journal
from generate.progress import Counters
from generate.schedule import Schedule, retry_delay
from generate.verdict import Answer, CallFailed, Refused, Rejected
from pipeline.errors import DistillError
from pipeline.recipe import GenerateConfig
from pipeline.records import Usage

GRACE_S = 5.0  # how long requests in flight may still end when the run is to stop
SYNC_INTERVAL_S = 1.0  # at most this much is lost in a power cut
TICK_INTERVAL_S = 0.25
LONGEST_WAIT_S = 3600.0  # of a timer; it looks again
STARTS_AT_ONCE = 64  # requests that go out before answers are looked at again
TOKENS_A_BYTE = 0.3  # of a prompt, until answers have said better


class Dispatcher:
    """One run's requests, over one or several endpoints of the same model."""

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        schedule: Schedule,
        config: GenerateConfig,
        budget: Budget,
        completions: Journal,
        failures: Journal,
        counters: Counters,
        say: Callable[[str], None],
    ) -> None:
        self._endpoints, self._schedule, self._config, self._budget = endpoints, schedule, config, budget
        self._completions, self._failures, self._counters, self._say = completions, failures, counters, say
        self._dialect = Dialect()
        self._tasks: set[asyncio.Task[None]] = set()
        self._held: Job | None = None  # drawn, and waiting for room
        self._timer: asyncio.TimerHandle | None = None
        self._tokens_a_byte = TOKENS_A_BYTE
        self._idle, self._stopping, self._stopping_now = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._error: BaseException | None = None
        self.interrupted = False

    async def run(self, tick: Callable[[], None]) -> None:
        """Asks everything. Raises the DistillError that ended the run early; an interrupt only sets `interrupted`."""
        beside = [
            asyncio.create_task(self._sync_regularly()),
            asyncio.create_task(self._tick(tick)),
            *(asyncio.create_task(endpoint.watch(self._pump)) for endpoint in self._endpoints),
        ]
        waits = [asyncio.create_task(event.wait()) for event in (self._idle, self._stopping, self._stopping_now)]
        idle, stopping, now = waits
        self._pump()
        try:
            await asyncio.wait({idle, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not idle.done():
                await asyncio.wait({idle, now}, timeout=GRACE_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._schedule_next(None)
            everything = [*self._tasks, *beside, *waits]
            for task in everything:
                task.cancel()
            ends = await asyncio.gather(*everything, return_exceptions=True)
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

    def _stop(self, error: BaseException | None = None, *, now: bool = False) -> None:
        self._error = self._error or error
        self._stopping.set()
        if now:
            self._stopping_now.set()
        if not self._tasks:
            self._idle.set()

    def _pump(self) -> None:
        """Sends out all that may go now, and sees to it that it is called again when more may."""
        try:
            for _ in range(STARTS_AT_ONCE):
                if self._stopping.is_set() or not self._start_next():
                    break
            else:
                self._schedule_next(0.0)
        except Exception as error:  # the disk is full, or a prompt of a file is wrong: nothing can go on
            self._stop(error, now=True)
        if not self._tasks and (self._stopping.is_set() or not (self._held or self._timer)):
            self._idle.set()

    def _start_next(self) -> bool:
        """Sends out one request; False when none may go now."""
        now = monotonic()
        endpoint, wait = self._least_busy(now)
        if endpoint is None:
            if wait is not None and wait > self._config.give_up_s:
                self._check_rest(now)
            self._schedule_next(wait)
            return False
        job = self._held or self._schedule.next_job(now)
        if job is None:
            due = self._schedule.due
            self._schedule_next(max(due - now, 0.0) if due is not None else None)
            return False
        self._held = job
        body = self._dialect.body(job)
        tokens = self._estimate(job)
        wait = endpoint.ready_in(tokens, now)  # now that the size is known
        if wait != 0:
            self._schedule_next(wait)
            return False
        reservation = self._budget.reserve(len(body), job.request.sampling["max_tokens"])
        if reservation is None:
            self._schedule_next(None)
            if not self._tasks:  # and nothing will give back what it has reserved
                raise self._budget.reached()
            return False
        self._held = None
        endpoint.begin(tokens, now)
        self._counters.in_flight += 1
        task = asyncio.create_task(self._ask(job, endpoint, tokens, reservation))
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return True

    def _least_busy(self, now: float) -> tuple[Endpoint | None, float | None]:
        """The endpoint with the fewest requests in flight of those with room; else the seconds until one has."""
        best, soonest = None, None
        for endpoint in self._endpoints:
            wait = endpoint.ready_in(1, now)
            if wait == 0:
                if best is None or endpoint.in_flight < best.in_flight:
                    best = endpoint
            elif wait is not None and (soonest is None or wait < soonest):
                soonest = wait
        return best, soonest

    def _schedule_next(self, wait_s: float | None) -> None:
        """The next call of `_pump` that no answer brings; None for none."""
        if self._timer:
            self._timer.cancel()
        if wait_s is None:
            self._timer = None
        else:
            self._timer = asyncio.get_running_loop().call_later(min(wait_s, LONGEST_WAIT_S), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._pump()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self._stop(error, now=True)
        self._pump()

    async def _ask(self, job: Job, endpoint: Endpoint, tokens: int, reservation: Reservation) -> None:
        sent = monotonic()
        job.attempts += 1
        answer: Answer | None = None
        error: CallFailed | None = None
        version = job.dialect
        try:
            answer = await endpoint.client.ask(job.body, endpoint.timeout_s(job.spent_s))
        except CallFailed as failure:
            error = failure
        finally:
            now = monotonic()
            self._counters.in_flight -= 1
            endpoint.ended()
            if not answer and not error:  # abandoned: it may have been worked for all the same
                self._budget.settle(reservation, None, billed=True, journaled=False)
        job.spent_s += now - sent
        if answer:
            self._answered(job, endpoint, answer, now - sent, now)
            used: Usage | None = answer.usage
        else:
            assert error is not None
            await self._failed(job, endpoint, error, version, now)
            used = error.usage
        billed = error is None or error.maybe_billed
        self._budget.settle(reservation, used, billed=billed, journaled=error is None)
        if endpoint.limits.any and used and used.prompt_tokens is not None:
            endpoint.limits.settle(tokens, used.prompt_tokens + (used.completion_tokens or 0), now)

    def _answered(self, job: Job, endpoint: Endpoint, answer: Answer, latency_s: float, now: float) -> None:
        sampling = self._dialect.sent(job.request.sampling)
        completion = completed(job, answer, latency_s=latency_s, endpoint=endpoint.url, sampling=sampling)
        self._completions.append(completion)
        self._counters.count(completion.model, completion.usage)
        endpoint.answered(answer.usage.completion_tokens or 0, latency_s, now)
        if answer.usage.prompt_tokens:
            self._tokens_a_byte += 0.02 * (answer.usage.prompt_tokens / len(job.body) - self._tokens_a_byte)

    async def _failed(self, job: Job, endpoint: Endpoint, error: CallFailed, version: int, now: float) -> None:
        """Ends the run, puts the job back, or writes its failure."""
        was_down = endpoint.down_since is not None
        endpoint.failed(job.request.id, error, now)
        if isinstance(error, Rejected):
            await self._reject(endpoint, error)
            return
        if isinstance(error, Refused) and self._dialect.learns_from(error, version, self._say):
            job.attempts -= 1
            self._schedule.put_back(job, now)
            return
        if self._given_up(now):
            return
        if error.error == "unreachable" or was_down:  # the endpoint's fault, not the request's
            job.attempts -= 1
            job.spent_s = 0.0 if error.error == "unreachable" else job.spent_s
        too_long = error.retry_after > self._config.give_up_s
        if too_long and (was_down or error.error == "rate_limited"):  # the endpoint's to wait for
            error.retry_after, too_long = 0.0, False
        delay = retry_delay(job.attempts, self._config.max_attempts, error)
        if delay is not None and not too_long and endpoint.timeout_s(job.spent_s) > 0:
            self._schedule.put_back(job, now + delay)
            return
        sampling = self._dialect.sent(job.request.sampling)
        self._failures.append(failed(job, error, endpoint=endpoint.url, sampling=sampling))
        self._counters.failed += 1
        self._counters.errors[error.error] += 1

    def _given_up(self, now: float) -> bool:
        """Ends the run when every endpoint has been down for too long."""
        downs = [endpoint.down_since for endpoint in self._endpoints]
        since = [down for down in downs if down is not None]
        if len(since) < len(downs) or now - max(since) < self._config.give_up_s:
            return False
        endpoint = self._endpoints[0]
        self._stop(
            DistillError(
                f"{endpoint.url} has not answered for {now - max(since):.0f} s ({endpoint.last_error}); "
                "start it and run this again: what was answered is kept"
            ),
            now=True,
        )
        return True

    def _check_rest(self, now: float) -> None:
        """Raises DistillError when nothing is in flight and every endpoint asks for too long a rest."""
        rest = min(endpoint.limits.paused_s(now) for endpoint in self._endpoints)
        if rest > self._config.give_up_s and not self._tasks:
            raise DistillError(
                f"{self._endpoints[0].url} takes no requests for another {rest:.0f} s, longer than generate.give_up_s "
                f"({self._config.give_up_s:g}); run the same command again then: what was answered is kept"
            )

    async def _reject(self, endpoint: Endpoint, error: Rejected) -> None:
        """Ends the run; of many rejections at once the first is told."""
        if self._stopping.is_set():
            return
        message = error.message
        self._stop(DistillError(message))
        if error.error == "not_found":
            models = await endpoint.client.models()
            message += (
                f"; it lists {', '.join(models)}: set teacher.model to one of them"
                if models
                else "; it lists no models: check teacher.base_url"
            )
            self._error = DistillError(message)

    def _estimate(self, job: Job) -> int:
        return int(len(job.body) * self._tokens_a_byte) + int(job.request.sampling["max_tokens"])

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
