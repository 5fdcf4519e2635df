"""Stages as processes of their own, each the very command that a user would type, and the teacher they may need."""

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.errors import DistillError, RequestsFailed
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir
from serve.server import serving

REQUESTS_FAILED = RequestsFailed.exit_code
LOCAL_HOSTS = {"127.0.0.1", "localhost", "::1"}
GRACE_S = 20  # for a stage to end by itself after an interrupt


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


def stage(name: str, run: RunDir, recipe: Path, flags: Sequence[str]) -> int:
    """Runs one stage to its end; raises DistillError if it failed, KeyboardInterrupt if it was interrupted."""
    process = subprocess.Popen([sys.executable, "-m", name, str(recipe), "--run", str(run.path), *flags])
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
        failed = StageFailed(f"`python -m {name}` ended with {code}; fix it and run the same command again")
        failed.exit_code = code
        raise failed
    return code


class StageFailed(DistillError):
    """A stage said what was wrong and ended; the chain ends with the same code."""
