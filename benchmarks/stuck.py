"""`python -m benchmarks.stuck`: one request of many that never gets its answer: what it does to all the others."""

import argparse
import tempfile
from pathlib import Path
from statistics import median

from benchmarks.clients import MODEL, prompt
from benchmarks.http_server import running
from benchmarks.steady import answer_ends
from generate.run import generate
from pipeline.recipe import Recipe
from pipeline.records import Failure, read_jsonl
from pipeline.rundir import RunDir

STUCK = "rabbit number stuck"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--timeout-s", type=float, default=3.0, help="request_timeout_s; the deadline is twice that")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    rates: dict[bool, list[float]] = {False: [], True: []}
    with running("benchmarks.stub", "--stuck", STUCK) as url:
        for _ in range(options.runs):
            for stuck in (False, True):
                rates[stuck].append(once(url, options, stuck))
    without, with_one = median(rates[False]), median(rates[True])
    print(
        f"{options.requests} requests, {options.in_flight} in flight: {without:.0f} answers/s, {with_one:.0f} with one "
        f"request stuck for ever: {1 - with_one / without:+.1%} dent; the run ended, that one is in failures.jsonl"
    )


def once(url: str, options: argparse.Namespace, stuck: bool) -> float:
    """Answers a second, from the first to the last of the others."""
    names = [str(number) for number in range(options.requests)]
    if stuck:
        names[options.requests // 3] = "stuck"
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(
            name="stuck",
            teacher={"model": MODEL, "base_url": url},
            prompts={
                "count": options.requests,
                "template": prompt(0).replace("number 0", "number {n}"),
                "slots": {"n": names},
            },
            generate={
                "concurrency": options.in_flight,
                "request_timeout_s": options.timeout_s,
                "deadline_s": 2 * options.timeout_s,
            },
        )
        run = RunDir(Path(folder) / "run")
        summary = generate(recipe, run, quiet=True)
        assert (summary.answered, summary.failed) == (options.requests - stuck, int(stuck)), summary
        failed = [(line.error, STUCK in line.messages[0].content) for line in read_jsonl(run.failures, Failure)]
        assert failed == [("timeout", True)] * stuck, failed
        ends = answer_ends(run)
        return (len(ends) - 1) / (max(ends) - min(ends))


if __name__ == "__main__":
    main()
