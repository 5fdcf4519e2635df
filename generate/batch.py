"""`generate.mode: batch`: the same requests through the endpoint's Batch API, at half the price, within a day.

Reads and writes the run's `batches/` (generate.batch_files) and its journals, with the `openai` package for Files and
Batches. Written for `kill -9` at any moment: the state is on disk before and after each step, a batch that may have
been created is looked for before it is created again, and an answer that is collected twice is written once.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import openai
from openai.types import Batch

from generate.batch_files import Folder, Part, output_ids, read_output
from generate.budget import Budget, Reservation
from generate.client import headers_of
from generate.dialect import Dialect
from generate.endpoint import TIMEOUT_S
from generate.idset import IdSet
from generate.jobs import Job, completed, failed
from generate.journal import Journal
from generate.progress import Counters
from generate.reply import Answer, Fault, shortened
from generate.verdict import heals
from pipeline.address import is_loopback
from pipeline.errors import DistillError, RecipeError, UsageError
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir

ENDED = ("completed", "failed", "expired", "cancelled")
FULL = "token_limit_exceeded"  # more is enqueued than the account may have: create this one later
FIRST_POLL_S = 1.0
LISTED = 100  # batches a page, when one is looked for


class Batches:
    """One run's batches, from the first request to the last answer."""

    def __init__(
        self,
        recipe: Recipe,
        run: RunDir,
        jobs: Callable[[], Iterator[Job]],
        completions: Journal,
        failures: Journal,
        counters: Counters,
        budget: Budget,
        say: Callable[[str], None],
    ) -> None:
        """`jobs` makes the jobs that the run had no answer to when this call began, each time it is called."""
        if len(recipe.teacher.urls) > 1:
            raise RecipeError("generate.mode batch takes one endpoint; teacher.base_url has several")
        self._recipe, self._jobs = recipe, jobs
        self._completions, self._failures, self._counters = completions, failures, counters
        self._budget, self._say, self._dialect = budget, say, Dialect()
        self._folder = Folder(run.path / "batches")
        self._done = IdSet()  # answered or failed for good, by this call
        self._tries: Counter[str] = Counter()  # of this call
        self._last: dict[str, Fault] = {}  # what came of those that are to be asked again
        self._reserved: dict[str, Reservation] = {}
        self._versions: dict[str, int] = {}  # of the dialect that this call's parts were written in
        teacher, key = recipe.teacher, recipe.teacher.api_key()
        self._api = openai.AsyncOpenAI(
            api_key=key.get_secret_value() if key else "none",
            base_url=teacher.url,
            default_headers={
                k: v for k, v in headers_of(teacher).items() if k not in ("Content-Type", "Authorization")
            },
            default_query=dict(teacher.query),
            # A proxy set in the environment is for the outside, never for a server on this machine.
            http_client=openai.DefaultAsyncHttpxClient(trust_env=not is_loopback(teacher.url)),
            max_retries=0,  # a request that may have arrived is not sent again unseen
            timeout=recipe.generate.request_timeout_s or TIMEOUT_S,
        )

    async def run(self, stopped: asyncio.Event) -> None:
        """Asks all, or goes on where it was left. Returns when all is answered or failed, or `stopped` is set."""
        async with self._api:
            self._reserve_live()
            while not stopped.is_set():
                if not self._folder.live and not self._write():
                    return
                await self._follow(stopped)
        self._leave()

    def write(self) -> list[Path]:
        """Writes the batch files and submits nothing; returns those that wait, for `vllm run-batch`."""
        if not self._folder.live:
            self._write()
        self._leave()
        return [self._folder.input(part) for part in self._folder.live if part.batch_id is None]

    def collect(self, path: Path) -> None:
        """Collects an output file that came another way, as `vllm run-batch` writes it.

        Raises UsageError where it is not there, DataError where it is no such file.
        """
        if not path.is_file():
            raise UsageError(f"{path}: no such file; give the output of a batch")
        self._collect(path)
        for part in self._folder.live:
            if part.batch_id is None and all(id_ in self._done for id_ in self._folder.ids(part)):
                part.collected = True
        self._folder.save()

    def _write(self) -> bool:
        """Writes what is still to be asked, and can be paid, as new parts; False when that is nothing."""
        refused = False

        def affordable() -> Iterator[tuple[Job, bytes]]:
            nonlocal refused
            for job in self._jobs():
                if job.request.id in self._done:
                    continue
                if (tries := self._tries[job.request.id]) >= self._recipe.generate.max_attempts:
                    job.attempts = tries
                    self._fail(job, self._last[job.request.id], self._dialect.sent(job.request.sampling))
                    continue
                body = self._dialect.body(job)
                reservation = self._budget.reserve(len(body), job.request.sampling["max_tokens"])
                if reservation is None:
                    refused = True
                    return
                self._reserved[job.request.id] = reservation
                yield job, body

        parts = self._folder.write(affordable())
        self._versions |= {part.name: self._dialect.version for part in parts}
        if parts:
            counted = sum(1 for part in parts for _ in self._folder.ids(part))
            self._say(f"{counted} requests in {len(parts)} batch file(s) in {self._folder.path}")
        elif refused:
            raise self._budget.reached()
        return bool(parts)

    def _reserve_live(self) -> None:
        """Batches of an earlier call still cost: their requests are reserved again."""
        live = {id_ for part in self._folder.live for id_ in self._folder.ids(part)}
        for job in self._jobs() if live else ():
            if job.request.id in live:
                body = self._dialect.body(job)
                reservation = self._budget.reserve(len(body), job.request.sampling["max_tokens"])
                if reservation is not None:
                    self._reserved[job.request.id] = reservation

    async def _follow(self, stopped: asyncio.Event) -> None:
        """Submits, polls and collects until no part is live."""
        poll_s = min(FIRST_POLL_S, self._recipe.generate.batch_poll_s)
        troubles = 0
        while self._folder.live and not stopped.is_set():
            try:
                for part in self._folder.live:
                    await self._advance(part)
                troubles = 0
            except openai.APIError as error:
                self._explain(error)
                troubles += 1
                if troubles >= self._recipe.generate.max_attempts:
                    raise DistillError(
                        f"{self._recipe.teacher.url}: {shortened(error.message)}, {troubles} times in a row; the "
                        "batches are under way, and the same command goes on with them"
                    ) from None
            self._counters.in_flight = len(self._reserved)
            with suppress(TimeoutError):
                await asyncio.wait_for(stopped.wait(), poll_s if self._folder.live else 0)
            poll_s = min(poll_s * 1.5, self._recipe.generate.batch_poll_s)

    async def _advance(self, part: Part) -> None:
        """Takes a part as far as it goes now."""
        if part.file_id is None:
            with self._folder.input(part).open("rb") as file:
                part.file_id = (await self._api.files.create(file=file, purpose="batch")).id
            self._folder.save()
        if part.batch_id is None:
            others = [other for other in self._folder.live if other.batch_id and other.status not in ENDED]
            if part.status == FULL and others:
                return  # when one of them has ended
            batch = await self._find(part) or await self._create(part)
            part.batch_id, part.status = batch.id, batch.status
            self._folder.save()
            self._say(f"batch {part.batch_id} is {part.status} ({self._folder.input(part).name})")
            return
        batch = await self._api.batches.retrieve(part.batch_id)
        if batch.status != part.status:
            part.status = batch.status
            self._folder.save()
        if batch.request_counts and batch.status == "in_progress":
            counts = batch.request_counts
            self._say(f"batch {batch.id}: {counts.completed} of {counts.total} done, {counts.failed} failed")
        if batch.status in ENDED:
            await self._end(part, batch)

    async def _create(self, part: Part) -> Batch:
        assert part.file_id
        return await self._api.batches.create(
            input_file_id=part.file_id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata={"distillate_run": self._folder.state.key, "part": part.name, "file": part.file_id},
        )

    async def _find(self, part: Part) -> Batch | None:
        """The part's batch, if a call that never heard of it had created it."""
        async for batch in self._api.batches.list(limit=LISTED):
            said = batch.metadata or {}
            if (said.get("distillate_run"), said.get("part")) == (self._folder.state.key, part.name):
                if batch.status == "failed":
                    continue
                return batch
        return None

    async def _end(self, part: Part, batch: Batch) -> None:
        """Collects what there is of a batch that has ended."""
        errors = (batch.errors.data if batch.errors else None) or []
        if batch.status == "failed" and any(error.code == FULL for error in errors):
            part.batch_id, part.status = None, FULL
            self._folder.save()
            self._say(f"batch {batch.id}: the account has enough enqueued; it is created again when another has ended")
            return
        for kind, file_id in (("output", batch.output_file_id), ("error", batch.error_file_id)):
            if file_id:
                await self._download(file_id, self._folder.output(part, kind))
                self._collect(self._folder.output(part, kind), part)
        for id_ in self._folder.ids(part):  # neither answered nor failed: an expired batch does not work for them
            if (reservation := self._reserved.pop(id_, None)) is not None:
                self._budget.settle(reservation, None, billed=False, journaled=False)
        for journal in (self._completions, self._failures):
            journal.sync()
        part.collected = True
        self._folder.save()
        self._say(f"batch {batch.id} is {batch.status}: {self._counters.answered} answered in this call so far")
        if batch.status == "failed":
            words = "; ".join(f"{error.code}: {error.message}" for error in errors[:3])
            raise DistillError(f"batch {batch.id} failed: {shortened(words) or 'it does not say why'}")

    async def _download(self, file_id: str, path: Path) -> None:
        partial = path.with_suffix(".part")
        try:
            async with self._api.files.with_streaming_response.content(file_id) as response:
                with partial.open("wb") as file:
                    async for block in response.iter_bytes():
                        file.write(block)
        except httpx2.HTTPError as error:  # cut on the way: the package gives its own errors only before the body
            raise openai.APIConnectionError(message=str(error), request=error.request) from None
        partial.replace(path)

    def _collect(self, path: Path, part: Part | None = None) -> None:
        """Writes the outcomes in a file to the journals: each request's first answer, and no more."""
        ids = output_ids(path)
        sent = self._folder.sent(part) if part else {}
        jobs = {job.request.id: job for job in self._jobs() if job.request.id in ids}
        strangers = len(ids) - len(jobs)
        for id_, outcome in read_output(path):
            job = jobs.get(id_)
            if job is None or id_ in self._done:
                continue
            self._tries[id_] += 1
            job.attempts = self._tries[id_]
            sampling = sent.get(id_) or self._dialect.sent(job.request.sampling)
            if isinstance(outcome, Answer):
                self._answer(job, outcome, sampling)
                continue
            self._settle(id_, outcome)
            version = self._versions.get(part.name, 0) if part else 0
            if part and self._dialect.teaches(outcome, job, version):
                self._dialect.learn(outcome, job, version, self._say)
                self._tries[id_] -= 1
            elif heals(outcome):
                self._last[id_] = outcome
            else:
                self._fail(job, outcome, sampling)
        if strangers:
            self._say(f"{path}: passed over {strangers} answers that were there already, or that nothing asks for")

    def _answer(self, job: Job, answer: Answer, sampling: dict[str, Any]) -> None:
        reservation = self._reserved.pop(job.request.id, None)
        completion = completed(job, answer, latency_s=0.0, endpoint=self._recipe.teacher.url, sampling=sampling)
        self._completions.append(completion)
        self._done.add(job.request.id)
        self._counters.count(completion.model, completion.usage)
        if reservation is not None:
            self._budget.settle(reservation, answer.usage, billed=True, journaled=True)

    def _settle(self, id_: str, error: Fault) -> None:
        if (reservation := self._reserved.pop(id_, None)) is not None:
            self._budget.settle(reservation, error.usage, billed=error.status == 200, journaled=False)

    def _fail(self, job: Job, error: Fault, sampling: dict[str, Any]) -> None:
        self._failures.append(failed(job, error, endpoint=self._recipe.teacher.url, sampling=sampling))
        self._done.add(job.request.id)
        self._counters.failed += 1
        self._counters.errors[error.error] += 1

    def _explain(self, error: openai.APIError) -> None:
        """Raises DistillError for what does not heal; says what does."""
        url = self._recipe.teacher.url
        if (
            isinstance(error, openai.APIStatusError)
            and error.status_code not in (408, 409, 429)
            and error.status_code < 500
        ):
            fix = {
                401: f"; {self._recipe.teacher.api_key_env} is not set, or holds a key that it refuses",
                404: "; has it a Batch API? generate.mode online does without",
            }.get(error.status_code, "")
            raise DistillError(f"{url} answers {error.status_code} ({self._words(error)}){fix}") from None
        if getattr(error, "code", None) == "insufficient_quota":
            raise DistillError(f"{url}: the quota is used up ({self._words(error)}); top it up") from None
        self._say(f"{url}: {self._words(error)}; going on")

    def _words(self, error: openai.APIError) -> str:
        body: Any = error.body
        said = body.get("message") if isinstance(body, dict) else None
        return shortened(str(said or error.message))

    def _leave(self) -> None:
        """Batches go on without us. What they may cost is reserved again by the call that collects them."""
        for reservation in self._reserved.values():
            self._budget.settle(reservation, None, billed=False, journaled=False)
        ids = [part.batch_id for part in self._folder.live if part.batch_id]
        if ids:
            self._say(
                f"{', '.join(ids)} go on at {self._recipe.teacher.url}; the same command collects them. To cancel one: "
                f"POST {self._recipe.teacher.url}/batches/<id>/cancel"
            )
