"""`python -m benchmarks.shared`: what `generate.share_prompt` saves, by what the stub bills with it and without.

The default is a long prompt with a short answer, at the price of gpt-4.1-mini. Each bill is checked against the
run's summary.
"""

import argparse
from typing import NamedTuple

from benchmarks.http_server import running
from benchmarks.measure import flags
from benchmarks.runs import billed, fresh, run_quietly

PRICE = {"input": 0.4, "output": 1.6}  # USD per million tokens


class Bill(NamedTuple):
    """Of one run."""

    requests: int
    prompt_tokens: int
    completion_tokens: int
    usd: float


def main() -> None:
    options = flags(__doc__, prompts=100, samples=4, prompt_tokens=1000, completion_tokens=60)
    print(f"{options.prompts:,} prompts, {options.samples} samples each")
    for name, share in (("a request for each sample", False), ("generate.share_prompt", True)):
        bill = once(options, share=share)
        print(
            f"{name}: {bill.requests:,} HTTP requests, {bill.prompt_tokens:,} prompt tokens, "
            f"{bill.completion_tokens:,} completion tokens, ${bill.usd:.3f}"
        )


def once(options: argparse.Namespace, *, share: bool) -> Bill:
    """One run on a stub of its own."""
    tokens = ("--prompt-tokens", options.prompt_tokens, "--completion-tokens", options.completion_tokens)
    with (
        running("benchmarks.stub", *tokens) as url,
        fresh(url, options.prompts, {"price": PRICE}, generate={"share_prompt": share}) as (recipe, run),
    ):
        prompts = recipe.prompts.model_copy(update={"samples": options.samples})
        summary, bill = run_quietly(recipe.model_copy(update={"prompts": prompts}), run), billed(url)
    assert (summary.prompt_tokens, summary.completion_tokens) == (bill["prompt_tokens"], bill["completion_tokens"])
    assert summary.cost_usd is not None
    return Bill(bill["requests"], bill["prompt_tokens"], bill["completion_tokens"], summary.cost_usd)


if __name__ == "__main__":
    main()
