"""Servers that come and go under a run on a cluster, whose driver alone reads their list; what is counted by server."""

import asyncio
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tenacity import wait_fixed

from generate.metrics import _Collector
from pipeline.errors import RecipeError
from pipeline.lineage import read_lineage
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir
from scale.generation import Driver
from tests.scale.test_generation import FakeCluster, drive, until, whole
from tests.scale.test_generation import _quick as _quick
from tests.servers.misbehaving_server import (
    Asked,
    Behaviour,
    MisbehavingServer,
    answer,
    completions,
    error,
    misbehaving,
    recipe_for,
)

pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setattr("generate.loop.BACKOFF", wait_fixed(0.01))
    monkeypatch.setattr("generate.verdict.PROBE_WAIT", wait_fixed(0.05))
    return RunDir(tmp_path / "run")


def following(urls: Path, count: int, **sections: Any) -> Recipe:
    teacher = {"model": "stub", "base_url": "http://cluster/v1", "urls_file": urls}
    return recipe_for("x", count, **{"teacher": teacher, "generate": {"concurrency": 4}, **sections})


def write(urls: Path, *servers: MisbehavingServer) -> None:
    """As `serve --cluster` does."""
    urls.with_suffix(".new").write_text("".join(f"{server.url}\n" for server in servers))
    urls.with_suffix(".new").replace(urls)


