"""What a run may spend, and what it has: a hard limit in USD, in tokens, or both.

A request that goes out reserves the most that it can cost: a token for each byte of its body (no byte-level tokenizer
makes more), what a chat template adds, and `max_tokens`. The answer's `usage` settles it. An attempt that may have been
worked for and says nothing of it (a timeout, a cut body, no `usage`) stays charged in full. So what is spent and what
is in flight never pass the budget together, whatever the timing. Only a server that counts more than was reserved (some
think beyond `max_tokens`) can: from then on every request reserves that much more. Reads and writes `spend.json` in the
run directory: what the journals do not know, so that a killed run's requests in flight count, too.

Money is counted in whole pico-dollars: sums are exact.
"""

from pathlib import Path
from typing import NamedTuple

import msgspec

from generate.jobs import WHOLE, Partition
from generate.journal import Contents
from generate.prices import PICO, Price, price_of
from generate.tokens import bound
from pipeline.errors import BudgetReached, DataError, RecipeError
from pipeline.recipe import BudgetConfig, Recipe
from pipeline.records import Usage
from pipeline.rundir import RunDir, replacing

ROOM = 150  # percent: how far ahead the file is of what is in flight


class Reservation(NamedTuple):
    """What a request in flight can cost at most: tokens, and pico-dollars."""

    prompt_tokens: int
    tokens: int
    cost: int
    margins: tuple[int, int] = (0, 0)  # of it: beyond the prompt's bound, and beyond max_tokens


class Spend(msgspec.Struct, frozen=True):
    """Tokens, and pico-dollars."""

    tokens: int = 0
    cost: int = 0

    def plus(self, other: "Spend | Reservation", sign: int = 1) -> "Spend":
        return Spend(self.tokens + sign * other.tokens, self.cost + sign * other.cost)


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
        share: Partition = WHOLE,
    ) -> None:
        """`spent` is what earlier calls spent in all; what is left of the budget is divided by `share`."""
        self._config, self._price, self._file, self._before = config, price, file, spent
        self._tokens = None if config.tokens is None else max(config.tokens - spent.tokens, 0) // share.of
        self._cost = None if config.usd is None else max(round(config.usd * PICO) - spent.cost, 0) // share.of
        self._counts = price is not None or config.tokens is not None
        self._margins = 0, 0  # tokens that a prompt has had beyond the bound, and an answer beyond max_tokens
        self._refused = FREE  # what the last request that did not fit could have cost
        self._used, self._reserved = Spend(), Spend()  # of this call: settled, and in flight
        self._unsaid = _read(file) if file else Spend()  # of this file, of all calls: what the journals do not say
        self._saved = self._unsaid

    @classmethod
    def open(cls, recipe: Recipe, run: RunDir, found: Contents, share: Partition = WHOLE) -> "Budget":
        """The budget of a run that has spent what its journal and its `spend*.json` say.

        Raises RecipeError where the price is not known, DataError where a file is no spend.
        """
        config, price = recipe.budget, price_of(recipe.teacher, recipe.generate.mode)
        if config.usd is not None and price is None:
            raise RecipeError(
                f"budget.usd is {config.usd:g}, but what {recipe.teacher.model} costs is not known: set "
                "teacher.price: {input: …, output: …}, in USD a million tokens"
            )
        spent = _spend(price, found.prompt_tokens, found.completion_tokens)
        for file in sorted(run.path.glob("spend*.json")):
            spent = spent.plus(_read(file))
        name = "spend.json" if share.of == 1 else f"spend-{share.part}.json"
        return cls(config, price, spent, file=run.path / name, share=share)

    def reserve(self, body_bytes: int, max_tokens: int) -> Reservation | None:
        """Takes what a request can cost at most; None if that could pass the budget."""
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
        self._promise()
        return reservation

    def settle(self, reservation: Reservation, usage: Usage | None, *, billed: bool, journaled: bool) -> None:
        """Puts what an attempt really cost in place of what it reserved: in full where that is not known.

        `journaled` is whether completions.jsonl says it.
        """
        if not self._counts:
            return
        self._reserved = self._reserved.plus(reservation, -1)
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
        beyond = (
            prompt_tokens - reservation.prompt_tokens,
            completion_tokens - (reservation.tokens - reservation.prompt_tokens),
        )
        prompt, completion = (had + more for had, more in zip(reservation.margins, beyond, strict=True))
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
        """Writes what the journals do not say, to the token: the run has ended, or nothing is in flight."""
        self._write(self._unsaid.plus(self._reserved))

    def _promise(self) -> None:
        """Keeps the file at or above what a run that is killed now may have cost; with some room, to write seldom."""
        open_ = self._unsaid.plus(self._reserved)
        if open_.tokens > self._saved.tokens or open_.cost > self._saved.cost:
            self._write(Spend(open_.tokens * ROOM // 100, open_.cost * ROOM // 100))

    def _write(self, unsaid: Spend) -> None:
        if self._file and self._counts and unsaid != self._saved:
            with replacing(self._file) as file:
                file.write(msgspec.json.encode(unsaid) + b"\n")
            self._saved = unsaid


def _spend(price: Price | None, prompt_tokens: int, completion_tokens: int) -> Spend:
    return Spend(prompt_tokens + completion_tokens, price.cost(prompt_tokens, completion_tokens) if price else 0)


def _usage(price: Price | None, usage: Usage) -> Spend:
    return _spend(price, usage.prompt_tokens or 0, usage.completion_tokens or 0)


def _read(file: Path) -> Spend:
    try:
        return msgspec.json.decode(file.read_bytes(), type=Spend)
    except FileNotFoundError:
        return Spend()
    except msgspec.DecodeError as error:
        raise DataError(f"{file}: {error}; without it the budget cannot be kept") from None
