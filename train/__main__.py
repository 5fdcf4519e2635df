"""`python -m train RECIPE [--run DIR] [--force] [--allow-chain] [--again]`: the student, on kept.jsonl."""

import sys
from contextlib import nullcontext

from pipeline.cli import INTERRUPTED, parse_stage, run_stage, stage_parser
from pipeline.errors import DistillError
from train.processes import launched
from train.run import train_run


def main() -> None:
    parser = stage_parser("train", "Fine-tunes the student on the kept answers, into student/.")
    parser.add_argument("--force", action="store_true", help="continue past checks that warn (never past a failed one)")
    parser.add_argument("--allow-chain", action="store_true", help="learn from a teacher that was itself distilled")
    parser.add_argument("--again", action="store_true", help="train again, even if the student is up to date")
    recipe, run, options = parse_stage(parser)
    processes = launched()
    flags = {"again": options.again, "force": options.force, "allow_chain": options.allow_chain}
    try:
        with run.locked() if processes.lead else nullcontext():
            train_run(recipe, run, **flags, processes=processes)
    except (DistillError, KeyboardInterrupt) as error:
        if processes.lead:
            raise
        sys.exit(error.exit_code if isinstance(error, DistillError) else INTERRUPTED)  # the leading process says why


if __name__ == "__main__":
    run_stage(main)
