"""The event loop of a stage that sends: uvloop where it is there; Ctrl-C, SIGTERM and a hangup as calls in it."""

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TypeVar

from pipeline.cli import hang_up
from pipeline.errors import UsageError

Result = TypeVar("Result")

_taken: set[int] = set()  # the signals that a loop has now


def _leave_signals() -> None:
    """In a process that is forked meanwhile, as by a Pool in a user's rows(): its signals are not the loop's."""
    if _taken:
        signal.set_wakeup_fd(-1)
    for number in _taken:
        signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_leave_signals)


@contextmanager
def on_signals(handle: Callable[[], object] | None) -> Iterator[None]:
    """Ctrl-C and SIGTERM call `handle` in the running loop, and so does a hangup, which a stage takes for a SIGTERM.

    Afterwards they do what they did before.
    """
    if handle is None or threading.current_thread() is not threading.main_thread():
        yield  # Python gives signals to the main thread only
        return
    loop = asyncio.get_running_loop()
    calls = {signal.SIGINT: handle, signal.SIGTERM: handle}
    if signal.getsignal(signal.SIGHUP) is hang_up:
        # A call of the loop, too: uvloop would hear the SIGTERM twice that Python's own handler raises.
        calls[signal.SIGHUP] = partial(hang_up, signal.SIGHUP, None)
    before = {number: signal.getsignal(number) for number in calls}
    _taken.update(before)
    for number, call in calls.items():
        loop.add_signal_handler(number, call)
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
        _taken.clear()


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
