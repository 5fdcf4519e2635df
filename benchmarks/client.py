"""`python -m benchmarks.client`: our client against AsyncOpenAI and against a bare aiohttp loop, on a local stub.

Each run is a process of its own; the sides take turns, so that the machine's moods fall on all of them.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median

from benchmarks.clients import CLIENTS
from benchmarks.http_server import running
from benchmarks.table import show


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--in-flight", default="64,512")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--delay-ms", type=float, default=50.0)
    parser.add_argument("--clients", default=",".join(CLIENTS))
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args()
    found = []
    with running("benchmarks.stub", "--delay-ms", str(options.delay_ms)) as url:
        for in_flight in map(int, options.in_flight.split(",")):
            figures = measure(url, options.clients.split(","), options.requests, in_flight, options.runs)
            found.append({"in_flight": in_flight, **figures})
            print(f"{in_flight} in flight, {options.requests} requests, answers after {options.delay_ms:g} ms")
            print(describe(figures, in_flight / options.delay_ms * 1000))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


def measure(url: str, names: list[str], requests: int, in_flight: int, runs: int) -> dict[str, dict[str, float]]:
    """Medians of each client's figures, and its requests a second."""
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(runs):
        for name in names:
            command = [sys.executable, "-m", "benchmarks.clients", name, url, str(requests), str(in_flight)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            taken[name].append(json.loads(done.stdout))
    return {
        name: {key: median(run[key] for run in rows) for key in rows[0]}
        | {"per_s": median(requests / run["asking_s"] for run in rows)}
        | {"cpu_ms": median(1000 * run["cpu_s"] / requests for run in rows)}
        for name, rows in taken.items()
    }


def describe(figures: dict[str, dict[str, float]], most: float) -> str:
    """The table; `most` is what the stub could give at all."""
    rows: list[tuple[str, ...]] = [
        ("client", "req/s", "of the stub's most", "of bare", "of openai", "whole s", "CPU ms a request", "peak MiB")
    ]
    for name, row in figures.items():
        shares = [
            f"{row['per_s'] / figures[other]['per_s']:.2f}" if other in figures else "-" for other in ("bare", "openai")
        ]
        rows.append(
            (
                name,
                f"{row['per_s']:.0f}",
                f"{row['per_s'] / most:.2f}",
                *shares,
                f"{row['whole_s']:.1f}",
                f"{row['cpu_ms']:.2f}",
                f"{row['peak_mib']:.0f}",
            )
        )
    return show(rows)


if __name__ == "__main__":
    main()
