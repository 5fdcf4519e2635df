"""Servers on a cluster without Ray: its actors are in this process, their servers are real processes (a stand-in)."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from generate import agenerate
from pipeline.errors import DistillError, UsageError
from pipeline.rundir import RunDir
from pipeline.serve_config import ServeConfig
from scale import serving
from scale.cluster import Node
from scale.serving import TRIES, Model, NodeServer, Supervisor, places_on
from serve.__main__ import main
from tests.servers.misbehaving_server import completions, recipe_for
from tests.servers.serve_process import empty_model, processes_with, server_at, stand_in

pytestmark = pytest.mark.timeout(300)

HERE = "127.0.0.1"
CPU = ServeConfig(device="cpu", kv_cache_gib=0.25)


class FakeCluster:
    """Nodes and actors, without Ray."""

    def __init__(self, nodes: int = 2) -> None:
        self.alive = [Node(f"n{number}", HERE) for number in range(nodes)]

    def nodes(self) -> list[Node]:
        return list(self.alive)

    def on_node(self, kind: type, node: Node, **options: Any) -> Any:
        class Maker:
            remote = kind

        return Maker

    async def call(self, method: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.to_thread(method, *args)

    def kill(self, actor: Any) -> None:
        actor.stop()


@pytest.fixture
def processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[psutil.Process]]]:
    """Puts the stand-in in vLLM's place, and gives what finds its processes; none may be left."""
    variables = stand_in(tmp_path / "packages")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name in ("LOOK_S", "FIRST_WAIT_S"):
        monkeypatch.setattr(serving, name, 0.1)
    monkeypatch.setattr("generate.servers.FOLLOW_S", 0.2)
    yield lambda: processes_with(variables)
    assert processes_with(variables) == []


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return Model(empty_model(tmp_path / "model"), "stub", CPU, None)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "new" / "urls.txt"


@asynccontextmanager
async def supervised(cluster: FakeCluster, model: Model, file: Path) -> AsyncIterator[list[str]]:
    """What it says, while it runs; its error afterwards."""
    said: list[str] = []
    supervisor = Supervisor(cluster, model, file, said.append)  # type: ignore[arg-type]
    task = asyncio.create_task(supervisor.run())
    try:
        yield said
    finally:
        supervisor.stop()
        await task
        assert published(file) == set()


def published(file: Path) -> set[str]:
    return set(file.read_text().split()) if file.exists() else set()


async def until(file: Path, true: Callable[[set[str]], object]) -> set[str]:
    """Waits until it is true of the published URLs."""
    while True:
        if true(urls := published(file)):
            return urls
        await asyncio.sleep(0.05)


async def test_a_server_that_dies_comes_back_and_generate_goes_on(processes, model, file, tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "SILENT_S", 1000.0)
    run = RunDir(tmp_path / "run")
    teacher = {"model": "stub", "base_url": "http://cluster/v1", "urls_file": file}
    recipe = recipe_for("x", 400, teacher=teacher, generate={"concurrency": 4, "request_timeout_s": 200})
    async with supervised(FakeCluster(), model, file) as said:
        first = await until(file, lambda urls: len(urls) == 2)
        generating = asyncio.create_task(agenerate(recipe, run, quiet=True))
        while asked_of(run) != first:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        killed, other = (server_at(processes(), url) for url in sorted(first))
        other.suspend()  # else it may answer all before there is a new one
        killed.kill()
        second = await until(file, lambda urls: len(urls) == 2 and min(first) not in urls)
        while asked_of(run) != first | second:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        other.resume()
        summary = await generating
    assert (summary.answered, summary.failed) == (400, 0)
    assert any("vLLM ended while it was serving" in line and "started again" in line for line in said)


def asked_of(run: RunDir) -> set[str]:
    return {record.endpoint for record in completions(run)} if run.completions.exists() else set()


