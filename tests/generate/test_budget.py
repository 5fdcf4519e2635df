"""The budget: what is reserved, what is settled, that it is never passed, and what a dry run says of it."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from generate.budget import Account, Budget, Spend, read_account, shared_budget, spent_in, spent_so_far
from generate.dry_run import describe, dry_run
from generate.jobs import Partition
from generate.journal import Contents, Journal
from generate.prices import PICO, Price, price_of
from generate.run import generate
from generate.tokens import TEMPLATE_TOKENS
from pipeline.errors import BudgetReached, DataError
from pipeline.lineage import read_lineage
from pipeline.recipe import Recipe
from pipeline.records import Completion, Usage
from pipeline.rundir import RunDir
from pipeline.section import BudgetConfig
from tests.completion_fields import completion_fields
from tests.servers.misbehaving_server import Asked, Behaviour, answer, misbehaving, recipe_for

PRICE = Price(input=2, output=10)  # pico-dollars a token


def usage(prompt: int | None, completion: int | None) -> Usage:
    return Usage(prompt_tokens=prompt, completion_tokens=completion)


def test_an_answer_gives_back_what_it_did_not_use() -> None:
    budget = Budget(BudgetConfig(tokens=1000), None, Spend())
    first = budget.reserve(body_bytes=100, max_tokens=50)
    assert first is not None
    assert first.most.tokens == 100 + TEMPLATE_TOKENS + 50
    assert budget.reserve(body_bytes=700, max_tokens=50) is None  # 214 + 814 > 1000
    budget.settle(first, usage(20, 30), billed=True, journaled=[usage(20, 30)])
    assert budget.spent == Spend(50, 0)
    assert budget.reserve(body_bytes=700, max_tokens=50) is not None


@pytest.mark.parametrize("config", [BudgetConfig(tokens=214), BudgetConfig(usd=828 / PICO)])
def test_a_budget_covers_a_request_that_can_cost_all_of_it(config: BudgetConfig) -> None:
    budget = Budget(config, PRICE, Spend())
    assert budget.reserve(100, 50) is not None
    assert budget.reserve(0, 1) is None


@pytest.mark.parametrize(
    ("said", "billed", "spent"),
    [
        (usage(20, 30), True, Spend(50, 340)),
        (None, True, Spend(214, 828)),  # a timeout: it may have been worked for
        (usage(20, None), True, Spend(214, 828)),
        (usage(None, 30), True, Spend(214, 828)),
        (usage(1000, None), True, Spend(1000, 2000)),  # more than the bound already
        (None, False, Spend(0, 0)),  # refused before any work
    ],
)
def test_what_is_not_known_stays_charged_in_full(said: Usage | None, billed: bool, spent: Spend) -> None:
    budget = Budget(BudgetConfig(usd=1), PRICE, Spend())
    reservation = budget.reserve(100, 50)
    assert reservation is not None
    assert reservation.most.cost == 2 * 164 + 10 * 50
    budget.settle(reservation, said, billed=billed, journaled=[said] if said else [])
    assert budget.spent == spent


def test_a_server_that_counts_more_than_the_bound_raises_it() -> None:
    budget = Budget(BudgetConfig(tokens=10**6), None, Spend())
    first = budget.reserve(10, 5)
    assert first is not None
    said = usage(10 + TEMPLATE_TOKENS + 30, 5)
    budget.settle(first, said, billed=True, journaled=[said])
    second = budget.reserve(10, 5)
    assert second is not None
    assert second.most.tokens == first.most.tokens + 30


def test_answers_in_flight_together_raise_the_margins_once() -> None:
    budget = Budget(BudgetConfig(tokens=10**6), None, Spend())
    out = [budget.reserve(10, 5) for _ in range(3)]
    for reservation, beyond in zip(out, (30, 50, 40), strict=True):
        assert reservation is not None
        said = usage(10 + TEMPLATE_TOKENS + beyond, 5 + 2 * beyond)  # a model that thinks beyond max_tokens
        budget.settle(reservation, said, billed=True, journaled=[said])
    later = budget.reserve(10, 5)
    assert later is not None
    assert later.most.tokens == 10 + TEMPLATE_TOKENS + 50 + 5 + 100


def test_a_budget_that_is_reached_says_what_was_spent_and_what_the_next_would_cost() -> None:
    budget = Budget(BudgetConfig(usd=1000 / PICO, tokens=300), PRICE, Spend(100, 400))
    assert budget.reserve(100, 50) is None  # 214 tokens, 828 pico-dollars
    reached = budget.reached()
    assert reached.exit_code == 3
    assert "100 of budget.tokens 300 spent" in str(reached)
    assert "the next request can cost up to $0.000000 and 214 tokens; raise the budget and run the same" in str(reached)


def test_failed_attempts_of_a_call_without_a_budget_count_once_there_is_one(tmp_path: Path) -> None:
    def script(asked: Asked) -> Behaviour:
        return answer("" if int(asked.text.split()[1]) < 8 else "fine")  # an empty answer is a failure; it costs 12

    run = RunDir(tmp_path / "run")
    with misbehaving(script) as server:
        assert generate(recipe_for(server, 10), run, quiet=True).failed == 8
        with pytest.raises(BudgetReached, match=r"120 of budget\.tokens 130 spent"):
            generate(recipe_for(server, 13, budget={"tokens": 130}), run, quiet=True)
    assert read_lineage(run)["generate"]["spent"]["tokens"] == 120


REQUEST = st.tuples(
    st.integers(0, 300), st.integers(1, 200), st.floats(0, 1), st.sampled_from(["said", "lost", "free"])
)


@given(st.integers(500, 20_000), st.lists(REQUEST, max_size=60), st.randoms())
def test_spent_and_reserved_never_pass_the_budget(most: int, requests: list[tuple[int, int, float, str]], rng) -> None:  # type: ignore[no-untyped-def]
    budget = Budget(BudgetConfig(usd=most / PICO), PRICE, Spend())
    out, spent = [], 0
    for body_bytes, max_tokens, used, end in requests:
        reservation = budget.reserve(body_bytes, max_tokens)
        if reservation is not None:
            out.append((reservation, max_tokens, used, end))
        assert spent + sum(one[0].most.cost for one in out) <= most
        while out and rng.random() < 0.5:
            reservation, most_tokens, share, how = out.pop(rng.randrange(len(out)))
            said = usage(int(reservation.prompt_tokens * share), int(most_tokens * share)) if how == "said" else None
            budget.settle(reservation, said, billed=how != "free", journaled=[said] if said else [])
            if said:
                spent += PRICE.cost(said.prompt_tokens or 0, said.completion_tokens or 0)
            elif how == "lost":
                spent += reservation.most.cost
            assert budget.spent.cost == spent <= most


def test_what_the_journal_does_not_say_is_kept_in_a_file_and_counted_again(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    recipe = recipe_for("http://127.0.0.1:1/v1", budget={"tokens": 1000})
    budget = Budget.open(recipe, run, Contents())
    lost, flying = budget.reserve(100, 50), budget.reserve(100, 50)
    assert lost is not None
    assert flying is not None
    budget.settle(lost, None, billed=True)
    killed = Budget.open(recipe, run, Contents(prompt_tokens=20, completion_tokens=30))
    assert killed.spent.tokens >= 2 * 214 + 50  # all that was in flight or lost, at least
    budget.settle(flying, usage(20, 30), billed=True, journaled=[usage(20, 30)])
    budget.save()  # and now it ends in order
    again = Budget.open(recipe, run, Contents(prompt_tokens=20, completion_tokens=30))
    assert again.spent.tokens == 214 + 50
    saved = json.loads((tmp_path / "spend.json").read_bytes())
    assert (saved["unsaid"]["tokens"], saved["prompt_tokens"], saved["completion_tokens"]) == (214, 20, 30)
    (tmp_path / "spend.json").write_text("{")
    with pytest.raises(DataError, match=r"spend\.json: .*without it the budget cannot be kept"):
        Budget.open(recipe, run, Contents())


def test_a_file_of_another_version_is_refused_and_not_read_as_nothing_spent(tmp_path: Path) -> None:
    (tmp_path / "spend.json").write_text('{"tokens": 1987, "cost": 2587500000}')
    with pytest.raises(DataError, match=r"spend\.json: .*field `tokens`; .*of another version, .*lower the budget"):
        Budget.open(recipe_for("http://127.0.0.1:1/v1", budget={"tokens": 1000}), RunDir(tmp_path), Contents())


def test_the_file_covers_what_is_in_flight_where_a_batch_was_cheaper_than_the_journal_says(tmp_path: Path) -> None:
    account = Account(unsaid=Spend(0, -10_000))
    budget = Budget(BudgetConfig(), PRICE, Spend(), file=tmp_path / "spend.json", account=account)
    reservation = budget.reserve(100, 50)
    assert reservation is not None
    assert read_account(tmp_path / "spend.json").unsaid.cost >= reservation.most.cost - 10_000


REMOTE = "https://api.example.com/v1"
MILLION = Contents(prompt_tokens=10**6, completion_tokens=10**6)


def priced(price: float | None, mode: str = "online", model: str = "m") -> Recipe:
    """A recipe whose teacher costs so much per million tokens, prompt and completion alike."""
    teacher = {"model": model, "base_url": REMOTE, "price": price and {"input": price, "output": price}}
    return recipe_for(REMOTE, teacher=teacher, generate={"mode": mode})


@pytest.mark.parametrize(
    "later",
    [priced(2.4, mode="batch"), priced(0.12, model="smaller"), priced(24.0), priced(None)],
    ids=["batch", "another model", "another price", "no price"],
)
def test_money_that_was_spent_stays_spent_whatever_changes(tmp_path: Path, later: Recipe) -> None:
    run = RunDir(tmp_path)
    Budget.open(priced(2.4), run, Contents())  # its answers reach the journal, and then it is killed
    assert Budget.open(later, run, MILLION).spent.cost == round(4.8 * PICO)
    twice = Contents(prompt_tokens=2 * 10**6, completion_tokens=2 * 10**6)
    price = price_of(later.teacher, later.generate.mode)
    new = price.cost(10**6, 10**6) if price else 0
    assert spent_in(run, twice).cost == round(4.8 * PICO) + new  # and what came later has its own price
    assert spent_in(run, twice).tokens == 4 * 10**6


def test_a_new_price_is_on_disk_before_anything_is_spent_at_it(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    Budget.open(priced(2.4), run, Contents())
    before = (tmp_path / "spend.json").read_bytes()
    assert spent_in(run, MILLION).cost == round(4.8 * PICO)
    assert (tmp_path / "spend.json").read_bytes() == before  # a dry run records nothing
    Budget.open(priced(1.0), run, MILLION)
    saved = json.loads((tmp_path / "spend.json").read_bytes())
    assert (saved["journal_cost"], saved["price"]) == (round(4.8 * PICO), [10**6, 10**6])


def test_a_line_taken_out_of_the_journal_gives_no_money_back(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    Budget.open(priced(2.4), run, Contents())
    Budget.open(priced(2.4), run, MILLION)
    assert spent_in(run, Contents(prompt_tokens=10**5, completion_tokens=10**5)).cost == round(4.8 * PICO)


def test_a_shared_budget_keeps_its_limits_and_counts_what_the_others_have_spent(tmp_path: Path) -> None:
    run, other = RunDir(tmp_path / "run"), RunDir(tmp_path / "other")
    limits = BudgetConfig(usd=5, tokens=3 * 10**6)
    for folder in (run, other):
        folder.path.mkdir()
        Budget.open(priced(2.4), folder, Contents())
    assert shared_budget(limits, [other]) == limits
    with Journal(other.completions, Completion) as journal:
        journal.append(Completion(**completion_fields("a", "text", usage=usage(10**6, 10**6))))
    shared = shared_budget(limits, [other])
    assert (shared.usd, shared.tokens) == (limits.usd, limits.tokens)
    assert spent_so_far(shared, run, Contents()) == Spend(2 * 10**6, round(4.8 * PICO))


def test_answers_that_came_while_no_price_was_known_stay_free(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    Budget.open(priced(None), run, Contents())
    assert Budget.open(priced(0.5), run, MILLION).spent == Spend(2 * 10**6, 0)
    more = Contents(prompt_tokens=2 * 10**6, completion_tokens=10**6)
    assert spent_in(run, more) == Spend(3 * 10**6, PICO // 2)


@pytest.mark.parametrize("processes", [1, 2])
def test_two_calls_at_two_prices_cost_what_each_cost_then(tmp_path: Path, processes: int) -> None:
    run = RunDir(tmp_path / "run")
    with misbehaving() as server:  # 7 and 5 tokens an answer

        def call(count: int, price: float | None) -> float | None:
            costs = price and {"input": price, "output": price}
            teacher = {"model": "stub", "base_url": server.url, "price": costs}
            recipe = recipe_for(server, 20, teacher=teacher)
            prompts = recipe.prompts.model_copy(update={"count": count})
            config = recipe.generate.model_copy(update={"processes": processes})
            return generate(
                recipe.model_copy(update={"prompts": prompts, "generate": config}), run, quiet=True
            ).cost_usd

        assert call(10, 10**6) == pytest.approx(120)
        assert call(20, 10**5) == pytest.approx(132)
        assert call(20, 10**3) == pytest.approx(132)
        assert call(20, None) == pytest.approx(132)  # no price is known now, but the money is spent


def test_processes_divide_what_is_left(tmp_path: Path) -> None:
    recipe = recipe_for("http://127.0.0.1:1/v1", budget={"tokens": 1000})
    found = Contents(prompt_tokens=300, completion_tokens=100)
    shares = [Budget.open(recipe, RunDir(tmp_path), found, Partition(part, 2)) for part in range(2)]
    for budget in shares:
        assert budget.reserve(100, 50) is not None  # 214 of 300
        assert budget.reserve(100, 50) is None


def test_a_dry_run_counts_and_sends_nothing(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with misbehaving(lambda asked: answer()) as server:
        teacher = {"model": "stub", "base_url": server.url, "price": {"input": 1.0, "output": 2.0}}
        recipe = recipe_for(server, 30, teacher=teacher, sampling={"max_tokens": 100}, budget={"usd": 0.005})
        fresh = dry_run(recipe, run)
        assert not run.path.exists()
        few = recipe.model_copy(update={"prompts": recipe.prompts.model_copy(update={"count": 25})})
        generate(few, run, quiet=True)
        asked = len(server.asked)
        rest = dry_run(recipe, run)
        assert len(server.asked) == asked == 25
    assert (fresh.requests, fresh.to_ask, fresh.counted, fresh.completion_tokens) == (30, 30, False, 3000)
    assert fresh.cost == pytest.approx((fresh.prompt_tokens + 2 * 3000) / 10**6)
    assert fresh.expected_cost is None
    assert (rest.answered, rest.to_ask) == (25, 5)
    assert rest.expected_cost == pytest.approx(5 * (7 + 2 * 5) / 10**6)
    assert rest.spent == pytest.approx(25 * (7 + 2 * 5) / 10**6)
    assert "budget.usd 0.005 may end the run early (exit 3)" in "\n".join(describe(recipe, fresh))
    assert "budget.usd 0.005 is enough for all" in "\n".join(describe(recipe, rest))
