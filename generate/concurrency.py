"""How many requests to have in flight at an endpoint: a fixed number, or one that finds itself.

`Concurrency` is a fixed number. `auto` is one of two: `ByQueue`, on a server that shows its queue (vLLM's /metrics),
keeps its batch full and the queue behind it short; `ByClimbing` (generate.climbing), on any other, raises the number
until throughput stops rising. Both back off on refusals and timeouts as TCP does (a multiplicative decrease; Chiu and
Jain 1989), once per episode: what was sent before a cut says nothing about it. Latency is no guide here: a larger batch
makes every answer slower and the whole faster. Pure: the time and the observations are passed in by generate.endpoint.
"""

import re
from statistics import median_low
from typing import NamedTuple

START = 64  # in flight, before anything is known
START_QUEUED = 276  # per engine, where the server shows its queue: 256, which many run at once, and a queue
MOST = 4096  # per endpoint: more than any one engine batches; a larger fixed number can still be asked for
BACK_OFF = 0.7

QUEUE_SHARE = 0.08  # of the running requests: so many wait at the server, so that a free slot is filled at once
QUEUE_LEAST = 4
# Seconds between two looks at the load, which cost a server: while the limit doubles, while it moves, and after.
DOUBLING_S, QUICK_S, CALM_S = 0.03, 0.1, 5.0
CALM_AFTER = 10  # looks at which it did not move
LOOK_SHARE = QUEUE_SHARE / 2  # of an answer's time between two looks: half of the queue has drained by then
KV_FULL = 0.97  # above it the engine puts requests aside and computes them twice


class Load(NamedTuple):
    """What a server says of itself. Where it has several engines, one that is clogged does not speak for the others."""

    running: float
    waiting: float
    kv_used: float = 0.0  # share; of several engines: the lower median
    preempted: float = 0.0  # since it started; of several engines: the lower median
    engines: int = 1  # behind this one endpoint
    clogged: float = 0.0  # of `waiting`: at engines whose queue is more than twice as long as that of most

    @property
    def queue(self) -> float:
        """What waits because the server is full."""
        return self.waiting - self.clogged


class Concurrency:
    """How many requests may be in flight: as many as the recipe says. The classes below find the number themselves."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def answered(self, tokens: int, latency_s: float, in_flight: int, now: float) -> None:
        """An answer of so many tokens came, so long after its request; `in_flight` counts it."""

    def congested(self, sent: float, now: float, *, overloaded: bool) -> None:
        """The server refused or timed out a request that was sent then.

        `overloaded`: it cannot do more (a timeout, a full queue); else it will not (429).
        """

    def delay(self, now: float) -> float:
        """Seconds until the next request may go out; 0 for now."""
        return 0.0

    def sending(self, choices: int, now: float) -> None:
        """A request for so many answers goes out."""

    def share(self, fraction: float) -> None:
        """So much of the server's load is this process's from now on."""


class ByQueue(Concurrency):
    """Keeps a short queue at the server. `fraction` of its load is this process's."""

    def __init__(self, limit: int, fraction: float = 1.0) -> None:
        super().__init__(limit)
        self._fraction = fraction
        self._cut_at = float("-inf")  # the last cut
        self._doubling = True  # until the first queue
        self._peak: float | None = 0.0  # the most that ran at once; None once it refused requests
        self._preempted: float | None = None
        self._latency_s = 0.0  # a running mean
        self._steady = 0  # looks since the limit moved
        self._seen = 0.0  # at the server, at the last look

    def share(self, fraction: float) -> None:
        self.limit = max(1, round(self.limit * fraction / self._fraction))
        self._fraction = fraction

    @property
    def look_s(self) -> float:
        """Seconds until the load should be looked at again."""
        quick_s = DOUBLING_S if self._doubling else max(QUICK_S, LOOK_SHARE * self._latency_s)
        return min(quick_s * 2.0 ** min(max(0, self._steady - CALM_AFTER), 9), CALM_S)

    def answered(self, tokens: int, latency_s: float, in_flight: int, now: float) -> None:
        self._latency_s += 0.1 * (latency_s - self._latency_s)

    def congested(self, sent: float, now: float, *, overloaded: bool) -> None:
        """One cut for all that were sent before it."""
        if sent > self._cut_at:
            self._cut_at = now
            self.limit, self._doubling, self._peak = max(1, int(self.limit * BACK_OFF)), False, None

    def observed(self, load: Load | None, in_flight: int) -> None:
        """Looks at the load (None where the server did not say it) and moves the limit."""
        before = self.limit
        if load is not None:
            self._follow(load, in_flight)
        self._steady = self._steady + 1 if self.limit == before else 0

    def _follow(self, load: Load, in_flight: int) -> None:
        """Moves the limit by what is missing in the queue, or too much in it.

        Never below what the server has run at once, and its queue: where many answers end in one step, those that
        follow them wait in the queue for a moment, which is no reason to lower the limit.
        """
        wanted = max(QUEUE_LEAST, load.running * QUEUE_SHARE)
        seen = (load.running + load.waiting) * self._fraction
        rising, self._seen = seen > 1.02 * self._seen, seen
        preempting = self._preempted is not None and load.preempted > self._preempted
        self._preempted = load.preempted
        if self._peak is not None:
            self._peak = load.running if preempting else max(self._peak, load.running)
        least = int((self._peak or 0) * (1 + QUEUE_SHARE) * self._fraction)
        if load.kv_used <= KV_FULL:
            self.limit = max(self.limit, least)
        if load.queue > 2 * wanted or preempting:
            self._doubling = False
            if in_flight <= self.limit:  # else the last step down has not shown yet
                self.limit = max(1, least, min(self.limit, int(in_flight - (load.queue - wanted) * self._fraction)))
            return
        arrived = seen >= (0.95 if self._doubling and rising else 0.8) * in_flight  # else they are under way
        if load.queue >= wanted / 2 or in_flight < 0.9 * self.limit or not arrived or load.kv_used > KV_FULL:
            return
        if load.queue:
            step = round((wanted - load.queue) * self._fraction)
        elif self._doubling:
            step = self.limit
        else:
            step = self.limit // 4
        self.limit = min(self.limit + max(1, step), max(MOST, self.limit))


_GAUGES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "kv_used",
    "vllm:gpu_cache_usage_perc": "kv_used",  # its name before 0.10
    "vllm:num_preemptions_total": "preempted",
}
_LINE = re.compile(rf"^({'|'.join(map(re.escape, _GAUGES))})(?:\{{[^}}]*\}})? ([0-9.eE+-]+)", re.MULTILINE)


def read_load(metrics: str) -> Load | None:
    """The load in a Prometheus text, over all of the server's engines; None where it shows no queue."""
    found: dict[str, list[float]] = {}
    for name, value in _LINE.findall(metrics):
        found.setdefault(_GAUGES[name], []).append(float(value))
    if "running" not in found or "waiting" not in found:
        return None
    longest = 2 * median_low(found["waiting"])
    return Load(
        running=sum(found["running"]),
        waiting=sum(found["waiting"]),
        kv_used=median_low(found.get("kv_used", [0.0])),
        preempted=median_low(found.get("preempted", [0.0])),
        engines=len(found["running"]),
        clogged=sum(max(waiting - longest, 0) for waiting in found["waiting"]),
    )
