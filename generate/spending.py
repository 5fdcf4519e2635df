"""What a run has spent: `spend.json`, which no later change of mode, model or price re-prices.

Each call begins by recording what all answers in the journal have cost until now, and the price of the answers to come
(`Account`). The record is on disk before the first request goes out, so a `kill -9` loses nothing of it: the next call
adds the journal's new answers at the price that they had. `spend.json` and, with several processes, `spend-<n>.json`
also hold what the journal does not say. Amounts are whole pico-dollars, so sums are exact.
"""

from pathlib import Path

import msgspec

from generate.journal import Contents
from generate.prices import Price, price_of
from pipeline.errors import DataError, RecipeError
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir, replacing


class Spend(msgspec.Struct, frozen=True):
    """Tokens and pico-dollars."""

    tokens: int = 0
    cost: int = 0

    def __add__(self, other: "Spend") -> "Spend":
        return Spend(self.tokens + other.tokens, self.cost + other.cost)

    def __sub__(self, other: "Spend") -> "Spend":
        return Spend(self.tokens - other.tokens, self.cost - other.cost)


class Account(msgspec.Struct, frozen=True, omit_defaults=True):
    """A spend file: what the journal does not say, and in `spend.json` also what the journal has cost."""

    unsaid: Spend = Spend()  # of attempts without an answer, and of requests in flight
    journal_cost: int = 0  # of the journal's answers when a call began
    prompt_tokens: int = 0  # theirs
    completion_tokens: int = 0  # theirs
    price: Price | None = None  # of the answers that came later; None: not known, or a server of one's own


def spent_so_far(recipe: Recipe, run: RunDir, found: Contents) -> Spend:
    """What all calls of a run have spent, by its journal and its spend files. Writes nothing; raises as Budget.open."""
    account = account_of(run, found, known_price(recipe))
    unsaid = (read_account(file).unsaid for file in run.path.glob("spend*.json"))
    return sum(unsaid, Spend(found.prompt_tokens + found.completion_tokens, account.journal_cost))


def account_of(run: RunDir, found: Contents, price: Price | None) -> Account:
    """spend.json as a call finds it, carried on to now: the whole journal has its cost, and `price` is for the rest."""
    before = read_account(run.path / "spend.json")
    cost = before.journal_cost
    if before.price:
        cost += before.price.cost(
            max(found.prompt_tokens - before.prompt_tokens, 0),
            max(found.completion_tokens - before.completion_tokens, 0),
        )
    return Account(before.unsaid, cost, found.prompt_tokens, found.completion_tokens, price)


def known_price(recipe: Recipe) -> Price | None:
    """The price of the teacher's tokens. Raises RecipeError if it is not known and budget.usd needs it."""
    price = price_of(recipe.teacher, recipe.generate.mode)
    if recipe.budget.usd is not None and price is None:
        raise RecipeError(
            f"budget.usd is {recipe.budget.usd:g}, but the price of {recipe.teacher.model} is not known: set "
            "teacher.price: {input: …, output: …}, in USD per million tokens"
        )
    return price


def read_account(file: Path) -> Account:
    """A spend file; empty if there is none. Raises DataError."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Account)
    except FileNotFoundError:
        return Account()
    except msgspec.DecodeError as error:
        raise DataError(f"{file}: {error}; without it the budget cannot be kept") from None


def write_account(file: Path, account: Account) -> None:
    """Replaces a spend file."""
    with replacing(file) as out:
        out.write(msgspec.json.encode(account) + b"\n")
