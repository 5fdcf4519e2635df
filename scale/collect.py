"""The driver's end of the store: what the workers upload goes into the run's own journals, and the state is saved.

Reads parts and accounts; writes the journals, leases.json, and what the journals do not say of the money. A part is
removed when its rows are in the journals, on disk, and the state that counts them is saved.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

import msgspec

from generate.budget import Account, Spend, known_price, spent_so_far
from generate.context import Run
from generate.dialect import Dialect
from generate.idset import IdSet
from generate.prices import PICO, Price
from generate.tokens import bound
from pipeline.records import Completion, Failure
from pipeline.rundir import write_json
from scale.parts import part_name, part_names, read_part
from scale.request_leases import Claim, Item, Leases, LeaseState
from scale.storage import Store, TryAgain, read_record, retried
from scale.worker import account_name

LEASES_FILE = "leases.json"
SPEND_FILE = "spend-cluster.json"
NEEDED = "without it the budget cannot be kept"
AGAIN_S = 1.0  # between two calls of a store that is away

Result = TypeVar("Result")


class Collector:
    """What one call has leased, read and saved."""

    def __init__(self, run: Run, store: Store, lease_s: float) -> None:
        self._run, self._store, self._price = run, store, known_price(run.recipe)
        self._counts = self._price is not None or run.recipe.budget.tokens is not None
        before = read_record(store, LEASES_FILE, LeaseState, NEEDED)
        self.state = before or LeaseState()
        self._unsaved = _answers_since(run.completions.path, before.journal_bytes) if before else IdSet()
        self._counted = IdSet()  # of these, each once: a part may be there twice
        self._read: list[str] = []  # parts whose rows are in the journals, and accounts of ended workers
        self._collecting: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._saving, self._changes, self._saved = asyncio.Lock(), 0, 0
        self._patience_s, self._away = lease_s / 2, False  # after a whole lease without a word a worker ends
        budget = run.recipe.budget
        self.leases = Leases(
            _items_of(run, self._price),
            self.state,
            run.left.answered,
            tokens=budget.tokens,
            cost=None if budget.usd is None else round(budget.usd * PICO),
            before=self._spent_before(),
            lease_s=lease_s,
        )

    def _spent_before(self) -> Spend:
        """What is spent of the budget beside what the state charges: by the run, and by those that share its budget."""
        if self._counts:
            write_json(self._run.dir.path / SPEND_FILE, Account(self.state.unsaid))
        spent = spent_so_far(self._run.recipe.budget, self._run.dir, self._run.completions.found)
        return spent - self.state.charged

    def drop_leftovers(self) -> None:
        """Removes, with the next `save`, what is left of workers that the state does not charge.

        No lease goes out before the state is saved: so they have ended, and all that they uploaded was read.
        """
        for name in [*part_names(self._store, "completions"), *part_names(self._store, "failures")]:
            worker = name.rpartition("/")[2].rpartition("-")[0]
            if worker not in self.state.accounts:
                self._read += [name, account_name(worker)]
                self.changed()

    def close(self, name: str) -> None:
        """A worker has ended in order, and all that it uploaded was read."""
        self.leases.close(name)
        self._read.append(account_name(name))
        self.changed()

    def changed(self) -> None:
        """The state is another: the next `save` writes it."""
        self._changes += 1

    async def collect(self, name: str) -> None:
        """Reads what a worker has uploaded since the last time: its parts into the journals, then its account."""
        account = self.state.accounts.get(name)
        if account is None:  # it was leased nothing
            return
        async with self._collecting[name]:
            claim = await self._in_store(read_record, self._store, account_name(name), Claim, NEEDED)
            kinds: list[tuple[str, Any, Callable[[str, Any], None]]] = [
                ("completions", Completion, self._take_answer),
                ("failures", Failure, self._take_failure),
            ]
            for kind, record, take in kinds:
                while True:
                    number = account.parts.get(kind, 0)
                    part = part_name(kind, name, number)
                    lines = await self._in_store(read_part, self._store, part)
                    if not lines:
                        break
                    for line in lines:
                        take(name, msgspec.json.decode(line, type=record))
                    account.parts[kind] = number + 1
                    self._read.append(part)
                    self.changed()
            if claim and claim != account.claim:
                self.leases.claimed(name, claim)
                self.changed()
        self._run.show()

    def _take_answer(self, name: str, answer: Completion) -> None:
        recorded = _key(answer) in self._unsaved and self._counted.add(_key(answer))
        first = self.leases.answered(name, answer.id, self._cost(answer), recorded=recorded)
        if first:
            self._run.record_answers((answer, None))
        if first or recorded:
            counts = self.leases.counts(name)
            counts.answered += 1
            counts.prompt_tokens += answer.usage.prompt_tokens or 0
            counts.completion_tokens += answer.usage.completion_tokens or 0

    def _take_failure(self, name: str, failure: Failure) -> None:
        if self.leases.failed(name, failure.id):
            self._run.record_failures(failure)

    def _cost(self, answer: Completion) -> Spend:
        """What an answer has cost; nothing where nothing is counted."""
        if not self._counts:
            return Spend()
        return Spend.of(answer.usage.prompt_tokens or 0, answer.usage.completion_tokens or 0, self._price)

    async def save(self) -> None:
        """Makes sure that all changes until now are in the store; one write serves all who wait. Then drops parts."""
        changes = self._changes
        async with self._saving:
            if self._saved >= changes:
                return
            changes, state = self._changes, self.state
            state.journal_bytes = self._run.completions.path.stat().st_size
            data, unsaid = msgspec.json.encode(state), state.unsaid
            read, self._read = self._read, []
            await self._in_store(self._write, data, unsaid, read)
            self._saved = changes

    async def _in_store(self, call: Callable[..., Result], *given: Any) -> Result:
        """Calls the store in a thread; again while it is away, as long as no worker ends for want of a word."""
        until = monotonic() + self._patience_s
        while True:
            try:
                result = await asyncio.to_thread(call, *given)
            except TryAgain as error:
                if monotonic() > until:
                    raise
                if not self._away:
                    self._run.say(f"warning: {error}; trying again")
                self._away = True
                await asyncio.sleep(AGAIN_S)
            else:
                self._away = False
                return result

    def _write(self, state: bytes, unsaid: Spend, read: list[str]) -> None:
        for journal in self._run.journals:
            journal.sync()
        retried(self._store.put, LEASES_FILE, state)
        if self._counts:
            write_json(self._run.dir.path / SPEND_FILE, Account(unsaid))
        for part in read:
            retried(self._store.delete, part)


def _items_of(run: Run, price: Price | None) -> Iterator[Item]:
    """What is to be leased: all that the run has left."""
    dialect = Dialect()
    for job in run.jobs():
        most = Spend.of(bound(len(dialect.body(job))), int(job.request.sampling["max_tokens"]), price)  # of an attempt
        yield Item(job.request.id, msgspec.json.encode(job.request), most)


def _answers_since(journal: Path, start: int) -> IdSet:
    """The keys of the answers that stand in a journal after so many bytes."""
    keys = IdSet()
    with journal.open("rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()  # to the start of a line, should the user have taken one out
        for line in filter(bytes.strip, file):
            keys.add(_key(msgspec.json.decode(line, type=Completion)))
    return keys


def _key(answer: Completion) -> str:
    """Tells an answer from others to the same request."""
    return f"{answer.id} {answer.created} {answer.latency_s}"
