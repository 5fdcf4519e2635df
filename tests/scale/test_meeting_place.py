"""Where the driver and the workers of a run meet: always in one place, which is the run's own if none is given."""

import asyncio
import sys
from pathlib import Path

import pytest

from generate.context import Outcome
from generate.run import generate
from pipeline.errors import UsageError
from pipeline.lineage import read_lineage
from pipeline.rundir import RunDir
from scale import generation
from scale.nodes import read_nodes
from scale.run_in_store import run_in_store
from scale.storage import open_store
from scale.sync import meeting_store
from tests.scale.test_generation import FakeCluster, until
from tests.servers.misbehaving_server import answer, completions, misbehaving, recipe_for
from tests.servers.object_storage import object_storage

pytestmark = pytest.mark.timeout(400)

ON_FAKES = """if True:
    import runpy, sys
    from scale import generation
    from tests.scale.test_generation import FakeCluster
    generation.Cluster = lambda *_: FakeCluster()
    runpy.run_module("generate", run_name="__main__", alter_sys=True)
"""


def test_a_run_keeps_its_place_and_so_what_lost_workers_were_charged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, place, cluster = RunDir(tmp_path / "run"), tmp_path / "meet", FakeCluster()
    run.path.mkdir()
    monkeypatch.setattr(generation, "Cluster", lambda *_: cluster)
    for name, value in (("generation.BEAT_S", 0.05), ("worker.LOOK_S", 0.05), ("parts.ROWS", 20)):
        monkeypatch.setattr(f"scale.{name}", value)
    send = generation.Driver.send

    async def losing(driver: generation.Driver) -> Outcome:
        sending = asyncio.create_task(send(driver))
        await until(driver, 40)
        cluster.kill(next(iter(cluster.actors.values())))
        return await sending

    def ask(count: int, place: Path | None) -> int:
        recipe = recipe_for(server, count, budget={"tokens": 100_000}, sampling={"max_tokens": 5})
        sender = generation.cluster_sender("auto", run, str(place) if place else None)
        generate(recipe, run, quiet=True, send=sender)
        return int(read_lineage(run)["generate"]["spent"]["tokens"])

    with misbehaving(lambda asked: answer(delay_s=0.05)) as server:
        with monkeypatch.context() as patch:
            patch.setattr(generation.Driver, "send", losing)
            spent = ask(200, place)
        assert (place / "leases.json").exists()
        lost = spent - 200 * 12
        assert lost > 0
        with pytest.raises(UsageError, match=rf"--cluster-store {tmp_path}/other: this run has {place}, which"):
            ask(220, tmp_path / "other")
        assert ask(220, None) == 220 * 12 + lost
        assert ask(240, place) == 240 * 12 + lost
    assert len({record.id for record in completions(run)}) == 240


def test_a_run_in_a_store_has_its_place_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    with misbehaving() as server, object_storage():
        recipe = tmp_path / "recipe.yaml"
        for number, folder in enumerate((tmp_path / "one", tmp_path / "two"), 1):
            folder.mkdir()
            recipe.write_text(recipe_for(server, 20 * number).model_dump_json(exclude_unset=True))
            command = [sys.executable, "-c", ON_FAKES, str(recipe), "--run", str(folder), "--cluster", "auto"]
            assert run_in_store(command, "s3://bucket/stories", folder) == 0
            assert len(completions(RunDir(folder))) == 20 * number
            assert not (folder / "cluster").exists()
        store = open_store("s3://bucket/stories")
        assert store.names("cluster") == ["cluster/leases.json", "cluster/nodes.json"]
        assert read_nodes("s3://bucket/stories").done == 40
        assert store.get("cluster-store.txt") == b"s3://bucket/stories/cluster"


def test_each_pass_has_a_place_of_its_own_and_a_run_may_be_moved(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    assert meeting_store(run, None, run.path / "turns/1-user").url == str(run.path / "cluster/turns/1-user")
    run = RunDir(run.path.rename(tmp_path / "moved"))
    for asked in (None, str(tmp_path / "moved/cluster")):
        assert meeting_store(run, asked, run.path).url == str(tmp_path / "moved/cluster")
    with pytest.raises(UsageError, match=r"--cluster-store s3://bucket/x: this run has /.*/moved/cluster, which"):
        meeting_store(run, "s3://bucket/x", run.path)
    with pytest.raises(UsageError, match=r"^s3:/bucket/x: a store's URL begins with s3://"):
        meeting_store(run, "s3:/bucket/x", run.path)


def test_two_runs_never_meet_in_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each reads, and removes, what the other's workers upload."""
    monkeypatch.setattr(generation, "Cluster", lambda *_: FakeCluster())
    one, two, place = RunDir(tmp_path / "one"), RunDir(tmp_path / "two"), str(tmp_path / "meet")

    def ask(run: RunDir, place: str) -> int:
        sender = generation.cluster_sender("auto", run, place)
        generate(recipe_for(server, 20), run, quiet=True, send=sender)
        return len(completions(run))

    with misbehaving() as server:
        assert ask(one, place) == 20
        with pytest.raises(UsageError, match=rf"--cluster-store {place}: {one.path} meets there; .*, as {place}/two"):
            ask(two, place)
        assert ask(two, f"{place}/two") == 20
        (one.path / "cluster-store.txt").unlink()  # as after a kill before it was written
        assert ask(one, place) == 20
    assert len(server.asked) == 40
