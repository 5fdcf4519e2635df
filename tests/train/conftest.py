"""What all tests of training share."""

import pytest
import torch

from tests.tiny_student import tiny_model


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """A tiny model is no faster on several threads, and many times slower if other work has the cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model's folder, which no test changes."""
    return str(tiny_model(tmp_path_factory.mktemp("student") / "model"))
