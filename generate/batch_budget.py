"""What a run's batches may cost: each request that is at work, or may still be, has reserved the most that it can.

As run.budget, but in memory: no spend file counts what `batches/` says is under way.
"""

from collections.abc import Iterable, Set

from generate.batch_files import Chunk
from generate.budget import Budget, Reservation, Spend, known_price, most_of_batch, spend_under_way
from generate.context import Run
from generate.jobs import Job
from generate.reply import Answer, Fault
from generate.tokens import bound
from pipeline.errors import BudgetReached
from pipeline.records import Usage


class BatchBudget:
    def __init__(self, run: Run) -> None:
        """Raises RecipeError if budget.usd is set and the price is not known."""
        self.price = known_price(run.recipe)
        self._limit = Budget(run.recipe.budget, self.price, run.budget.spent - spend_under_way(run.dir))
        self._requests: dict[str, Reservation] = {}
        self._created: dict[str, Reservation] = {}  # by chunk: batches of earlier calls, which count as a whole

    @property
    def requests(self) -> Set[str]:
        """The ids of those that have reserved something."""
        return self._requests.keys()

    @property
    def unsaid(self) -> Spend:
        """What is spent and the journal does not say."""
        return self._limit.unsaid

    def reserve(self, job: Job, body_bytes: int) -> bool:
        """Reserves the most that a new request can cost; False if the budget does not cover it."""
        reservation = self._limit.reserve(body_bytes, job.request.sampling["max_tokens"])
        if reservation is not None:
            self._requests[job.request.id] = reservation
        return reservation is not None

    def reached(self) -> BudgetReached:
        """The error for a budget that the next request could pass."""
        return self._limit.reached()

    def hold(self, created: Iterable[Chunk]) -> None:
        """Batches that earlier calls created count in any case, at the prices of then."""
        self._created = {chunk.name: self._limit.hold(most_of_batch(chunk)) for chunk in created}

    def take_over(self, job: Job, body_bytes: int, chunk: Chunk, *, wanted: bool) -> bool:
        """Reserves for a request in a file of an earlier call.

        A file whose batch is not known to be created still has to be paid: False if it is no longer wanted, or the
        budget does not cover it.
        """
        if chunk.batch_id is None and wanted and self.reserve(job, body_bytes):
            return True
        max_tokens = job.request.sampling["max_tokens"]
        self._requests[job.request.id] = Reservation(bound(body_bytes), max_tokens, price=chunk.price)
        return chunk.batch_id is not None

    def release(self, chunk: Chunk) -> None:
        """Gives back what is held for a batch of an earlier call: its requests count for themselves from now on."""
        if held := self._created.pop(chunk.name, None):
            self._limit.settle(held, None, billed=False)

    def settle(self, id_: str, outcome: Answer | Fault | None, chunk: Chunk) -> None:
        """Gives back what a request reserved, but for what it cost; None: no outcome, and no cost.

        Where the provider did not count, it costs the most that it can. One that reserved nothing, as nobody asks for
        it, costs the same as others; where the provider did not count, as a request of its chunk can on average.
        """
        usage, reserved = (outcome and outcome.usage) or Usage(), self._requests.pop(id_, None)
        if outcome and (isinstance(outcome, Answer) or outcome.status == 200):
            most = reserved or Reservation(
                usage.prompt_tokens or -(-chunk.prompt_tokens // chunk.requests),
                usage.completion_tokens or chunk.completion_tokens // chunk.requests,
                price=chunk.price,
            )
            journaled = [usage] if reserved and isinstance(outcome, Answer) else []
            if usage.prompt_tokens is None or usage.completion_tokens is None:
                usage = Usage(prompt_tokens=most.prompt_tokens, completion_tokens=most.max_tokens)
            self._limit.settle(most, usage, billed=True, journaled=journaled)
        elif reserved:
            self._limit.settle(reserved, None, billed=False)
