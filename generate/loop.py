"""The loop: takes the next request from the schedule, waits for an endpoint and for money, and sends it.

One coroutine schedules (`_send_all`); each request in flight is a task (`_attempt`), and none is made for a prompt, so
memory stays flat. Whatever may make room sets one event, and the scheduler looks again. What a reply means is
generate.verdict's, when a request may go out generate.endpoint's, what it may cost generate.budget's. Writes the
journals of its run.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from math import inf
from time import monotonic
from typing import Any, NamedTuple

from generate.budget import Reservation
from generate.context import Outcome, Run
from generate.dialect import Dialect
from generate.endpoint import Endpoint
from generate.fleet import Fleet
from generate.jobs import Job, completed, failed, outcomes
from generate.refusals import Refusals
from generate.reply import Answer, Choices, Fault
from generate.schedule import BACKOFF, Schedule, wait_s
from generate.verdict import EndRun, Fail, Pause, Relearn, Retry, State, Verdict, decide, paused_too_long
from pipeline.errors import DistillError
from pipeline.records import Usage

GRACE_S = 5.0  # how long requests in flight may still end when the user stops the run, or their server is down
SYNC_INTERVAL_S = 1.0  # at most this much is lost in a power cut
SHOW_INTERVAL_S = 0.25
LONGEST_WAIT_S = 3600.0  # then the scheduler looks again, whatever it waits for
STARTS_AT_ONCE = 64  # requests that go out before replies are looked at again
TOKENS_PER_BYTE = 0.3  # of a prompt, until answers have said better


class Attempt(NamedTuple):
    """One request in flight: where it went, when, and how it was asked."""

    job: Job
    endpoint: Endpoint
    reservation: Reservation
    tokens: int  # an estimate, prompt and answers
    sent: float  # time.monotonic
    sampling: dict[str, Any]  # as it was sent


class Loop:
    """One process's requests, over one or several endpoints of the same model."""

    def __init__(
        self, run: Run, fleet: Fleet, jobs: Iterator[Job | None], *beside: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        """`beside` goes on while requests go out."""
        self._run, self._fleet, self._beside, self._config = run, fleet, beside, run.recipe.generate
        self._schedule = Schedule(jobs)
        self._dialect = Dialect()
        self._tokens_per_byte = TOKENS_PER_BYTE
        self._in_flight: set[asyncio.Task[None]] = set()
        self._changed = fleet.changed  # also set when a request has ended, or the run is to end
        self._ended_by: Outcome = None  # None: it goes on
        self._refusals = Refusals(run, monotonic())
        self._waits_until = inf  # time.monotonic: how long a run that is to end waits for what is in flight

    async def run(self) -> Outcome:
        """Sends every request and returns how that ended."""
        beside = [self._start(begin()) for begin in (self._sync_journals, self._show_progress, *self._beside)]
        try:
            await self._send_all()
            await self._drain()
        finally:
            tasks = [*beside, *self._in_flight]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._fleet.count()
        return self._ended_by or self._refusals.all_sent()

    def interrupt(self) -> bool:
        """Ends the run: nothing new, and a short grace for what is in flight; a second call ends it at once.

        True for the first call.
        """
        first = self._waits_until == inf
        self._end(KeyboardInterrupt(), grace_s=GRACE_S if first else 0.0)
        return first

    def close(self) -> None:
        """Ends the run: nothing new, and all that is in flight is awaited."""
        self._end(KeyboardInterrupt())

    def look_again(self) -> None:
        """Jobs have arrived, or an endpoint's limits or the budget have moved."""
        self._changed.set()

    @property
    def limit(self) -> int:
        """Requests that may be in flight now."""
        return sum(endpoint.limit for endpoint in self._fleet.endpoints)

    def _end(self, why: BaseException, *, grace_s: float = inf) -> None:
        """The run is to end, for the first reason given, and waits so long for what is in flight."""
        self._ended_by = self._ended_by or why
        self._refusals.end()
        self._waits_until = min(self._waits_until, monotonic() + grace_s)
        self._changed.set()

    async def _send_all(self) -> None:
        """Sends requests while there are any and the run goes on: each once there is room and money for it."""
        sent = 0
        while not self._ended_by:
            now = monotonic()
            job = self._schedule.next_job(now)
            if job is None:
                if not self._in_flight and not self._schedule.waiting and not self._schedule.open:
                    return
                await self._change(self._schedule.due_in(now))
                continue
            job, *others = self._dialect.separated(job)
            for other in others:
                self._schedule.hold(other)
            attempt = self._prepare(job, now)
            if not isinstance(attempt, Attempt):
                self._schedule.hold(job)
                await self._change(attempt)
                continue
            self._in_flight.add(self._start(self._attempt(attempt)))
            sent += 1
            if sent % STARTS_AT_ONCE == 0:
                await asyncio.sleep(0)

    def _prepare(self, job: Job, now: float) -> Attempt | float:
        """Takes an endpoint with room for a request of this size, and its cost out of the budget.

        Without them: the seconds until there may be, infinite until a reply. Ends the run where no wait will help.
        """
        body, max_tokens, choices = self._dialect.body(job), int(job.request.sampling["max_tokens"]), job.choices
        tokens = int(len(body) * self._tokens_per_byte) + choices * max_tokens
        endpoint, wait = self._fleet.pick(tokens, now, choices)
        if endpoint is None:
            if not self._in_flight and (pause_s := self._fleet.paused_s(now)) > self._config.give_up_s:
                name = self._fleet.endpoints[0].name
                self._end(DistillError(paused_too_long(name, pause_s, self._config)))
            return wait
        reservation = self._run.budget.reserve(len(body), max_tokens, choices)
        if reservation is None:
            if not self._in_flight:  # and so no reply will give back what its request did not use
                self._end(self._run.budget.reached())
            return inf
        endpoint.begin(tokens, choices, now)
        self._run.counters.in_flight += choices
        return Attempt(job, endpoint, reservation, tokens, now, self._dialect.sent(job.request.sampling, choices))

    async def _attempt(self, attempt: Attempt) -> None:
        """Sends one request, and does what follows from its reply."""
        job, endpoint, counters, budget = attempt.job, attempt.endpoint, self._run.counters, self._run.budget
        job.attempts += 1
        timeout_s, reply = endpoint.timeout_s(job.spent_s), None
        try:
            reply = await endpoint.client.complete(job.body, timeout_s, job.choices)
        finally:
            counters.in_flight -= job.choices
            endpoint.ended(job.choices, attempt.sent)
            self._fleet.reopen(endpoint)
            if reply is None:  # abandoned: the server may have worked on it all the same
                budget.settle(attempt.reservation, None, billed=True)
        now = monotonic()
        job.spent_s += min(now - attempt.sent, timeout_s)  # more where this process or machine was paused
        parts = outcomes(job, reply)
        journaled = self._record_answers(attempt, parts, now)
        for part, outcome in parts:
            if isinstance(outcome, Fault):
                await self._follow(attempt._replace(job=part), outcome, now)
        usage, billed = reply.usage, isinstance(reply, Choices) or reply.maybe_billed
        budget.settle(attempt.reservation, usage, billed=billed, journaled=journaled)
        if usage and usage.prompt_tokens:
            self._tokens_per_byte += 0.02 * (usage.prompt_tokens / len(job.body) - self._tokens_per_byte)
            endpoint.limits.settle(attempt.tokens, usage.prompt_tokens + (usage.completion_tokens or 0), now)

    async def _follow(self, attempt: Attempt, fault: Fault, now: float) -> None:
        job, endpoint = attempt.job, attempt.endpoint
        if fault.error == "rate_limited":
            self._refusals.saw_429(job.request.id, now)
        state = State(
            endpoint.name,
            key=endpoint.client.key,
            down=endpoint.down_since is not None,
            failing=endpoint.failing_with(job.request.id),
            step=endpoint.step(attempt.sent),
            all_down_s=self._fleet.all_down_s(now),
            others_up=self._fleet.others_up(endpoint),
            refused_alike=self._refusals.alike(job, fault),
            quiet_s=self._refusals.quiet_s(now),
            limited_s=self._refusals.limited_s(now),
            limited=self._refusals.limited,
            idle=self._run.counters.in_flight == 0,
            has_time=endpoint.timeout_s(job.spent_s) > 0,
            teaches=self._dialect.teaches(fault, job),
        )
        verdict = decide(fault, job, state, self._config)
        endpoint.failed(job.request.id, fault, attempt.sent, now)
        await self._carry_out(verdict, attempt, fault, now)

    async def _carry_out(self, verdict: Verdict, attempt: Attempt, fault: Fault, now: float) -> None:
        job, endpoint, counters = attempt.job, attempt.endpoint, self._run.counters
        match verdict:
            case Pause():
                endpoint.pause(verdict, fault, attempt.sent, now)
                await self._carry_out(verdict.then, attempt, fault, now)
            case Retry():
                endpoint.retried(fault)
                job.attempts -= not verdict.counted
                job.spent_s = 0.0 if fault.error == "unreachable" else job.spent_s
                self._schedule.put_back(job, now + verdict.after_s + wait_s(BACKOFF, verdict.step))
            case Relearn():
                endpoint.retried(fault)
                self._dialect.learn(fault, job, self._run.say)
                job.attempts -= 1
                self._schedule.put_back(job, now)
            case Fail():
                took = now - attempt.sent
                failures = failed(job, fault, endpoint=endpoint.url, sampling=attempt.sampling, latency_s=took)
                if verdict.held_back:
                    self._refusals.hold_back(failures)
                else:
                    self._refusals.release()
                    self._run.record_failures(*failures)
            case EndRun():
                if not self._ended_by:  # of many at once the first is told
                    # Answers in flight are paid for; those of a server that is down may never come.
                    key = self._run.recipe.teacher.max_tokens_key
                    message = verdict.message.replace("sampling.max_tokens", key)
                    self._end(DistillError(message), grace_s=GRACE_S if endpoint.down_since else inf)
                    if counters.in_flight:
                        self._run.say(f"nothing new goes out; waiting for {counters.in_flight} requests in flight")
                    if verdict.name_models:
                        self._ended_by = DistillError(verdict.message + await endpoint.client.describe_models())

    def _record_answers(self, attempt: Attempt, parts: list[tuple[Job, Answer | Fault]], now: float) -> list[Usage]:
        """Records the answers of a reply together; returns the tokens of each."""
        answers = [(part, outcome) for part, outcome in parts if isinstance(outcome, Answer)]
        if not answers:
            return []
        self._refusals.answered(now)
        endpoint, latency_s = attempt.endpoint, now - attempt.sent
        records = [
            completed(part, answer, latency_s=latency_s, endpoint=endpoint.url, sampling=attempt.sampling)
            for part, answer in answers
        ]
        logprobs = (answer.logprobs for _, answer in answers)
        self._run.record_answers(*zip(records, logprobs, strict=True))
        for _, answer in answers:
            endpoint.answered(answer, attempt.job.choices, attempt.sent, now)
        return [answer.usage for _, answer in answers]

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A task is over: there may be room. One that broke (a full disk) ends the run at once."""
        self._in_flight.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self._end(error, grace_s=0.0)
        self._changed.set()

    async def _change(self, within_s: float) -> None:
        """Waits until something has changed, but not longer than `within_s` seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(min(within_s, LONGEST_WAIT_S)):
                await self._changed.wait()
        self._changed.clear()

    async def _drain(self) -> None:
        """Waits for what is in flight."""
        while self._in_flight and (left_s := self._waits_until - monotonic()) > 0:
            await self._change(left_s)

    async def _sync_journals(self) -> None:
        while True:
            await asyncio.sleep(SYNC_INTERVAL_S)
            for journal in self._run.journals:
                await asyncio.to_thread(journal.sync)

    async def _show_progress(self) -> None:
        while True:
            await asyncio.sleep(SHOW_INTERVAL_S)
            self._fleet.count()
            self._run.counters.waiting = self._schedule.waiting
            self._run.show()
