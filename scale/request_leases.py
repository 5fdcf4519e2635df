"""Who holds what of a run on a cluster: shares of its requests, of its budget and of its endpoints' limits.

A worker is one actor from its start to its end; no two have the same name. It holds requests as long as it is heard;
after `lease_s` of silence they are leased to others. It may only be frozen, and may still write: its late answers count
where nobody else's came first, its late failures do not.

Money. A lease reserves the most that each of its requests can cost. A worker says in its account, which it writes with
its parts, what it has spent and what it may still spend (its claim); only an account that has been read gives money
back. So whatever a silent worker does, it spends no more than it is charged, and the budget holds. What a lost worker
was charged stays charged: it may have spent that. `LeaseState` is all of it that must outlive the driver, and is saved
before a lease goes out.

Limits. An endpoint that n workers ask gives each 1/n of what it allows. A new worker gets its part when the others have
heard of it, so that the parts never add up to more than the whole. Pure: the time is passed in.
"""

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from heapq import heapify, heapreplace

import msgspec

from generate.budget import Spend
from generate.idset import IdSet
from generate.progress import NodeCounts


class Item(msgspec.Struct, frozen=True):
    """One request to be leased."""

    id: str
    line: bytes  # its record, encoded
    most: Spend = Spend()  # that one attempt can cost


class Claim(msgspec.Struct, frozen=True):
    """A worker's account, as it writes it."""

    most: Spend = Spend()  # it has spent so much, or may still
    granted: Spend = Spend()  # of all leases that it knew of then


class WorkerAccount(msgspec.Struct):
    """A worker's money, as the driver knows it."""

    granted: Spend = Spend()  # over all its leases
    claim: Claim = Claim()
    rows: Spend = Spend()  # of the answers read in its parts
    parts: dict[str, int] = {}  # how many of them have been read, by kind

    @property
    def charged(self) -> Spend:
        """The most that it can have spent, or can still."""
        return self.claim.most + self.granted - self.claim.granted


class LeaseState(msgspec.Struct):
    """What outlives the driver."""

    accounts: dict[str, WorkerAccount] = {}  # of the workers that have not ended in order
    rest: Spend = Spend()  # not in the journal: of those that have, and of answers that were dropped as repeated
    journal_bytes: int = 0  # the size of completions.jsonl whose answers it counts
    nodes: dict[str, NodeCounts] = {}  # what each has done

    @property
    def charged(self) -> Spend:
        return sum((account.charged for account in self.accounts.values()), Spend())

    @property
    def unsaid(self) -> Spend:
        """What of it the run's journal does not say."""
        return self.charged + self.rest - sum((account.rows for account in self.accounts.values()), Spend())


@dataclass
class LiveWorker:
    """A worker that is heard: what it asks and holds."""

    urls: list[str]
    heard: float
    items: dict[str, Item] = field(default_factory=dict)  # leased, and not finished as far as was read
    askers: dict[str, int] = field(default_factory=dict)  # by URL: the fewest it may go by, so the largest 1/n


