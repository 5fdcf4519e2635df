"""What a run shows while it works: a live line on a terminal, a plain line every few seconds elsewhere, or nothing.

Reads the run's counters and writes to stderr, never to stdout.
"""

import time
from collections import Counter, deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from pipeline.progress import until_next_line
from pipeline.prompts_config import PromptsConfig

WINDOW_S = 30.0  # seconds: the speed and the time left are measured over them
PLAIN_INTERVAL_S = 5.0  # between lines that are not in a terminal, at least
SUMMED = (
    "answered",
    "failed",
    "settled_again",
    "in_flight",
    "waiting",
    "prompt_tokens",
    "completion_tokens",
    "reasoning_tokens",
)


class EndpointCounts(msgspec.Struct):
    """What one endpoint has done in this call, and is doing."""

    answered: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    faults: dict[str, int] = {}  # attempts without an answer, by kind
    retries: dict[str, int] = {}  # of them: sent again later
    in_flight: int = 0
    limit: int = 0  # of `in_flight`
    up: bool = True

    def add(self, other: "EndpointCounts") -> None:
        """Adds what another process has done there."""
        ups = [one.up for one in (self, other) if one.up or one.limit]  # one that is gone says nothing
        self.up = bool(ups) and all(ups)
        for name in ("answered", "prompt_tokens", "completion_tokens", "in_flight", "limit"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for mine, theirs in ((self.faults, other.faults), (self.retries, other.retries)):
            for kind, number in theirs.items():
                mine[kind] = mine.get(kind, 0) + number


class NodeCounts(msgspec.Struct):
    """What one node of a cluster has done for a run, over all calls (scale.generation)."""

    answered: int = 0  # answers that count: the first to their requests
    prompt_tokens: int = 0  # of them
    completion_tokens: int = 0
    active_s: float = 0.0  # with requests in hand
    retried: int = 0  # attempts without an answer that were sent again
    asked_again: int = 0  # requests that its workers held when they were lost


@dataclass
class Counters:
    """Where a run is. Tokens are those of this call, as the server counted them."""

    total: int = 0  # requests of the run
    prompts: int = 0  # that they are made of; each asks for `prompts.samples` answers
    distinct: int = 0  # of the prompts: the others ask a question again
    ambiguous: int = 0  # questions that have several different references
    resumed: int = 0  # answered by an earlier call
    failed_before: int = 0  # failed in an earlier call, and had no answer when this one began
    retrying: bool = False  # whether those are asked again
    settled_again: int = 0  # of those: answered or failed in this call
    answered: int = 0
    failed: int = 0
    in_flight: int = 0
    waiting: int = 0  # failed once, waiting for a retry
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0  # of the completion's
    models: set[str] = field(default_factory=set)  # as the server named them
    errors: Counter[str] = field(default_factory=Counter)  # failures by type
    endpoints: dict[str, EndpointCounts] = field(default_factory=dict)  # of this process, by name
    gathered: dict[Any, dict[str, Any]] = field(default_factory=dict)  # `endpoints` of other processes' snapshots
    nodes: dict[str, NodeCounts] = field(default_factory=dict)  # of a cluster, over all calls
    started: float = field(default_factory=time.monotonic)

    @property
    def without_answer(self) -> int:
        """Requests that have failed for good, in this call or an earlier one, and were not answered since."""
        return self.failed_before - self.settled_again + self.failed

    @property
    def done(self) -> int:
        """Requests that need nothing more: answered, or failed for good and not to be asked again."""
        left_alone = 0 if self.retrying else self.failed_before - self.settled_again
        return self.resumed + left_alone + self.answered + self.failed

    @property
    def left(self) -> int:
        """Requests still to be asked."""
        return self.total - self.done

    def snapshot(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in SUMMED} | {
            "models": sorted(self.models),
            "errors": dict(self.errors),
            "endpoints": msgspec.to_builtins(self.endpoints),
        }

    def gather(self, parts: Collection[dict[str, Any]]) -> None:
        """Takes over the sum of the snapshots."""
        for name in SUMMED:
            setattr(self, name, sum(part[name] for part in parts))
        self.models = {model for part in parts for model in part["models"]}
        self.errors = sum((Counter(part["errors"]) for part in parts), Counter())
        self.gathered = {number: part["endpoints"] for number, part in enumerate(parts)}

    def by_endpoint(self) -> dict[str, EndpointCounts]:
        """What each endpoint has done for all processes."""
        whole: dict[str, EndpointCounts] = {}
        for part in (msgspec.to_builtins(self.endpoints), *self.gathered.values()):
            for name, counts in msgspec.convert(part, dict[str, EndpointCounts]).items():
                if name in whole:
                    whole[name].add(counts)
                else:
                    whole[name] = counts
        return whole

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


class Display:
    """Shows the counters; use as a context manager and call `tick` a few times per second."""

    def __init__(self, counters: Counters, console: Console, *, quiet: bool) -> None:
        self._counters, self._console, self._quiet = counters, console, quiet
        self._samples: deque[tuple[float, int, int]] = deque()
        self._next_line = 0.0
        columns = BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("{task.description}")
        self._bar = Progress(*columns, console=console, disable=quiet or not console.is_terminal)
        self._task = self._bar.add_task("")

    def __enter__(self) -> "Display":
        self._next_line = time.monotonic() + PLAIN_INTERVAL_S
        self.tick()
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.tick()
        self._bar.stop()

    def tick(self) -> None:
        now, counters = time.monotonic(), self._counters
        self._samples.append((now, counters.done, counters.completion_tokens))
        while self._samples[0][0] < now - WINDOW_S:
            self._samples.popleft()
        self._bar.update(self._task, total=counters.total, completed=counters.done, description=self._line(now))
        if self._bar.disable and not self._quiet and now >= self._next_line:
            self._next_line = now + until_next_line(counters.seconds, PLAIN_INTERVAL_S)
            self._console.print(
                f"{counters.done}/{counters.total} · {self._line(now)}", highlight=False, soft_wrap=True
            )

    def say(self, message: str) -> None:
        """A message above the live line; shown however quiet the run is."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def _line(self, now: float) -> str:
        """Tokens per second, in flight, waiting, failures and the time left."""
        counters = self._counters
        since, done, tokens = self._samples[0]
        seconds = max(now - since, 1e-9)
        per_second = (counters.done - done) / seconds
        waiting = f"{counters.waiting} waiting for a retry" if counters.waiting else ""
        speed = f"{(counters.completion_tokens - tokens) / seconds:.0f} tok/s"
        parts = [
            speed if counters.done else f"no answer yet after {clock(counters.seconds)}",
            f"{counters.in_flight} in flight",
            waiting,
            f"{counters.without_answer} failed",
            f"{clock(counters.left / per_second)} left" if per_second > 0 else "",
        ]
        return " · ".join(filter(None, parts))


def requests_of(requests: int, prompts: int) -> str:
    """A number of requests in words, with the prompts that they are made of if each has several samples."""
    samples = requests // max(prompts, 1)
    return f"{requests:,} requests" + (f" ({prompts:,} prompts, {samples} samples each)" if samples > 1 else "")


def prompt_warnings(config: PromptsConfig, counters: Counters) -> Iterator[str]:
    """What a user may not mean about the prompts, once all of them are counted."""
    if repeats := counters.prompts - counters.distinct:
        fix = "repeated rows get several answers" if config.file else "add slot values, or lower prompts.count"
        yield (
            f"warning: {counters.prompts} prompts asked for, but only {counters.distinct} differ: "
            f"{repeats} ask the same again; {fix}"
        )
    if counters.ambiguous:
        yield (
            f"warning: {config.file}: {counters.ambiguous} questions have several different references; each answer "
            "is held against that of its own row, and evaluate.verify takes the last: give one question one reference"
        )
    if config.count is not None and counters.prompts < config.count:
        yield (
            f"warning: prompts.count is {config.count}, but {config.file} has only {counters.prompts} rows: each is "
            "asked once (prompts.samples asks for several answers)"
        )


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
