"""The price table: names, snapshots and gateways, and where each price is from."""

from typing import Any

import pytest

from generate.budget import known_price
from generate.prices import PICO, PRICES, Price, price_of, source_of
from pipeline.errors import RecipeError
from pipeline.teacher_config import TeacherConfig
from tests.servers.misbehaving_server import recipe_for

HOSTED = "https://api.example.com/v1"


@pytest.mark.parametrize(
    ("model", "input_usd", "output_usd"),
    [
        ("gpt-4.1", 2, 8),
        ("gpt-4o", 2.5, 10),
        ("gpt-4o-2024-11-20", 2.5, 10),
        ("gpt-4o-2024-05-13", 5, 15),  # a snapshot that costs more than its family
        ("gpt-4o-mini-2024-07-18", 0.15, 0.6),
        ("GPT-4.1-nano", 0.1, 0.4),
        ("claude-sonnet-4-5-20250929", 3, 15),
        ("models/gemini-2.5-flash-lite", 0.1, 0.4),
        ("deepseek/deepseek-v4-pro", 1.32, 3.96),
    ],
)
def test_a_million_tokens_of_each_kind_cost_what_the_table_says(
    model: str, input_usd: float, output_usd: float
) -> None:
    price = price_of(TeacherConfig(model=model, base_url=HOSTED))
    assert price is not None
    assert price.cost(10**6, 0) == round(input_usd * PICO)
    assert price.cost(0, 10**6) == round(output_usd * PICO)


@pytest.mark.parametrize("model", ["gpt-4.1-turbo", "ft:gpt-4.1:mine::abc", "gpt", "o3", "grok-4.6", "my/gpt-4.1-lora"])
def test_a_name_that_only_looks_like_a_listed_one_has_no_price(model: str) -> None:
    teacher = TeacherConfig(model=model, base_url=HOSTED)
    assert price_of(teacher) is None
    assert source_of(teacher) is None


def test_every_price_is_a_whole_number_of_pico_dollars_a_token_and_half_of_it_too() -> None:
    for name, listed in PRICES.items():
        teacher = TeacherConfig(model=name, base_url=HOSTED)
        price, half = price_of(teacher), price_of(teacher, "batch")
        assert price is not None
        assert half is not None
        for exact, halved, usd in zip(price, half, listed, strict=True):
            assert (exact, 2 * halved) == (pytest.approx(usd * 10**6, abs=1e-6), exact), name
        assert 0 < price.input < price.output


def test_every_listed_name_has_a_dated_page_of_its_provider() -> None:
    for name in PRICES:
        source = source_of(TeacherConfig(model=name, base_url=HOSTED))
        assert source is not None, name
        assert source.startswith("https://")
        assert " as of 20" in source


def test_the_recipe_s_own_price_comes_first() -> None:
    teacher = TeacherConfig(model="gpt-4.1", base_url=HOSTED, price={"input": 0, "output": 1.5})
    assert price_of(teacher) == Price(0, 1_500_000)
    assert price_of(teacher, "batch") == Price(0, 750_000)
    assert source_of(teacher) == "teacher.price"


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8000/v1", "http://10.0.0.7/v1", "http://localhost:1/v1", "http://gpu1/v1"]
)
def test_a_server_of_one_s_own_has_no_price_but_the_recipe_s(url: str) -> None:
    assert price_of(TeacherConfig(model="gpt-4.1", base_url=url)) is None
    own = TeacherConfig(model="gpt-4.1", base_url=url, price={"input": 0.0375, "output": 0.15})
    assert price_of(own) == Price(37_500, 150_000)


def test_one_private_endpoint_of_several_leaves_the_price_open() -> None:
    teacher = TeacherConfig(model="gpt-4.1", base_url=[HOSTED, "http://10.0.0.7:8000/v1"])
    assert price_of(teacher) is None


@pytest.mark.parametrize(
    ("extra", "price", "refused"),
    [
        ({"service_tier": "priority"}, None, "service_tier"),
        ({"models": ["openai/gpt-5.5"]}, None, "models"),
        ({"plugins": [{"id": "web"}]}, None, "plugins"),
        ({"web_search_options": {}}, None, "web_search_options"),
        ({"service_tier": "flex"}, None, None),
        ({"service_tier": "priority"}, {"input": 3.5, "output": 14}, None),
    ],
)
def test_a_dearer_way_to_be_answered_needs_its_own_price(
    extra: dict[str, Any], price: dict[str, float] | None, refused: str | None
) -> None:
    """A budget in USD would be passed at the table's price."""
    teacher = {"model": "gpt-4.1", "base_url": HOSTED, "price": price}
    recipe = recipe_for(HOSTED, teacher=teacher, sampling={"extra": extra}, budget={"usd": 1})
    if refused:
        said = rf"gpt-4\.1 is only known without sampling\.extra\.{refused}: set teacher\.price"
        with pytest.raises(RecipeError, match=said):
            known_price(recipe)
    else:
        assert known_price(recipe) == price_of(recipe.teacher)
