"""What the tests of `generate` share: a run, and no key in the environment unless a test sets one."""

from pathlib import Path

import pytest
from tenacity import wait_fixed

from pipeline.rundir import RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


@pytest.fixture(autouse=True)
def _keyless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed is asked again at once."""
    monkeypatch.setattr("generate.loop.BACKOFF", wait_fixed(0.01))
