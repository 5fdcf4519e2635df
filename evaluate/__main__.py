"""`python -m evaluate RECIPE [--run DIR]`: quality, speed and memory of teacher and student, and the report."""

from rich.console import Console

from evaluate.report.tables import print_report
from evaluate.run import evaluate_run
from pipeline.cli import parse_stage, run_stage, stage_parser


def main(argv: list[str] | None = None) -> None:
    parser = stage_parser("evaluate", "Scores and times teacher and student, and writes report.json and report.html.")
    parser.add_argument("--report-only", action="store_true", help="measure nothing: write the report again")
    parser.add_argument("--no-speed", action="store_true", help="start no server: no speed and no probes")
    parser.add_argument("--force", action="store_true", help="measure again what was measured already")
    recipe, run, options = parse_stage(parser, argv)
    with run.locked():
        report = evaluate_run(
            recipe,
            run,
            options.recipe,
            report_only=options.report_only,
            speed=not options.no_speed,
            force=options.force,
            flags=options.flags,
        )
    console = Console()
    print_report(report, console)
    console.print(f"\n{run.report_html}", highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    run_stage(main)
