"""One node's part of a run on a cluster: asks what it is leased, and writes its answers as parts of its own.

Runs the client of generate/ for as long as the driver (scale.generation) feeds it: one loop, with its connections and
its concurrency, however many leases. Answers and failures go to local journals first; scale.parts uploads them. After
each upload it writes its account, from which the driver learns which parts there are and what it still claims of the
budget. Knows nothing of Ray: the driver makes an actor of `Worker`.

A worker that its driver has not spoken to for `lease_s`, because the driver is gone or the worker was frozen, asks
nothing more: it uploads what it has and ends.
"""

import asyncio
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import msgspec

from generate.budget import Budget, Spend, known_price
from generate.context import Left, Outcome, Run
from generate.idset import IdSet
from generate.jobs import Job
from generate.journal import Journal
from generate.loop import Loop
from generate.progress import Counters
from generate.schedule import Feed
from generate.servers import Servers, opened_loop
from pipeline.errors import DistillError
from pipeline.instructions import told_to_teacher
from pipeline.recipe import Recipe
from pipeline.records import Completion, Failure, Request
from pipeline.rundir import RunDir
from scale.parts import Uploader
from scale.request_leases import Claim, Item
from scale.storage import Store, open_store

START_S = 60.0  # what a worker may take to start, beside its lease: code must arrive, and packages be imported
LOOK_S = 0.5  # between two looks at whether a part is to be closed


class Orders(msgspec.Struct, frozen=True):
    """What the driver says at each heartbeat."""

    items: list[Item] = []
    askers: dict[str, int] = {}  # the URLs to ask, and how many workers ask each
    weights: dict[str, float] = {}  # of these URLs
    flush: bool = False  # upload what there is, however little
    close: bool = False  # nothing will follow: end when all is asked
    stop: bool = False  # as the first Ctrl-C: ask nothing more, and wait a moment for what is in flight


class Report(msgspec.Struct, frozen=True):
    """What a worker answers."""

    counters: dict[str, Any]
    room: int  # requests that it would like to have more
    idle: bool  # nothing is queued, in flight, or waiting for a retry
    uploads: int  # accounts that it has written
    said: list[str]
    ended: bool  # it asks nothing more, and has uploaded what it had
    error: DistillError | None  # which ended it


@dataclass(frozen=True, kw_only=True)
class WorkerRun(Run):
    """A run on a worker's own disk, which says what is finished."""

    finished: Callable[[str], object]

    def record_answers(self, *answers: tuple[Completion, Any]) -> None:
        super().record_answers(*answers)
        for completion, _ in answers:
            self.finished(completion.id)

    def record_failures(self, *failures: Failure) -> None:
        super().record_failures(*failures)
        for failure in failures:
            self.finished(failure.id)


