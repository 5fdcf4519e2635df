"""What several test files share: a real vLLM server of the embedded model, and small recipes and model folders."""

import os
import signal
from collections.abc import Generator, Iterator
from subprocess import CalledProcessError
from typing import Any

import hypothesis
import pytest

from pipeline.serve_config import ServeConfig
from serve.server import Server, free_port, serving

EMBEDDED = "embedded:smollm2-135m"
START_TIMEOUT_S = 900  # a first start on a busy machine

# Several tests and their servers share the cores. OpenMP's threads, torch's and vLLM's, would wait for each other by
# keeping a core busy, which the thread that they wait for needs. It is read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A shell starts what runs in its background with Ctrl-C ignored, and children inherit that: tests that interrupt a
# child would wait forever.
signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("untimed", deadline=None)  # an example may take longer on a busy machine
hypothesis.settings.load_profile("untimed")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that uses the real server is slow, and has time for its start."""
    for item in items:
        if "teacher_server" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(START_TIMEOUT_S))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo[Any]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A command that failed shows what it printed; the error alone names its exit status."""
    report = yield
    if call.excinfo and isinstance(error := call.excinfo.value, CalledProcessError):
        for name, text in (("stdout", error.stdout), ("stderr", error.stderr)):
            text = text.decode() if isinstance(text, bytes) else text
            report.sections += [(f"{name} of the command", text)] if text else []
    return report


@pytest.fixture(scope="session")
def teacher_server() -> Iterator[Server]:
    """The embedded model behind a real vLLM, one for the whole session; it answers to `embedded:smollm2-135m`."""
    with serving(EMBEDDED, port=free_port(), config=ServeConfig(kv_cache_gib=1)) as server:
        yield server
