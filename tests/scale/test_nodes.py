"""What is told of each node: while a run goes, after its driver has died, and in its lineage."""

import asyncio
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tenacity import wait_fixed

from generate.progress import Counters, EndpointCounts
from generate.run import agenerate
from pipeline.errors import DataError, UsageError
from pipeline.lineage import read_lineage
from pipeline.rundir import RunDir
from scale import nodes
from scale.generation import Driver
from scale.nodes import SCHEMA, Nodes, WorkerRow, WorkerTable, describe, main, read_nodes
from scale.storage import Folder
from tests.scale.test_generation import FakeCluster, drive, until
from tests.scale.test_generation import _quick as _quick
from tests.scale.test_request_leases import table
from tests.servers.misbehaving_server import answer, error, misbehaving, recipe_for

pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setattr(nodes, "WRITE_S", 0.05)
    monkeypatch.setattr("generate.loop.BACKOFF", wait_fixed(0.01))
    return RunDir(tmp_path / "run")


def counted(run: RunDir) -> dict[str, Any]:
    """The sums over all nodes."""
    found: dict[str, dict[str, Any]] = read_lineage(run)["generate"]["nodes"]
    return {name: sum(node[name] for node in found.values()) for name in next(iter(found.values()))}


async def test_each_answer_counts_for_one_node_over_all_calls(run: RunDir) -> None:
    cluster = FakeCluster(2)

    async def kill(driver: Driver) -> None:
        await until(driver, 40)
        cluster.kill(next(iter(cluster.actors.values())))

    with misbehaving(lambda asked: error(500) if asked.text == "say 3" else answer(delay_s=0.05)) as server:
        await drive(recipe_for(server, 201), run, cluster, kill)
        first = counted(run)
        assert (first["answered"], first["prompt_tokens"], first["completion_tokens"]) == (200, 1400, 1000)
        assert first["retried"] >= 2 and 0 < first["asked_again"] < 200 and first["active_s"] > 1
        assert set(read_lineage(run)["generate"]["nodes"]) == {"10.0.0.0", "10.0.0.1"}
        await drive(recipe_for(server, 241), run, FakeCluster(1))
        second = counted(run)
        assert second["answered"] == 240
        assert all(second[name] >= first[name] for name in first)
        assert (await agenerate(recipe_for(server, 251), run, quiet=True)).answered == 10  # by one machine
        elsewhere = RunDir(run.path.parent / "elsewhere")
        await agenerate(recipe_for(server, 5), elsewhere, quiet=True)
    assert counted(run) == second
    assert "nodes" not in read_lineage(elsewhere)["generate"]


async def test_a_look_at_the_nodes_while_one_is_lost_and_one_is_frozen(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nodes, "SILENT_S", 1.0)
    cluster = FakeCluster(3)
    seen = list[Nodes]()

    async def look(driver: Driver) -> None:
        await until(driver, 40)
        dead, frozen, _ = cluster.actors.values()
        cluster.kill(dead)
        cluster.alive.pop(0)
        frozen.thawed.clear()
        while not seen or not {"lost", "silent", "working"} <= states(seen[-1]):
            await asyncio.sleep(0.05)
            seen.append(read_nodes(str(run.path)))
        main(["--run", str(run.path)])
        frozen.thawed.set()

    with misbehaving(lambda asked: answer(delay_s=0.05)) as server:
        await drive(recipe_for(server, 900), run, cluster, look)
    working = next(row for row in seen[-1].workers.values() if nodes._state(row, seen[-1]) == "working")
    assert working.urls == [server.url] and working.answered > 0 and working.leased >= working.in_flight > 0
    assert working.answers_per_s > 0 and working.tokens_per_s == pytest.approx(5 * working.answers_per_s)
    said = capsys.readouterr().out
    assert "of 900 requests done; workers at work: 1" in said
    for words in ("10.0.0.0", "10.0.0.1", "10.0.0.2", server.url.split("/")[2], "lost", "silent", "0:0", "tok/s"):
        assert words in said
    last = read_nodes(str(run.path))
    assert (last.ended, last.done, last.total) == (True, 900, 900)
    assert states(last) == {"lost", "done"}
    assert "the call ended 0:0" in describe(last, time.time())


def states(found: Nodes) -> set[str]:
    return {nodes._state(row, found) for row in found.workers.values()}


def test_speed_is_that_of_the_last_half_minute_and_idle_time_is_not_active(monkeypatch: pytest.MonkeyPatch) -> None:
    leases, now = table(), 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    leases.join("10.0.0.1-ab", ["u"], 0)
    shown = WorkerTable(leases, Counters(), Folder(Path("unused")))
    shown.joined("10.0.0.1-ab", "10.0.0.1", ["u"])
    for second in range(100):  # 2 answers a second, and 4 from the 60th on; then it has nothing to do
        now = 1000.0 + second
        answers = 2 * second + max(2 * (second - 60), 0)
        counts = Counters(answered=answers, completion_tokens=10 * answers, in_flight=3)
        counts.endpoints["u"] = EndpointCounts(retries={"timeout": 2, "busy": second})
        shown.heard("10.0.0.1-ab", counts.snapshot(), idle=second > 90)
    row = shown._rows["10.0.0.1-ab"]
    assert (row.answers_per_s, row.tokens_per_s, row.retried) == (4.0, 40.0, 101)
    assert (leases.state.nodes["10.0.0.1"].active_s, leases.state.nodes["10.0.0.1"].retried) == (90.0, 101)


def test_of_many_workers_that_are_gone_the_last_are_shown() -> None:
    shown = WorkerTable(table(), Counters(), Folder(Path("unused")))
    for number in range(50):
        shown.joined(f"n-{number}", "n", ["u"])
        if number:
            shown.left(f"n-{number}", "lost")
    assert list(shown._rows) == ["n-0", *(f"n-{number}" for number in range(18, 50))]


def test_they_are_found_by_recipe_run_or_meeting_place_and_reading_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe, home, place = tmp_path / "recipe.yaml", tmp_path / "runs/t", tmp_path / "meet"
    recipe.write_text(recipe_for("http://a/v1").model_dump_json(exclude_unset=True))
    for folder in (str(tmp_path), str(home), "nowhere"):
        with pytest.raises(UsageError, match=f"{folder}: no run on a cluster has written anything here"):
            main(["--run", folder])
    rows = {"w": WorkerRow("10.0.0.7", ["http://a/v1", "http://b/v1"], "working", 940.0, answered=1234)}
    written = Nodes(SCHEMA, 950.0, False, 5, 1234, rows)
    for folder, total in ((home / "cluster", 10), (home / "cluster/turns/1-user", 20), (place, 30)):
        folder.mkdir(parents=True)
        later = msgspec.structs.replace(written, total=total, written=950.0 + total)
        (folder / "nodes.json").write_bytes(msgspec.json.encode(later))
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    for arguments, total in (([str(recipe)], 20), ([str(recipe), "--run", str(place)], 30)):
        main(arguments)
        said = capsys.readouterr().out
        assert f"5 of {total} requests done; the driver has written nothing for" in said
        assert "10.0.0.7" in said and "a +1" in said and "1,234" in said
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before
    (home / "cluster-store.txt").write_text(str(place))
    assert read_nodes("runs/t/").total == 30
    newer = msgspec.json.encode(msgspec.structs.replace(written, schema=2))
    for data, said in ((b'{"schema": 1', "truncated"), (newer, "of version 2")):
        (place / "nodes.json").write_bytes(data)
        with pytest.raises(DataError, match=rf"{place}/nodes.json: .*{said}"):
            read_nodes("runs/t")
