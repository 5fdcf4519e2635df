"""`python -m benchmarks.budget`: many runs under a small hard budget, with different timing; none may pass it.

Answers differ in their tokens by up to the whole of `max_tokens`. What is spent is what the stub billed, whether or
not our client heard the answer. A budget that is passed once ends with exit code 1.
"""

import argparse
import json
import sys
import tempfile
import urllib.request
from pathlib import Path

from benchmarks.clients import MODEL, prompt
from benchmarks.http_server import running
from generate.run import generate
from pipeline.errors import BudgetReached
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir

PROMPT_TOKENS, MAX_TOKENS = 40, 200  # of an answer at most
INPUT_USD, OUTPUT_USD = 0.15, 0.6  # a million tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--usd", type=float, default=0.01)
    parser.add_argument("--requests", type=int, default=1000)
    options = parser.parse_args()
    shares = []
    for number in range(options.runs):
        delay, jitter, in_flight = 2 + number % 7, 5 * (number % 11), 1 + 13 * (number % 20)
        with running(
            "benchmarks.stub",
            *("--delay-ms", str(delay), "--jitter-ms", str(jitter)),
            *("--vary", "--prompt-tokens", str(PROMPT_TOKENS), "--completion-tokens", str(MAX_TOKENS)),
        ) as url:
            ended = once(url, options, in_flight, seed=number)
            shares.append(billed_usd(url) / options.usd)
        if not ended:
            sys.exit(f"run {number} ended without reaching the budget: give it more requests")
    passed = sum(share > 1 for share in shares)
    print(
        f"{options.runs} runs of budget.usd {options.usd:g}: {passed} passed it; "
        f"spent {min(shares):.1%} to {max(shares):.1%} of it"
    )
    sys.exit(1 if passed else 0)


def billed_usd(url: str) -> float:
    """What the stub has billed."""
    with urllib.request.urlopen(url.removesuffix("/v1") + "/billed") as reply:
        billed = json.load(reply)
    return float(billed["prompt_tokens"] * INPUT_USD + billed["completion_tokens"] * OUTPUT_USD) / 1_000_000


def once(url: str, options: argparse.Namespace, in_flight: int, seed: int) -> bool:
    """One run; True if the budget ended it."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(
            name="budget",
            teacher={"model": MODEL, "base_url": url, "price": {"input": INPUT_USD, "output": OUTPUT_USD}},
            prompts={
                "count": options.requests,
                "template": prompt(0) + "{n}",
                "slots": {"n": [str(number) for number in range(options.requests)]},
            },
            sampling={"max_tokens": MAX_TOKENS, "seed": seed},
            generate={"concurrency": in_flight},
            budget={"usd": options.usd},
        )
        try:
            generate(recipe, RunDir(Path(folder) / "run"), quiet=True)
        except BudgetReached:
            return True
        return False


if __name__ == "__main__":
    main()
