"""`python -m chain RECIPE`: serve, generate, filter, train, evaluate, in one command and one terminal.

Each stage is the very command a user would type, run as a process of its own; this module only starts them in turn
and keeps the teacher's server up while answers are missing. Every stage knows what it has done already, so the
same command goes on after an interrupt.
"""

import json
import signal
import subprocess
import sys
import time
import urllib.request
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from generate.engine import pending
from pipeline.cli import parse_stage, run_stage, stage_parser
from pipeline.errors import DistillError, RecipeError, RequestsFailed
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir
from serve.server import serving

REQUESTS_FAILED = RequestsFailed.exit_code
LOCAL_HOSTS = {"127.0.0.1", "localhost", "::1"}
GRACE_S = 20  # for a stage to end by itself after an interrupt


def main(argv: list[str] | None = None) -> None:
    parser = stage_parser("chain", "Runs all stages of a recipe; run again, it goes on where it was.")
    recipe, run, options = parse_stage(parser, argv)
    if recipe.student is None:
        raise RecipeError(f"{options.recipe}: student is missing; the chain needs a model to train")
    started = time.monotonic()
    requests_failed = False

    heading(1, f"generate: {recipe.teacher.model} answers")
    if pending(recipe, run):
        with teacher(recipe, run):
            requests_failed = stage("generate", run, options) == REQUESTS_FAILED
    else:
        print(f"{run.completions}: every prompt is answered or has failed for good")
    heading(2, "filters: what is worth learning from")
    stage("filters", run, options)
    heading(3, f"train: {recipe.student.model} learns")
    stage("train", run, options)
    heading(4, "evaluate: what the student became")
    stage("evaluate", run, options)

    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    print(f"\nDone in {minutes} min {seconds} s. The report: {run.report_html}", flush=True)
    if requests_failed:
        raise RequestsFailed(f"some requests failed for good; see {run.failures}")


def heading(number: int, text: str) -> None:
    print(f"\n── {number}/4 {text}", flush=True)


@contextmanager
def teacher(recipe: Recipe, run: RunDir) -> Iterator[None]:
    """The recipe's endpoint, up: a remote one or one that answers already is used, else the teacher is served here."""
    address = urlsplit(recipe.teacher.url)
    if address.hostname not in LOCAL_HOSTS or _serves(recipe.teacher.url, recipe.teacher.model):
        yield
        return
    run.path.mkdir(parents=True, exist_ok=True)
    log = run.path / "teacher.log"
    print(f"serving {recipe.teacher.model} (about a minute; log: {log})", flush=True)
    with serving(recipe.teacher.model, port=address.port or 80, config=recipe.serve, log=log) as server:
        print(f"ready at {server.base_url} after {server.startup_s:.0f} s", flush=True)
        yield


def _serves(base_url: str, model: str) -> bool:
    try:
        with urllib.request.urlopen(f"{base_url}/models", timeout=5) as answer:
            listed = json.load(answer)["data"]
    except (OSError, ValueError, KeyError):
        return False
    return any(entry.get("id") == model for entry in listed)


def stage(name: str, run: RunDir, options: Namespace) -> int:
    """Runs one stage to its end; raises DistillError if it failed, KeyboardInterrupt if it was interrupted."""
    process = subprocess.Popen(
        [sys.executable, "-m", name, str(options.recipe), "--run", str(run.path), *options.flags]
    )
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise
    if code == 130:
        raise KeyboardInterrupt
    if code not in (0, REQUESTS_FAILED):
        failed = StageFailed(f"`python -m {name}` ended with {code}; mend it and run the same command again")
        failed.exit_code = code
        raise failed
    return code


class StageFailed(DistillError):
    """A stage said what was wrong and ended; the chain ends with the same code."""


if __name__ == "__main__":
    run_stage(main)
