"""`python -m chat RECIPE [--run DIR] [--only student] [--terminal]`: talk to a run's models."""

import argparse
import sys

from chat.conversation import system_of
from chat.models import choose_models, starting
from chat.terminal import talk
from pipeline.cli import parse_stage, run_stage, stage_parser
from pipeline.errors import UsageError
from pipeline.local_page import serve_page
from pipeline.students import AFTER
from serve.named import KEYS, NAMES


def main(argv: list[str] | None = None) -> None:
    one_answer = ["--prompts.samples", "1"]  # to a question: several would not be possible at temperature 0
    recipe, run, options = parse_stage(_parser(), [*(sys.argv[1:] if argv is None else argv), *one_answer])
    names = options.only or ([NAMES[AFTER]] if options.terminal else list(KEYS))
    if unknown := [name for name in names if name not in KEYS]:
        raise UsageError(f"--only {','.join(names)}: no model {unknown[0]!r}; there are {', '.join(KEYS)}")
    if options.terminal and len(names) > 1:
        raise UsageError(f"--terminal is for one model, not {len(names)}; name it with --only")
    if options.terminal and sys.stdin is None:
        raise UsageError("--terminal: standard input is closed; run it in a terminal, or give it a file of questions")
    models = choose_models(recipe, run, [KEYS[name] for name in names])
    run.path.mkdir(parents=True, exist_ok=True)  # for the logs of servers
    with starting(models, run):
        if options.terminal:
            talk(models[0], system_of(recipe, run))
        else:
            from chat.page import chat_page

            serve_page(
                lambda token: chat_page(recipe, run, models, token),
                port=options.port,
                before=f"chat with {', '.join(model.label for model in models)}",
                after="Ctrl-C ends it and the servers that it started",
            )


def _parser() -> argparse.ArgumentParser:
    parser = stage_parser("chat", "Talk to teacher, student before and student after, side by side on a local page.")
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        metavar="NAMES",
        help=f"of {', '.join(KEYS)}: those, with commas between them (default: all; in a terminal the student)",
    )
    parser.add_argument("--terminal", action="store_true", help="no page: one model, in this terminal")
    parser.add_argument("--port", type=int, default=0, help="of the page; 0: any that is free")
    return parser


if __name__ == "__main__":
    run_stage(main)
