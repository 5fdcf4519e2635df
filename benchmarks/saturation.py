"""`python -m benchmarks.saturation`: our client through a real server against the same engine without one.

The same prompts, seeds and lengths (`ignore_eos`) on both sides, the same engine arguments, the model warmed up on
both; the sides take turns. R is the offline side's time over ours: for the whole run, and for its steady part, which is
all but the first and the last answer of each slot. The last line compares `concurrency: auto` with fixed numbers.
"""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.clients import numbered_prompts
from benchmarks.steady import answer_ends, steady_seconds
from benchmarks.table import show
from generate.concurrency import read_load
from generate.dialect import Dialect
from generate.jobs import build_jobs
from generate.prompts import iter_prompts
from generate.run import generate
from pipeline.recipe import Recipe, ServeConfig
from pipeline.rundir import RunDir
from serve.server import Server, free_port, serving

MODEL = "embedded:smollm2-135m"
LOOK_S = 4.0  # seldom: to say its metrics costs the server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--slots", type=int, default=64, help="max_num_seqs of the engine, on both sides")
    parser.add_argument("--concurrency", default="auto,32,64,128", help="of our client, each against the engine alone")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    if options.requests <= 2 * options.slots:
        parser.error(f"--requests must be more than twice --slots ({options.slots}), got {options.requests}")
    levels = options.concurrency.split(",")
    config = ServeConfig(kv_cache_gib=1, args=["--max-num-seqs", str(options.slots)])
    with serving(options.model, port=free_port(), config=config) as server, offline(server) as ask:
        once(server, options, "auto", prompts=options.slots)  # warm-up
        ask(bodies(recipe_for(server, options, "auto", options.slots)))
        taken: dict[str, list[dict[str, Any]]] = {level: [] for level in ("offline", *levels)}
        for _ in range(options.runs):
            for level in taken:
                if level == "offline":
                    figures = ask(bodies(recipe_for(server, options, "auto", options.requests)))
                    figures["per_s"] = figures["tokens"] / figures["seconds"]
                    figures["steady_s"] = steady_seconds(figures.pop("ends"), options.slots)
                else:
                    figures = once(server, options, level, prompts=options.requests)
                taken[level].append(figures)
                print(level, {key: round(value, 3) for key, value in figures.items()}, file=sys.stderr)
    print(describe(taken, options))


def describe(taken: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> str:
    """The table: medians."""
    middle = {
        level: {key: median(run[key] for run in runs) for key in runs[0]} for level, runs in taken.items() if runs
    }
    limit = middle["offline"]
    rows: list[tuple[str, ...]] = [("side", "tok/s", "R whole", "R steady", "client CPU ms a request", "running/slots")]
    rows.append(("offline", f"{limit['per_s']:.1f}", "1.000", "1.000", "-", "-"))
    for level, figures in middle.items():
        if level != "offline":
            rows.append(
                (
                    f"client, {level}",
                    f"{figures['per_s']:.1f}",
                    f"{figures['per_s'] / limit['per_s']:.3f}",
                    f"{limit['steady_s'] / figures['steady_s']:.3f}",
                    f"{figures['cpu_ms']:.2f}",
                    f"{figures['running'] / options.slots:.3f}",
                )
            )
    fixed = [figures["per_s"] for level, figures in middle.items() if level not in ("offline", "auto")]
    if "auto" not in middle or not fixed:
        return show(rows)
    return f"{show(rows)}\nauto gives {middle['auto']['per_s'] / max(fixed):.3f} of the best fixed number"


def once(server: Server, options: argparse.Namespace, concurrency: str, *, prompts: int) -> dict[str, float]:
    """One run of ours."""
    recipe = recipe_for(server, options, concurrency, prompts)
    running: list[float] = []
    stop = threading.Event()
    looking = threading.Thread(target=_look, args=(server, running, stop))
    with tempfile.TemporaryDirectory() as folder:
        looking.start()
        before = _cpu_s()
        summary = generate(recipe, RunDir(Path(folder)), quiet=True)
        cpu_s = _cpu_s() - before
        stop.set()
        looking.join()
        ends = answer_ends(RunDir(Path(folder)))
    assert summary.completion_tokens == prompts * options.tokens, summary
    return {
        "seconds": summary.wall_s,
        "tokens": summary.completion_tokens,
        "per_s": summary.completion_tokens / summary.wall_s,
        "cpu_ms": 1000 * cpu_s / prompts,
        "running": mean(running[1:-1] or [0.0]),
        "steady_s": steady_seconds(ends, options.slots) if prompts > 2 * options.slots else 0.0,  # 0: a warm-up
    }


def recipe_for(server: Server, options: argparse.Namespace, concurrency: str, prompts: int) -> Recipe:
    """A recipe of so many prompts, each answered with the same number of tokens."""
    return Recipe(
        name="saturation",
        teacher={"model": server.served_name, "base_url": server.base_url},
        prompts=numbered_prompts(prompts),
        sampling={"max_tokens": options.tokens, "extra": {"ignore_eos": True}},
        generate={"concurrency": concurrency if concurrency == "auto" else int(concurrency)},
    )


def bodies(recipe: Recipe) -> list[dict[str, Any]]:
    """What our client sends."""
    dialect = Dialect()
    return [json.loads(dialect.body(job)) for job in build_jobs(iter_prompts(recipe), recipe)]


@contextmanager
def offline(server: Server) -> Iterator[Any]:
    """The engine without a server, with the same arguments; yields a function that runs chat requests on it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.offline"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **server.command.env},
        start_new_session=True,
    )
    assert process.stdin and process.stdout

    def say(message: object) -> dict[str, Any]:
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps(message) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            sys.exit("vLLM without a server ended; `python -m benchmarks.offline` with the server's arguments says why")
        answer: dict[str, Any] = json.loads(line)
        return answer

    try:
        say(server.command.argv[3:])  # without the interpreter and the module
        yield lambda requests: say({"bodies": requests})
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # and the engine's own processes
        process.wait(30)


def _look(server: Server, running: list[float], stop: threading.Event) -> None:
    url = server.base_url.removesuffix("/v1") + "/metrics"
    while not stop.wait(LOOK_S):
        with urllib.request.urlopen(url) as answer:
            load = read_load(answer.read().decode())
        if load:
            running.append(load.running)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
