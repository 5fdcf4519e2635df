"""What all tests share: their order, how threads wait, Ctrl-C, hypothesis without a clock, a failed command's words."""

import os
import signal
from collections.abc import Generator, Iterator
from subprocess import CalledProcessError
from typing import Any

import hypothesis
import pytest

# Several tests and their servers share the cores. OpenMP's threads, torch's and vLLM's, would wait for each other by
# keeping a core busy, which the thread that they wait for needs. It is read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A shell starts what runs in its background with Ctrl-C ignored, and children inherit that: tests that interrupt a
# child would wait forever.
signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("untimed", deadline=None)  # an example may take longer on a busy machine
hypothesis.settings.load_profile("untimed")


SIGNALS = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """What a test, or Ray in a module's fixture, has this process do at a signal is over with that test."""
    yield
    for number, handler in SIGNALS.items():
        signal.signal(number, handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: the short ones after them keep all workers busy until the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo[Any]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A command that failed shows what it printed; the error alone names its exit status."""
    report = yield
    if call.excinfo and isinstance(error := call.excinfo.value, CalledProcessError):
        for name, text in (("stdout", error.stdout), ("stderr", error.stderr)):
            text = text.decode() if isinstance(text, bytes) else text
            report.sections += [(f"{name} of the command", text)] if text else []
    return report
