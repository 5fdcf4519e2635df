"""Sends what is left of a run from this process: opens the endpoints, runs the loop, and obeys Ctrl-C and SIGTERM.

The work is generate.loop's; several processes are generate.workers's.
"""

import asyncio
import resource
import signal
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from typing import TypeVar

from generate.client import no_endpoint
from generate.context import Outcome, Run
from generate.endpoint import Endpoint
from generate.jobs import Job
from generate.loop import Loop
from pipeline.errors import UsageError

SPARE_FILES = 64  # file descriptors that are not connections

Result = TypeVar("Result")


async def send_from_here(run: Run, *, signals: bool) -> Outcome:
    """Sends every request that is left. With `signals`, Ctrl-C and SIGTERM end it in order."""
    async with opened_loop(run) as loop:

        def interrupt() -> None:
            if loop.interrupt():
                run.say_stopping()

        with on_signals(interrupt if signals else None):
            return await loop.run()


@asynccontextmanager
async def opened_loop(run: Run, jobs: Iterator[Job] | None = None) -> AsyncIterator[Loop]:
    """A loop over the recipe's endpoints, for `jobs` or all that is left. Raises DistillError if none is there."""
    recipe, urls = run.recipe, run.recipe.teacher.urls
    most = _most_connections() // len(urls)
    if recipe.generate.concurrency != "auto" and recipe.generate.concurrency > most * run.partition.of:
        run.say(
            f"warning: this system allows {most} connections per endpoint (ulimit -n): that many requests are in flight"
        )
    async with AsyncExitStack() as stack:
        endpoints = [Endpoint(recipe, url, run.partition, run.say, most) for url in urls]
        for endpoint in endpoints:
            await stack.enter_async_context(endpoint.client)
        silent = await asyncio.gather(*(endpoint.prepare() for endpoint in endpoints))
        if all(silent):
            raise no_endpoint(recipe.teacher, urls[0], silent[0] or "")
        for endpoint, why in zip(endpoints, silent, strict=True):
            if why:
                run.say(f"warning: no endpoint at {endpoint.url} ({why}); it is probed until it answers")
        yield Loop(run, endpoints, jobs)


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
