"""`python -m benchmarks.memory`: peak resident memory of runs of very different length: it must not grow with them."""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from benchmarks.clients import MODEL, prompt
from benchmarks.http_server import running


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", default="10000,1000000")
    parser.add_argument("--in-flight", type=int, default=256)
    options = parser.parse_args()
    peaks = {}
    with running("benchmarks.stub", "--delay-ms", "0", "--completion-tokens", "1") as url:
        for requests in map(int, options.requests.split(",")):
            with tempfile.TemporaryDirectory() as folder:
                recipe = write_recipe(Path(folder), url, requests, options.in_flight)
                for state in ("fresh", "resumed"):
                    if state == "resumed":
                        cut_half(Path(folder) / "run" / "completions.jsonl")
                    timed = [sys.executable, "-m", "benchmarks.timed", str(recipe), str(Path(folder) / "run")]
                    figures = json.loads(subprocess.run(timed, stdout=subprocess.PIPE, check=True, text=True).stdout)
                    peaks[requests, state] = figures["peak_mib"]
                    per_s = figures["summary"]["answered"] / figures["summary"]["wall_s"]
                    print(
                        f"{requests:,} requests, {state}: {figures['peak_mib']:.1f} MiB at most, {per_s:.0f} answers/s"
                    )
    few, *_, many = sorted({requests for requests, _ in peaks})
    for state in ("fresh", "resumed"):
        print(f"{state}: {peaks[many, state] - peaks[few, state]:+.1f} MiB from {few:,} to {many:,} requests")


def write_recipe(folder: Path, url: str, requests: int, in_flight: int) -> Path:
    """A recipe whose template makes so many different prompts."""
    side = round(requests**0.5)
    slots = {
        "a": [f"{number:05}" for number in range(side)],
        "b": [f"{number:05}" for number in range(requests // side)],
    }
    recipe = {
        "name": "memory",
        "teacher": {"model": MODEL, "base_url": url},
        "prompts": {"count": requests, "template": prompt(0) + " {a} {b}", "slots": slots},
        "generate": {"concurrency": in_flight},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def cut_half(journal: Path) -> None:
    """Leaves half of the answers, and half of the line after them."""
    with journal.open("r+b") as file:
        file.truncate(journal.stat().st_size // 2)


if __name__ == "__main__":
    main()