class Worker:
    """Asks on one node. All methods run in one event loop."""

    def __init__(
        self,
        name: str,
        recipe: Recipe,
        weights: dict[str, float],
        store: str,
        environment: dict[str, str],
        lease_s: float,
        had_answers: bool = False,
    ) -> None:
        """`weights`: the URLs to ask at first. `environment`: variables of the driver's, such as the key.

        `had_answers`: whether the run has any, of earlier calls or other workers.
        """
        os.environ.update(environment)
        self._name, self._store_url, self._lease_s, self._had_answers = name, store, lease_s, had_answers
        self._recipe = recipe.model_copy(update={"teacher": recipe.teacher.only_at(weights)})
        self._feed, self._counters = Feed(), Counters()
        self._unfinished: dict[str, Spend] = {}  # what one attempt of each request can cost
        self._granted = self._limit = Spend()  # by all leases; of it, what may still be spent or was
        self._heard, self._done_before, self._uploads = monotonic() + START_S, 0, 0
        self._flush = self._stopped = False
        self._said: list[str] = []
        self._loop: Loop | None = None  # once it is open
        self._servers: Servers | None = None
        self._budget = Budget(recipe.budget, known_price(recipe), Spend())  # at the run's price, whatever the URLs
        self._ready, self._ended = asyncio.Event(), False
        self._error: DistillError | None = None  # which has ended it

    async def work(self) -> None:
        """Works until it is told to end, and returns when the driver has not spoken for `lease_s`."""
        try:
            with tempfile.TemporaryDirectory(prefix="distillate-") as folder:
                outcome = await self._send(RunDir(Path(folder)))
            if outcome and not isinstance(outcome, KeyboardInterrupt):
                raise outcome
        except DistillError as error:
            self._error = error
        except Exception as error:  # whatever it is, the driver is told
            self._error = DistillError(f"a worker broke with {type(error).__name__}: {error}")
        self._ended = True
        self._ready.set()
        while not self._is_orphan():  # noqa: ASYNC110, it waits for what does not happen
            await asyncio.sleep(LOOK_S)

    async def beat(self, orders: Orders) -> Report:
        """Takes orders, and reports."""
        await self._ready.wait()
        self._heard = monotonic()
        if self._loop and self._servers and not self._ended:
            self._obey(orders, self._loop, self._servers)
        counters, queued = self._counters, len(self._feed)
        done = counters.answered + counters.failed
        room = 2 * (self._loop.limit if self._loop else 0) + 2 * (done - self._done_before) - queued
        self._done_before = done
        said, self._said = self._said, []
        return Report(
            counters.snapshot(),
            room=max(room, 0),
            idle=not (queued or counters.in_flight or counters.waiting),
            uploads=self._uploads,
            said=said,
            ended=self._ended,
            error=self._error,
        )

    def _obey(self, orders: Orders, loop: Loop, servers: Servers) -> None:
        for item in orders.items:
            request = msgspec.json.decode(item.line, type=Request)
            told = told_to_teacher(request.messages, self._recipe.teacher)
            self._feed.add(Job(request, told, self._recipe.teacher.model))
            self._unfinished[item.id] = item.most
            self._granted += item.most
            self._limit += item.most
        self._budget.limit_to(self._limit)
        self._flush |= orders.flush
        if not orders.stop:
            servers.lead_to(orders.weights, orders.askers)
        if orders.close:
            self._feed.close()
        if orders.stop:
            self._stop(loop)
        loop.look_again()

    def _stop(self, loop: Loop) -> None:
        if not self._stopped:
            self._stopped = True
            loop.interrupt()

    def _is_orphan(self) -> bool:
        return monotonic() - self._heard > self._lease_s

    async def _send(self, folder: RunDir) -> Outcome:
        """Runs the client until its feed is closed, and uploads beside it."""
        store = await asyncio.to_thread(open_store, self._store_url)
        with Journal(folder.completions, Completion) as completions, Journal(folder.failures, Failure) as failures:
            run = WorkerRun(
                recipe=self._recipe,
                dir=folder,
                completions=completions,
                failures=failures,
                logprobs=None,
                had_answers=self._had_answers,  # of the run: the worker's own journals are new
                left=Left(IdSet(), IdSet(), retry_failures=False),
                budget=self._budget,
                counters=self._counters,
                say=self._said.append,
                show=lambda: None,
                finished=lambda id_: self._unfinished.pop(id_, None),
            )
            self._budget.limit_to(Spend())
            uploaders = [
                Uploader(store, self._name, journal.path, kind)
                for kind, journal in (("completions", completions), ("failures", failures))
            ]
            async with opened_loop(run, self._feed) as (self._loop, self._servers):
                self._ready.set()
                sending = asyncio.create_task(self._loop.run())
                while not (await asyncio.wait([sending], timeout=LOOK_S))[0]:
                    if self._is_orphan():
                        self._stop(self._loop)
                    await self._upload(store, uploaders)
                await self._upload_rest(store, uploaders)
                return await sending

    async def _upload(self, store: Store, uploaders: list[Uploader]) -> None:
        """Uploads the parts that are to be closed now, then the account. A store that is away is tried again."""
        flush, self._flush = self._flush, False
        try:
            await self._put(store, uploaders, rest=flush)
        except DistillError as error:
            self._flush |= flush
            self._said.append(f"warning: {error}; trying again")

    async def _upload_rest(self, store: Store, uploaders: list[Uploader]) -> None:
        """Uploads all there is; raises DistillError when the store does not take it for `lease_s`."""
        self._unfinished.clear()  # nothing more will be spent on it
        until = monotonic() + self._lease_s
        while True:
            try:
                return await self._put(store, uploaders, rest=True)
            except DistillError:
                if monotonic() > until:
                    raise
                await asyncio.sleep(LOOK_S)

    async def _put(self, store: Store, uploaders: list[Uploader], *, rest: bool) -> None:
        # What is finished gives back what it did not cost: from here on no more than this is spent without a new lease.
        waiting = sum(self._unfinished.values(), Spend())
        used = self._budget.used
        self._limit = Spend(
            min(self._limit.tokens, used.tokens + waiting.tokens), min(self._limit.cost, used.cost + waiting.cost)
        )
        self._budget.limit_to(self._limit)
        claim = Claim(self._limit, self._granted)
        put = [await asyncio.to_thread(uploader.upload, rest=rest) for uploader in uploaders]
        if any(put) or rest:
            await asyncio.to_thread(store.put, account_name(self._name), msgspec.json.encode(claim))
            self._uploads += 1


def account_name(worker: str) -> str:
    """Where a worker's account is in the store."""
    return f"accounts/{worker}.json"
