"""`generate.mode: batch`: the same requests through the endpoint's Batch API, at half the price, within a day.

Reads and writes the run's `batches/` (generate.batch_files) and its journals. generate.batch_api talks to the provider,
generate.batch_budget keeps what it may cost.
Safe against `kill -9` at any moment: the state is on disk before and after each step, a batch that may have been
created is looked for before it is created again, and an answer that is collected twice is written once. `batches/` says
what is under way, and what of a batch's cost the journals do not say: `spend.json` has nothing of it.
"""

import asyncio
from collections import Counter
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

import openai
from openai.types import Batch
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt

from generate.batch_api import BatchApi
from generate.batch_budget import BatchBudget
from generate.batch_files import COLLECTED, ENDED, FULL, NO_LINE, NO_OUTCOME, Chunk, Folder, read_output
from generate.budget import Reservation
from generate.context import Run
from generate.idset import IdSet
from generate.jobs import Job, completed, failed
from generate.reply import Answer, Fault
from generate.verdict import EndRun, State, decide, heals
from pipeline.errors import DataError, DistillError, RecipeError, UsageError
from pipeline.records import Usage

OLDER = -1  # in place of a dialect's version: the request was written before the dialect knew what it knows
UNKNOWN = "unknown"  # to the account of this call; not in the state
FIRST_POLL_S, POLL_GROWTH = 1.0, 1.5