class Leases:
    """The table. `tokens` and `cost` (pico-dollars) are the budget; `before` was spent beside what `state` charges."""

    def __init__(
        self,
        items: Iterator[Item],
        state: LeaseState,
        finished: IdSet,
        *,
        tokens: int | None = None,
        cost: int | None = None,
        before: Spend = Spend(),  # noqa: B008, a frozen value
        lease_s: float,
    ) -> None:
        self._new, self._again = items, deque[Item]()
        self.state, self._finished, self._lease_s = state, finished, lease_s
        self._tokens, self._cost = tokens, cost
        self.spent = before + state.charged  # the most that the run can have spent, with all that is leased
        self.workers: dict[str, LiveWorker] = {}
        self._holder: dict[str, str] = {}
        self._looked = float("inf")  # when the silent were last looked for
        self.asked_again = 0  # requests that were leased to a worker that was lost
        self.refused: Item | None = None  # the last request that the budget had no room for

    @property
    def leased(self) -> int:
        """Requests that a live worker holds."""
        return len(self._holder)

    def join(self, name: str, urls: list[str], now: float) -> None:
        """A worker begins, on these endpoints; it counts as heard at `now`, which may be later than now."""
        self.workers[name] = LiveWorker(urls, now)
        self.state.accounts[name] = WorkerAccount()

    def heard(self, name: str, askers: dict[str, int], now: float) -> None:
        """A live worker has said something; it goes by these numbers of askers, and by none that it was told before."""
        if worker := self.workers.get(name):
            worker.heard, worker.askers = now, dict(askers)

    def silent(self, now: float) -> list[str]:
        """The workers whose leases have run out. While the driver itself slept, nobody was silent."""
        slept_s, self._looked = now - self._looked, now
        if slept_s > self._lease_s / 2:
            for worker in self.workers.values():
                worker.heard += slept_s
        return [name for name, worker in self.workers.items() if now - worker.heard > self._lease_s]

    def leave(self, name: str, *, lost: bool) -> None:
        """A worker has ended or is lost: what it holds is leased again, its share of the limits is free."""
        worker = self.workers.pop(name, None)
        if worker:
            asked_again = len(worker.items) if lost else 0
            self.asked_again += asked_again
            self.counts(name).asked_again += asked_again
            self._again.extend(worker.items.values())
            for id_ in worker.items:
                del self._holder[id_]

    def close(self, name: str) -> None:
        """A worker has ended in order, and all that it wrote was read: what it claims is what it has spent."""
        account = self.state.accounts.pop(name, WorkerAccount())
        self.state.rest += account.charged - account.rows

    def lease(self, name: str, most: int) -> list[Item]:
        """Up to so many more requests for a live worker, as far as the budget goes. Charges what they can cost."""
        worker, account, items = self.workers[name], self.state.accounts[name], list[Item]()
        while len(items) < most and (item := self._next()):
            if self._passes(self.spent + item.most):
                self.refused = item
                self._again.appendleft(item)
                break
            self.refused = None
            self.spent += item.most
            account.granted += item.most
            items.append(item)
        worker.items |= {item.id: item for item in items}
        self._holder |= {item.id: name for item in items}
        return items

    def any_left(self) -> bool:
        """Whether there is a request that nobody holds."""
        if item := self._next():
            self._again.appendleft(item)
        return item is not None

    def answered(self, name: str, id_: str, cost: Spend, *, recorded: bool = False) -> bool:
        """An answer was read in a worker's part. True if it is the first to its request, and so counts.

        `recorded`: this very answer is in the journal; a driver that was killed had read it and not saved that.
        """
        self.state.accounts[name].rows += cost
        first = self._finished.add(id_)
        if recorded:
            self.spent -= cost  # until now it was counted in the journal, and in what its worker is charged
        elif not first:
            self.state.rest += cost
        self._release(id_)
        return first

    def failed(self, name: str, id_: str) -> bool:
        """A failure was read in a worker's part. True if it counts: the worker is the one that holds the request."""
        if self._holder.get(id_) != name:
            return False
        self._finished.add(id_)
        self._release(id_)
        return True

    def claimed(self, name: str, claim: Claim) -> None:
        """A worker's account was read: what it does not claim any more can be leased again."""
        account = self.state.accounts[name]
        before = account.charged
        account.claim = claim
        self.spent += account.charged - before

    def counts(self, name: str) -> NodeCounts:
        """What a worker's node has done. A worker's name is its node's, a hyphen, and a random end."""
        return self.state.nodes.setdefault(name.rpartition("-")[0], NodeCounts())

    def askers(self, name: str) -> dict[str, int]:
        """How many workers ask each of a worker's URLs: of n each has 1/n of the limits.

        A URL of which the others still hold too much is left out.
        """
        askers, workers = {}, self.workers
        for url in workers[name].urls:
            others = [one for key, one in workers.items() if key != name and (url in one.urls or url in one.askers)]
            count = 1 + sum(url in one.urls for one in others)
            taken = sum(Fraction(1, one.askers[url]) for one in others if url in one.askers)
            if taken + Fraction(1, count) <= 1:
                askers[url] = count
        return askers

    def offer(self, name: str, askers: dict[str, int]) -> None:
        """A worker is told of the askers. Until it is heard, it may go by the number before: the smaller one counts."""
        before = self.workers[name].askers
        self.workers[name].askers = before | {url: min(n, before.get(url, n)) for url, n in askers.items()}

    def deal(self, weights: dict[str, float], newcomers: int) -> list[str]:
        """The URLs of a new worker, one of so many that come now: those without a worker, else the least asked one.

        The least asked one has the fewest workers for its weight.
        """
        asked = self._asked()
        free = [url for url in weights if not asked[url]]
        return free[:: max(newcomers, 1)] or [min(weights, key=lambda url: asked[url] / weights[url])]

    def lead_to(self, weights: dict[str, float]) -> None:
        """These are the URLs now. Those that have gone are taken from their workers.

        A URL that nobody asks goes to the worker whose own URLs have the least weight; its own are those that no other
        worker asks. In return this worker gives up the URLs that others ask too.
        """
        workers = [*self.workers.values()]
        for worker in workers:
            worker.urls = [url for url in worker.urls if url in weights]
        asked = self._asked()

        def alone(worker: LiveWorker) -> list[str]:
            return [url for url in worker.urls if asked[url] == 1]

        loads = [(sum(weights[url] for url in alone(one)), number, one) for number, one in enumerate(workers)]
        heapify(loads)
        for new in [url for url in weights if not asked[url]] if workers else []:
            load, number, least = loads[0]
            urls = [*alone(least), new]
            asked.subtract(least.urls)
            asked.update(urls)
            least.urls = urls
            heapreplace(loads, (load + weights[new], number, least))
        for worker in workers:
            worker.urls = worker.urls or self.deal(weights, 1)

    def _asked(self) -> Counter[str]:
        """How many workers ask each URL."""
        return Counter(url for worker in self.workers.values() for url in worker.urls)

    def _next(self) -> Item | None:
        """The next request that nobody holds; one whose answer came late needs nothing more."""
        while self._again:
            if (item := self._again.popleft()).id not in self._finished:
                return item
        return next(self._new, None)

    def _passes(self, spent: Spend) -> bool:
        return (self._tokens is not None and spent.tokens > self._tokens) or (
            self._cost is not None and spent.cost > self._cost
        )

    def _release(self, id_: str) -> None:
        holder = self.workers.get(self._holder.pop(id_, ""))
        if holder:
            holder.items.pop(id_, None)
