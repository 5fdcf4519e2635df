"""One endpoint: how many requests it takes, how long an attempt may last, and whether it is up.

Joins its client (generate.client), its limits (generate.limits) and its concurrency (generate.concurrency), and is the
circuit breaker: an endpoint that only fails gets nothing but one probe now and then, until it answers again. What a
reply means is generate.verdict's; which request goes to which endpoint is generate.fleet's.
"""

import asyncio
from collections.abc import Callable, Mapping
from math import inf
from time import monotonic

from generate.client import Client
from generate.climbing import ByClimbing
from generate.concurrency import MOST, START, START_QUEUED, ByQueue, Concurrency, read_load
from generate.jobs import Partition
from generate.limits import Limits
from generate.progress import EndpointCounts
from generate.reply import Answer, Fault
from generate.targets import Target
from generate.verdict import FAILURES_IN_ROW, OVERLOADED, Pause, speaks_of_endpoint
from pipeline.recipe import Recipe

TIMEOUT_S, TIMEOUT_WORKING_S = 300.0, 3600.0  # of an attempt, unless the recipe says
ATTEMPTS_OF_TIME = 3  # the deadline of a request, in such times, unless the recipe says
FULL_QUEUE = 0.25  # of the limit: so many more 503s and 529s than answers mean a full queue
LEAST_OF_FIRST = 0.1  # of the first attempt's time: with less than that left, another attempt would only cost


