"""`generate --cluster`: one run over the nodes of a Ray cluster. The driver, which leases, listens and collects.

One worker (scale.worker) per node asks; this process leases requests to it, hears it every BEAT_S, and reads the parts
that it has uploaded into the run's own journals. So the run folder is always that of a one-machine run, and everything
after it goes on from there. Who holds what is scale.request_leases's; Ray is scale.cluster's.

What is guaranteed. Every finished answer counts once: rows are told apart by id, and the first one read stays. Requests
that a lost node had in flight, or had not uploaded, are asked again, and may be paid twice. The budget holds all the
same. After the driver is killed, the same command goes on. Nodes may join and leave.

    cluster-store.txt                  where driver and workers meet; if that is in the run, it is the folder cluster/
    cluster/leases.json                what is charged to whom, saved before a lease goes out
    cluster/parts/…, accounts/…        what the workers write; removed when it was read
    cluster/nodes.json                 how each worker is (scale.nodes), for whoever looks
    spend-cluster.json                 what of it the journals do not say
"""

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from time import monotonic
from typing import Any, Literal
from uuid import uuid4

from generate.budget import spent_of
from generate.context import Outcome, Run
from generate.event_loop import on_signals
from generate.prices import PICO
from generate.run import Sender
from generate.servers import describe_change
from generate.targets import urls_now
from pipeline.errors import BudgetReached, DistillError, RecipeError
from pipeline.rundir import RunDir
from scale.cluster import Cluster, Lost, Node, variables_of
from scale.collect import Collector
from scale.nodes import WorkerTable
from scale.request_leases import Item
from scale.storage import Store
from scale.sync import meeting_store
from scale.worker import START_S, Orders, Report

LEASE_S = 30.0  # of silence, after which a worker's requests are leased to others
BEAT_S = 0.5
LOOK_S = 1.0  # between two looks at the nodes, the leases, and what lost workers have uploaded
ASIDE_S = 30.0  # how long a node on which no worker can work is left alone


def cluster_sender(address: str, whole: RunDir, store_url: str | None = None) -> Sender:
    """What sends the requests of a run, or of its passes, from the cluster at `address`: auto, host:port, or ray://….

    `store_url`: where driver and workers meet, as scale.sync.meeting_store.
    """

    async def send(run: Run, *, signals: bool) -> Outcome:
        if run.recipe.sampling.logprobs is not None:
            raise RecipeError("sampling.logprobs: only one machine stores them so far; leave out --cluster, or the key")
        if run.recipe.generate.share_prompt:
            raise RecipeError("generate.share_prompt: a cluster sends a request for each sample; set it to false")
        namespace = "distillate-" + blake2b(str(run.dir.path.absolute()).encode(), digest_size=8).hexdigest()
        cluster = await asyncio.to_thread(Cluster, address, namespace)
        try:
            store = meeting_store(whole, store_url, run.dir.path)
            driver = Driver(run, cluster, store, LEASE_S)
            with on_signals(driver.interrupt if signals else None):
                return await driver.send()
        finally:
            cluster.close()

    return send


@dataclass
class _Followed:
    """A worker as the driver knows it."""

    node: Node
    actor: Any
    task: asyncio.Task[None]  # which follows it
    report: Report | None = None  # the last
    collected: int = 0  # uploads that have been read
    idle_since: int | None = None  # the uploads that it had when it became idle

    @property
    def settled(self) -> bool:
        """It has nothing to do, and an account that it wrote since then was read."""
        return self.idle_since is not None and self.collected >= self.idle_since + 2


