"""What a run may spend, a hard limit in USD, in tokens, or both; and what it has spent, in `spend.json`.

A request that goes out reserves the most that it can cost: one token for each byte of its body (no byte-level tokenizer
makes more), what a chat template adds, and `max_tokens` for each answer. The reply's `usage` settles it. An attempt
that the server may have worked on, and that reports no `usage` (a timeout, a cut body), stays charged in full. So
spending and requests in flight together never pass the budget, whatever the timing. One thing can pass it: a server
that counts more tokens than were reserved (some models think beyond `max_tokens`). From then on every request reserves
that much more.

Each call begins by recording what all answers in the journal have cost until now, and the price of the answers to come
(`Account`). The record is on disk before the first request goes out, so a `kill -9` loses nothing of it: the next call
adds the journal's new answers at the price that they had, whatever mode, model and price are now. `spend.json` and,
with several processes, `spend-<n>.json` also hold what the journal does not say; `batches/` does so of batches.
Amounts are whole pico-dollars.
"""

from collections.abc import Iterable, Sequence
from math import inf
from pathlib import Path
from typing import NamedTuple

import msgspec

from generate.batch_files import Chunk, chunks_in, under_way
from generate.jobs import WHOLE, Partition
from generate.journal import Contents, read_journal
from generate.prices import PICO, Price, dearer_by, price_of
from generate.tokens import bound
from pipeline.errors import BudgetReached, RecipeError
from pipeline.recipe import Recipe
from pipeline.records import Completion, Usage, read_json
from pipeline.rundir import RunDir, write_json
from pipeline.section import BudgetConfig

FIX = (
    "without it the budget cannot be kept; if it is of another version, finish the run with that one, or move the file "
    "away and lower the budget by what is spent"
)
AHEAD = 110  # percent of what is in flight that the file covers: some dozens of writes, not one for each request


class Spend(msgspec.Struct, frozen=True):
    """Tokens and pico-dollars."""

    tokens: int = 0
    cost: int = 0

    @classmethod
    def of(cls, prompt_tokens: int, completion_tokens: int, price: Price | None) -> "Spend":
        """What so many tokens cost: nothing, where no price is known."""
        return cls(prompt_tokens + completion_tokens, price.cost(prompt_tokens, completion_tokens) if price else 0)

    def __add__(self, other: "Spend") -> "Spend":
        return Spend(self.tokens + other.tokens, self.cost + other.cost)

    def __sub__(self, other: "Spend") -> "Spend":
        return Spend(self.tokens - other.tokens, self.cost - other.cost)


