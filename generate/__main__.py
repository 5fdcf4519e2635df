"""`python -m generate RECIPE [--run DIR] [--cluster ADDRESS] [--dry-run] [--retry-failures] [--quiet]`.

Asks the teacher, from this machine or from the nodes of a Ray cluster.

Ends with 0 when every request is answered, 4 when some failed for good, 3 when the budget is reached, 130 when
interrupted, 1 when the run could not go on, 2 on wrong usage. Run it again after any of them: what is answered stays
answered. The counts go to stdout.
"""

import sys
from pathlib import Path

from generate import dry_run
from generate.progress import clock, requests_of
from generate.prompts import iter_prompts
from generate.run import Sender, check_stored, generate, pending
from generate.summary import Summary
from generate.turns import passes
from pipeline.cli import parse_stage, run_stage, stage_parser
from pipeline.errors import RecipeError, RequestsFailed, UsageError
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir

MOST_SHOWN = 16  # endpoints of the final counts


def main() -> None:
    parser = stage_parser("generate", "Asks the teacher every prompt of the recipe, and goes on where it was stopped.")
    parser.add_argument(
        "--retry-failures",
        action="store_true",
        help="ask again what failed for good earlier (it is left alone otherwise)",
    )
    parser.add_argument("--write-batches", action="store_true", help="only write batch files, for `vllm run-batch`")
    parser.add_argument("--collect", type=Path, metavar="FILE", help="only take in the output file of a batch")
    parser.add_argument("--dry-run", action="store_true", help="what would be asked, and its cost; sends nothing")
    parser.add_argument("--quiet", action="store_true", help="no progress; warnings and the final counts remain")
    parser.add_argument(
        "--cluster", metavar="ADDRESS", help="ask from the nodes of a Ray cluster: auto, host:port or ray://host:port"
    )
    parser.add_argument(
        "--cluster-store", metavar="URL", help="a folder that all nodes see, or s3:// or gs:// (default: the run's)"
    )
    recipe, run, options = parse_stage(parser)
    if options.cluster_store and not options.cluster:
        raise UsageError(
            f"--cluster-store {options.cluster_store} is for a cluster: add --cluster auto, or leave it out"
        )
    if recipe.sampling.logprobs is not None:
        _refuse_store(run, f"sampling.logprobs is {recipe.sampling.logprobs}", "leave the key out")
    if recipe.generate.mode == "batch":
        _refuse_store(run, "generate.mode is batch", "set it to online")
    if recipe.evaluate.verify:
        _warn_untested(recipe)
    if options.dry_run:
        _dry_run(recipe, run, retry_failures=options.retry_failures)
        return
    summary = generate(
        recipe,
        run,
        quiet=options.quiet,
        retry_failures=options.retry_failures,
        write_batches=options.write_batches,
        collect=options.collect,
        send=_sender(options.cluster, options.cluster_store, recipe, run) if options.cluster else None,
    )
    for line in describe(recipe, run, summary):
        print(line)
    if summary.failed:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(summary.errors.items()))
        again = "--retry-failures asks them again"
        if options.collect:
            again = f"--collect can bring their answers later, or {again}"
        if recipe.prompts.answers:
            again = "the same command takes in answers that come later"
        where = f"{run.failures}, or in those of its turns/," if recipe.prompts.user else f"{run.failures},"
        raise RequestsFailed(
            f"{summary.failed} of {summary.requests} requests failed for good"
            + (f" (now: {kinds})" if kinds else "")
            + f"; they are in {where} and {again}"
        )


def _dry_run(recipe: Recipe, run: RunDir, *, retry_failures: bool) -> None:
    if recipe.prompts.answers:
        print(f"{recipe.name}: {pending(recipe, run):,} rows without an answer so far, which prompts.answers brings")
        return
    check_stored(recipe, run)
    first, folder = next(passes(recipe, run))
    for line in dry_run.describe(first, dry_run.dry_run(first, folder, retry_failures=retry_failures)):
        print(line)
    if recipe.prompts.user:
        print("this is the first answer only: the turns of prompts.user depend on it, and those to come cost more")


def _sender(address: str, store: str | None, recipe: Recipe, run: RunDir) -> Sender:
    from scale.generation import cluster_sender  # here: a run on one machine needs nothing of it

    if recipe.generate.mode == "batch":
        raise UsageError("--cluster asks an endpoint online, but generate.mode is batch; a batch needs no cluster")
    return cluster_sender(address, run, store)


def _warn_untested(recipe: Recipe) -> None:
    """Says, before anything is paid, that no prompt is in the test part. Stops at the first that is."""
    config = recipe.prompts.model_copy(update={"user": None})  # no conversation is continued yet
    if all(config.part_of(prompt) != "test" for prompt in iter_prompts(recipe)):
        print(
            f"warning: none of so few {'groups' if config.group else 'prompts'} is in the test part, so "
            f"evaluate.verify will have nothing to ask; raise prompts.test (now {config.test:g}), or take another "
            "prompts.seed",
            file=sys.stderr,
        )


def _refuse_store(run: RunDir, what: str, fix: str) -> None:
    """Raises RecipeError if the run is in object storage: logprobs and batches would be lost with its machine."""
    from scale.sync import StoreState  # here: as above

    if url := StoreState.read(run.path).url:
        raise RecipeError(
            f"{what}, but a run in object storage ({url}) would lose that with its machine: use a folder for --run "
            f"(make fetch brings the run into one), or {fix}"
        )


def describe(recipe: Recipe, run: RunDir, summary: Summary) -> list[str]:
    """The final counts, in two lines, and one for each of several endpoints, the busiest first."""
    seconds = max(summary.wall_s, 1e-9)
    tokens = summary.completion_tokens
    thought = f" ({summary.reasoning_tokens:,} of reasoning)" if summary.reasoning_tokens else ""
    return [
        f"{recipe.name}: {requests_of(summary.requests, summary.prompts)}, {summary.completed} answered "
        f"({summary.answered} now, {summary.resumed} earlier), {summary.failed} failed → {run.completions}",
        f"{clock(summary.wall_s)} · {summary.answered / seconds:.1f} answers/s · "
        f"{summary.prompt_tokens:,} prompt tokens · {tokens:,} completion tokens{thought} · "
        f"{tokens / seconds:,.0f} tok/s"
        + (f" · ${summary.cost_usd:,.4f} spent in all" if summary.cost_usd is not None else ""),
        *_by_endpoint(summary, seconds),
    ]


def _by_endpoint(summary: Summary, seconds: float) -> list[str]:
    busiest = sorted(summary.endpoints.items(), key=lambda one: one[1].answered, reverse=True)
    if len(busiest) < 2:
        return []
    more = [f"and {len(busiest) - MOST_SHOWN} endpoints more"] if len(busiest) > MOST_SHOWN else []
    return [
        f"{name}: {counts.answered:,} answers · {counts.completion_tokens / seconds:,.0f} tok/s · "
        f"{sum(counts.faults.values()):,} attempts without an answer"
        for name, counts in busiest[:MOST_SHOWN]
    ] + more


if __name__ == "__main__":
    run_stage(main)
