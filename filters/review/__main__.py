"""`python -m filters.review RECIPE [--run DIR]`: a local page to review a sample, and the agreement with the person."""

import secrets
import socket
from contextlib import suppress

from rich.console import Console

from filters.review.agreement import agreement, print_agreement
from filters.review.session import Session
from pipeline.cli import parse_stage, run_stage, stage_parser
from pipeline.errors import DistillError, UsageError

HOST = "127.0.0.1"


def main(argv: list[str] | None = None) -> None:
    parser = stage_parser("filters.review", "Shows a blind sample of a run on a local page, for a person to judge.")
    parser.add_argument("--sample", type=int, default=100, help="answers to review, half of them kept")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--port", type=int, default=0, help="0: any that is free")
    parser.add_argument("--agreement", action="store_true", help="no page: print what the verdicts so far show")
    recipe, run, options = parse_stage(parser, argv)
    if options.sample < 1:
        raise UsageError(f"--sample must be at least 1, got {options.sample}")
    if not options.agreement:
        with Session(run, size=options.sample, seed=options.seed) as session:
            _serve(session, options.port)
    print_agreement(agreement(recipe, run), Console())


def _serve(session: Session, port: int) -> None:
    """Serves the page until Ctrl-C."""
    try:
        import uvicorn

        from filters.review.app import create_app
    except ImportError as error:
        raise DistillError(f"{error.name} is not installed; `make review` installs it") from None
    token = secrets.token_urlsafe(16)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
            listener.listen()
        except OSError as error:
            raise UsageError(f"--port {port}: {error.strerror}; name another, or none for any that is free") from None
        config = uvicorn.Config(create_app(session, token), log_level="warning", access_log=False)
        print(f"review {session.done} of {len(session.sample.items)} done")
        print(f"http://{HOST}:{listener.getsockname()[1]}/{token}/  (Ctrl-C ends; every verdict is kept)", flush=True)
        with suppress(KeyboardInterrupt):  # uvicorn closes, then passes the signal on
            uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    run_stage(main)
