"""`python -m train RECIPE [--run DIR] [--force]`: the student, on kept.jsonl."""

from pipeline.cli import parse_stage, run_stage, stage_parser
from train.run import train_run


def main() -> None:
    parser = stage_parser("train", "Fine-tunes the student on the kept answers, into student/.")
    parser.add_argument("--force", action="store_true", help="train again, even if the student is up to date")
    recipe, run, options = parse_stage(parser)
    with run.locked():
        train_run(recipe, run, force=options.force)


if __name__ == "__main__":
    run_stage(main)
