"""A worker without a driver: what it does once nobody speaks to it."""

import asyncio
from pathlib import Path

import msgspec
import pytest

from generate.idset import IdSet
from generate.jobs import build_jobs
from generate.prompts import iter_prompts
from scale import worker
from scale.parts import part_names, read_new_rows
from scale.request_leases import Item
from scale.storage import Folder
from scale.worker import Orders, Worker
from tests.servers.misbehaving_server import answer, misbehaving, recipe_for

REQUESTS = 400


async def test_a_worker_whose_lease_has_expired_asks_no_more_and_uploads_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "LOOK_S", 0.05)
    with misbehaving(lambda asked: answer(delay_s=0.1)) as server:
        recipe = recipe_for(server, REQUESTS, generate={"concurrency": 4})
        items = [
            Item(job.request.id, msgspec.json.encode(job.request)) for job in build_jobs(iter_prompts(recipe), recipe)
        ]
        alone = Worker("w", recipe, {server.url: 1.0}, str(tmp_path), {}, 1.0)
        working = asyncio.create_task(alone.work())
        await alone.beat(Orders(items=items, askers={server.url: 1}, weights={server.url: 1.0}))
        async with asyncio.timeout(60):
            await working
        assert 0 < len(server.asked) < REQUESTS
        store = Folder(tmp_path)
        names = part_names(store, "completions")
        assert len(list(read_new_rows(store, "completions", names, IdSet()))) == len(server.asked)
