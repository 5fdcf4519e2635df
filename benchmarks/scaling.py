"""`python -m benchmarks.scaling`: answers per second against 1, 2 and 4 nodes' worth of simulated engines.

Each node is a simulator (benchmarks.simulator) in a process of its own, at a URL of its own. Ways to ask them:
`machine`, one process of `generate`; `cluster`, a Ray node with a worker for each, and the driver. R is the least time
that the simulators need for full queues over the time taken: of the whole run, and of its steady part, without the
first and the last tenth of the answers. CPU is that of the steady part alone, so without starts: of our client, and of
what shares the cores with it: the simulators, Ray, and the rest of the machine.

Each run's figures are printed as a line of JSON when it ends, and a table at the end.
"""

import json
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from threading import Event, Thread
from typing import Any

import psutil

from benchmarks.http_server import running
from benchmarks.measure import flags, measured, one_of, several, show_records, steady_seconds, whole
from benchmarks.ray_nodes import ray_cluster
from benchmarks.runs import answer_ends, bodies, fresh
from benchmarks.simulator import answer_tokens, ideal_ends
from generate.run import generate
from generate.summary import Summary
from pipeline.cli import run_stage
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir

SAMPLE_S = 0.5
MACHINE = "all"  # CPU of the whole machine

Sample = tuple[float, dict[str, float]]  # a time, and the CPU seconds of each group until then


def main() -> None:
    options = flags(
        __doc__,
        {"nodes": several(whole), "ways": several(one_of("machine", "cluster"))},
        nodes="1,2,4",
        ways="machine,cluster",
        requests=10_000,  # of each node
        replicas=2,
        slots=256,
        step_ms=10.0,
        runs=1,
    )
    rows: list[dict[str, Any]] = []
    for _ in range(options.runs):
        for way in options.ways:
            for nodes in options.nodes:
                rows.append({"way": way, "nodes": nodes, **once(way, nodes, options)})
                print(json.dumps(rows[-1]), flush=True)
    print(show_records(rows))


def once(way: str, nodes: int, options: Namespace) -> dict[str, float]:
    """One run on fresh simulators and fresh Ray nodes."""
    requests, step_s = nodes * options.requests, options.step_ms / 1000
    engine = "--replicas", options.replicas, "--slots", options.slots, "--step-ms", options.step_ms
    with ExitStack() as stack:
        urls = [stack.enter_context(running("benchmarks.simulator", *engine)) for _ in range(nodes)]
        address = stack.enter_context(ray_cluster(nodes, blind=0))[0] if way == "cluster" else ""
        sections = {"sampling": {"max_tokens": 500}, "generate": {"concurrency": "auto"}}
        recipe, run = stack.enter_context(fresh(urls[0], requests, {"base_url": urls}, **sections))
        samples = stack.enter_context(sampled())
        summary = measured(ask, recipe, run, address).value
        assert summary.answered == requests, summary
        tokens = [answer_tokens(body) for body in bodies(recipe)]
        ideal = ideal_ends(tokens, nodes * options.replicas, options.slots, step_s)
        ends, cut = sorted(answer_ends(run)), requests // 10
        steady_s, answers = steady_seconds(ends, cut), requests - 2 * cut
        figures = {
            "full slots, answers/s": answers / steady_seconds(ideal, cut),
            "answers/s": answers / steady_s,
            "R whole": max(ideal) / summary.wall_s,
            "R steady": steady_seconds(ideal, cut) / steady_s,
        } | cpu(samples, ends[cut - 1], ends[-1 - cut], answers)
        return {name: float(f"{value:.4g}") for name, value in figures.items()}


def ask(recipe: Recipe, run: RunDir, address: str) -> Summary:
    if not address:
        return generate(recipe, run, quiet=True)
    from scale.generation import cluster_sender

    return generate(recipe, run, quiet=True, send=cluster_sender(address, run))


def cpu(samples: list[Sample], start: float, end: float, answers: int) -> dict[str, float]:
    """CPU between two times: of our client per 1,000 answers, of the others in cores."""
    first, last = (min(samples, key=lambda sample: abs(sample[0] - at)) for at in (start, end))
    seconds = last[0] - first[0]
    used = {name: cpu_s - first[1].get(name, 0.0) for name, cpu_s in last[1].items()}
    whole = used.pop(MACHINE)
    rest, thousands = whole - sum(used.values()), answers / (end - start) * seconds / 1000
    driver, workers = used.get("driver", 0.0), used.get("workers", 0.0)
    return {
        "client CPU s per 1,000": (driver + workers) / thousands,
        "of it the driver": driver / thousands,
        "simulators, cores": used.get("simulators", 0.0) / seconds,
        "Ray, cores": used.get("Ray", 0.0) / seconds,
        "rest, cores": rest / seconds,
    }


@contextmanager
def sampled() -> Iterator[list[Sample]]:
    """Notes every SAMPLE_S what CPU this process's children have used, by group."""
    samples, ended = list[Sample](), Event()

    def follow() -> None:
        spent: dict[int, tuple[str, float]] = {}
        while not ended.wait(SAMPLE_S):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):  # it has ended
                    times = process.cpu_times()
                    spent[process.pid] = _group(" ".join(process.cmdline())), times.user + times.system
            totals: defaultdict[str, float] = defaultdict(float)
            for group, cpu_s in spent.values():
                totals[group] += cpu_s
            machine = psutil.cpu_times()
            totals[MACHINE] = machine.user + machine.nice + machine.system
            samples.append((time.time(), totals))

    thread = Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()


def _group(command: str) -> str:
    if "NodeWorker" in command:
        return "workers"
    if "benchmarks.simulator" in command:
        return "simulators"
    return "driver" if "spawn_main" in command else "Ray"


if __name__ == "__main__":
    run_stage(main)