async def test_workers_follow_the_list_that_only_the_driver_reads(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    urls, cluster = tmp_path / "urls.txt", FakeCluster(3)
    with ExitStack() as stack:
        servers = [stack.enter_context(misbehaving(slow)) for _ in range(4)]
        first, second, third, fourth = servers

        async def come_and_go(driver: Driver) -> None:
            await until(driver, 20)
            write(urls, first, second, third)
            await until(driver, 120)
            asked = len(first.asked)
            assert min(len(second.asked), len(third.asked)) > 10
            write(urls, third, fourth)
            await until(driver, 300)
            first.die()  # by now nobody asks there
            assert len(first.asked) < asked + 120
            urls.write_text("# none at the moment\n")
            while not any("holds no URL" in message for message in driver._told):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            urls.unlink()

        write(urls, first)
        summary = await drive(following(urls, 500), run, cluster, come_and_go)
        assert sum(len(server.asked) for server in servers) == 500
        assert all(server.most_at_once <= 4 + 2 for server in servers)  # of all workers, and what a moved one has there
        assert min(len(server.asked) for server in servers) > 10
    assert (summary.answered, summary.failed) == (500, 0)
    assert whole(run, 500)
    assert {record.endpoint for record in completions(run)} == {server.url for server in servers}
    assert len(cluster.actors) == 3  # none was started for another's sake
    assert {actor.worker._recipe.teacher.urls_file for actor in cluster.actors.values()} == {None}
    said = capsys.readouterr().err
    assert said.count("holds no URL; ") == said.count("No such file") == 1
    assert [line for line in said.splitlines() if line.startswith("servers: ")] == [
        "servers: 3 (new 2, gone 0)",
        "servers: 2 (new 1, gone 2)",
    ]


async def test_a_server_that_dies_and_is_replaced_costs_no_answer(run: RunDir, tmp_path: Path) -> None:
    urls = tmp_path / "urls.txt"
    with misbehaving(slow) as first, misbehaving() as second:

        async def die(driver: Driver) -> None:
            await until(driver, 40)
            first.die()
            await asyncio.sleep(0.3)
            write(urls, second)

        write(urls, first)
        budget = {"tokens": 160 * 200}
        summary = await drive(following(urls, 160, budget=budget), run, FakeCluster(2), die)
    assert (summary.answered, summary.failed) == (160, 0)
    assert whole(run, 160)


def slow(asked: Asked) -> Behaviour:
    return answer(delay_s=0.05)


async def test_the_servers_of_a_lost_node_go_to_the_others(run: RunDir) -> None:
    cluster = FakeCluster(2)
    with misbehaving(slow) as first, misbehaving(slow) as second:

        async def lose(driver: Driver) -> None:
            await until(driver, 40)
            lost = next(iter(cluster.actors.values()))
            cluster.alive.remove(lost.node)
            cluster.kill(lost)
            await until(driver, 100)

        teacher = {"model": "stub", "base_url": [first.url, second.url]}
        recipe = recipe_for("x", 300, teacher=teacher, generate={"concurrency": 4})
        assert (await drive(recipe, run, cluster, lose)).answered == 300
        assert min(len(first.asked), len(second.asked)) > 50
    assert whole(run, 300)
    assert len(cluster.actors) == 2


async def test_a_list_without_servers_at_first_is_an_error_as_on_one_machine(run: RunDir, tmp_path: Path) -> None:
    urls = tmp_path / "urls.txt"
    with pytest.raises(RecipeError, match=r"teacher\.urls_file .*urls\.txt: No such file"):
        await drive(following(urls, 10), run, FakeCluster(1))
    urls.write_text("# soon\n")
    with pytest.raises(RecipeError, match=r"urls\.txt holds no URL"):
        await drive(following(urls, 10), run, FakeCluster(1))


async def test_the_price_is_that_of_the_run_whatever_the_servers(run: RunDir, tmp_path: Path) -> None:
    urls = tmp_path / "urls.txt"
    teacher = {"model": "gpt-4.1-mini", "base_url": "https://api.example.com/v1", "urls_file": urls}
    with misbehaving() as server:
        write(urls, server)
        sections = {"teacher": teacher, "budget": {"usd": 1}, "sampling": {"max_tokens": 5}}
        summary = await drive(following(urls, 10, **sections), run, FakeCluster(1))
    assert summary.answered == 10
    assert summary.cost_usd == pytest.approx(10 * (7 * 0.4 + 5 * 1.6) / 1e6)


async def test_what_workers_count_by_server_is_shown_and_in_the_lineage(run: RunDir) -> None:
    cluster, seen = FakeCluster(2), list[Any]()
    busy = set[str]()

    def either(asked: Asked) -> Behaviour:
        if asked.text == "say 3" and asked.text not in busy:
            busy.add(asked.text)
            return error(503, "busy")
        return slow(asked)

    with misbehaving(either) as first, misbehaving(either) as second:

        async def look(driver: Driver) -> None:
            await until(driver, 40)
            name, actor = next(iter(cluster.actors.items()))
            cluster.kill(actor)
            while len(cluster.actors) < 3:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            seen.append(driver._run.counters.gathered[name])
            await until(driver, 150)
            metrics = {one.name: one.samples for one in _Collector(driver._run.counters, lambda: None).collect()}
            seen.append(metrics)

        teacher = {"model": "stub", "base_url": [first.url, second.url]}
        recipe = recipe_for("x", 400, teacher=teacher, generate={"concurrency": 4})
        summary = await drive(recipe, run, cluster, look)
        asked = {server.url: len(server.asked) for server in (first, second)}
    lost, metrics = seen
    assert all((one["in_flight"], one["limit"], one["up"]) == (0, 0, False) for one in lost.values())
    assert {one.labels["endpoint"]: one.value for one in metrics["distillate_up"]} == dict.fromkeys(asked, 1)
    limits = {one.labels["endpoint"]: one.value for one in metrics["distillate_in_flight_limit"]}
    assert limits == dict.fromkeys(asked, 4)
    counted = {url: one.answered for url, one in summary.endpoints.items()}
    killed = next(iter(cluster.actors.values())).worker._counters.endpoints
    (of_killed,) = killed  # each had one server
    unreported = {of_killed: killed[of_killed].answered - lost[of_killed]["answered"] + 4}  # and what it had in flight
    for url, number in asked.items():
        assert counted[url] <= number <= counted[url] + unreported.get(url, 0) + 1  # and what was busy
    assert sum(one.retries.get("server_error", 0) for one in summary.endpoints.values()) == 1
    lines = read_lineage(run)["generate"]["last_call"]["by_endpoint"]
    assert lines == {url: {"answered": number, "completion_tokens": 5 * number} for url, number in counted.items()}