class Account(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A spend file: what the journal does not say, and in `spend.json` also what the journal has cost."""

    unsaid: Spend = Spend()  # of attempts without an answer, and of requests in flight
    journal_cost: int = 0  # of the journal's answers when a call began
    prompt_tokens: int = 0  # theirs
    completion_tokens: int = 0  # theirs
    price: Price | None = None  # of the answers that came later; None: not known, or a server of one's own


class SharedBudget(BudgetConfig):
    """A budget that several runs share, as one of them has it: it knows what the others have spent."""

    others_tokens: int = 0
    others_cost: int = 0  # pico-dollars


class Reservation(NamedTuple):
    """The most that a request in flight can cost."""

    prompt_tokens: int = 0  # by the bytes of its body
    max_tokens: int = 0  # of each answer
    answers: int = 1
    most: Spend = Spend()  # of these, and of what earlier answers had beyond such bounds
    price: Price | None = None  # if it is not the budget's: that of a batch when it was made


class Budget:
    """The budget of one process of a run."""

    def __init__(
        self,
        config: BudgetConfig,
        price: Price | None,
        spent: Spend,
        *,
        file: Path | None = None,
        account: Account | None = None,
        partition: Partition = WHOLE,
    ) -> None:
        """`spent` is what earlier calls spent in all; each partition has its part of the rest.

        `account` is what `file` holds.
        """
        self._config, self._price, self._before, self._file = config, price, spent, file
        self._account = account or Account()
        self._most_tokens = inf if config.tokens is None else max(config.tokens - spent.tokens, 0) // partition.of
        self._most_cost = inf if config.usd is None else max(round(config.usd * PICO) - spent.cost, 0) // partition.of
        self._prompt_margin = self._answer_margin = 0  # tokens that one has had beyond the bound, or beyond max_tokens
        self._refused = Spend()  # what the last request that did not fit could have cost
        self.used, self._reserved = Spend(), Spend()  # of this call: settled, and in flight
        self.unsaid = self._account.unsaid  # what is spent and the journal does not say; without what is in flight

    @classmethod
    def open(cls, recipe: Recipe, run: RunDir, found: Contents, partition: Partition = WHOLE) -> "Budget":
        """The budget of a run whose journal holds `found`. Records in `spend.json` what that has cost.

        Raises RecipeError if budget.usd is set and the price is not known, DataError if a spend file cannot be read.
        """
        price, spent = known_price(recipe), spent_so_far(recipe.budget, run, found)
        if partition.of > 1:  # the first process keeps the account of the run
            file = run.path / f"spend-{partition.part}.json"
            account = read_account(file)
        else:
            file, account = run.path / "spend.json", account_of(run, found, price)
            write_json(file, account)
        return cls(recipe.budget, price, spent, file=file, account=account, partition=partition)

    def reserve(self, body_bytes: int, max_tokens: int, answers: int = 1) -> Reservation | None:
        """Takes the most that a request for so many answers can cost; None if that could pass the budget."""
        prompt_tokens = bound(body_bytes)
        completion_tokens = answers * (max_tokens + self._answer_margin)
        most = Spend.of(prompt_tokens + self._prompt_margin, completion_tokens, self._price)
        total = self.used + self._reserved + most
        if total.tokens > self._most_tokens or total.cost > self._most_cost:
            self._refused = most
            return None
        self._reserved += most
        self._cover()
        return Reservation(prompt_tokens, max_tokens, answers, most)

    def hold(self, most: Spend) -> Reservation:
        """Reserves for what is under way already, whether or not the budget covers it."""
        self._reserved += most
        return Reservation(most=most)

    def settle(
        self, reservation: Reservation, usage: Usage | None, *, billed: bool, journaled: Sequence[Usage] = ()
    ) -> None:
        """Replaces a reservation by what the attempt really cost; without a full `usage` it stays charged in full.

        `journaled` is what completions.jsonl holds of this usage: the parts of the answers.
        """
        self._reserved -= reservation.most
        if not billed:
            return
        usage, most, price = usage or Usage(), reservation.most, reservation.price or self._price
        counted = Spend.of(usage.prompt_tokens or 0, usage.completion_tokens or 0, price)
        if usage.prompt_tokens is None or usage.completion_tokens is None:
            used = Spend(max(most.tokens, counted.tokens), max(most.cost, counted.cost))
        else:
            used = counted
            of_an_answer = -(-usage.completion_tokens // reservation.answers)  # rounded up
            self._prompt_margin = max(self._prompt_margin, usage.prompt_tokens - reservation.prompt_tokens)
            self._answer_margin = max(self._answer_margin, of_an_answer - reservation.max_tokens)
        self.used += used
        said = (Spend.of(part.prompt_tokens or 0, part.completion_tokens or 0, self._price) for part in journaled)
        self.unsaid += used - sum(said, Spend())

    def limit_to(self, most: Spend) -> None:
        """This call may spend so much in all: what a lease of a larger budget allows (scale.request_leases)."""
        self._most_tokens = inf if self._config.tokens is None else most.tokens
        self._most_cost = inf if self._config.usd is None else most.cost

    @property
    def spent(self) -> Spend:
        """Of all calls, without what is in flight."""
        return self._before + self.used

    def reached(self) -> BudgetReached:
        """The error for a budget that the next request could pass."""
        refused, most = self._refused, []
        if self._config.usd is not None:
            most.append(f"${refused.cost / PICO:.6f}")
        if self._config.tokens is not None:
            most.append(f"{refused.tokens:,} tokens")
        return BudgetReached(
            f"{spent_of(self._config, self.spent)} spent, and the next request can cost up to {' and '.join(most)}; "
            "raise the budget and run the same command again"
        )

    def save(self) -> None:
        """Writes exactly what the journal does not say: the run has ended, or nothing is in flight."""
        self._write(self.unsaid + self._reserved)

    def _cover(self) -> None:
        """Keeps the file at or above what a run that is killed now may have cost."""
        most, saved = self.unsaid + self._reserved, self._account.unsaid
        if most.tokens > saved.tokens or most.cost > saved.cost:
            ahead = Spend(self._reserved.tokens * AHEAD // 100, self._reserved.cost * AHEAD // 100)
            self._write(self.unsaid + ahead)

    def _write(self, unsaid: Spend) -> None:
        if self._file and unsaid != self._account.unsaid:
            self._account = msgspec.structs.replace(self._account, unsaid=unsaid)
            write_json(self._file, self._account)


def spent_of(budget: BudgetConfig, spent: Spend) -> str:
    """How much of each limit is spent, in words."""
    parts = [f"${spent.cost / PICO:.6f} of budget.usd {budget.usd:g}"] if budget.usd is not None else []
    parts += [f"{spent.tokens:,} of budget.tokens {budget.tokens:,}"] if budget.tokens is not None else []
    return " and ".join(parts)


def spent_so_far(budget: BudgetConfig, run: RunDir, found: Contents) -> Spend:
    """What is spent of a budget: by all calls of the run, and by the runs that share it.

    Writes nothing. Raises DataError if a spend file cannot be read.
    """
    spent = spent_in(run, found)
    return spent + Spend(budget.others_tokens, budget.others_cost) if isinstance(budget, SharedBudget) else spent


def spent_in(run: RunDir, found: Contents) -> Spend:
    """What all calls of a run have spent, by its journal and its spend files, at the prices of their time.

    Batches under way count as the most that they can cost.
    """
    account = account_of(run, found, None)
    unsaid = [read_account(file).unsaid for file in run.path.glob("spend*.json")]
    unsaid += [Spend(chunk.unsaid_tokens, chunk.unsaid_cost) for chunk in chunks_in(run.path / "batches")]
    journaled = Spend(found.prompt_tokens + found.completion_tokens, account.journal_cost)
    return sum(unsaid, journaled) + spend_under_way(run)


def spend_under_way(run: RunDir) -> Spend:
    """The most that the run's batches under way can cost. Raises DataError."""
    return sum(map(most_of_batch, under_way(run.path / "batches")), Spend())


def most_of_batch(chunk: Chunk) -> Spend:
    """The most that a batch can cost, at the price that its file was written with."""
    return Spend.of(chunk.prompt_tokens, chunk.completion_tokens, chunk.price)


def spent_by(runs: Iterable[RunDir]) -> Spend:
    """What these runs have spent. By their journals: a run that was killed has no lineage."""
    return sum((spent_in(run, read_journal(run.completions, Completion)) for run in runs), Spend())


def shared_budget(budget: BudgetConfig, others: Iterable[RunDir]) -> BudgetConfig:
    """A budget that other runs share: its limits as they are, and what those have spent."""
    spent = spent_by(others)
    if spent == Spend():
        return budget
    return SharedBudget(usd=budget.usd, tokens=budget.tokens, others_tokens=spent.tokens, others_cost=spent.cost)


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
    dearer = None if recipe.teacher.price else dearer_by(recipe.sampling.extra)
    if recipe.budget.usd is not None and (price is None or dearer):
        known = f"only known without sampling.extra.{dearer}" if price else "not known"
        raise RecipeError(
            f"budget.usd is {recipe.budget.usd:g}, but the price of {recipe.teacher.model} is {known}: set "
            f"{recipe.teacher.section}.price: {{input: …, output: …}}, in USD per million tokens"
        )
    return price


def read_account(file: Path) -> Account:
    """A spend file; empty if there is none. Raises DataError."""
    return read_json(file, Account, FIX) or Account()
