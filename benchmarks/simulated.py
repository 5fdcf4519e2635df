"""`python -m benchmarks.simulated`: our client against a simulated engine of the size of eight large GPUs.

R is the least time that the simulator computes for a queue that is never empty, over the time that the run took: for
the whole run, and for its steady part, which is all but the first and the last tenth of the answers. `--bind` shortens
the simulator's step until R of the steady part falls below 0.98: there our client starts to bind. The requests grow
as the step shrinks, so that each run is as long as the first.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import yaml

from benchmarks.clients import MODEL, write_questions
from benchmarks.http_server import running
from benchmarks.simulator import LENGTHS, answer_tokens, ideal_ends
from benchmarks.steady import answer_ends, steady_seconds
from benchmarks.table import show
from generate.dialect import Dialect
from generate.jobs import build_jobs
from generate.prompts import iter_prompts
from generate.run import Summary
from pipeline.recipe import Recipe, load_recipe
from pipeline.rundir import RunDir

HOLDS = 0.98
STEPS_MS = (30.0, 15.0, 10.0, 7.5, 6.0, 5.0, 4.0, 3.0)  # of a decoding step, for `--bind`


class Run(NamedTuple):
    """One run's figures."""

    whole: float  # R
    steady: float
    per_s: float  # answers
    cpu_ms: float  # a request, of all our processes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--step-ms", type=float, default=STEPS_MS[0])
    parser.add_argument(
        "--concurrency", default="auto", help="of our client; several, separated by commas, are compared"
    )
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--no-metrics", action="store_true")
    parser.add_argument("--bind", action="store_true", help="find the rate at which our client binds")
    options = parser.parse_args()
    rows: list[tuple[str, ...]] = [
        (
            "processes",
            "concurrency",
            "step ms",
            "full slots give",
            "answers/s",
            "R whole",
            "R steady",
            "CPU ms a request",
        )
    ]
    for processes in map(int, options.processes.split(",")):
        for concurrency in options.concurrency.split(","):
            for step_ms in STEPS_MS if options.bind else (options.step_ms,):
                requests = round(options.requests * STEPS_MS[0] / step_ms) if options.bind else options.requests
                runs = [once(options, requests, processes, concurrency, step_ms) for _ in range(options.runs)]
                middle = Run(*(median(values) for values in zip(*runs, strict=True)))
                most = options.replicas * options.slots / (mean(LENGTHS) * step_ms / 1000)
                rows.append(
                    (
                        str(processes),
                        concurrency,
                        f"{step_ms:g}",
                        f"{most:.0f}/s",
                        f"{middle.per_s:.0f}",
                        f"{middle.whole:.3f}",
                        f"{middle.steady:.3f}",
                        f"{middle.cpu_ms:.2f}",
                    )
                )
                print(" · ".join(rows[-1]), file=sys.stderr)
                if options.bind and middle.steady < HOLDS:
                    break
    print(show(rows))


def once(options: argparse.Namespace, requests: int, processes: int, concurrency: str, step_ms: float) -> Run:
    """One run on a fresh simulator and a fresh run directory."""
    server = ["--replicas", str(options.replicas), "--slots", str(options.slots), "--step-ms", str(step_ms)]
    server += ["--no-metrics"] if options.no_metrics else []
    with tempfile.TemporaryDirectory() as folder, running("benchmarks.simulator", *server) as url:
        recipe = write_recipe(Path(folder), url, requests, processes, concurrency)
        run = RunDir(Path(folder) / "run")
        timed = [sys.executable, "-m", "benchmarks.timed", str(recipe), str(run.path)]
        figures = json.loads(subprocess.run(timed, stdout=subprocess.PIPE, check=True, text=True).stdout)
        summary = Summary(**figures["summary"])
        assert summary.answered == requests, summary
        ideal = ideal_ends(lengths(load_recipe(recipe)), options.replicas, options.slots, step_ms / 1000)
        cut = requests // 10
        return Run(
            whole=max(ideal) / summary.wall_s,
            steady=steady_seconds(ideal, cut) / steady_seconds(answer_ends(run), cut),
            per_s=summary.answered / summary.wall_s,
            cpu_ms=1000 * figures["cpu_s"] / summary.answered,
        )


def write_recipe(folder: Path, url: str, requests: int, processes: int, concurrency: str) -> Path:
    """A recipe of so many different prompts."""
    recipe = {
        "name": "simulated",
        "teacher": {"model": MODEL, "base_url": url},
        "prompts": {"file": str(write_questions(folder / "questions.jsonl", requests))},
        "sampling": {"max_tokens": 500},
        "generate": {
            "concurrency": concurrency if concurrency == "auto" else int(concurrency),
            "processes": processes,
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def lengths(recipe: Recipe) -> list[int]:
    """The tokens of the answers that the simulator will give, in the order of the prompts."""
    dialect = Dialect()
    return [answer_tokens(dialect.body(job)) for job in build_jobs(iter_prompts(recipe), recipe)]


if __name__ == "__main__":
    main()
