"""What a run may spend: a hard limit in USD, in tokens, or both. What it has spent is in generate.spending.

A request that goes out reserves the most that it can cost: one token for each byte of its body (no byte-level tokenizer
makes more), what a chat template adds, and `max_tokens`. The answer's `usage` settles it. An attempt that the server
may have worked on, and that reports no `usage` (a timeout, a cut body), stays charged in full. So spending and requests
in flight together never pass the budget, whatever the timing. One thing can pass it: a server that counts more tokens
than were reserved (some models think beyond `max_tokens`). From then on every request reserves that much more.
"""

from pathlib import Path
from typing import NamedTuple

from generate.jobs import WHOLE, Partition
from generate.journal import Contents
from generate.prices import PICO, Price
from generate.spending import (
    Account,
    Spend,
    account_of,
    known_price,
    read_account,
    spent_so_far,
    write_account,
)
from generate.tokens import bound
from pipeline.errors import BudgetReached
from pipeline.recipe import BudgetConfig, Recipe
from pipeline.records import Usage
from pipeline.rundir import RunDir

AHEAD = 150  # percent of what is in flight that the file covers, so that it is written seldom


class Reservation(NamedTuple):
    """The most that a request in flight can cost: tokens and pico-dollars."""

    prompt_tokens: int
    tokens: int
    cost: int
    margins: tuple[int, int] = (0, 0)  # included in `tokens`: beyond the prompt's bound, and beyond max_tokens


FREE = Reservation(0, 0, 0)


class Budget:
    """The budget of one process of a run."""

    def __init__(
        self,
        config: BudgetConfig,
        price: Price | None,
        spent: Spend,
        *,
        file: Path | None = None,
        partition: Partition = WHOLE,
    ) -> None:
        """`spent` is what earlier calls spent in all; each partition has its part of the rest. `file`: its account."""
        self._config, self._price, self._before, self._file = config, price, spent, file
        self._account = read_account(file) if file else Account()
        self._tokens = None if config.tokens is None else max(config.tokens - spent.tokens, 0) // partition.of
        self._cost = None if config.usd is None else max(round(config.usd * PICO) - spent.cost, 0) // partition.of
        self._counts = price is not None or config.tokens is not None
        self._margins = 0, 0  # tokens that a prompt has had beyond the bound, and an answer beyond max_tokens
        self._refused = FREE  # what the last request that did not fit could have cost
        self._used, self._reserved = Spend(), Spend()  # of this call: settled, and in flight
        self._unsaid = self._account.unsaid

    @classmethod
    def open(cls, recipe: Recipe, run: RunDir, found: Contents, partition: Partition = WHOLE) -> "Budget":
        """The budget of a run whose journal holds `found`. Records in `spend.json` what that has cost.

        Raises RecipeError if budget.usd is set and the price is not known, DataError if a spend file cannot be read.
        """
        price, spent, whole = known_price(recipe), spent_so_far(recipe, run, found), partition.of == 1
        file = run.path / ("spend.json" if whole else f"spend-{partition.part}.json")
        budget = cls(recipe.budget, price, spent, file=file, partition=partition)
        if whole and (budget._counts or file.exists()):  # one of several processes leaves that to the first
            budget._write(account_of(run, found, price))
        return budget

    def reserve(self, body_bytes: int, max_tokens: int) -> Reservation | None:
        """Takes the most that a request can cost; None if that could pass the budget."""
        if not self._counts:
            return FREE
        prompt_tokens = bound(body_bytes) + self._margins[0]
        most = _spend(self._price, prompt_tokens, max_tokens + self._margins[1])
        reservation = Reservation(prompt_tokens, most.tokens, most.cost, self._margins)
        total = self._used.plus(self._reserved).plus(most)
        too_many = self._tokens is not None and total.tokens > self._tokens
        if too_many or (self._cost is not None and total.cost > self._cost):
            self._refused = reservation
            return None
        self._reserved = self._reserved.plus(most)
        self._cover()
        return reservation

    def settle(self, reservation: Reservation, usage: Usage | None, *, billed: bool, journaled: bool) -> None:
        """Replaces a reservation by what the attempt really cost; without a full `usage` it stays charged in full.

        `journaled` is whether completions.jsonl holds this usage.
        """
        if not self._counts:
            return
        self._reserved = self._reserved.plus(Spend(reservation.tokens, reservation.cost), -1)
        if not billed:
            return
        if usage is None or usage.prompt_tokens is None or usage.completion_tokens is None:
            said = Spend() if usage is None or not journaled else _usage(self._price, usage)
            used = Spend(max(reservation.tokens, said.tokens), max(reservation.cost, said.cost))
        else:
            used = _usage(self._price, usage)
            said = used if journaled else Spend()
            self._learn(reservation, usage.prompt_tokens, usage.completion_tokens)
        self._used = self._used.plus(used)
        self._unsaid = self._unsaid.plus(used).plus(said, -1)

    def _learn(self, reservation: Reservation, prompt_tokens: int, completion_tokens: int) -> None:
        """Raises the margins to what this answer would have needed."""
        most_prompt, most_completion = reservation.prompt_tokens, reservation.tokens - reservation.prompt_tokens
        prompt = reservation.margins[0] + prompt_tokens - most_prompt
        completion = reservation.margins[1] + completion_tokens - most_completion
        self._margins = max(self._margins[0], prompt), max(self._margins[1], completion)

    @property
    def spent(self) -> Spend:
        """Of all calls, without what is in flight."""
        return self._before.plus(self._used)

    def reached(self) -> BudgetReached:
        """The error for a budget that the next request could pass."""
        config, spent, refused = self._config, self.spent, self._refused
        parts, most = [], []
        if config.usd is not None:
            parts.append(f"${spent.cost / PICO:.6f} of budget.usd {config.usd:g}")
            most.append(f"${refused.cost / PICO:.6f}")
        if config.tokens is not None:
            parts.append(f"{spent.tokens:,} of budget.tokens {config.tokens:,}")
            most.append(f"{refused.tokens:,} tokens")
        return BudgetReached(
            f"{' and '.join(parts)} spent, and the next request can cost up to {' and '.join(most)}; "
            "raise the budget and run the same command again"
        )

    def save(self) -> None:
        """Writes exactly what the journal does not say: the run has ended, or nothing is in flight."""
        self._write_unsaid(self._unsaid.plus(self._reserved))

    def _cover(self) -> None:
        """Keeps the file at or above what a run that is killed now may have cost."""
        most, saved = self._unsaid.plus(self._reserved), self._account.unsaid
        if most.tokens > saved.tokens or most.cost > saved.cost:
            self._write_unsaid(Spend(most.tokens * AHEAD // 100, most.cost * AHEAD // 100))

    def _write_unsaid(self, unsaid: Spend) -> None:
        if self._counts:
            self._write(self._account.with_unsaid(unsaid))

    def _write(self, account: Account) -> None:
        if self._file and account != self._account:
            write_account(self._file, account)
        self._account = account


def _spend(price: Price | None, prompt_tokens: int, completion_tokens: int) -> Spend:
    return Spend(prompt_tokens + completion_tokens, price.cost(prompt_tokens, completion_tokens) if price else 0)


def _usage(price: Price | None, usage: Usage) -> Spend:
    return _spend(price, usage.prompt_tokens or 0, usage.completion_tokens or 0)