class Driver:
    """One call's driver."""

    def __init__(self, run: Run, cluster: Cluster, store: Store, lease_s: float) -> None:
        self._run, self._cluster, self._store, self._lease_s = run, cluster, store, lease_s
        self._weights = urls_now(run.recipe.teacher)  # of the URLs that the workers have
        self._collector = Collector(run, store, lease_s)
        self._leases = self._collector.leases
        self._table = WorkerTable(self._leases, run.counters, store)
        self._workers: dict[str, _Followed] = {}
        self._silent = set(self._collector.state.accounts)  # lost, or another driver's: they may still upload
        self._aside: dict[str, float] = {}  # nodes where no worker could work, until when
        self._error: DistillError | None = None  # of the last such node
        self._interrupts = 0
        self._stopping = asyncio.Event()
        self._told: set[str] = set()

    async def send(self) -> Outcome:
        """Has everything asked that the run has left, and says how that ended."""
        ended = asyncio.Event()
        writing = asyncio.create_task(self._table.keep_writing(ended))
        try:
            await self._recover()
            outcome = await self._direct()
            self._stopping.set()
            await self._until_ended()
            await self._collector.save()
            return outcome
        finally:
            for worker in self._workers.values():
                worker.task.cancel()
                self._cluster.kill(worker.actor)
            ended.set()
            await writing
            self._run.counters.nodes = self._collector.state.nodes
            if self._leases.asked_again:
                self._run.say(f"{self._leases.asked_again} requests of lost workers were leased again")

    def interrupt(self) -> None:
        """Stops the workers in order; a second call leaves them."""
        self._interrupts += 1
        if self._interrupts == 1:
            self._run.say_stopping()
        self._stopping.set()

    async def _recover(self) -> None:
        """Ends the workers of an earlier driver, and reads what was uploaded for it."""
        old = self._cluster.leftovers()
        if old:
            self._run.say(f"ending {len(old)} workers of an earlier call")
        ended = await asyncio.gather(*(self._retire(actor) for actor in old.values()))
        self._collector.drop_leftovers()
        self._silent |= old.keys()
        for name in self._silent:
            await self._collector.collect(name)
        for name in (name for name, in_order in zip(old, ended, strict=True) if in_order):
            self._silent.discard(name)
            self._collector.close(name)
        await self._collector.save()

    async def _retire(self, actor: Any) -> bool:
        """Stops a worker; False if it cannot be heard: it is dead, or frozen and may still upload."""
        try:
            async with asyncio.timeout(self._lease_s):
                ended = False
                while not ended:
                    ended = (await self._cluster.call(actor.beat, Orders(stop=True))).ended
                    await asyncio.sleep(BEAT_S)
            self._cluster.kill(actor)
        except (Lost, TimeoutError):
            return False
        return True

    async def _direct(self) -> Outcome:
        """Keeps a worker on every node until the run is done, or cannot go on."""
        leases = self._leases
        while True:
            for worker in self._workers.values():
                if worker.task.done() and (error := worker.task.exception()):
                    return error  # the store is away, or a disk is full
            if self._stopping.is_set():
                return KeyboardInterrupt()
            for name in leases.silent(monotonic()):
                await self._lose(name, "it is silent")
            for name in list(self._silent):
                await self._collector.collect(name)
            if not leases.leased and not leases.any_left():
                return None
            if leases.refused and not leases.leased and all(worker.settled for worker in self._workers.values()):
                return self._reached(leases.refused)
            weights, nodes = await self._urls_now(), await asyncio.to_thread(self._cluster.nodes)
            now = monotonic()
            free = {node.id for node in nodes} - {worker.node.id for worker in self._workers.values()}
            ready = [node for node in nodes if node.id in free and self._aside.get(node.id, 0.0) <= now]
            if nodes and not ready and not self._workers:
                return self._error
            self._lead_to(weights, ready, now)
            self._show()
            await self._collector.save()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), LOOK_S)

    async def _urls_now(self) -> dict[str, float]:
        """The URLs and their weights; those known so far while their file cannot be read."""
        try:
            return await asyncio.to_thread(urls_now, self._run.recipe.teacher)
        except RecipeError as error:
            self._tell([f"warning: {error}; going on with the servers known so far"])
            return self._weights

    def _lead_to(self, weights: dict[str, float], nodes: list[Node], now: float) -> None:
        """Starts a worker on each of the nodes. These are the URLs now: the newcomers get theirs first."""
        if weights != self._weights:
            self._run.say(describe_change(weights.items(), self._weights.items()))
        self._weights = weights
        for index, node in enumerate(nodes):
            name = f"{node.address.replace(':', '.')}-{uuid4().hex[:8]}"
            own = self._leases.deal(weights, len(nodes) - index)
            at, variables = {url: weights[url] for url in own}, variables_of(self._run.recipe.teacher)
            answers = self._run.had_answers or self._run.counters.answered > 0
            recipe, url = self._run.recipe, self._store.url
            actor = self._cluster.start(node, name, recipe, at, url, variables, self._lease_s, answers)
            self._leases.join(name, own, now + START_S)
            self._table.joined(name, node.address, own)
            self._workers[name] = _Followed(node, actor, asyncio.create_task(self._follow(name)))
        self._leases.lead_to(weights)

    async def _follow(self, name: str) -> None:
        """Gives a worker its orders and reads what it uploads, until it ends or is lost."""
        worker = self._workers[name]
        try:
            while True:
                orders = self._orders(name, worker)
                if orders.items:
                    await self._collector.save()
                report: Report = await self._cluster.call(worker.actor.beat, orders)
                self._leases.heard(name, orders.askers, monotonic())
                self._table.heard(name, report.counters, idle=report.idle)
                self._tell(report.said)
                if report.ended or report.uploads > worker.collected:
                    await self._collector.collect(name)
                worker.report, worker.collected = report, report.uploads
                if not report.idle:
                    worker.idle_since = None
                elif worker.idle_since is None:
                    worker.idle_since = report.uploads
                if report.ended:
                    return self._ended(name, worker, report.error)
                await asyncio.sleep(BEAT_S)
        except Lost as error:
            await self._lose(name, str(error))

    def _orders(self, name: str, worker: _Followed) -> Orders:
        """What a worker is to do next."""
        leases, items = self._leases, list[Item]()
        askers, report = leases.askers(name), worker.report
        leases.offer(name, askers)
        if askers and report and not self._stopping.is_set():
            items = leases.lease(name, report.room)
            self._collector.changed()
        if items:
            worker.idle_since = None
        at_end = not items and (leases.refused is not None or not leases.any_left())
        refused_all = at_end and worker.settled and bool(leases.workers[name].items)  # the client holds them back
        return Orders(
            items=items,
            askers=askers,
            weights={url: self._weights[url] for url in askers},
            flush=at_end and report is not None and (report.idle or leases.refused is not None),
            close=refused_all,
            stop=self._stopping.is_set(),
        )

    def _ended(self, name: str, worker: _Followed, error: DistillError | None) -> None:
        """A worker has ended by itself, and all that it wrote was read."""
        broken = None if isinstance(error, BudgetReached) else error
        self._leave(name, "broken" if broken else "done")
        self._collector.close(name)
        self._cluster.kill(worker.actor)
        if broken:
            self._put_aside(worker.node, broken)

    async def _lose(self, name: str, why: str) -> None:
        """A worker is gone, or as good as gone: what it had not uploaded is leased to others."""
        if not (worker := self._workers.get(name)):
            return
        self._silent.add(name)
        await self._collector.collect(name)
        if name not in self._workers:  # two have noticed
            return
        if worker.task is not asyncio.current_task():
            worker.task.cancel()
        self._run.say(f"warning: the worker {name} is lost ({why})")
        if worker.report is None:  # it never said a word: so it has nothing, and should not begin later
            self._cluster.kill(worker.actor)
            self._put_aside(worker.node, DistillError(f"no worker starts on {worker.node.address}: {why}"))
        self._leave(name, "lost")

    def _leave(self, name: str, how: Literal["done", "broken", "lost"]) -> None:
        self._workers.pop(name, None)
        self._leases.leave(name, lost=how == "lost")
        self._table.left(name, how)

    def _put_aside(self, node: Node, error: DistillError) -> None:
        self._aside[node.id] = monotonic() + ASIDE_S
        self._error = error
        self._tell([f"warning: {node.address}: {error}"])

    async def _until_ended(self) -> None:
        """The workers have been told to stop: waits for what they have in flight, and reads it."""
        while self._workers and self._interrupts < 2:
            tasks = [worker.task for worker in self._workers.values()]
            await asyncio.wait(tasks, timeout=LOOK_S)
            for name in self._leases.silent(monotonic()):
                await self._lose(name, "it is silent")
            if any(task.done() and task.exception() for task in tasks):
                return

    def _reached(self, refused: Item) -> BudgetReached:
        spent, most = spent_of(self._run.recipe.budget, self._leases.spent), refused.most
        return BudgetReached(
            f"{spent} spent, or charged for lost workers, and the next request can cost up to {most.tokens:,} tokens "
            f"(${most.cost / PICO:.6f}); raise the budget and run the same command again"
        )

    def _show(self) -> None:
        """The progress line: what was read, and what all workers have in flight."""
        reports = [worker.report for worker in self._workers.values() if worker.report]
        for name in ("in_flight", "waiting"):
            setattr(self._run.counters, name, sum(report.counters[name] for report in reports))
        self._run.show()

    def _tell(self, messages: list[str]) -> None:
        """Says each message once: all workers see the same endpoints."""
        for message in messages:
            if message not in self._told:
                self._told.add(message)
                self._run.say(message)
