"""The verifier `math` on answers as models write them. Right values are those of a person who reads the answer."""

import pytest

from tests.filters.verifying import outcome, settings_of, verify


@pytest.mark.parametrize(
    ("text", "right", "result"),
    [
        ("\\[ x = \\frac{12}{3} = 4 \\]", "4", "4"),
        ("\\boxed{x = \\frac{12}{3} = 4}", "4", "4"),
        ("$$x = \\frac{12}{3} = 4$$", "x = 4", "4"),
        ("So $P = \\frac{3}{8} = 0.375$.", "3/8", "0.375"),
        ("\\[ \\text{Total} = 48 + 24 = 72 \\]", "72", "72"),
        ("\\[ 48 + 24 = 72 \\]", "72", "72"),  # it was `True`
        ("$f(2) = 2^2 + 1 = 5$", "5", "5"),
    ],
)
def test_the_last_side_of_an_equation_is_its_value(text: str, right: str, result: str) -> None:
    said = verify("math", text, settings_of("math"), right)
    assert (outcome(said), said.result) == ("passes", result)
    assert outcome(verify("math", text, settings_of("math"), "6")) == "math"


def test_an_equation_to_solve_is_no_value() -> None:
    assert verify("math", "$2x + 3 = 7$", settings_of("math"), "7x").result == "Eq(2*x + 3, 7)"
    assert outcome(verify("math", "\\boxed{0 < x < 5}", settings_of("math"), "0 < x < 5")) == "passes"
