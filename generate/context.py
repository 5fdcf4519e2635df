"""The `Run`: what every part of one call of `generate` works with.

Opens the journals and the budget; decides nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from generate.budget import Budget
from generate.idset import IdSet
from generate.jobs import WHOLE, Job, Partition, build_jobs
from generate.journal import Journal
from generate.progress import Counters
from generate.prompts import iter_prompts
from pipeline.recipe import Recipe
from pipeline.records import Completion, Failure
from pipeline.rundir import RunDir

# How a run ends: None when every request was answered or has failed for good, else what the API is to raise.
# KeyboardInterrupt: the user stopped it. BudgetReached: the next request could cost too much. Others: it cannot go on.
Outcome = BaseException | None


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

    def record_answers(self, *completions: Completion) -> None:
        """Writes the answers of one reply to their journal, together, and counts them."""
        self.completions.append(*completions)
        for completion in completions:
            self.counters.answered += 1
            self.counters.models.add(completion.model)
            self.counters.prompt_tokens += completion.usage.prompt_tokens or 0
            self.counters.reasoning_tokens += completion.usage.reasoning_tokens or 0
            self.counters.completion_tokens += completion.usage.completion_tokens or 0

    def record_failures(self, *failures: Failure) -> None:
        """Writes the failures of requests, for good, to their journal, together, and counts them."""
        self.failures.append(*failures)
        for failure in failures:
            self.counters.failed += 1
            self.counters.errors[failure.error] += 1

    def say_stopping(self) -> None:
        """Tells the user that the run ends when what is in flight has ended."""
        self.say(f"stopping: a moment for {self.counters.in_flight} requests in flight; again to stop at once")


@contextmanager
def opened_run(
    recipe: Recipe,
    folder: RunDir,
    counters: Counters,
    *,
    say: Callable[[str], None],
    show: Callable[[], None],
    retry_failures: bool = False,
    partition: Partition = WHOLE,
) -> Iterator[Run]:
    """Opens the journals and the budget of a run, or of one process's part of it."""
    with Journal(folder.completions, Completion) as completions, Journal(folder.failures, Failure) as failures:
        yield Run(
            recipe=recipe,
            dir=folder,
            completions=completions,
            failures=failures,
            left=Left(completions.found.ids, failures.found.ids, retry_failures=retry_failures),
            budget=Budget.open(recipe, folder, completions.found, partition),
            counters=counters,
            say=say,
            show=show,
            partition=partition,
        )
