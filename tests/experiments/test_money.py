"""What the experiment `teachers` says of money."""

import numpy as np
import pytest

from evaluate.figures.quality import difference
from evaluate.figures.statistics import Figure
from experiments.results import _money
from pipeline.lineage import spent_on_answers

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


@pytest.mark.parametrize("usd", [1.0, 0.5])
def test_a_teacher_that_cost_no_more_has_no_gain_for_a_dollar(usd: float) -> None:
    assert len(list(_money({"a": {"usd": 1.0}, "b": {"usd": usd}}, [BETTER]))) == 2  # what each cost


def test_a_dollar_more_bought_nothing_that_is_sure_or_lowered_the_perplexity() -> None:
    unsure = difference("accuracy", "b", "a", ONE, ONE, "higher", "test")
    lower = difference("perplexity", "b", "a", OTHER, ONE, "lower", "test")
    lines = list(_money({"a": {"usd": 1.0}, "b": {"usd": 3.0}}, [unsure, lower]))
    assert lines[2:] == [
        "accuracy: 2.00 USD more made no significant difference",
        "perplexity: +0.1 for each USD that b cost more than a",
    ]


@pytest.mark.parametrize(
    ("last", "before", "usd"), [(0.5, 0.25, 0.75), (0.5, None, None), (None, 0.25, None), (0.0, 0.25, 0.25)]
)
def test_the_turns_before_the_last_cost_too(last: float | None, before: float | None, usd: float | None) -> None:
    asked = {"spent": {"tokens": 10, "usd": last}, "user": {"spent_before": {"tokens": 30, "usd": before}}}
    assert spent_on_answers(asked) == {"tokens": 40, "usd": usd}


def test_a_run_of_one_turn_costs_what_it_spent() -> None:
    assert spent_on_answers({"spent": {"tokens": 10, "usd": 0.5}}) == {"tokens": 10, "usd": 0.5}
    assert spent_on_answers({})["usd"] is None
