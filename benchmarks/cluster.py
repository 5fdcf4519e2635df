"""`python -m benchmarks.cluster`: breaks a cluster in every way while it generates, and counts answers and money.

Ray nodes on this machine (`--nodes`), the last of which does not see the project's code, and `--requests` prompts on
the stub. Each fault has a cluster and a run of its own, and comes at `--moments` moments. With `--storage s3` the run
and what the workers upload are in S3 (moto's server on loopback), and the run is fetched from there to be counted.

Each run's counts are printed as a line of JSON when it ends, and a table of all at the end.
"""

import json
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from benchmarks.http_server import running
from benchmarks.measure import flags, one_of, several, show_records
from benchmarks.ray_nodes import ROOT, RayNode, ray_cluster
from benchmarks.runs import billed, recipe_for
from pipeline.cli import run_stage
from pipeline.lineage import read_lineage
from pipeline.rundir import RunDir

FROZEN = 1.5  # leases that a node is frozen
LOST_ROWS = 20  # that a node has at least when it is lost before its first part
TOKENS = 140  # of the stub's answers
WAIT_S = 900.0
GENERATE = "import scale.generation, runpy; scale.generation.LEASE_S = {lease_s}; " + (
    "runpy.run_module('generate', run_name='__main__', alter_sys=True)"
)
IN_STORE = "import sys; from pathlib import Path; from scale.run_in_store import run_in_store; " + (
    "sys.exit(run_in_store(sys.argv[3:], sys.argv[1], Path(sys.argv[2])))"
)


class Broken(Exception):
    """The run ended, or hangs."""


class Call:
    """`generate --cluster` on one run, which can be killed and started again; `store`: the URL of the run there."""

    def __init__(self, recipe: Path, run: RunDir, address: str, lease_s: float, store: str = "") -> None:
        command = [sys.executable, "-c", GENERATE.format(lease_s=lease_s), str(recipe), "--run", str(run.path)]
        self._command = [*command, "--cluster", address, "--quiet"]
        if store:
            run.path.mkdir()
            self._command = [sys.executable, "-c", IN_STORE, store, str(run.path), *self._command]
        self._errors = run.path.with_name("errors.txt")
        self.start()

    def start(self) -> None:
        with self._errors.open("ab") as errors:
            self._process = psutil.Popen(self._command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors)

    def kill(self) -> None:
        if self._process.poll() is not None:
            return
        family = [self._process, *self._process.children(recursive=True)]
        for process in family:
            process.kill()
        psutil.wait_procs(family)

    def end(self) -> int:
        """Its exit code. Raises Broken."""
        self.until(lambda: self._process.poll() is not None)
        return int(self._process.returncode)

    def until_billed(self, url: str, answers: int) -> None:
        """Waits until the stub has billed this many answers. Raises Broken."""
        self.until(lambda: billed(url)["answers"] >= answers)

    def until(self, condition: Callable[[], object]) -> None:
        """Waits. Raises Broken if that takes too long, or the run ends before."""
        deadline = time.monotonic() + WAIT_S
        while not condition():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise Broken(f"exit code {self._process.poll()}: {self._errors.read_text()}")
            time.sleep(0.1)


def kill_actor(call: Call, address: str, nodes: list[RayNode], lease_s: float) -> None:
    busy = [process for node in nodes for process in node.workers()]
    busy[-1].kill()


def kill_node(call: Call, address: str, nodes: list[RayNode], lease_s: float) -> None:
    """Another joins."""
    nodes.pop().kill()
    nodes.append(RayNode(address, blind=True))


def freeze_node(call: Call, address: str, nodes: list[RayNode], lease_s: float) -> None:
    nodes[-1].freeze()
    time.sleep(FROZEN * lease_s)
    nodes[-1].revive()


def kill_driver(call: Call, address: str, nodes: list[RayNode], lease_s: float) -> None:
    call.kill()
    call.start()


def lose_node(call: Call, address: str, nodes: list[RayNode], lease_s: float) -> int:
    """A node joins, and is killed when it has answers and has uploaded none. Returns how many."""
    nodes.append(RayNode(address, blind=True))
    call.until(lambda: _rows(nodes[-1]) >= LOST_ROWS)
    (journal,) = nodes[-1].journals()
    nodes.pop().kill()
    rows = journal.read_bytes().count(b"\n")
    rmtree(journal.parent)
    return rows


