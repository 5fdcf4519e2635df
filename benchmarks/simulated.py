"""`python -m benchmarks.simulated`: our client against a simulated engine of the size of eight large GPUs.

R is the least time that the simulator computes for a queue that is never empty, over the time that the run took: for
the whole run, and for its steady part, which is all but the first and the last tenth of the answers. `--bind` shortens
the simulator's step until R of the steady part falls below 0.98: there our client starts to bind. The number of
requests grows as the step shrinks, so that every run takes about as long as the first. `--concurrency` and
`--processes` are our client's; several, with commas, are compared.
"""

import argparse
import sys
from statistics import mean, median
from typing import NamedTuple

from benchmarks.http_server import running
from benchmarks.measure import auto_or_whole, flags, measured, several, show, steady_seconds, whole
from benchmarks.runs import answer_ends, bodies, fresh, run_quietly
from benchmarks.simulator import ENGINE, LENGTHS, answer_tokens, ideal_ends
from pipeline.cli import run_stage

HOLDS = 0.98
STEPS_MS = (ENGINE["step_ms"], 15.0, 10.0, 7.5, 6.0, 5.0, 4.0, 3.0)  # of a decoding step, for `--bind`
HEAD = ("processes", "concurrency", "step ms", "full slots give", "answers/s", "R whole", "R steady")


class Figures(NamedTuple):
    """One run's figures."""

    per_s: float  # answers
    whole: float  # R
    steady: float
    cpu_ms: float  # per request, of all our processes


def main() -> None:
    kinds = {"concurrency": several(auto_or_whole), "processes": several(whole)}
    sizes = {"requests": 20_000, "concurrency": "auto", "processes": "1,2", "runs": 3}
    options = flags(__doc__, kinds, **ENGINE, **sizes, bind=False)
    rows: list[tuple[str, ...]] = [(*HEAD, "CPU ms/request")]
    for processes in options.processes:
        for level in options.concurrency:
            for step_ms in STEPS_MS if options.bind else (options.step_ms,):
                requests = round(options.requests * STEPS_MS[0] / step_ms) if options.bind else options.requests
                runs = [once(options, requests, processes, level, step_ms) for _ in range(options.runs)]
                middle = Figures(*map(median, zip(*runs, strict=True)))
                most = options.replicas * options.slots / (mean(LENGTHS) * step_ms / 1000)
                setting = (str(processes), level, f"{step_ms:g}", f"{most:.0f}/s", f"{middle.per_s:.0f}")
                rows.append((*setting, f"{middle.whole:.3f}", f"{middle.steady:.3f}", f"{middle.cpu_ms:.2f}"))
                print(" · ".join(rows[-1]), file=sys.stderr)
                if options.bind and middle.steady < HOLDS:
                    break
    print(show(rows))


def once(options: argparse.Namespace, requests: int, processes: int, level: str, step_ms: float) -> Figures:
    """One run on a fresh simulator and a fresh run directory."""
    server = ["--replicas", options.replicas, "--slots", options.slots, "--step-ms", step_ms]
    server += ["--no-metrics"] if options.no_metrics else []
    settings = {"concurrency": level, "processes": processes}
    with (
        running("benchmarks.simulator", *server) as url,
        fresh(url, requests, sampling={"max_tokens": 500}, generate=settings) as (recipe, run),
    ):
        summary, _, cpu_s, _ = measured(run_quietly, recipe, run)
        assert summary.answered == requests, summary
        tokens = [answer_tokens(body) for body in bodies(recipe)]  # the answers that the simulator gives
        ideal = ideal_ends(tokens, options.replicas, options.slots, step_ms / 1000)
        cut = requests // 10
        return Figures(
            per_s=requests / summary.wall_s,
            whole=max(ideal) / summary.wall_s,
            steady=steady_seconds(ideal, cut) / steady_seconds(answer_ends(run), cut),
            cpu_ms=1000 * cpu_s / requests,
        )


if __name__ == "__main__":
    run_stage(main)
