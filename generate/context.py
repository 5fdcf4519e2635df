"""The `Run`: what every part of one call of `generate` works with, and the ways in which it can end.

Holds open journals; decides nothing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from generate.budget import Budget
from generate.idset import IdSet
from generate.jobs import WHOLE, Job, Partition, build_jobs
from generate.journal import Journal
from generate.progress import Counters
from generate.prompts import iter_prompts
from pipeline.errors import DistillError
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir


class Left:
    """Which jobs are still to be asked."""

    def __init__(self, answered: IdSet, failed: IdSet, *, retry_failures: bool) -> None:
        self.answered, self.failed = answered, IdSet() if retry_failures else failed
        self.retry_failures = retry_failures

    def has(self, job: Job) -> bool:
        return job.request.id not in self.answered and job.request.id not in self.failed

    def jobs(self, recipe: Recipe, partition: Partition = WHOLE) -> Iterator[Job]:
        """Streams them."""
        return (job for job in build_jobs(iter_prompts(recipe), recipe, partition) if self.has(job))


@dataclass(frozen=True, kw_only=True)
class Run:
    """One call's work on a run directory, in one process."""

    recipe: Recipe
    dir: RunDir
    completions: Journal
    failures: Journal
    left: Left
    budget: Budget
    counters: Counters
    say: Callable[[str], None]  # a message to the user
    show: Callable[[], None]  # shows the counters; called a few times per second
    partition: Partition = WHOLE

    def jobs(self) -> Iterator[Job]:
        """Streams the jobs that are left to this process."""
        return self.left.jobs(self.recipe, self.partition)


@dataclass(frozen=True)
class Finished:
    """Every request was answered or has failed for good."""


@dataclass(frozen=True)
class Interrupted:
    """The user stopped it; the rest can be asked later."""


@dataclass(frozen=True)
class BudgetSpent:
    """The next request could pass the budget."""


@dataclass(frozen=True)
class Stopped:
    """It cannot go on."""

    error: BaseException


Outcome = Finished | Interrupted | BudgetSpent | Stopped


def raise_unless_finished(outcome: Outcome, budget: Budget) -> None:
    """Turns an outcome into what the API promises: KeyboardInterrupt, BudgetReached or the error that stopped it."""
    match outcome:
        case Interrupted():
            raise KeyboardInterrupt
        case BudgetSpent():
            raise budget.reached()
        case Stopped(error):
            raise error


def stopped(message: str) -> Stopped:
    """An end with a message for the user."""
    return Stopped(DistillError(message))
