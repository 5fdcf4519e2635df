"""A difference between arms is named over enough prompts only: over a few the bootstrap's interval is too narrow."""

import pytest

from evaluate.document import MEASURES
from evaluate.figures.quality import perplexity_figures
from evaluate.figures.statistics import Figure, draw, ratio
from evaluate.measure.results import RowScore
from experiments.results import Column, _differences, _few


def share(right: int, prompts: int) -> Figure:
    found = ratio([1.0] * right + [0.0] * (prompts - right), [1.0] * prompts, draw(range(prompts)))
    assert found
    return found


@pytest.mark.parametrize(("prompts", "improved"), [(4, None), (19, None), (20, True), (60, True)])
def test_all_pairs_for_one_arm_say_nothing_where_there_are_few(prompts: int, improved: bool | None) -> None:
    arms = {"one": share(0, prompts), "four": share(prompts, prompts)}
    column = Column("right answers", MEASURES["accuracy"], arms, {})
    (found,) = _differences([column])
    assert (found.model, found.against, found.improved) == ("four", "one", improved)
    assert found.change.low > 0  # the interval alone would name it
    assert list(_few([column])) == (
        [] if improved else ["right answers: over fewer than 20 prompts (or groups of them) no difference is named"]
    )


def test_rows_without_a_value_are_no_prompts_of_a_figure() -> None:
    found = ratio([1.0, 0.0, 0.0], [1.0, 1.0, 0.0], draw(range(3)))
    assert found and found.prompts == 2
    scores = [RowScore(f"r{n}", f"p{n // 2}", nll_nats=3.0, tokens=3, characters=4) for n in range(8)]
    assert {figure.prompts for figure in perplexity_figures({"one": scores})["one"].values()} == {4}
