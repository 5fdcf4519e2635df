"""`python -m benchmarks.stuck`: one request of many never gets its answer: how much slower are all the others?

`--timeout-s` is `request_timeout_s`; the deadline is twice that.
"""

import argparse
from statistics import median

from benchmarks.http_server import running
from benchmarks.measure import flags, question
from benchmarks.runs import answer_ends, fresh, run_quietly
from pipeline.records import Failure, read_jsonl


def main() -> None:
    options = flags(__doc__, requests=10_000, in_flight=64, timeout_s=3.0, runs=3)
    stuck = question(options.requests // 3)
    without, with_one = list[float](), list[float]()
    with running("benchmarks.stub") as healthy, running("benchmarks.stub", "--stuck", stuck) as silent:
        for _ in range(options.runs):
            without.append(once(healthy, options, []))
            with_one.append(once(silent, options, [stuck]))
    print(
        f"{options.requests} requests, {options.in_flight} in flight: {median(without):.0f} answers/s, "
        f"{median(with_one):.0f} with one stuck for ever: {1 - median(with_one) / median(without):+.1%} slower; "
        "the run ended; only that one failed"
    )


def once(url: str, options: argparse.Namespace, stuck: list[str]) -> float:
    """Answers per second, from the first to the last. Exactly the requests of the `stuck` questions must fail."""
    limits = {"request_timeout_s": options.timeout_s, "deadline_s": 2 * options.timeout_s}
    with fresh(url, options.requests, generate={"concurrency": options.in_flight, **limits}) as (recipe, run):
        summary = run_quietly(recipe, run)
        assert (summary.answered, summary.failed) == (options.requests - len(stuck), len(stuck)), summary
        failed = [(line.error, line.messages[0].content) for line in read_jsonl(run.failures, Failure)]
        assert failed == [("timeout", prompt) for prompt in stuck], failed
        ends = answer_ends(run)
        return (len(ends) - 1) / (max(ends) - min(ends))


if __name__ == "__main__":
    main()