class Batches:
    """One run's batches, from the first request to the last answer."""

    def __init__(self, run: Run) -> None:
        """Raises RecipeError for what no batch can do, DataError if the state of the batches is broken."""
        if len(run.recipe.teacher.urls) > 1 or run.recipe.teacher.urls_file:
            raise RecipeError("generate.mode batch takes one endpoint: one teacher.base_url and no teacher.urls_file")
        if run.recipe.generate.share_prompt:
            raise RecipeError("generate.share_prompt: batch files have a request for each sample; set it to false")
        self._run, self._config, self._url = run, run.recipe.generate, run.recipe.teacher.url
        self._folder = Folder(run.dir.path / "batches")
        self._api = BatchApi(run.recipe, self._folder.state.key)
        self._dialect = run.dialect()  # each lesson costs the time of a batch
        self._done = IdSet()  # answered or failed for good, by this call
        self._tries: Counter[str] = Counter()  # of this call
        self._budget = BatchBudget(run)
        self.stopped = asyncio.Event()  # set by whoever wants `run` to end after the step that is under way
        self._poll_s = FIRST_POLL_S
        self._written_in = 0  # the version of the dialect in which this call wrote its chunks
        self._most: int | None = None  # requests per file, if the account takes no larger ones
        self._ahead: dict[str, set[str]] = {}  # by chunk that the account had no room for: the batches then at work
        self._stale = set[str]()  # chunks of earlier calls that are not to be created as they are
        self._no_more = ""  # why no request can be answered now

    async def run(self) -> None:
        """Asks all, or goes on with earlier batches. Returns when all is answered or failed, or `stopped` is set."""
        try:
            async with self._api.client:
                self._remember_live()
                while not self.stopped.is_set():
                    if not self._folder.live and not self._write():
                        return
                    await self._follow()
        finally:
            self._say_live()

    def write(self) -> list[Path]:
        """Writes the batch files and submits nothing; returns those that wait, for `vllm run-batch`.

        Files that an earlier call wrote are for the recipe as it was then. Their answers can still be collected.
        """
        for chunk in self._folder.live:
            chunk.collected = chunk.file_id is None
        if not self._folder.live:
            self._write()
        self._say_live()
        return [self._folder.file(chunk, "input") for chunk in self._folder.live if chunk.batch_id is None]

    def collect(self, path: Path) -> None:
        """Collects an output file that came another way, as `vllm run-batch` writes it, or one of `batches/` again.

        Raises UsageError if the file does not exist, DataError if it is no such file, or is of another recipe.
        """
        if not path.is_file():
            raise UsageError(f"{path}: no file of this name; give the output of a batch")
        outcomes = read_output(path, self._api.words)
        if all(outcome == NO_OUTCOME for outcome in outcomes.values()):
            raise DataError(f"{path}: no line has a `response` or an `error`; give the output of a batch")
        if self._record(dict(outcomes), str(path)) == len(outcomes):
            raise DataError(f"{path}: of other prompts, sampling, model or endpoint than the recipe's")
        if self._folder.is_recorded(path):  # charged then, and not again, though the journal has it only now
            again = [got.usage for id_, got in outcomes.items() if isinstance(got, Answer) and id_ in self._done]
            free = Usage(prompt_tokens=0, completion_tokens=0)
            self._run.budget.settle(Reservation(), free, billed=True, journaled=again)
        for chunk in self._folder.live:
            if chunk.batch_id is None and all(id_ in self._done for id_ in self._folder.sent(chunk)):
                chunk.collected = True
        self._folder.save()
        if self._no_more:
            raise DistillError(self._no_more)

    def _write(self) -> bool:
        """Writes what is still to be asked, and can be paid, as new chunks; False if nothing is left to ask."""
        self._written_in = self._dialect.version
        left = (job for job in self._run.jobs() if job.request.id not in self._done)
        chunks = self._folder.write(takewhile(self._reserve, left), self._budget.price, self._most)
        if chunks:
            requests = sum(chunk.requests for chunk in chunks)
            over = self._run.counters.left - requests
            short = f"; the budget does not cover the other {over}, which are left out" if over else ""
            self._run.say(f"{requests} requests in {len(chunks)} batch file(s) in {self._folder.path}{short}")
        elif self._run.counters.left:
            raise self._budget.reached()
        return bool(chunks)

    def _reserve(self, job: Job) -> bool:
        """Encodes a request and reserves what it can cost; False if the budget does not cover it."""
        return self._budget.reserve(job, len(self._dialect.body(job)))

    def _remember_live(self) -> None:
        """Reserves for the batches and the files of earlier calls.

        A file is stale if the budget does not cover it, or if one of its requests is no longer to be asked.
        """
        self._budget.hold(chunk for chunk in self._folder.live if chunk.batch_id)
        chunks = {id_: chunk for chunk in self._folder.live for id_ in self._folder.sent(chunk)}
        for job in self._run.unanswered() if chunks else ():
            if (chunk := chunks.pop(job.request.id, None)) is None:
                continue
            size, wanted = len(self._dialect.body(job)), self._run.left.has(job)
            if not self._budget.take_over(job, size, chunk, wanted=wanted):
                self._stale.add(chunk.name)
        self._stale |= {chunk.name for chunk in chunks.values() if chunk.batch_id is None}

    async def _follow(self) -> None:
        """Submits, polls and collects until no chunk is live."""
        self._poll_s = min(FIRST_POLL_S, self._config.batch_poll_s)
        persist = AsyncRetrying(
            retry=retry_if_exception_type(openai.APIError),
            wait=self._next_poll_s,
            stop=stop_after_attempt(self._config.max_attempts),
            before_sleep=lambda state: self._run.say(f"{self._trouble(state)}; going on"),
            retry_error_callback=self._give_in,
            sleep=self._pause,
        )
        while self._folder.live and not self.stopped.is_set():
            await persist(self._advance_all)
            self._run.counters.in_flight = len(self._budget.requests)
            if self._folder.live:
                await self._pause(self._next_poll_s())

    async def _advance_all(self) -> None:
        for chunk in self._folder.live:
            if not self.stopped.is_set() and (chunk.batch_id or not self._no_more):
                await self._advance(chunk)
        if self._no_more:
            raise DistillError(self._no_more)

    def _next_poll_s(self, _: RetryCallState | None = None) -> float:
        """Seconds until the provider is asked again: more each time."""
        now, self._poll_s = self._poll_s, min(self._poll_s * POLL_GROWTH, self._config.batch_poll_s)
        return now

    async def _pause(self, pause_s: float) -> None:
        """Waits, but not when the call is to end."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.stopped.wait(), pause_s)

    def _trouble(self, state: RetryCallState) -> str:
        """What the attempt's error says. Raises DistillError for one that no waiting heals."""
        error = state.outcome.exception() if state.outcome else None
        assert isinstance(error, openai.APIError)
        return f"{self._url}: {self._api.explain(error)}"

    def _give_in(self, state: RetryCallState) -> None:
        """Raises DistillError: the provider failed at every attempt."""
        then = "when it answers again, run the same command again"
        if any(chunk.batch_id for chunk in self._folder.live):
            then = "the batches are under way, and the same command goes on with them"
        raise DistillError(f"{self._trouble(state)}, {state.attempt_number} times in a row; {then}")

    async def _advance(self, chunk: Chunk) -> None:
        if chunk.batch_id is None:
            await self._submit(chunk)
            return
        try:
            batch = await self._api.retrieve(chunk.batch_id)
            if batch.status != chunk.status:
                chunk.status = batch.status
                self._folder.save()
            if batch.request_counts and batch.status == "in_progress":
                counts = batch.request_counts
                self._run.say(f"batch {batch.id}: {counts.completed} of {counts.total} done, {counts.failed} failed")
            if batch.status in ENDED:
                await self._end(chunk, batch)
        except (openai.BadRequestError, openai.NotFoundError) as error:
            chunk.status = UNKNOWN
            raise DistillError(
                f"{self._url} does not know batch {chunk.batch_id} or its files ({self._api.said(error)}); use the key "
                f"and {self._run.recipe.teacher.section}.base_url that it was made with, or, to ask its requests "
                f"again, set {COLLECTED} in chunk {chunk.name} of {self._folder.path / 'state.json'}"
            ) from None

    async def _submit(self, chunk: Chunk) -> None:
        """Uploads a chunk and creates its batch, unless an earlier call did, or nothing asks for its answers now."""
        ahead = self._ahead.get(chunk.name)
        if chunk.status == FULL and (self._folder.any_at_work or (ahead and ahead <= await self._api.at_work())):
            return  # until one of them has ended
        file = self._folder.file(chunk, "input")
        # The file's id is on disk before a batch is created from it: without one there is no batch to look for.
        batch = await self._api.find(chunk.name, chunk.file_id) if chunk.file_id else None
        if batch is None:
            if chunk.name in self._stale:
                changed = "its answers came another way, or the recipe or the budget changed"
                why = f"{file.name} is not sent: since it was written {changed}; what is left is written anew"
                self._give_up(chunk, why)
                return
            earlier = chunk.file_id
            if chunk.file_id is None:
                chunk.file_id = await self._api.upload(file)
                self._folder.save()
            if self.stopped.is_set():
                return
            try:
                batch = await self._api.create(chunk.name, chunk.file_id)
            except (openai.BadRequestError, openai.NotFoundError) as error:
                if earlier is None:
                    raise
                chunk.file_id = None  # deleted, or another account's: the next round uploads it again
                self._folder.save()
                self._run.say(f"{file.name} is uploaded again: {self._api.said(error)}")
                return
        chunk.batch_id, chunk.status = batch.id, batch.status
        self._folder.save()
        self._run.say(f"batch {chunk.batch_id} is {chunk.status} ({file.name})")

    def _give_up(self, chunk: Chunk, why: str) -> None:
        """Leaves a chunk that has no batch; its requests can be written again."""
        self._budget.release(chunk)
        for id_ in self._folder.sent(chunk):
            self._budget.settle(id_, None, chunk)
        chunk.collected = True
        self._folder.save()
        self._run.say(why)

    async def _wait_or_split(self, chunk: Chunk, batch_id: str, words: str) -> None:
        """The account has its limit of tokens enqueued: with others, this one waits; alone, it is too large.

        Raises DistillError where a file of one request is.
        """
        chunk.batch_id, chunk.status = None, FULL
        self._folder.save()
        self._ahead[chunk.name] = await self._api.at_work()  # also those of other runs
        if self._folder.any_at_work or self._ahead[chunk.name]:
            self._run.say(f"batch {batch_id}: the account's limit is enqueued; it is created again when another ends")
        elif chunk.requests == 1:
            raise DistillError(
                f"{self._url}: no batch of one request fits the account's limit ({words}); try again later"
            )
        else:
            self._most = chunk.requests // 2
            why = f"batch {batch_id} is too large for the account ({words}): files of {self._most} requests"
            self._give_up(chunk, why)

    async def _end(self, chunk: Chunk, batch: Batch) -> None:
        errors = (batch.errors.data if batch.errors else None) or []
        if batch.status == "failed" and any(error.code == FULL for error in errors):
            words = self._api.words("; ".join(str(error.message) for error in errors[:3]))
            await self._wait_or_split(chunk, batch.id, words)
            return
        sent = self._folder.sent(chunk)
        # One that failed was never at work.
        asked = sent.keys() & self._budget.requests if batch.status != "failed" else ()
        outcomes: dict[str, Answer | Fault] = dict.fromkeys(asked, NO_LINE)
        for kind, file_id in (("error", batch.error_file_id), ("output", batch.output_file_id)):
            if file_id:
                file = self._folder.file(chunk, kind)
                await self._api.download(file_id, file)
                outcomes |= read_output(file, self._api.words)
        self._budget.release(chunk)
        before = self._budget.unsaid
        for id_, outcome in outcomes.items():
            # A call that was killed while it recorded has saved what the journal does not say.
            if not chunk.collecting or (id_ in self._budget.requests and _is_counted(outcome)):
                self._budget.settle(id_, outcome, chunk)
        if not chunk.collecting:
            unsaid = self._budget.unsaid - before
            chunk.collecting, chunk.unsaid_tokens, chunk.unsaid_cost = True, unsaid.tokens, unsaid.cost
            self._folder.save()
        self._record(outcomes, f"batch {batch.id}", sent)
        for id_ in sent:  # of a batch that failed, or charged by a call that was killed
            self._budget.settle(id_, None, chunk)
        for journal in self._run.journals:
            journal.sync()
        chunk.collected = True
        self._folder.save()
        self._run.say(f"batch {batch.id} is {batch.status}: {self._run.counters.answered} answered in this call so far")
        if batch.status == "failed":
            words = self._api.words("; ".join(f"{error.code}: {error.message}" for error in errors[:3]))
            raise DistillError(f"batch {batch.id} failed: {words or 'it does not say why'}")

    def _record(
        self, outcomes: dict[str, Answer | Fault], source: str, sent: dict[str, dict[str, Any]] | None = None
    ) -> int:
        """Writes outcomes to the journals: each request's first answer, and no more. Returns how many nobody asks for.

        `sent`: the requests of the batch that brought them; None for a file that came another way.
        """
        for job in self._run.unanswered():
            id_ = job.request.id
            if (outcome := outcomes.pop(id_, None)) and id_ not in self._done:
                self._take(job, outcome, sent)
        had = sum(id_ in self._run.left.answered for id_ in outcomes)
        for count, which in ((had, "to requests that have one"), (len(outcomes) - had, "that nothing asks for")):
            if count:
                self._run.say(f"{source}: ignored {count} answers {which}")
        return len(outcomes) - had

    def _take(self, job: Job, outcome: Answer | Fault, sent: dict[str, dict[str, Any]] | None) -> None:
        """Records an outcome; one that may heal, teaches something or ends the run leaves the request unanswered."""
        id_ = job.request.id
        if isinstance(outcome, Fault):
            verdict = decide(outcome, job, State(self._url, self._api.key), self._config)
            if isinstance(verdict, EndRun):
                self._no_more = verdict.message
                return
        known = self._dialect.sent(job.request.sampling)
        sampling = (sent or {}).get(id_) or known
        job.dialect = self._written_in if sampling.keys() == known.keys() else OLDER
        if sent and isinstance(outcome, Fault) and self._dialect.teaches(outcome, job):
            self._dialect.learn(outcome, job, self._run.say)
            return
        self._tries[id_] += 1
        job.attempts = self._tries[id_]
        if isinstance(outcome, Answer):
            record = completed(job, outcome, latency_s=0.0, endpoint=self._url, sampling=sampling)
            self._run.record_answers((record, outcome.logprobs))
            self._done.add(id_)
        elif not heals(outcome) or job.attempts >= self._config.max_attempts:
            self._run.record_failures(*failed(job, outcome, endpoint=self._url, sampling=sampling))
            self._done.add(id_)

    def _say_live(self) -> None:
        """Says which batches go on without this call."""
        live = [chunk for chunk in self._folder.live if chunk.status not in (UNKNOWN, "failed")]
        if ids := [chunk.batch_id for chunk in live if chunk.batch_id]:
            self._run.say(
                f"{', '.join(ids)} go on at {self._url}; the same command collects them. To cancel one: "
                f"POST {self._url}/batches/<id>/cancel"
            )


def _is_counted(outcome: Answer | Fault) -> bool:
    """Whether the journal says all that an outcome costs."""
    return isinstance(outcome, Answer) and None not in (outcome.usage.prompt_tokens, outcome.usage.completion_tokens)
