"""`python -m benchmarks.budget`: many runs under a small hard budget, with different timing; none may pass it.

Answers differ in their tokens by up to the whole of `max_tokens`. What is spent is what the stub billed, whether or
not our client received the answer. If a run passes its budget, the exit code is 1.
"""

import argparse
import sys

from benchmarks.http_server import running
from benchmarks.measure import flags
from benchmarks.runs import billed, fresh, run_quietly
from pipeline.cli import run_stage
from pipeline.errors import BudgetReached

PROMPT_TOKENS, MAX_TOKENS = 40, 200  # per answer, at most
INPUT_USD, OUTPUT_USD = 0.15, 0.6  # per million tokens


def main() -> None:
    options = flags(__doc__, runs=100, usd=0.01, requests=1000)
    spent = []
    for number in range(options.runs):
        timing = ("--delay-ms", 2 + number % 7, "--jitter-ms", 5 * (number % 11))
        tokens = ("--prompt-tokens", PROMPT_TOKENS, "--completion-tokens", MAX_TOKENS)
        with running("benchmarks.stub", "--vary", *timing, *tokens) as url:
            if not once(url, options, in_flight=1 + 13 * (number % 20), seed=number):
                sys.exit(f"run {number} ended without reaching the budget: give it more requests")
            spent.append(billed_usd(url) / options.usd)
    passed = sum(ratio > 1 for ratio in spent)
    print(
        f"{options.runs} runs of budget.usd {options.usd:g}: {passed} passed it; "
        f"spent {min(spent):.1%} to {max(spent):.1%} of it"
    )
    sys.exit(1 if passed else 0)


def billed_usd(url: str) -> float:
    """What the stub has billed."""
    tokens = billed(url)
    return (tokens["prompt_tokens"] * INPUT_USD + tokens["completion_tokens"] * OUTPUT_USD) / 1_000_000


def once(url: str, options: argparse.Namespace, in_flight: int, seed: int) -> bool:
    """One run; True if the budget ended it."""
    teacher = {"price": {"input": INPUT_USD, "output": OUTPUT_USD}}
    sampling, settings = {"max_tokens": MAX_TOKENS, "seed": seed}, {"concurrency": in_flight}
    sections = {"sampling": sampling, "generate": settings, "budget": {"usd": options.usd}}
    with fresh(url, options.requests, teacher, **sections) as (recipe, run):
        try:
            run_quietly(recipe, run)
        except BudgetReached:
            return True
        return False


if __name__ == "__main__":
    run_stage(main)
