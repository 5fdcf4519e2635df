"""One endpoint and what is known of it: how many requests it takes, in what time, and whether it is up.

Joins its client (generate.client), its limits (generate.limits) and its concurrency (generate.concurrency), and is the
circuit breaker: an endpoint that only fails gets nothing but one probe now and then, until it answers again.
Which request goes to which endpoint is generate.loop's.
"""

import asyncio
from collections.abc import Callable, Mapping
from time import monotonic

from tenacity import wait_exponential

from generate.client import Client
from generate.concurrency import MOST, START, START_QUEUED, ByClimbing, ByQueue, Concurrency, Fixed, read_load
from generate.jobs import Share
from generate.limits import LONG_S, Limits
from generate.schedule import wait_s
from generate.verdict import CallFailed, Transient
from pipeline.recipe import Recipe

FAILURES_IN_ROW = 8  # of different requests, and no answer between: then the endpoint is down
PROBE_WAIT = wait_exponential(multiplier=0.5, max=30)  # seconds between probes of one that is down
REFUSED_WAIT = wait_exponential(multiplier=0.25, max=30)  # after a 429 that says nothing of when
TIMEOUT_S, TIMEOUT_WORKING_S = 300.0, 3600.0  # of an attempt, unless the recipe says
ATTEMPTS_OF_TIME = 3  # the deadline of a request, in such times, unless the recipe says
LEAST_OF_FIRST = 0.1  # of the first attempt's time: with less than that left, another attempt would only be paid for


class Endpoint:
    """Use as an async context manager; `watch` runs beside the requests."""

    def __init__(self, recipe: Recipe, url: str, share: Share, say: Callable[[str], None], most: int) -> None:
        """`most` requests are in flight at most, whatever the recipe or the endpoint allows."""
        config, now = recipe.generate, monotonic()
        self.url, self._say, self._most, self._share = url, say, most, share
        self.limits = Limits(config.requests_per_minute, config.tokens_per_minute, now, 1 / share.of)
        self._config, self._auto, self._shows_load = config, config.concurrency == "auto", False
        self._concurrency: Concurrency = (
            ByClimbing(_part(START, share)) if config.concurrency == "auto" else Fixed(_part(config.concurrency, share))
        )
        self.client = Client(recipe.teacher, url, on_headers=self._read_headers)
        self.in_flight = 0
        self.down_since: float | None = None
        self.last_error = ""
        self._failing: set[str] = set()
        self._probes = self._refusals = 0
        self._probe_at, self._probing = 0.0, False

    async def __aenter__(self) -> "Endpoint":
        await self.client.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.__aexit__(*_)

    @property
    def limit(self) -> int:
        """Requests that may be in flight now."""
        return min(self._concurrency.limit, self._most)

    def ready_in(self, tokens: int, now: float) -> float | None:
        """Seconds until a request of so many tokens may go out; 0 for now, None when only an answer makes room."""
        if self.down_since is not None:
            return None if self._probing else max(0.0, self._probe_at - now)
        if self.in_flight >= self.limit:
            return None
        return self.limits.delay(tokens, now)

    def begin(self, tokens: int, now: float) -> None:
        """A request goes out."""
        self.in_flight += 1
        self._probing = self._probing or self.down_since is not None
        self.limits.take(tokens, now)

    def answered(self, tokens: int, latency_s: float, now: float) -> None:
        """An answer came: the endpoint is up."""
        self._refusals = 0
        self._failing.clear()
        if self.down_since is not None:
            self._say(f"{self.url} answers again, after {now - self.down_since:.0f} s")
            self.down_since, self._probes, self._probing = None, 0, False
        self._concurrency.answered(tokens, latency_s, now)

    def failed(self, request_id: str, error: CallFailed, now: float) -> None:
        """An attempt failed."""
        if not isinstance(error, Transient):
            self._probing = False
            return
        if error.error in ("rate_limited", "timeout"):
            self._concurrency.congested(now)
        if error.error == "rate_limited":
            self._refusals += 1
            rest = error.retry_after or wait_s(REFUSED_WAIT, self._refusals)
            if rest > max(LONG_S, self.limits.paused_s(now) + 1):
                self._say(f"{self.url} asks for a rest of {rest:.0f} s ({error.message})")
            self.limits.pause(rest, now)
            self._probing = False
            return
        self.last_error = error.message
        self._failing.add(request_id)
        if error.error == "unreachable" or len(self._failing) >= FAILURES_IN_ROW:
            if self.down_since is None:
                self.down_since = now
                self._say(f"{self.url} is down ({error.message}); probing it until it answers")
            self._probes += 1
            self._probe_at, self._probing = now + wait_s(PROBE_WAIT, self._probes), False

    def ended(self) -> None:
        """A request that went out is over, however it ended."""
        self.in_flight -= 1

    async def prepare(self) -> str | None:
        """Looks what is there, before the first request. None when something answers; else why nothing does."""
        silent = await self.client.check_reachable()
        load = None if silent else read_load(await self.client.metrics() or "")
        if load is not None:
            self._shows_load = True
            if self._auto:
                start = min(START_QUEUED * load.engines, MOST)
                self._concurrency = ByQueue(_part(start, self._share), 1 / self._share.of)
        return silent

    def timeout_s(self, spent_s: float) -> float:
        """Seconds that the next attempt of a request may take which has been in flight for `spent_s`; 0 for none."""
        config = self._config
        timeout_s = config.request_timeout_s or (TIMEOUT_WORKING_S if self._shows_load else TIMEOUT_S)
        deadline_s = config.deadline_s or ATTEMPTS_OF_TIME * timeout_s
        first, left = min(timeout_s, deadline_s), min(timeout_s, deadline_s - spent_s)
        return left if left >= LEAST_OF_FIRST * first else 0.0

    async def watch(self, changed: Callable[[], None]) -> None:
        """Follows the server's own queue where that decides; calls `changed` when the limit rises."""
        while isinstance(self._concurrency, ByQueue):
            await asyncio.sleep(self._concurrency.look_s)
            before = self.limit
            load = read_load(await self.client.metrics() or "") if self.down_since is None else None
            self._concurrency.observed(load, self.in_flight)
            if self.limit > before:
                changed()

    def _read_headers(self, headers: Mapping[str, str]) -> None:
        news = self.limits.learn(headers, monotonic())
        if news:
            self._say(f"{self.url} {news}")


def _part(limit: int, share: Share) -> int:
    """This process's part of a number, at least 1."""
    return max(1, limit // share.of + (share.part < limit % share.of))