class Endpoint:
    """Its `client` is open while requests go out, and `watch` runs beside them."""

    def __init__(self, recipe: Recipe, target: Target, partition: Partition, say: Callable[[str], None]) -> None:
        """The target's weight multiplies the recipe's limits and the number of requests that `auto` begins with."""
        config, now, weight = recipe.generate, monotonic(), target.weight
        requests, tokens = (rate and rate * weight for rate in (config.requests_per_minute, config.tokens_per_minute))
        self.url, self.name, self.weight = target.url, target.name, weight
        self._say, self._partition = say, partition
        self.most = MOST  # in flight, whatever the recipe or the endpoint allows; a fleet sets it
        self.limits = Limits(requests, tokens, now, 1 / partition.of)
        self._config, self._shows_load = config, False
        self._concurrency: Concurrency = (
            ByClimbing(_part(min(START * weight, MOST), partition))
            if config.concurrency == "auto"
            else Concurrency(_part(config.concurrency * weight, partition))
        )
        self.client = Client(recipe.teacher, target.url, address=target.address, on_headers=self._read_headers)
        self.in_flight, self.counts = 0, EndpointCounts()  # a request for several answers counts as several
        self.down_since: float | None = None
        self._probe_at = 0.0  # when it is down
        self._probe_sent: float | None = None  # the probe in flight
        self._failing: set[str] = set()  # requests that failed since the last answer
        self._overload = 0.0  # how many more 503s and 529s came than answers, from 0 on
        self._steps, self._stepped_at = 0, -inf  # of the backoff since the last answer

    @property
    def limit(self) -> int:
        """Requests that may be in flight now."""
        return min(self._concurrency.limit, self.most)

    def share(self, of: int) -> None:
        """So many processes ask this endpoint: a part of what it allows is this one's, rounded down."""
        if of == self._partition.of:
            return
        self._partition = Partition(of - 1, of)
        self.limits.share(1 / of, monotonic())
        self._concurrency.share(1 / of)
        if self._config.concurrency != "auto":
            self._concurrency.limit = _part(self._config.concurrency * self.weight, self._partition)

    def ready_in(self, tokens: int, choices: int, now: float) -> float:
        """Seconds until a request of so many tokens and choices may go out; infinite: only a reply makes room."""
        if self.down_since is not None:
            return inf if self._probe_sent is not None else max(self._probe_at - now, self.limits.delay(tokens, now))
        if self.in_flight and self.in_flight + choices > self.limit:
            return inf
        return max(self.limits.delay(tokens, now), self._concurrency.delay(now))

    def begin(self, tokens: int, choices: int, now: float) -> None:
        self.in_flight += choices
        if self.down_since is not None:
            self._probe_sent = now
        self.limits.take(tokens, now)
        self._concurrency.sending(choices, now)

    def ended(self, choices: int, sent: float) -> None:
        """A request that went out at `sent` is over, however it ended."""
        self.in_flight -= choices
        if sent == self._probe_sent:
            self._probe_sent = None

    def answered(self, answer: Answer, choices: int, sent: float, now: float) -> None:
        """The endpoint has answered: it is up. `choices` are those that were asked for together."""
        self.counts.answered += 1
        self.counts.prompt_tokens += answer.usage.prompt_tokens or 0
        self.counts.completion_tokens += answer.usage.completion_tokens or 0
        self._steps = 0
        self._failing.clear()
        self._overload = max(0.0, self._overload - 1)
        if self.down_since is not None:
            self._say(f"{self.name} answers again, after {now - self.down_since:.0f} s")
            self.down_since = None
        self._concurrency.answered(answer.usage.completion_tokens or 0, now - sent, self.in_flight + choices, now)

    def retried(self, fault: Fault) -> None:
        """A request that failed here is sent again, here or elsewhere."""
        self.counts.retries[fault.error] = self.counts.retries.get(fault.error, 0) + 1

    def count(self) -> None:
        """Brings the counts up to date with how it is now."""
        self.counts.in_flight, self.counts.limit, self.counts.up = self.in_flight, self.limit, self.down_since is None

    def failing_with(self, request_id: str) -> int:
        """How many different requests have failed since the last answer, this one included."""
        return len(self._failing | {request_id})

    def step(self, sent: float) -> int:
        """Which step of the backoff a failure of a request sent then is; 0: none, it belongs to the step before."""
        return self._steps + 1 if sent > self._stepped_at else 0

    def failed(self, request_id: str, fault: Fault, sent: float, now: float) -> None:
        self.counts.faults[fault.error] = self.counts.faults.get(fault.error, 0) + 1
        if fault.error == "rate_limited":
            congested = not self.limits.paced(sent, now)
        elif fault.status in OVERLOADED:  # one alone has many causes
            many = max(FAILURES_IN_ROW, FULL_QUEUE * self.limit)
            self._overload = min(self._overload + 1, many)
            congested = self.down_since is None and self._overload >= many
        else:
            congested = fault.error == "timeout"
        if congested:
            self._concurrency.congested(sent, now, overloaded=fault.error != "rate_limited")
        if speaks_of_endpoint(fault):
            self._failing.add(request_id)

    def pause(self, pause: Pause, fault: Fault, sent: float, now: float) -> None:
        """Takes the pause; one step of the backoff for all requests that were in flight together."""
        if step := self.step(sent):
            self._steps, self._stepped_at = step, now
        if not pause.down:
            if self.limits.pause(pause.pause_s, now):
                self._say(f"{self.name} asks to be left alone for {pause.pause_s:.0f} s ({fault.message})")
            return
        self._probe_at = max(self._probe_at, now + pause.pause_s) if step else self._probe_at
        if self.down_since is None:
            self.down_since = now
            self._say(f"{self.name} is down ({fault.message}); probing it until it answers")

    async def prepare(self) -> str | None:
        """Checks the endpoint before the first request. None if something answers there, else why nothing does."""
        silent = await self.client.check_reachable()
        load = None if silent else read_load(await self.client.metrics())
        if load is not None:
            self._shows_load = True
            if self._config.concurrency == "auto":
                start = min(START_QUEUED * max(load.engines, self.weight), MOST)
                self._concurrency = ByQueue(_part(start, self._partition), 1 / self._partition.of)
        return silent

    def timeout_s(self, spent_s: float) -> float:
        """Seconds for the next attempt of a request that has been in flight for `spent_s`; 0: no attempt."""
        config = self._config
        timeout_s = config.request_timeout_s or (TIMEOUT_WORKING_S if self._shows_load else TIMEOUT_S)
        deadline_s = config.deadline_s or ATTEMPTS_OF_TIME * timeout_s
        first, left = min(timeout_s, deadline_s), min(timeout_s, deadline_s - spent_s)
        return left if left >= LEAST_OF_FIRST * first else 0.0

    async def watch(self, changed: Callable[[], None]) -> None:
        """Follows the server's queue if it shows one; calls `changed` when the limit rises."""
        while isinstance(self._concurrency, ByQueue):
            await asyncio.sleep(self._concurrency.look_s)
            before = self.limit
            load = read_load(await self.client.metrics()) if self.down_since is None else None
            self._concurrency.observed(load, self.in_flight)
            if self.limit > before:
                changed()

    def _read_headers(self, headers: Mapping[str, str]) -> None:
        news = self.limits.learn(headers, monotonic())
        if news:
            self._say(f"{self.name} {news}")


def _part(limit: float, partition: Partition) -> int:
    """This process's part of a number, at least 1."""
    limit = round(limit)
    return max(1, limit // partition.of + (partition.part < limit % partition.of))
