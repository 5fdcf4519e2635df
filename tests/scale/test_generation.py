"""The driver and its workers without Ray: actors in the event loop of the test, that die or freeze when told."""

import asyncio
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from moto.server import DomainDispatcherApplication

from generate.budget import SharedBudget
from generate.run import _opened
from generate.summary import Summary, summary_of
from pipeline.errors import BudgetReached, DistillError
from pipeline.lineage import read_lineage
from pipeline.recipe import Recipe
from pipeline.records import Completion
from pipeline.rundir import RunDir
from scale import generation, worker
from scale.cluster import Cluster, Lost, Node
from scale.generation import Driver
from scale.parts import read_part
from scale.storage import Folder, Store, open_store
from scale.worker import Worker
from serve.server import free_port
from tests.servers.misbehaving_server import (
    MODEL,
    Asked,
    Behaviour,
    answer,
    completions,
    cut_thought,
    error,
    failures,
    misbehaving,
    recipe_for,
    whole,
)
from tests.servers.object_storage import object_storage

pytestmark = pytest.mark.timeout(400)  # they start nodes and commands, which takes long on a busy machine

LEASE_S = 60.0  # a busy machine must not lose a worker that is well


class FakeActor:
    """A worker; `frozen` while it hears nothing (it goes on all the same: a zombie)."""

    def __init__(self, node: Node, *args: Any) -> None:
        self.node, self.worker = node, Worker(*args)
        self.beat = self.worker.beat
        self.thawed = asyncio.Event()
        self.thawed.set()
        self.work = asyncio.create_task(self.worker.work())


class FakeCluster:
    """Nodes and actors, without Ray."""

    def __init__(self, nodes: int = 2) -> None:
        self.alive = [Node(f"n{number}", f"10.0.0.{number}") for number in range(nodes)]
        self.actors: dict[str, FakeActor] = {}
        self.old: dict[str, FakeActor] = {}
        self.dead: set[int] = set()

    def nodes(self) -> list[Node]:
        return list(self.alive)

    def start(self, node: Node, name: str, *args: Any) -> FakeActor:
        self.actors[name] = FakeActor(node, name, *args)
        return self.actors[name]

    def leftovers(self) -> dict[str, FakeActor]:
        return self.old

    async def call(self, method: Any, *args: Any) -> Any:
        actor = next(one for one in [*self.actors.values(), *self.old.values()] if one.beat == method)
        await actor.thawed.wait()
        if actor.work.cancelled():
            raise Lost("it died")
        return await method(*args)

    def kill(self, actor: FakeActor) -> None:
        actor.work.cancel()

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "BEAT_S", 0.05)
    monkeypatch.setattr(generation, "LOOK_S", 0.1)
    monkeypatch.setattr(worker, "LOOK_S", 0.05)
    monkeypatch.setattr("scale.parts.ROWS", 20)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


async def drive(
    recipe: Recipe,
    folder: RunDir,
    cluster: FakeCluster,
    beside: Any = None,
    lease_s: float = LEASE_S,
    store: Store | None = None,
) -> Summary:
    """One call of the driver; `beside` is what happens to it meanwhile."""
    store = store or Folder(folder.path / "cluster")
    with _opened(recipe, folder, recipe, quiet=True, retry_failures=False) as (call, _):
        driver = Driver(call, cluster, store, lease_s)  # type: ignore[arg-type]
        task = asyncio.create_task(beside(driver)) if beside else None
        outcome = await driver.send()
        if task:
            await task
        if outcome:
            raise outcome
    return summary_of(call)


async def until(driver: Driver, answered: int) -> None:
    while driver._run.counters.answered < answered:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def test_a_run_on_a_cluster_is_that_of_one_machine(run: RunDir) -> None:
    with misbehaving(lambda asked: error(400) if asked.text == "say 3" else answer(delay_s=0.01)) as server:
        summary = await drive(recipe_for(server, 200), run, FakeCluster(3))
        assert len(server.asked) == 200
        assert server.most_at_once <= 8  # together
    assert (summary.answered, summary.failed, summary.completion_tokens) == (199, 1, 199 * 5)
    assert [failure.error for failure in failures(run)] == ["bad_request"]
    assert whole(run, 199)
    assert not list((run.path / "cluster").rglob("*.gz"))


async def test_workers_keep_to_the_weights_of_the_endpoints(run: RunDir) -> None:
    with (
        misbehaving(lambda asked: answer(delay_s=0.05)) as large,
        misbehaving(lambda asked: answer(delay_s=0.05)) as small,
    ):
        teacher = {"model": "stub", "base_url": [f"{large.url} 3", small.url]}
        recipe = recipe_for("x", 400, teacher=teacher, generate={"concurrency": 4})
        assert (await drive(recipe, run, FakeCluster(1))).answered == 400
        assert (large.most_at_once, small.most_at_once) == (12, 4)
        assert len(large.asked) / 400 == pytest.approx(3 / 4, abs=0.1)


