"""The loop in simulated time: a model of a server in the client's place, and a clock that jumps to the next event.

A simulated hour takes a moment, so tests can bound the seconds that a run takes without depending on the machine.
"""

import asyncio
import selectors
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from generate.context import Outcome, opened_run
from generate.endpoint import Endpoint
from generate.fleet import Fleet
from generate.loop import Loop
from generate.progress import Counters
from generate.reply import Answer, Choices, Fault
from generate.targets import Target
from pipeline.records import Usage
from pipeline.rundir import RunDir
from tests.servers.misbehaving_server import recipe_for

USAGE = Usage(prompt_tokens=7, completion_tokens=5)
GOOD = Answer("yes", "stop", "stub", USAGE)


class _Jumping(selectors.SelectSelector):
    """Waits for nothing: the clock jumps over the time that it was to wait."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0 if timeout is not None else None)
        self.now += 1e-6  # else a wait that is too short to be seen beside the time of day never ends
        if not ready and timeout:
            self.now += timeout
        return ready


class Clock(asyncio.SelectorEventLoop):
    """An event loop in simulated seconds."""

    def __init__(self) -> None:
        self.jumping = _Jumping()
        super().__init__(self.jumping)

    def time(self) -> float:
        return self.jumping.now


Server = Callable[[int, float], "tuple[float, Answer | Fault]"]  # number of the request, seconds → delay, reply


class Model:
    """A server as a function, and what it has seen."""

    def __init__(self, serve: Server, slots: int | None = None, headers: Mapping[str, str] | None = None) -> None:
        self._serve, self._slots, self.headers = serve, slots, headers or {}
        self.asked = self.at_once = self.most_at_once = 0
        self.sent: list[float] = []

    async def complete(self, now: float) -> Answer | Fault:
        self.asked += 1
        self.sent.append(now)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        delay_s, reply = self._serve(self.asked, now)
        try:
            if self._slots is None or isinstance(reply, Fault):
                await asyncio.sleep(delay_s)
            else:
                if not hasattr(self, "_free"):
                    self._free = asyncio.Semaphore(self._slots)
                async with self._free:
                    await asyncio.sleep(delay_s)
        finally:
            self.at_once -= 1
        return reply


def simulate(
    models: dict[str, Model], folder: Path, monkeypatch: pytest.MonkeyPatch, count: int, **sections: Any
) -> tuple[float, Outcome, Counters]:
    """Runs the loop against models of servers by URL; returns simulated seconds, the outcome and the counts."""
    clock = Clock()

    class FakeClient:
        key = "KEY is not set"

        def __init__(self, teacher: object, url: str, on_headers: Callable[..., None], **_: object) -> None:
            self._model, self._on_headers = models[url], on_headers

        async def __aenter__(self) -> "FakeClient":
            return self

        async def __aexit__(self, *_: object) -> None:
            pass

        async def complete(self, body: bytes, timeout_s: float, choices: int) -> Choices | Fault:
            try:
                async with asyncio.timeout(timeout_s):
                    reply = await self._model.complete(clock.time())
                    self._on_headers(self._model.headers)
                    return reply if isinstance(reply, Fault) else Choices([reply] * choices, reply.usage)
            except TimeoutError:
                return Fault("timeout", "no whole answer")

        async def describe_models(self) -> str:
            return ""

    monkeypatch.setattr("generate.endpoint.Client", FakeClient)
    monkeypatch.setattr("generate.endpoint.monotonic", clock.time)
    monkeypatch.setattr("generate.loop.monotonic", clock.time)
    urls = list(models)
    recipe = recipe_for(urls[0], count, **{"teacher": {"model": "stub", "base_url": urls}, **sections})
    run_dir = RunDir(folder / "run")
    run_dir.path.mkdir(parents=True)

    async def main() -> tuple[float, Outcome, Counters]:
        with opened_run(recipe, run_dir, Counters(total=count), say=lambda message: None, show=lambda: None) as run:
            endpoints = [Endpoint(recipe, Target(url), run.partition, run.say) for url in urls]
            outcome = await Loop(run, Fleet(endpoints), run.jobs_to_send()).run()
            return clock.time(), outcome, run.counters

    with asyncio.Runner(loop_factory=lambda: clock) as runner:
        return runner.run(main())
