"""`python -m filters RECIPE [--run DIR] [--cluster ADDRESS]`.

Keeps the answers worth learning from, and says why it drops the others.
"""

import os
import sys
from contextlib import AbstractContextManager, nullcontext

from rich.console import Console

from filters.report import FilterReport, print_report
from filters.run import Machine, check_keep_rate, filter_run, recipe_rules
from filters.trials import dry_run, parse_shares, print_dry_run, print_sweep, sweep
from pipeline.cli import parse_stage, run_stage, stage_parser
from pipeline.errors import RequestsFailed
from pipeline.rundir import RunDir


def main(argv: list[str] | None = None) -> None:
    parser = stage_parser("filters", "Keeps the answers worth learning from, and says why it drops the others.")
    parser.add_argument("--allow-low-keep", action="store_true", help="end with 0 under filters.min_keep_rate too")
    parser.add_argument("--skip-bad", action="store_true", help="leave out and count lines that are no completions")
    parser.add_argument("--dry-run", action="store_true", help="show which rows of a filtered run would change sides")
    parser.add_argument("--sweep", metavar="PERCENTS", help="write the best 30,50,80 percent of a filtered run as runs")
    parser.add_argument(
        "--cluster", metavar="ADDRESS", help="work on a Ray cluster: auto, host:port or ray://host:port"
    )
    recipe, run, options = parse_stage(parser, argv)
    console = Console()
    if options.dry_run:
        print_dry_run(dry_run(recipe, run, recipe_rules(recipe, options.recipe)), console)
        return
    if options.sweep is not None:
        shares = parse_shares("--sweep", options.sweep)
        with run.locked():
            subsets = sweep(run, recipe_rules(recipe, options.recipe), shares)
        print_sweep(subsets, console)
        return
    with run.locked(), _machine(options.cluster) as machine:
        report = filter_run(recipe, run, options.recipe, skip_bad=options.skip_bad, machine=machine)
    print_report(report, console)
    _print_notices(report, run)
    if report.judge_failures:  # the keep rate means nothing before they are asked about
        raise RequestsFailed(
            f"the judge gave no answer about {report.judge_failures:,} of {report.rows:,} answers (why: detail in "
            f"{run.dropped}), so they are dropped; run the filters again, and it is asked about them again"
        )
    check_keep_rate(report, recipe.filters, options.recipe, allow_low_keep=options.allow_low_keep)


def _machine(cluster: str | None) -> AbstractContextManager[Machine | None]:
    if cluster is None:
        return nullcontext()
    from scale.filtering import cluster_machine  # here: filters on one machine need nothing of it

    return cluster_machine(cluster)


def _print_notices(report: FilterReport, run: RunDir) -> None:
    if not report.rules:
        print("warning: filters.rules is empty: every answer is kept", file=sys.stderr)
    if report.torn_last_line:
        print(
            f"notice: the last line of {run.completions} is cut off (generate was stopped while it wrote it) and is "
            "left out; generate, run again, asks for that answer once more",
            file=sys.stderr,
        )
    if report.bad_lines:
        first = report.first_bad_lines[0]
        print(
            f"notice: {report.bad_lines:,} bad lines left out, listed in {run.filter_report}; the first is "
            f"{run.completions}:{first.line}: {first.reason}",
            file=sys.stderr,
        )


if __name__ == "__main__":
    # So the libraries of a user's rule make no threads: the processes that are forked from this one would lack them.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run_stage(main)
