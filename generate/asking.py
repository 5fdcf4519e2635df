"""Asks what is left of a run, in this process: all of it, or a process's share.

Opens the endpoints, and turns Ctrl-C and SIGTERM into an orderly stop. Writes the journals it is given. The work is
generate.loop's; several processes are generate.workers's.
"""

import asyncio
import resource
import signal
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from generate.budget import Budget
from generate.client import no_endpoint
from generate.endpoint import Endpoint
from generate.idset import IdSet
from generate.jobs import WHOLE, Job, Share, build_jobs
from generate.journal import Journal
from generate.loop import Dispatcher
from generate.progress import Counters, Display
from generate.prompts import iter_prompts
from generate.schedule import Schedule
from pipeline.recipe import Recipe

if TYPE_CHECKING:
    from generate.batch import Batches

MOST_WAITING = 4096  # failed requests that may wait before no new ones go out
SPARE_FILES = 64  # file descriptors that are not connections


class Left:
    """Which jobs are still to be asked."""

    def __init__(self, answered: IdSet, failed: IdSet, *, retry_failures: bool) -> None:
        self.answered, self.failed = answered, IdSet() if retry_failures else failed

    def has(self, job: Job) -> bool:
        return job.request.id not in self.answered and job.request.id not in self.failed

    def jobs(self, recipe: Recipe, share: Share = WHOLE) -> Iterator[Job]:
        """Streams them."""
        return (job for job in build_jobs(iter_prompts(recipe), recipe, share) if self.has(job))


async def ask(
    recipe: Recipe,
    left: Left,
    completions: Journal,
    failures: Journal,
    counters: Counters,
    budget: Budget,
    display: Display,
) -> None:
    """Asks every job that is left. Raises KeyboardInterrupt once interrupted, DistillError when it cannot go on."""
    async with dispatching(
        recipe, left.jobs(recipe), completions, failures, counters, budget, display.say
    ) as dispatcher:

        def interrupt() -> None:
            if dispatcher.interrupt():
                display.stopping()

        with on_signals(interrupt), display:
            await dispatcher.run(display.tick)
        if dispatcher.interrupted:
            display.stopped("still to ask")
            raise KeyboardInterrupt


async def ask_in_batches(batches: "Batches", display: Display) -> None:
    """Asks through the Batch API. Raises as `ask` does."""
    stopped = asyncio.Event()
    with on_signals(stopped.set):
        await batches.run(stopped)
    if stopped.is_set():
        display.stopped("still to come")
        raise KeyboardInterrupt


@asynccontextmanager
async def dispatching(
    recipe: Recipe,
    jobs: Iterator[Job],
    completions: Journal,
    failures: Journal,
    counters: Counters,
    budget: Budget,
    say: Callable[[str], None],
    share: Share = WHOLE,
) -> AsyncIterator[Dispatcher]:
    """A dispatcher over the recipe's endpoints. Raises DistillError when none of them is there."""
    urls = recipe.teacher.urls
    most = _most_connections() // len(urls)
    if recipe.generate.concurrency != "auto" and recipe.generate.concurrency > most * share.of:
        say(f"warning: this system allows {most} connections an endpoint (ulimit -n): that many requests are in flight")
    async with AsyncExitStack() as stack:
        endpoints = [await stack.enter_async_context(Endpoint(recipe, url, share, say, most)) for url in urls]
        silent = await asyncio.gather(*(endpoint.prepare() for endpoint in endpoints))
        if all(silent):
            raise no_endpoint(recipe.teacher, urls[0], silent[0] or "")
        for endpoint, why in zip(endpoints, silent, strict=True):
            if why:
                say(f"warning: no endpoint at {endpoint.url} ({why}); it is probed until it answers")
        schedule = Schedule(jobs, MOST_WAITING)
        yield Dispatcher(endpoints, schedule, recipe.generate, budget, completions, failures, counters, say)


@contextmanager
def on_signals(handle: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM call `handle` in the running loop; afterwards they do what they did before."""
    if threading.current_thread() is not threading.main_thread():
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


def run_loop(main: Coroutine[None, None, None]) -> None:
    """Runs on uvloop where it is installed (it is not made for Windows)."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        asyncio.run(main)
        return
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(main)


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
