"""`python -m filters.review RECIPE [--run DIR]`: a local page to review a sample, and the agreement with the person."""

from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console

from filters.review.agreement import agreement, print_agreement
from filters.review.session import SAMPLE_FILES, Session
from pipeline.cli import parse_stage, run_stage, stage_parser
from pipeline.errors import UsageError
from pipeline.local_page import serve_page

if TYPE_CHECKING:
    from fastapi import FastAPI

SIZE = 100  # of a sample


def main(argv: list[str] | None = None) -> None:
    parser = stage_parser("filters.review", "Shows a blind sample of a run on a local page, for a person to judge.")
    parser.add_argument("--sample", type=int, help=f"answers to review, half of them kept (default: {SIZE})")
    parser.add_argument("--seed", type=int, help="of the sample (default: 0)")
    parser.add_argument("--port", type=int, default=0, help="0: any that is free")
    parser.add_argument("--agreement", action="store_true", help="no page: print what the verdicts so far show")
    recipe, run, options = parse_stage(parser, argv)
    if options.sample is not None and options.sample < 1:
        raise UsageError(f"--sample must be at least 1, got {options.sample}")
    if not options.agreement:
        with Session(run, size=options.sample or SIZE, seed=options.seed or 0) as session:
            sample = session.sample
            if not sample.is_as_asked(options.sample, options.seed):
                drawn = f"the sample of {len(sample.items)} answers with seed {sample.seed}"
                print(f"this review goes on with {drawn}; for another one move {SAMPLE_FILES} away")
            if session.gone:
                gone = f"{session.gone} of these {len(sample.items)} answers are no longer in the run"
                print(f"warning: {gone}, and count for nothing; for another sample move {SAMPLE_FILES} away")
            build = partial(_app, session)
            shown = f"review {session.done} of {len(sample.items)} done"
            serve_page(build, port=options.port, before=shown, after="Ctrl-C ends; every verdict is kept")
    print_agreement(agreement(recipe, run), Console())


def _app(session: Session, token: str) -> "FastAPI":
    from filters.review.app import create_app  # its packages come with `make review`

    return create_app(session, token)


if __name__ == "__main__":
    run_stage(main)
