"""`python -m serve` as a process of its own, in its own process group, as a terminal runs it."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from serve.server import free_port

ROOT = Path(__file__).parents[2]
GIVE_UP_S = 300


def _heed_hangups() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests under nohup hand down that it is ignored


def start(tmp_path: Path, model: str, *flags: str) -> "subprocess.Popen[str]":
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: test\nteacher: {{model: {model}, base_url: 'http://127.0.0.1:{free_port()}/v1'}}\n"
        "serve: {device: cpu}\nprompts: {template: hello, count: 1}\n"
    )
    return subprocess.Popen(
        [sys.executable, "-m", "serve", str(recipe), "--run", str(tmp_path / "run"), *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_heed_hangups,
    )


def read_until(process: "subprocess.Popen[str]", text: str) -> str:
    assert process.stderr
    read = ""
    for line in process.stderr:
        read += line
        if text in line:
            return read
    raise AssertionError(f"it ended without {text!r}: {read}")


def wait_until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + GIVE_UP_S
    while not true():
        assert time.monotonic() < deadline, f"nothing after {GIVE_UP_S} s"
        time.sleep(0.05)
