"""The event loop of a stage that sends: uvloop where it is there; Ctrl-C and SIGTERM as calls in it."""

import asyncio
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from pipeline.errors import UsageError

Result = TypeVar("Result")


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
