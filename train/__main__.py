"""`python -m train RECIPE [--run DIR] [--cluster ADDRESS] [--force] [--allow-chain] [--again]`: the student.

Trains it on kept.jsonl, in this process, in those of a launcher, or in those of a Ray cluster.
"""

import sys

from pipeline.cli import parse_stage, run_stage, stage_parser
from pipeline.errors import INTERRUPTED, DistillError
from train.processes import launched
from train.run import train_launched


def main() -> None:
    parser = stage_parser("train", "Fine-tunes the student on the kept answers, into student/.")
    parser.add_argument("--force", action="store_true", help="continue past checks that warn (never past a failed one)")
    parser.add_argument("--allow-chain", action="store_true", help="learn from a teacher that was itself distilled")
    parser.add_argument("--again", action="store_true", help="train again, even if the student is up to date")
    parser.add_argument("--cluster", metavar="ADDRESS", help="train on the nodes of a Ray cluster: auto or host:port")
    recipe, run, options = parse_stage(parser)
    flags = {"again": options.again, "force": options.force, "allow_chain": options.allow_chain}
    if options.cluster:
        from scale.training import Training, train_on_cluster  # here: a training on one machine needs nothing of it

        return train_on_cluster(options.cluster, Training(recipe, run, flags))
    try:
        train_launched(recipe, run, flags)
        launched().leave()
    except (DistillError, KeyboardInterrupt) as error:
        if launched().lead:
            raise
        sys.exit(error.exit_code if isinstance(error, DistillError) else INTERRUPTED)  # the leading process says why


if __name__ == "__main__":
    run_stage(main)
