"""`python -m benchmarks.cluster`: breaks a cluster in every way while it generates, and counts answers and money.

Ray nodes on this machine (`--nodes`), the last of which does not see the project's code, and `--requests` prompts on
the stub. For each fault an own run: an actor is killed, a node is killed (another joins), a node is frozen for longer
than a lease and revived, the driver is killed and started again; each at `--moments` moments. Printed: distinct ids,
lines too many, requests asked again, tokens that the stub has billed, what the run counts, and whether the budget held.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.http_server import running
from benchmarks.measure import flags
from benchmarks.ray_nodes import ROOT, RayNode, ray_cluster
from benchmarks.runs import billed, recipe_for
from pipeline.lineage import read_lineage
from pipeline.rundir import RunDir

FROZEN = 1.5  # leases that a node is frozen
TOKENS = 140  # of the stub's answers
WAIT_S = 900.0
GENERATE = "import scale.generation as g, runpy; g.cluster_sender.__kwdefaults__['lease_s'] = {lease_s}; " + (
    "runpy.run_module('generate', run_name='__main__', alter_sys=True)"
)


class Call:
    """`generate --cluster` on one run, which can be killed and started again."""

    def __init__(self, recipe: Path, run: RunDir, address: str, lease_s: float) -> None:
        code = GENERATE.format(lease_s=lease_s)
        self._command = [sys.executable, "-c", code, str(recipe), "--run", str(run.path), "--cluster", address]
        self._journal, self._errors = run.completions, run.path.with_name("errors.txt")
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [*self._command, "--quiet"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=self._errors.open("ab")
        )

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def end(self) -> int:
        return self._process.wait(WAIT_S)

    def until_answered(self, lines: int) -> None:
        """Waits until the journal has so many lines."""
        deadline = time.monotonic() + WAIT_S
        while not self._journal.exists() or self._journal.read_bytes().count(b"\n") < lines:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"generate ended or hangs:\n{self._errors.read_text()}")
            time.sleep(0.1)


def kill_actor(call: Call, address: str, nodes: list[RayNode], lease_s: float) -> None:
    busy = [process for node in nodes for process in node.workers()]
    busy[-1].kill()


def kill_node(call: Call, address: str, nodes: list[RayNode], lease_s: float) -> None:
    nodes.pop().kill()
    nodes.append(RayNode(address, blind=True))


def freeze_node(call: Call, address: str, nodes: list[RayNode], lease_s: float) -> None:
    nodes[-1].freeze()
    time.sleep(FROZEN * lease_s)
    nodes[-1].revive()


def kill_driver(call: Call, address: str, nodes: list[RayNode], lease_s: float) -> None:
    call.kill()
    call.start()


FAULTS: dict[str, Callable[[Call, str, list[RayNode], float], None]] = {
    "actor killed": kill_actor,
    "node killed": kill_node,
    "node frozen": freeze_node,
    "driver killed": kill_driver,
}


def main() -> None:
    options = flags(__doc__, requests=20_000, nodes=3, moments=3, lease_s=30.0, concurrency=128, delay_ms=500.0)
    with ray_cluster(options.nodes) as (address, nodes):
        print(f"{len(nodes)} nodes, one without the code; {options.requests} requests")
        for name, fault in FAULTS.items():
            print(f"{name}: {verdict(broken_run(fault, address, nodes, options))}", flush=True)


def broken_run(fault: Callable[..., None], address: str, nodes: list[RayNode], options: Any) -> dict[str, int]:
    """One run with the fault at evenly spread moments, and its counts."""
    budget = 2 * TOKENS * options.requests
    with running("benchmarks.stub", "--delay-ms", options.delay_ms) as url, TemporaryDirectory() as folder:
        settings = {"concurrency": options.concurrency}
        made = recipe_for(
            Path(folder),
            url,
            options.requests,
            generate=settings,
            budget={"tokens": budget},
            sampling={"max_tokens": 100},
        )
        recipe, run = Path(folder) / "recipe.yaml", RunDir(Path(folder) / "run")
        recipe.write_text(made.model_dump_json(exclude_unset=True))
        call = Call(recipe, run, address, options.lease_s)
        for moment in range(options.moments):
            call.until_answered(options.requests * (moment + 1) // (options.moments + 2))
            fault(call, address, nodes, options.lease_s)
        code = call.end()
        return counts(run, options.requests, billed(url), budget) | {"exit code": code}


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


def verdict(found: dict[str, int]) -> str:
    """The counts in a line, with what is wrong in capitals."""
    held = found["tokens billed"] <= found["tokens counted"] <= found["budget"]
    whole = not (found["repeated lines"] or found["missing"] or found["exit code"])
    said = ", ".join(f"{value:,} {name}" for name, value in found.items())
    return f"{said}; {'every answer once' if whole else 'NOT WHOLE'}, {'budget held' if held else 'BUDGET PASSED'}"


if __name__ == "__main__":
    main()