async def test_a_server_that_is_silent_is_replaced(processes, model, file, monkeypatch):
    silent, answers = set(), serving.is_ready
    monkeypatch.setattr(serving, "is_ready", lambda url, name: url not in silent and answers(url, name))
    monkeypatch.setattr(serving, "SILENT_S", 2.0)
    async with supervised(FakeCluster(1), model, file) as said:
        silent |= await until(file, lambda urls: len(urls) == 1)
        await until(file, lambda urls: len(urls) == 1 and not urls & silent)
    assert any("has not answered this machine for 2 s" in line for line in said)


async def test_a_server_may_fail_at_first(processes, model, file, monkeypatch):
    start, failures = NodeServer.start, iter(range(TRIES - 1))

    def failing(server: NodeServer, *args: Any) -> str:
        if next(failures, None) is not None:
            raise DistillError("cannot load libtorch_cpu.so")
        return start(server, *args)

    monkeypatch.setattr(NodeServer, "start", failing)
    async with supervised(FakeCluster(1), model, file) as said:
        await until(file, lambda urls: len(urls) == 1)
    assert sum("cannot load" in line for line in said) == TRIES - 1


async def test_nodes_join_and_leave(processes, model, file):
    cluster = FakeCluster(1)
    async with supervised(cluster, model, file) as said:
        (first,) = await until(file, lambda urls: len(urls) == 1)
        cluster.alive.append(Node("n9", HERE))
        both = await until(file, lambda urls: len(urls) == 2)
        cluster.alive.pop(0)
        assert await until(file, lambda urls: len(urls) == 1) == both - {first}
    assert f"{HERE} has left the cluster" in said


@pytest.mark.parametrize(
    ("reference", "mode", "kind", "says"),
    [
        ("/no/such", "ok", UsageError, "model /no/such: the folder is not there"),
        (None, "die", DistillError, "vLLM ended before it was ready .*: the weights are for another model"),
    ],
)
async def test_what_no_node_can_serve_is_an_error(processes, model, file, monkeypatch, reference, mode, kind, says):
    monkeypatch.setenv("STUB_VLLM", mode)
    model = model._replace(reference=reference or model.reference)
    with pytest.raises(kind, match=f"^{HERE}: {says}"):
        await Supervisor(FakeCluster(), model, file, lambda _: None).run()  # type: ignore[arg-type]
    assert not file.exists()


@pytest.mark.parametrize(
    ("gpus", "config", "expected"),
    [
        ([0, 0], {}, [0, 1]),
        ([0, 2], {}, [1, 1]),
        ([2, 8, 1], {"args": ["-tp", "4"]}, [1, 1]),
        ([4, 0], {"device": "gpu", "args": ["--tensor-parallel-size=2"]}, [0, 0]),
        ([4, 0], {"device": "cpu"}, [0, 1]),
    ],
)
def test_servers_per_node(gpus: list[int], config: dict[str, Any], expected: list[int]) -> None:
    nodes = [Node(f"n{number}", HERE, count) for number, count in enumerate(gpus)]
    found = places_on(nodes, ServeConfig(**config))
    assert sorted(nodes.index(place.node) for place in found) == expected


def test_too_few_gpus_is_an_error() -> None:
    assert places_on([], ServeConfig()) == set()
    for config in ({"args": ["-tp", "4"]}, {"device": "gpu"}):
        count = int(config == {"args": ["-tp", "4"]})
        with pytest.raises(UsageError, match=rf"needs \d GPUs on one node .* Ray knows of {count} at most"):
            places_on([Node("n", HERE, count)], ServeConfig(**config))


def test_only_the_teacher_is_served_on_a_cluster() -> None:
    with pytest.raises(UsageError, match="--cluster serves the teacher, not --model student"):
        main(["recipes/demo.yaml", "--cluster", "auto", "--model", "student"])


def test_print_starts_nothing_on_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "serve_on_cluster", lambda *given: pytest.fail("it has started servers"))
    with pytest.raises(UsageError, match="--print shows what this machine would start; leave out --cluster"):
        main(["recipes/demo.yaml", "--cluster", "auto", "--print"])