def _rows(node: RayNode) -> int:
    return sum(path.read_bytes().count(b"\n") for path in node.journals())


FAULTS: dict[str, Callable[[Call, str, list[RayNode], float], int | None]] = {
    "actor killed": kill_actor,
    "node killed": kill_node,
    "node frozen": freeze_node,
    "driver killed": kill_driver,
    "node lost with its first part": lose_node,
}


def main() -> None:
    options = flags(
        __doc__,
        {"storage": one_of("folder", "s3"), "faults": several(one_of(*FAULTS))},
        requests=20_000,
        nodes=3,
        moments=3,
        lease_s=30.0,
        concurrency=128,
        delay_ms=1000.0,
        storage="folder",
        faults=",".join(FAULTS),
    )
    rows: list[dict[str, Any]] = []
    with _storage(options.storage):
        for name in options.faults:
            started = time.monotonic()
            try:
                found = broken_run(name, options)
            except Broken as error:
                found = {"error": str(error)}
            rows.append({"fault": name, **found, "seconds": round(time.monotonic() - started)})
            print(json.dumps(rows[-1]), flush=True)
    whole = [row for row in rows if "error" not in row]
    print(show_records(whole) if whole else "no run ended")


@contextmanager
def _storage(kind: str) -> Iterator[None]:
    if kind == "s3":
        from tests.servers.object_storage import object_storage
    with object_storage() if kind == "s3" else nullcontext():
        yield


def broken_run(name: str, options: Namespace) -> dict[str, Any]:
    """One run with the fault at evenly spread moments, and its counts. Raises Broken."""
    budget = 2 * TOKENS * options.requests
    store = f"s3://bucket/{name.replace(' ', '-')}/run" if options.storage == "s3" else ""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        url = stack.enter_context(running("benchmarks.stub", "--delay-ms", options.delay_ms))
        address, nodes = stack.enter_context(ray_cluster(options.nodes))
        sections = {"generate": {"concurrency": options.concurrency}, "budget": {"tokens": budget}}
        made = recipe_for(folder, url, options.requests, sampling={"max_tokens": 100}, **sections)
        recipe, run = folder / "recipe.yaml", RunDir(folder / "run")
        recipe.write_text(made.model_dump_json(exclude_unset=True))
        call = Call(recipe, run, address, options.lease_s, store)
        stack.callback(call.kill)
        lost = 0
        for moment in range(options.moments):
            call.until_billed(url, options.requests * (moment + 1) // (options.moments + 2))
            lost += FAULTS[name](call, address, nodes, options.lease_s) or 0
        code = call.end()
        if store:
            run = RunDir(folder / "home")
            subprocess.run([sys.executable, "-m", "scale.fetch", store, str(run.path)], cwd=ROOT, check=True)
        found = counts(run, options.requests, billed(url), budget)
        return found | {"lost before a part": lost, "exit code": code} | verdict(found, code, lost)


def counts(run: RunDir, requests: int, bill: dict[str, int], budget: int) -> dict[str, int]:
    """What the run's files say, and what the stub has billed."""
    ids = list(_ids(run))
    return {
        "distinct ids": len(set(ids)),
        "repeated lines": len(ids) - len(set(ids)),
        "missing": requests - len(set(ids)),
        "asked again": bill["answers"] - requests,
        "tokens billed": bill["prompt_tokens"] + bill["completion_tokens"],
        "tokens counted": read_lineage(run)["generate"]["spent"]["tokens"],
        "budget": budget,
    }


def _ids(run: RunDir) -> Iterator[str]:
    with run.completions.open("rb") as file:
        for line in file:
            yield json.loads(line)["id"]


def verdict(found: dict[str, int], code: int, lost: int) -> dict[str, str]:
    """Whether the promises were kept; what was not is in capitals."""
    held = found["tokens billed"] <= found["tokens counted"] <= found["budget"]
    whole = not (found["repeated lines"] or found["missing"] or code or found["asked again"] < lost)
    return {"answers": "each once" if whole else "NOT WHOLE", "money": "held" if held else "PASSED"}


if __name__ == "__main__":
    run_stage(main)  # also when it is terminated, it ends the nodes
