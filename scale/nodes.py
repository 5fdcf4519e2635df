"""`python -m scale.nodes RECIPE [--run RUN] [--follow]`: the nodes of a run on a cluster, one line per worker.

The driver (scale.generation) writes what it hears of each worker to nodes.json, where it meets them, every WRITE_S.
Whoever sees that place can read it: on any machine, and after the driver has died. The command changes nothing there.
"""

import argparse
import asyncio
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from generate.progress import Counters, clock
from pipeline.cli import run_stage
from pipeline.errors import DataError, DistillError, UsageError
from pipeline.recipe import load_recipe
from scale.request_leases import Leases
from scale.storage import Store, open_store, read_record
from scale.sync import CLUSTER, CLUSTER_FILE

SCHEMA = 1
FILE = "nodes.json"
WRITE_S = 2.0
WINDOW_S = 30.0  # answers and tokens per second are those of so long
SILENT_S = 10.0  # without a word, after which a worker or the driver is called silent
MOST_GONE = 32  # workers that are shown after they have gone: the last ones
FIGURES = {
    "leased": "leased",
    "in_flight": "in flight",
    "answered": "answers",
    "answers_per_s": "ans/s",
    "tokens_per_s": "tok/s",
    "failed": "failed",
    "retried": "retried",
}


class WorkerRow(msgspec.Struct):
    """A worker, as the driver last heard it in this call. Its answers may not all have been read yet."""

    node: str
    urls: list[str]
    state: Literal["starting", "working", "done", "broken", "lost"] = "starting"
    heard: float | None = None  # Unix time
    leased: int = 0  # requests that it holds
    in_flight: int = 0
    answered: int = 0
    failed: int = 0
    retried: int = 0
    answers_per_s: float = 0.0
    tokens_per_s: float = 0.0  # of completions


class Nodes(msgspec.Struct):
    """nodes.json."""

    schema: int
    written: float  # Unix time
    ended: bool  # the call of the driver
    done: int  # requests that need nothing more
    total: int
    workers: dict[str, WorkerRow]


class WorkerTable:
    """The driver's side. What outlives the call is counted in the state of the leases (`NodeCounts`)."""

    def __init__(self, leases: Leases, counters: Counters, store: Store) -> None:
        self._leases, self._counters, self._store = leases, counters, store
        self._rows: dict[str, WorkerRow] = {}
        self._samples: dict[str, deque[tuple[float, int, int]]] = {}  # time, answers, tokens

    def joined(self, name: str, node: str, urls: list[str]) -> None:
        """A worker is being started."""
        self._rows[name], self._samples[name] = WorkerRow(node, urls), deque()

    def heard(self, name: str, counters: dict[str, Any], *, idle: bool) -> None:
        """A heartbeat: what the worker counts (Counters.snapshot), and whether it has nothing to do."""
        row, samples, counts, now = self._rows[name], self._samples[name], self._leases.counts(name), time.monotonic()
        retried = sum(sum(one["retries"].values()) for one in counters["endpoints"].values())
        counts.retried += retried - row.retried
        if samples and not idle:
            counts.active_s = round(counts.active_s + now - samples[-1][0], 3)
        samples.append((now, counters["answered"], counters["completion_tokens"]))
        while samples[0][0] < now - WINDOW_S:
            samples.popleft()
        since, answered, tokens = samples[0]
        seconds = max(now - since, 1e-9)
        self._counters.gathered[name] = counters["endpoints"]
        row.state, row.heard, row.retried = "working", time.time(), retried
        row.in_flight, row.answered, row.failed = (counters[one] for one in ("in_flight", "answered", "failed"))
        row.answers_per_s, row.tokens_per_s = (row.answered - answered) / seconds, (samples[-1][2] - tokens) / seconds

    def left(self, name: str, state: Literal["done", "broken", "lost"]) -> None:
        """A worker has gone."""
        row = self._rows.pop(name)
        row.state, row.leased, row.in_flight, row.answers_per_s, row.tokens_per_s = state, 0, 0, 0.0, 0.0
        self._rows[name] = row  # behind those that went before
        del self._samples[name]
        for counts in self._counters.gathered.get(name, {}).values():
            counts.update(in_flight=0, limit=0, up=False)
        for old in [name for name in self._rows if name not in self._samples][:-MOST_GONE]:
            del self._rows[old]

    async def keep_writing(self, ended: asyncio.Event) -> None:
        """Writes the file again and again, and once more when the call has ended."""
        while not ended.is_set():
            await self._write(ended=False)
            with suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), WRITE_S)
        await self._write(ended=True)

    async def _write(self, *, ended: bool) -> None:
        """Where the store is away, the run goes on, and the next file serves."""
        for name, worker in self._leases.workers.items():
            self._rows[name].leased, self._rows[name].urls = len(worker.items), worker.urls
        nodes = Nodes(SCHEMA, time.time(), ended, self._counters.done, self._counters.total, self._rows)
        with suppress(DistillError):
            await asyncio.to_thread(self._store.put, FILE, msgspec.json.encode(nodes))


