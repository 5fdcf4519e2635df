"""The `Run`: what every part of one call of `generate` works with, and what a recipe has left to ask (`Left`).

Opens the journals and the budget.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from generate.budget import Budget
from generate.dialect import Dialect
from generate.idset import IdSet
from generate.jobs import WHOLE, Job, Partition, build_jobs, left_of, shared
from generate.journal import Journal
from generate.logprobs import pack
from generate.progress import Counters
from generate.prompts import iter_prompts, prompt_id
from pipeline.errors import DistillError
from pipeline.recipe import Recipe
from pipeline.records import Completion, Failure, Request, TokenLogprobs, as_text, read_jsonl
from pipeline.rundir import RunDir

Row = TypeVar("Row", Completion, Failure)

SHOWN_CHARS = 300  # of a failure's message, to the user

# How a run ends: None when every request was answered or has failed for good, else what the API is to raise.
# KeyboardInterrupt: the user stopped it. BudgetReached: the next request could cost too much. Others: it cannot go on.
Outcome = BaseException | None


class Left:
    """Which jobs are still to be asked."""

    def __init__(self, answered: IdSet, failed: IdSet, *, retry_failures: bool) -> None:
        self.answered, self._failed, self.retry_failures = answered, failed, retry_failures
        self.left_alone = IdSet() if retry_failures else failed

    def has(self, job: Job) -> bool:
        return job.request.id not in self.answered and job.request.id not in self.left_alone

    def survey(self, recipe: Recipe, counters: Counters) -> Iterator[Job]:
        """Yields every job, asked or not, and counts them. So all prompts are checked before any is asked."""
        counters.retrying = self.retry_failures
        pairs, ambiguous = IdSet(), IdSet()  # a question and its reference; questions with several references
        for job in build_jobs(iter_prompts(recipe), recipe):
            request = job.request
            first_of_prompt = request.sample % recipe.prompts.samples == 0
            counters.total += 1
            counters.prompts += first_of_prompt
            counters.distinct += request.sample == 0
            if recipe.prompts.file and first_of_prompt:
                question = prompt_id(request.messages, request.tools)
                if pairs.add(f"{question} {as_text(request.reference)}") and request.sample and ambiguous.add(question):
                    counters.ambiguous += 1
            if request.id in self.answered:
                counters.resumed += 1
            elif request.id in self._failed:
                counters.failed_before += 1
            yield job


def asked_rows(recipe: Recipe, journal: Path, kind: type[Row]) -> Iterator[tuple[Request, Row]]:
    """The rows of a journal that the recipe asks for, each with its request; none if there is no journal.

    The journal may hold rows of other settings, and may name the prompts as an earlier recipe did.
    """
    if not journal.exists():
        return
    asked = {job.request.id: job.request for job in build_jobs(iter_prompts(recipe), recipe)}
    for row in read_jsonl(journal, kind):
        if row.id in asked:
            yield asked[row.id], row


@dataclass(frozen=True, kw_only=True)
class Run:
    """One call's work on a run directory, in one process."""

    recipe: Recipe
    dir: RunDir
    completions: Journal
    failures: Journal
    logprobs: Journal | None  # None: the recipe wants none
    had_answers: bool  # before this call
    left: Left
    budget: Budget
    counters: Counters
    say: Callable[[str], None]  # a message to the user
    show: Callable[[], None]  # shows the counters; called a few times per second
    partition: Partition = WHOLE

    @property
    def journals(self) -> Iterator[Journal]:
        """In the order in which they are to reach the disk: no answer before its logprobs."""
        return filter(None, (self.logprobs, self.completions, self.failures))

    def jobs(self) -> Iterator[Job]:
        """Streams the jobs that are left to this process."""
        return filter(self.left.has, build_jobs(iter_prompts(self.recipe), self.recipe, self.partition))

    def unanswered(self) -> Iterator[Job]:
        """Streams all jobs of the recipe without an answer, also those that failed for good and are left alone."""
        jobs = build_jobs(iter_prompts(self.recipe), self.recipe)
        return (job for job in jobs if job.request.id not in self.left.answered)

    def dialect(self) -> Dialect:
        """What the run knows of the teacher: the first answer to this recipe shows which settings it takes."""
        dialect, asked = Dialect(), IdSet()
        for job in build_jobs(iter_prompts(self.recipe), self.recipe) if self.counters.resumed else ():
            asked.add(job.request.id)
        row = next((row for row in read_jsonl(self.dir.completions, Completion) if row.id in asked), None)
        if row is not None:
            dialect.ask_as(row.sampling, self.recipe.sampling.fields())
        return dialect

    def jobs_to_send(self) -> Iterator[Job | None]:
        """As `jobs`, with None where many in a row are not left; `generate.share_prompt` joins a prompt's samples."""
        jobs = left_of(build_jobs(iter_prompts(self.recipe), self.recipe, self.partition), self.left.has)
        return shared(jobs) if self.recipe.generate.share_prompt else jobs

    def record_answers(self, *answers: tuple[Completion, Any]) -> None:
        """Writes the answers of a reply to their journal, together, and counts them.

        Beside each its logprobs, as the server gave them: they are written first, so that no answer stands without
        them. Raises DistillError if the recipe wants them and there are none.
        """
        completions, models = [completion for completion, _ in answers], self.counters.models
        if self.logprobs is not None:
            self.logprobs.append(*(self._packed(*answer) for answer in answers))
        self.completions.append(*completions)
        for completion in completions:
            self.counters.answered += 1
            self.counters.settled_again += completion.id in self.failures.found.ids
            if models and completion.model not in models:
                self.say(
                    f"warning: {completion.endpoint} names its model {completion.model}; answers before are of "
                    f"{', '.join(sorted(models))}. If that is another model, another --run keeps them apart"
                )
            models.add(completion.model)
            self.counters.prompt_tokens += completion.usage.prompt_tokens or 0
            self.counters.reasoning_tokens += completion.usage.reasoning_tokens or 0
            self.counters.completion_tokens += completion.usage.completion_tokens or 0

    def _packed(self, completion: Completion, logprobs: Any) -> TokenLogprobs:
        packed = pack(completion.id, logprobs, self.recipe.sampling.logprobs or 0)
        if packed is None:
            raise DistillError(
                f"{completion.endpoint} gives no logprobs with its answers; leave out sampling.logprobs, and train "
                "with train.kd.teacher: local or served; what was answered before is kept"
            )
        return packed

    def record_failures(self, *failures: Failure) -> None:
        """Writes the failures of requests, for good, to their journal, together, and counts them.

        Tells the user of the first of each type of error; the stage that an internal run belongs to tells of its own.
        """
        self.failures.append(*failures)
        for failure in failures:
            self.counters.failed += 1
            self.counters.settled_again += failure.id in self.failures.found.ids
            self.counters.errors[failure.error] += 1
            if self.counters.errors[failure.error] == 1 and not self.dir.internal:
                self.say(f"first request that failed for good with {failure.error}: {failure.message[:SHOWN_CHARS]}")

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
    with ExitStack() as opened:  # closed in the other order: logprobs reach the disk before their answers
        completions, failures = (
            opened.enter_context(Journal(path, kind))
            for path, kind in ((folder.completions, Completion), (folder.failures, Failure))
        )
        wanted = recipe.sampling.logprobs is not None
        logprobs = opened.enter_context(Journal(folder.logprobs, TokenLogprobs)) if wanted else None
        yield Run(
            recipe=recipe,
            dir=folder,
            completions=completions,
            failures=failures,
            logprobs=logprobs,
            had_answers=bool(completions.found.ids),
            left=Left(completions.found.ids, failures.found.ids, retry_failures=retry_failures),
            budget=Budget.open(recipe, folder, completions.found, partition),
            counters=counters,
            say=say,
            show=show,
            partition=partition,
        )
