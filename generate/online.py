"""Sends what is left of a run from this process: opens the endpoints, runs the loop, and obeys Ctrl-C and SIGTERM.

The work is generate.loop's; several processes are generate.workers's.
"""

import asyncio
import resource
import signal
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence, Set
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from typing import TypeVar

from generate.client import no_endpoint
from generate.context import Outcome, Run
from generate.endpoint import Endpoint
from generate.fleet import Fleet
from generate.jobs import Job
from generate.loop import Loop
from generate.targets import Target, find_targets
from pipeline.errors import RecipeError, UsageError

FOLLOW_S = 10.0  # between two looks at where the servers are
SPARE_FILES = 64  # file descriptors that are not connections

Result = TypeVar("Result")


async def send_from_here(run: Run, *, signals: bool) -> Outcome:
    """Sends every request that is left. With `signals`, Ctrl-C and SIGTERM end it in order."""
    sending, loop, stopped = asyncio.current_task(), None, False
    assert sending

    def interrupt() -> None:
        nonlocal stopped
        stopped = True
        if loop is None:  # the endpoints are looked at
            sending.cancel()
        elif loop.interrupt():
            run.say_stopping()

    with on_signals(interrupt if signals else None):
        try:
            async with opened_loop(run) as (loop, _):
                return await loop.run()
        except asyncio.CancelledError:
            if not stopped:
                raise
            return KeyboardInterrupt()


@asynccontextmanager
async def opened_loop(run: Run, jobs: Iterator[Job] | None = None) -> "AsyncIterator[tuple[Loop, Servers]]":
    """A loop over the recipe's servers, for `jobs` or all that is left, and those servers.

    Raises DistillError if none is there.
    """
    recipe, teacher = run.recipe, run.recipe.teacher
    targets, most = await find_targets(teacher), _most_connections()
    each = int(most / sum(target.weight for target in targets))
    if recipe.generate.concurrency != "auto" and recipe.generate.concurrency > each * run.partition.of:
        run.say(
            f"warning: this system allows {each} connections per endpoint (ulimit -n): that many requests are in flight"
        )
    async with AsyncExitStack() as stack:
        servers = Servers(run, Fleet(most=most), stack)
        silent = await servers.change(targets)
        if all(silent):
            raise no_endpoint(teacher, targets[0].name, silent[0] or "")
        yield Loop(run, servers.fleet, servers.follow, jobs=jobs), servers


class Servers:
    """Opens the endpoints of a fleet, and keeps it to the servers that the recipe leads to."""

    def __init__(self, run: Run, fleet: Fleet, stack: AsyncExitStack) -> None:
        """`stack` closes what is open at the end."""
        self.fleet, self._run, self._stack = fleet, run, stack
        self._endpoints: dict[Target, Endpoint] = {}
        self._leaving: list[Endpoint] = []  # with requests in flight
        self._teacher = run.recipe.teacher  # where `follow` looks
        self._of: dict[str, int] = {}  # how many processes ask each URL, if `lead_to` has said it
        self._led = asyncio.Event()  # set by `lead_to`, if the URLs are others, until `follow` looks at them

    def lead_to(self, weights: dict[str, float], of: dict[str, int]) -> None:
        """From now on these URLs are asked, and no other. `of`: how many processes ask each; this one has its part."""
        self._of = of
        for target, endpoint in [*self._endpoints.items()]:
            if target.url not in of:
                self._remove(target)
            else:
                endpoint.share(of[target.url])
                self.fleet.reopen(endpoint)
        teacher = self._teacher.only_at(weights)
        if teacher != self._teacher:
            self._teacher = teacher
            self._led.set()

    async def change(self, targets: Sequence[Target]) -> list[str | None]:
        """From now on requests go to these servers. Of each new one: why it does not answer, or None."""
        for target in self._endpoints.keys() - set(targets):
            self._remove(target)
        new = [target for target in targets if target not in self._endpoints]
        run = self._run
        endpoints = [
            Endpoint(run.recipe, one.url, run.partition, run.say, address=one.address, weight=one.weight) for one in new
        ]
        for endpoint in endpoints:
            await self._stack.enter_async_context(endpoint.client)
        silent = await asyncio.gather(*(endpoint.prepare() for endpoint in endpoints))
        if self._led.is_set():  # meanwhile others were named: `follow` looks again
            self._leaving += endpoints
            return silent
        if len(new) < len(targets) or not all(silent):
            for endpoint, why in zip(endpoints, silent, strict=True):
                if why:
                    self._run.say(f"warning: no endpoint at {endpoint.name} ({why}); it is probed until it answers")
        self._endpoints.update(zip(new, endpoints, strict=True))
        for endpoint in endpoints:
            endpoint.counts = self._run.counters.endpoints.setdefault(endpoint.name, endpoint.counts)
            if endpoint.url in self._of:
                endpoint.share(self._of[endpoint.url])
            self.fleet.add(endpoint)
        return silent

    def _remove(self, target: Target) -> None:
        """Nothing new goes there; what is in flight may end."""
        endpoint = self._endpoints.pop(target)
        self.fleet.remove(endpoint)
        endpoint.counts.limit, endpoint.counts.in_flight, endpoint.counts.up = 0, 0, False
        self._leaving.append(endpoint)

    async def follow(self) -> None:
        """Looks again every FOLLOW_S seconds where the servers are; what cannot be read changes nothing."""
        said = ""
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._led.wait(), FOLLOW_S)
            led = self._led.is_set()  # the driver of the cluster tells the user
            self._led.clear()
            for endpoint in [one for one in self._leaving if not one.in_flight]:
                self._leaving.remove(endpoint)
                await endpoint.client.__aexit__()
            try:
                targets = await find_targets(self._teacher, self._endpoints)
            except RecipeError as error:
                if (message := f"warning: {error}; going on with the servers known so far") != said:
                    self._run.say(said := message)
                continue
            said = ""
            before = set(self._endpoints)
            if before != set(targets):
                await self.change(targets)
                if not led:
                    self._run.say(describe_change(set(targets), before))


def describe_change(now: Set[object], before: Set[object]) -> str:
    """What the user is told when the servers are others than before."""
    return f"servers: {len(now)} (new {len(now - before)}, gone {len(before - now)})"


@contextmanager
def on_signals(handle: Callable[[], object] | None) -> Iterator[None]:
    """Ctrl-C and SIGTERM call `handle` in the running loop; afterwards they do what they did before."""
    if handle is None or threading.current_thread() is not threading.main_thread():
        yield  # Python gives signals to the main thread only
        return
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        loop.add_signal_handler(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


def run_loop(main: Coroutine[None, None, Result]) -> Result:
    """Runs on uvloop where it is installed (it is not made for Windows). Raises UsageError if a loop runs already."""
    with suppress(RuntimeError):
        asyncio.get_running_loop()
        main.close()
        raise UsageError("an event loop is running here, as in a notebook: use `await agenerate(...)`")
    try:
        from uvloop import new_event_loop
    except ImportError:
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main)


def _most_connections() -> int:
    """How many this process may open; raises its soft limit to the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (ValueError, OSError):  # a system (macOS) whose real limit is lower than what it names
            pass
    return max(soft - SPARE_FILES, 1)
