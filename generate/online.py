"""Sends what is left of a run from this process, and obeys Ctrl-C and SIGTERM; for several: generate.workers."""

import asyncio

from generate.context import Outcome, Run
from generate.event_loop import on_signals
from generate.servers import opened_loop


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
            async with opened_loop(run, run.jobs_to_send()) as (loop, _):
                return await loop.run()
        except asyncio.CancelledError:
            if not stopped:
                raise
            return KeyboardInterrupt()