async def test_a_worker_that_dies_is_replaced_and_what_it_had_is_asked_again(run: RunDir) -> None:
    cluster = FakeCluster(2)

    async def kill(driver: Driver) -> None:
        await until(driver, 40)
        cluster.kill(next(iter(cluster.actors.values())))

    with misbehaving(lambda asked: answer(delay_s=0.05)) as server:
        summary = await drive(recipe_for(server, 300), run, cluster, kill)
        assert 300 <= len(server.asked) < 300 + 8 + 20 + 1  # in flight, and one part
    assert (summary.answered, len(cluster.actors)) == (300, 3)
    assert whole(run, 300)


async def test_a_node_that_is_lost_before_its_first_part_is_in_s3_is_asked_again(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scale.parts.ROWS", 1000)  # and no part is closed before 15 s
    cluster, lost = FakeCluster(2), list[int]()
    budget = {"tokens": 60_000}
    with misbehaving(lambda asked: answer(delay_s=0.1)) as server, object_storage():
        store = open_store("s3://bucket/stories")

        async def lose(driver: Driver) -> None:
            while len(server.asked) < 40:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            first = next(iter(cluster.actors.values()))
            lost.append(first.worker._counters.answered)
            assert store.names("parts") == []
            cluster.kill(first)

        recipe = recipe_for(server, 200, budget=budget, sampling={"max_tokens": 5})
        summary = await drive(recipe, run, cluster, lose, store=store)
        assert store.names() == ["leases.json", "nodes.json"]
        asked = len(server.asked)
    assert summary.answered == 200
    assert whole(run, 200)
    assert 200 + lost[0] <= asked <= 200 + lost[0] + 8 + 1  # and what was in flight
    assert 12 * asked <= summary_tokens(run) <= budget["tokens"]


async def test_a_store_that_is_away_for_some_seconds_does_not_end_it(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, refused = DomainDispatcherApplication.__call__, Counter[str]()  # of what the driver asks
    monkeypatch.setattr("scale.storage.WAITS_S", (0.01,) * 5)

    def slow_down(self: Any, environ: dict[str, Any], start: Callable[..., object]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if len(server.asked) < 60 or max(refused.values(), default=0) > 6:  # tries of one call, and of the next
            return answers(self, environ, start)
        refused[path] += environ["REQUEST_METHOD"] == "GET" or path.endswith("leases.json")
        start("503 Slow Down", [])
        return [b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"]

    monkeypatch.setattr(DomainDispatcherApplication, "__call__", slow_down)
    with misbehaving(lambda asked: answer(delay_s=0.05)) as server, object_storage():
        store = open_store("s3://bucket/stories")
        await drive(recipe_for(server, 200, budget={"tokens": 60_000}), run, FakeCluster(2), store=store)
        assert len(server.asked) == 200
    assert whole(run, 200)


async def test_a_part_goes_once_its_answers_are_on_disk(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    sync, delete, on_disk, lost = os.fsync, Folder.delete, [b""], list[set[str]]()

    def note_sync(handle: int) -> None:
        written = run.completions.read_bytes()
        sync(handle)
        if os.path.samestat(os.fstat(handle), run.completions.stat()):
            on_disk.append(written)

    def note_delete(self: Folder, name: str) -> None:
        if name.startswith("parts/completions/"):
            lost.append({*map(id_of, read_part(self, name))} - {*map(id_of, on_disk[-1].splitlines())})
        delete(self, name)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Folder, "delete", note_delete)
    with misbehaving() as server:
        assert (await drive(recipe_for(server, 60), run, FakeCluster(1))).answered == 60
    assert lost and not any(lost)


def id_of(line: bytes) -> str:
    return str(json.loads(line)["id"])


async def test_a_frozen_node_loses_its_lease_and_what_it_writes_late_is_dropped_or_counts_once(run: RunDir) -> None:
    cluster = FakeCluster(2)

    async def freeze(driver: Driver) -> None:
        await until(driver, 40)
        first = next(iter(cluster.actors.values()))
        first.thawed.clear()
        await first.work  # it noticed by itself, and has uploaded what it had

    budget = {"tokens": 300 * 150}
    with misbehaving(lambda asked: answer(delay_s=0.05)) as server:
        recipe = recipe_for(server, 300, budget=budget, sampling={"max_tokens": 5}, generate={"concurrency": 4})
        summary = await drive(recipe, run, cluster, freeze, lease_s=4.0)
        asked = len(server.asked)
    assert summary.answered == 300
    assert whole(run, 300)
    spent = summary_tokens(run)
    assert 12 * asked <= spent <= budget["tokens"]


def summary_tokens(run: RunDir) -> int:
    return int(read_lineage(run)["generate"]["spent"]["tokens"])


@pytest.mark.parametrize(
    ("budget", "raised", "price", "words"),
    [
        ({"tokens": 1000}, {"tokens": 4000}, None, r"of budget\.tokens 1,000"),
        ({"usd": 0.001}, {"usd": 0.004}, {"input": 1, "output": 1}, r"of budget\.usd 0\.001"),
    ],
)
async def test_the_budget_ends_it_where_one_machine_would_and_a_raised_one_goes_on(
    run: RunDir, budget: dict[str, float], raised: dict[str, float], price: dict[str, float] | None, words: str
) -> None:
    with misbehaving(lambda asked: answer(delay_s=0.01)) as server:
        teacher = {"model": MODEL, "base_url": server.url, "price": price}
        sections: dict[str, Any] = {"teacher": teacher, "sampling": {"max_tokens": 5}}
        recipe = recipe_for(server, 100, budget=budget, **sections)
        with pytest.raises(BudgetReached, match=words):
            await drive(recipe, run, FakeCluster(2))
        assert 1000 - 250 < 12 * len(server.asked) <= 1000
        assert summary_tokens(run) == 12 * len(server.asked)
        more = recipe_for(server, 100, budget=raised, **sections)
        await drive(more, run, FakeCluster(2))
        assert len(server.asked) == 100
    assert whole(run, 100)


async def test_what_other_runs_have_spent_of_a_budget_that_they_share_is_spent(run: RunDir) -> None:
    with misbehaving(lambda asked: answer(delay_s=0.01)) as server:
        shared = SharedBudget(tokens=1000, others_tokens=600)
        recipe = recipe_for(server, 100, sampling={"max_tokens": 5}).model_copy(update={"budget": shared})
        with pytest.raises(BudgetReached, match=r"of budget\.tokens 1,000"):
            await drive(recipe, run, FakeCluster(2))
        assert 0 < 12 * len(server.asked) <= 400


class Deaf(Folder):
    """Hears of no part that it puts for the first time, so that each is put twice."""

    def __init__(self, path: Path, put: set[bytes]) -> None:
        super().__init__(path)
        self._put = put

    def put_new(self, name: str, data: bytes) -> bool:
        succeeded = super().put_new(name, data)
        if succeeded and data not in self._put:
            self._put.add(data)
            raise DistillError("no reply")
        return succeeded


@pytest.mark.parametrize("times", [1, 2], ids=["parts put once", "parts put twice"])
async def test_a_driver_that_is_killed_leaves_workers_whose_answers_the_next_one_reads(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    cluster, put = FakeCluster(2), set[bytes]()
    if times == 2:
        monkeypatch.setattr(worker, "open_store", lambda url: Deaf(Path(url), put))
    with misbehaving(lambda asked: answer(delay_s=0.05)) as server:
        recipe = recipe_for(server, 300, budget={"tokens": 300 * 60}, sampling={"max_tokens": 5})
        with _opened(recipe, run, recipe, quiet=True, retry_failures=False) as (call, _):
            driver = Driver(call, cluster, Folder(run.path / "cluster"), LEASE_S)  # type: ignore[arg-type]
            directing = asyncio.create_task(driver._direct())
            await until(driver, 40)
            await kill(driver, cluster, directing)
            await driver._collector.save()
            await until_read(driver, times, monkeypatch)  # what was read last is in the journal, not in the state
        after = FakeCluster(2)
        after.old = cluster.actors
        summary = await drive(recipe, run, after)
        assert len(server.asked) == 300  # the old workers had time to upload what they had in flight
        assert summary_tokens(run) == 300 * 12
    assert summary.resumed + summary.answered == 300
    assert sum(node["answered"] for node in read_lineage(run)["generate"]["nodes"].values()) == 300
    assert whole(run, 300)


async def kill(driver: Driver, cluster: FakeCluster, directing: "asyncio.Task[Any]") -> None:
    """Ends a driver as a kill does: nobody is told, nothing is saved.

    Not while a thread of it writes, which a kill would end, too; nor with orders on their way, which stay charged.
    """
    accounts, actors = driver._collector.state.accounts, cluster.actors
    while driver._collector._saving.locked() or any(  # noqa: ASYNC110
        accounts[name].granted != actor.worker._granted for name, actor in actors.items()
    ):
        await asyncio.sleep(0.001)
    for task in (directing, *(one.task for one in driver._workers.values())):
        assert task
        task.cancel()


async def until_read(driver: Driver, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads the workers' parts, without saving that, until an answer was read so many times, first by this."""
    take, read = driver._collector._take_answer, Counter[str]()
    before = {one.id for one in completions(driver._run.dir)}

    def count(name: str, record: Completion) -> None:
        take(name, record)
        read.update({record.id} - before)

    monkeypatch.setattr(driver._collector, "_take_answer", count)
    while max(read.values(), default=0) < times:
        for name in driver._workers:
            await driver._collector.collect(name)
        await asyncio.sleep(0.01)


async def test_a_driver_that_is_killed_before_it_removed_what_it_read_leaves_no_money_behind(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    with misbehaving() as server:
        sections = {"budget": {"tokens": 100_000}, "sampling": {"max_tokens": 5}}
        with monkeypatch.context() as patch:
            patch.setattr(Folder, "delete", lambda *_: None)
            await drive(recipe_for(server, 60, **sections), run, FakeCluster(2))
        assert list((run.path / "cluster").rglob("*.gz"))
        await drive(recipe_for(server, 80, **sections), run, FakeCluster(2))
        assert summary_tokens(run) == 12 * len(server.asked) == 12 * 80
    assert sorted(path.name for path in (run.path / "cluster").rglob("*.*")) == ["leases.json", "nodes.json"]


async def test_a_worker_may_take_longer_than_a_lease_to_start(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, lease_s = FakeCluster(1), 1.0
    begin = cluster.start

    def slowly(node: Node, name: str, *args: Any) -> FakeActor:
        actor = begin(node, name, *args[:-1], LEASE_S)
        actor.thawed.clear()
        return actor

    async def thaw(driver: Driver) -> None:
        await asyncio.sleep(1.5 * lease_s)
        driver._leases._lease_s = LEASE_S  # a busy machine must not lose it once it has started
        (actor,) = cluster.actors.values()
        actor.thawed.set()

    monkeypatch.setattr(cluster, "start", slowly)
    with misbehaving() as server:
        summary = await drive(recipe_for(server, 20), run, cluster, thaw, lease_s=lease_s)
    assert (summary.answered, len(cluster.actors)) == (20, 1)


async def test_an_error_ends_the_run_when_no_node_can_work(run: RunDir) -> None:
    with misbehaving(lambda asked: error(401, "wrong key")) as server, pytest.raises(DistillError, match="wrong key"):
        await drive(recipe_for(server, 30), run, FakeCluster(2))


async def test_the_error_that_ends_the_run_is_the_last_one(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "ASIDE_S", 0.2)
    said: dict[str, tuple[int, str]] = {}

    async def break_and_heal(driver: Driver) -> None:
        await until(driver, 20)
        said[one.url] = (404, "no such model")
        while driver._error is None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        del said[one.url]
        await until(driver, 100)
        said.update({one.url: (401, "wrong key"), two.url: (401, "wrong key")})

    def script(asked: Asked) -> Behaviour:
        url = f"http://{asked.headers['Host']}/v1"
        return error(*said[url]) if url in said else answer(delay_s=0.05)

    with misbehaving(script) as one, misbehaving(script) as two, pytest.raises(DistillError, match="wrong key"):
        teacher = {"model": "stub", "base_url": [one.url, two.url]}
        recipe = recipe_for(one, 1000, teacher=teacher, generate={"concurrency": 4})
        await drive(recipe, run, FakeCluster(2), break_and_heal)


async def test_requests_that_are_all_refused_fail_or_end_it_as_on_one_machine(run: RunDir) -> None:
    with misbehaving(lambda asked: error(403, "not you")) as server, pytest.raises(DistillError, match="not you"):
        await drive(recipe_for(server, 3), run, FakeCluster(1))


@pytest.mark.parametrize(("bad", "count"), [(cut_thought(), 40), (error(403, "flagged"), 10)])
async def test_prompts_that_fail_alike_are_their_own_failures_where_the_run_has_answers(
    run: RunDir, bad: Behaviour, count: int
) -> None:
    """A worker has none itself: they are of an earlier call."""
    with misbehaving(lambda asked: answer() if asked.text == "say 3" else bad) as server:
        await drive(recipe_for(server, 4), run, FakeCluster(1))
        summary = await drive(recipe_for(server, count), run, FakeCluster(1))
    assert (summary.resumed, summary.failed) == (1, count - 1)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nothing_listens_is_told_at_once(scheme: str) -> None:
    address = f"{scheme}127.0.0.1:{free_port()}"
    with pytest.raises(DistillError, match=f"no Ray cluster at {address}: .*refused; docs/clusters.md"):
        Cluster(address, "x")
