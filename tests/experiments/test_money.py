"""What the experiment `teachers` says of money."""

import numpy as np
import pytest

from evaluate.figures.quality import difference
from evaluate.figures.statistics import Figure
from experiments.results import _money

ONE, OTHER = Figure(0.2, np.linspace(0.1, 0.3, 201)), Figure(0.0, np.zeros(201))
BETTER = difference("accuracy", "b", "a", ONE, OTHER, "higher", "test")


@pytest.mark.parametrize(("a", "b"), [(None, 3.0), (1.0, None), (None, None)])
def test_a_price_that_is_not_known_is_not_nothing(a: float | None, b: float | None) -> None:
    lines = list(_money({"a": {"usd": a, "tokens": 10}, "b": {"usd": b}}, [BETTER]))
    assert not any("USD more" in line or "each USD" in line for line in lines)
    assert lines[2:] == ["what b cost more than a is unknown"]


def test_a_dollar_more_bought_something() -> None:
    lines = list(_money({"a": {"usd": 1.0}, "b": {"usd": 3.0}}, [BETTER]))
    assert lines[2:] == ["accuracy: +0.1 for each USD that b cost more than a"]
