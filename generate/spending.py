"""What a run has spent: `spend.json`, which no later change of mode, model or price re-prices.

Each call begins by recording what all answers in the journal have cost until now, and the price of the answers to come
(`Account`). The record is on disk before the first request goes out, so a `kill -9` loses nothing of it: the next call
adds the journal's new answers at the price that they had. `spend.json` and, with several processes, `spend-<n>.json`
also hold what the journal does not say: attempts without an answer, and requests in flight. Amounts are whole
pico-dollars, so sums are exact.
"""

from pathlib import Path

import msgspec

from generate.journal import Contents
from generate.prices import PICO, Price, price_of
from pipeline.errors import DataError, RecipeError
from pipeline.lineage import read_lineage
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir, replacing


class Spend(msgspec.Struct, frozen=True):
    """Tokens and pico-dollars."""

    tokens: int = 0
    cost: int = 0

    def plus(self, other: "Spend", sign: int = 1) -> "Spend":
        return Spend(self.tokens + sign * other.tokens, self.cost + sign * other.cost)


class Account(msgspec.Struct, frozen=True, omit_defaults=True):
    """A spend file: what the journal does not say, and in `spend.json` also what the journal has cost.

    A file of an earlier version has only `tokens` and `cost`.
    """

    tokens: int = 0  # of attempts without an answer, and of requests in flight
    cost: int = 0
    journal_cost: int | None = None  # of the journal's answers when a call began
    prompt_tokens: int = 0  # theirs
    completion_tokens: int = 0  # theirs
    price: Price | None = None  # of the answers that came later; None: not known, or a server of one's own

    @property
    def unsaid(self) -> Spend:
        """What the journal does not say."""
        return Spend(self.tokens, self.cost)

    def with_unsaid(self, unsaid: Spend) -> "Account":
        """The same account with another such amount."""
        return msgspec.structs.replace(self, tokens=unsaid.tokens, cost=unsaid.cost)


def spent_so_far(recipe: Recipe, run: RunDir, found: Contents) -> Spend:
    """What all calls of a run have spent, by its journal and its spend files. Writes nothing; raises as Budget.open."""
    account = account_of(run, found, known_price(recipe))
    spent = Spend(found.prompt_tokens + found.completion_tokens, account.journal_cost or 0)
    for file in run.path.glob("spend*.json"):
        spent = spent.plus(read_account(file).unsaid)
    return spent


def account_of(run: RunDir, found: Contents, price: Price | None) -> Account:
    """spend.json as a call finds it, carried on to now: the whole journal has its cost, and `price` is for the rest."""
    before = read_account(run.path / "spend.json")
    if before.journal_cost is None:
        before = _earlier_version(run, before, price)
    cost = before.journal_cost or 0
    if before.price:
        cost += before.price.cost(
            max(found.prompt_tokens - before.prompt_tokens, 0),
            max(found.completion_tokens - before.completion_tokens, 0),
        )
    return msgspec.structs.replace(
        before,
        journal_cost=cost,
        prompt_tokens=found.prompt_tokens,
        completion_tokens=found.completion_tokens,
        price=price,
    )


def _earlier_version(run: RunDir, file: Account, price: Price | None) -> Account:
    """The account of a run that has none. lineage.json says what its last whole call had spent, at the price of then.

    Attempts without an answer are in that sum and in the spend files, so they count twice rather than not at all.
    Answers that lineage.json does not know, of a call that was killed, have today's price.
    """
    known = read_lineage(run).get("generate", {})
    return msgspec.structs.replace(
        file,
        journal_cost=round((known.get("spent", {}).get("usd") or 0) * PICO),
        prompt_tokens=known.get("prompt_tokens", 0),
        completion_tokens=known.get("completion_tokens", 0),
        price=price,
    )


def known_price(recipe: Recipe) -> Price | None:
    price = price_of(recipe.teacher, recipe.generate.mode)
    if recipe.budget.usd is not None and price is None:
        raise RecipeError(
            f"budget.usd is {recipe.budget.usd:g}, but the price of {recipe.teacher.model} is not known: set "
            "teacher.price: {input: …, output: …}, in USD per million tokens"
        )
    return price


def read_account(file: Path) -> Account:
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
