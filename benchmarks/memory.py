"""`python -m benchmarks.memory`: peak resident memory of runs of very different length: it must not grow with them."""

from pathlib import Path

from benchmarks.http_server import running
from benchmarks.measure import flags, measured, several, whole
from benchmarks.runs import fresh, run_quietly
from pipeline.cli import run_stage


def main() -> None:
    options = flags(__doc__, {"requests": several(whole)}, requests="10000,1000000", in_flight=256)
    peaks: dict[tuple[int, str], float] = {}
    with running("benchmarks.stub", "--delay-ms", 0, "--completion-tokens", 1) as url:
        for requests in options.requests:
            with fresh(url, requests, generate={"concurrency": options.in_flight}) as (recipe, run):
                for state in ("fresh", "resumed"):
                    if state == "resumed":
                        cut_half(run.completions)
                    summary, _, _, peak = measured(run_quietly, recipe, run)
                    peaks[requests, state] = peak
                    per_s = summary.answered / summary.wall_s
                    print(f"{requests:,} requests, {state}: {peak:.1f} MiB at most, {per_s:.0f} answers/s", flush=True)
    few, many = min(options.requests), max(options.requests)
    for state in ("fresh", "resumed"):
        print(f"{state}: {peaks[many, state] - peaks[few, state]:+.1f} MiB from {few:,} to {many:,} requests")


def cut_half(journal: Path) -> None:
    """Leaves half of the answers, and a part of the line after them."""
    with journal.open("r+b") as file:
        file.truncate(journal.stat().st_size // 2)


if __name__ == "__main__":
    run_stage(main)
