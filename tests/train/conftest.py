"""What all tests of training share."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """A tiny model is no faster on several threads, and many times slower if other work has the cores."""
    torch.set_num_threads(1)