def read_nodes(run: str) -> Nodes:
    """What the driver wrote last. `run`: the run's folder or URL, or the place that --cluster-store named.

    Raises UsageError if no run on a cluster has written anything there, DataError if it cannot be read.
    """
    home = open_store(run)
    record = home.get(CLUSTER_FILE)
    store, names = home, [FILE]
    if record or home.get(FILE) is None:
        place = record.decode() if record else CLUSTER
        store = open_store(place if "://" in place or place.startswith("/") else f"{run.rstrip('/')}/{place}")
        names = [name for name in store.names() if PurePosixPath(name).name == FILE]  # each pass has a folder
    found = [nodes for name in names if (nodes := _read(store, name))]
    if not found:
        raise UsageError(
            f"{run}: no run on a cluster has written anything here; give its folder or URL, or what its "
            "--cluster-store was, with --run"
        )
    return max(found, key=lambda nodes: nodes.written)


def _read(store: Store, name: str) -> Nodes | None:
    nodes = read_record(store, name, Nodes, "a driver that runs replaces it")
    if nodes and nodes.schema != SCHEMA:
        raise DataError(
            f"{store.url}/{name}: of version {nodes.schema}, this program reads {SCHEMA}; use the driver's version"
        )
    return nodes


def describe(nodes: Nodes, now: float) -> str:
    """How the run is, in a line."""
    silent_s = now - nodes.written
    if nodes.ended:
        how = f"the call ended {clock(max(silent_s, 0))} ago"
    elif silent_s > SILENT_S:
        how = f"the driver has written nothing for {clock(silent_s)}: it is gone, or cut off; this is how it was then"
    else:
        how = f"workers at work: {sum(_state(row, nodes) == 'working' for row in nodes.workers.values())}"
    return f"{nodes.done:,} of {nodes.total:,} requests done; {how}"


def table_of(nodes: Nodes, now: float) -> Table:
    """One line per worker, and their sum."""
    rows = sorted(nodes.workers.values(), key=lambda row: (row.state not in ("starting", "working"), row.node))
    table = Table(box=SIMPLE_HEAD, show_footer=True, collapse_padding=True, pad_edge=False)
    table.caption = f"this call; heard so long ago; per second: over the last {WINDOW_S:.0f} s"
    for head, foot in (("node", "all"), ("endpoint", ""), ("state", ""), ("heard", "")):
        table.add_column(head, foot, no_wrap=head != "endpoint", overflow="fold")
    for name, head in FIGURES.items():
        foot = _shown(name, sum(getattr(row, name) for row in rows))
        table.add_column(head, foot, justify="right", no_wrap=True)
    for row in rows:
        more = f" +{len(row.urls) - 1}" if len(row.urls) > 1 else ""
        heard = "never" if row.heard is None else clock(max(now - row.heard, 0))
        figures = (_shown(name, getattr(row, name)) for name in FIGURES)
        table.add_row(row.node, urlsplit(row.urls[0]).netloc + more, _state(row, nodes), heard, *figures)
    return table


def _shown(name: str, value: float) -> str:
    return f"{value:,.1f}" if name == "answers_per_s" else f"{value:,.0f}"


def _state(row: WorkerRow, nodes: Nodes) -> str:
    if row.state == "working" and not nodes.ended and nodes.written - (row.heard or 0) > SILENT_S:
        return "silent"
    return "ended" if row.state == "working" and nodes.ended else row.state


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m scale.nodes", description="The nodes of a run on a cluster.")
    parser.add_argument("recipe", type=Path, nargs="?", help="a YAML recipe, whose run is runs/<its name>")
    parser.add_argument("--run", help="the run's folder, s3://… or gs://…; or what --cluster-store was")
    parser.add_argument("--follow", action="store_true", help="show them again and again, until the call ends")
    options = parser.parse_args(argv)
    if not (options.run or options.recipe):
        parser.error("give a recipe, or a run with --run")
    run = options.run or str(Path("runs") / load_recipe(options.recipe).name)
    console = Console(width=None if sys.stdout.isatty() else 160)
    while True:
        nodes, now = read_nodes(run), time.time()
        if options.follow:
            console.clear()
        console.print(f"{run}: {describe(nodes, now)}", highlight=False, markup=False, soft_wrap=True)
        console.print(table_of(nodes, now))
        if nodes.ended or not options.follow:
            return
        time.sleep(WRITE_S)


if __name__ == "__main__":
    run_stage(main)
