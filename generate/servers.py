"""Opens the endpoints of a run; follows their queues and the list of servers while requests go out.

Which servers there are is generate.targets's to find; which one a request goes to is generate.fleet's.
"""

import asyncio
import resource
from collections.abc import AsyncIterator, Iterator, Sequence, Set
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial

from generate.client import no_endpoint
from generate.context import Run
from generate.endpoint import Endpoint
from generate.fleet import Fleet
from generate.jobs import Job
from generate.loop import Loop
from generate.targets import Target, find_targets
from pipeline.errors import RecipeError

FOLLOW_S = 10.0  # between two looks at where the servers are
SPARE_FILES = 64  # file descriptors that are not connections


@asynccontextmanager
async def opened_loop(run: Run, jobs: Iterator[Job | None]) -> "AsyncIterator[tuple[Loop, Servers]]":
    """A loop that sends the jobs to the recipe's servers, and those servers. Raises DistillError if none is there."""
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
        yield Loop(run, servers.fleet, jobs, servers.watch, servers.follow), servers


class Servers:
    """Opens the endpoints of a fleet, and keeps it to the servers that the recipe leads to."""

    def __init__(self, run: Run, fleet: Fleet, stack: AsyncExitStack) -> None:
        """`stack` closes what is open at the end."""
        self.fleet, self._run, self._stack = fleet, run, stack
        self._endpoints: dict[Target, Endpoint] = {}
        self._leaving: list[Endpoint] = []  # with requests in flight
        self._tasks: asyncio.TaskGroup | None = None  # while `watch` runs
        self._watching: dict[Endpoint, asyncio.Task[None]] = {}
        self._teacher = run.recipe.teacher  # where `follow` looks
        self._askers: dict[str, int] = {}  # how many processes ask each URL, if `lead_to` has said it
        self._led = asyncio.Event()  # set by `lead_to`, if the URLs are others, until `follow` looks at them

    def lead_to(self, weights: dict[str, float], askers: dict[str, int]) -> None:
        """From now on these URLs are asked, and no other, each by so many processes; this one has its part."""
        self._askers = askers
        for target, endpoint in [*self._endpoints.items()]:
            if target.url not in askers:
                self._remove(target)
            else:
                endpoint.share(askers[target.url])
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
        endpoints = [Endpoint(run.recipe, target, run.partition, run.say) for target in new]
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
            if endpoint.url in self._askers:
                endpoint.share(self._askers[endpoint.url])
            self.fleet.add(endpoint)
            self._watch(endpoint)
        return silent

    def _remove(self, target: Target) -> None:
        """Nothing new goes there; what is in flight may end."""
        endpoint = self._endpoints.pop(target)
        self.fleet.remove(endpoint)
        if task := self._watching.pop(endpoint, None):
            task.cancel()
        endpoint.counts.limit, endpoint.counts.in_flight, endpoint.counts.up = 0, 0, False
        self._leaving.append(endpoint)

    async def watch(self) -> None:
        """Follows the queues of the endpoints. Ends when cancelled."""
        async with asyncio.TaskGroup() as self._tasks:
            for endpoint in self._endpoints.values():
                self._watch(endpoint)
            await asyncio.Event().wait()

    def _watch(self, endpoint: Endpoint) -> None:
        if self._tasks:
            self._watching[endpoint] = self._tasks.create_task(endpoint.watch(partial(self.fleet.has_more, endpoint)))

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
