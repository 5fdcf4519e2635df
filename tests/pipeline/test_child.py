"""A stage as a child process: one signal to the parent ends both in order, whatever the child ignores."""

import signal
import subprocess
import sys

import pytest

STAGE = """
import time
from pipeline.cli import run_stage

def main():
    print("at work", flush=True)
    time.sleep(60)

run_stage(main)
"""
PARENT = f"""
import sys
from pipeline.child import run_child
from pipeline.cli import run_stage

run_stage(lambda: sys.exit(run_child([sys.executable, "-c", {STAGE!r}])))
"""


@pytest.mark.parametrize("ignores_sigint", [False, True], ids=["", "in the background of a script"])
def test_one_sigterm_ends_a_stage_and_what_started_it(ignores_sigint: bool) -> None:
    trap = 'trap "" INT; ' if ignores_sigint else ""
    process = subprocess.Popen(
        ["/bin/sh", "-c", f'{trap}exec "$0" -c "$1"', sys.executable, PARENT],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout
    assert process.stdout.readline() == "at work\n"
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[1]  # ends with the last process that can write to it
    assert process.returncode == 130
    assert said.splitlines() == 2 * ["interrupted: run the same command again to go on"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no kernel tells it")
def test_a_stage_ends_in_order_when_what_started_it_is_killed() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "at work\n"
    process.kill()
    said = process.communicate()[1]  # ends with the last process that can write to it
    assert said == "interrupted: run the same command again to go on\n"
