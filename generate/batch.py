"""`generate.mode: batch`: the same requests through the endpoint's Batch API, at half the price, within a day.

Reads and writes the run's `batches/` (generate.batch_files) and its journals; generate.batch_api talks to the provider.
Safe against `kill -9` at any moment: the state is on disk before and after each step, a batch that may have been
created is looked for before it is created again, and an answer that is collected twice is written once.
"""

import asyncio
from collections import Counter
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

import openai
from openai.types import Batch

from generate.batch_api import BatchApi
from generate.batch_files import Chunk, Folder, read_output
from generate.budget import Reservation
from generate.context import Run
from generate.dialect import Dialect
from generate.idset import IdSet
from generate.jobs import Job, completed, failed
from generate.reply import Answer, Fault
from generate.verdict import heals
from pipeline.errors import DistillError, RecipeError, UsageError

ENDED = ("completed", "failed", "expired", "cancelled")
FULL = "token_limit_exceeded"  # the account has its limit enqueued: create this batch later
FIRST_POLL_S = 1.0


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
        self._dialect = Dialect()
        self._done = IdSet()  # answered or failed for good, by this call
        self._tries: Counter[str] = Counter()  # of this call
        self._reserved: dict[str, Reservation] = {}
        self._written_in = 0  # the version of the dialect in which this call wrote its chunks

    async def run(self, stopped: asyncio.Event) -> None:
        """Asks all, or goes on with earlier batches. Returns when all is answered or failed, or `stopped` is set."""
        async with self._api.client:
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
        return [self._folder.file(chunk, "input") for chunk in self._folder.live if chunk.batch_id is None]

    def collect(self, path: Path) -> None:
        """Collects an output file that came another way, as `vllm run-batch` writes it.

        Raises UsageError if the file does not exist, DataError if it is no such file.
        """
        if not path.is_file():
            raise UsageError(f"{path}: no such file; give the output of a batch")
        self._collect(path)
        for chunk in self._folder.live:
            if chunk.batch_id is None and all(id_ in self._done for id_ in self._folder.sent(chunk)):
                chunk.collected = True
        self._folder.save()

    def _write(self) -> bool:
        """Writes what is still to be asked, and can be paid, as new chunks; False if nothing is left to ask."""
        self._written_in = self._dialect.version
        left = (job for job in self._run.jobs() if job.request.id not in self._done)
        chunks = self._folder.write(takewhile(self._reserve, left))
        if chunks:
            requests = sum(chunk.requests for chunk in chunks)
            self._run.say(f"{requests} requests in {len(chunks)} batch file(s) in {self._folder.path}")
        elif self._run.counters.left:
            raise self._run.budget.reached()
        return bool(chunks)

    def _reserve(self, job: Job) -> bool:
        """Encodes a request and reserves what it can cost; False if the budget does not cover it."""
        reservation = self._run.budget.reserve(len(self._dialect.body(job)), job.request.sampling["max_tokens"])
        if reservation is not None:
            self._reserved[job.request.id] = reservation
        return reservation is not None

    def _reserve_live(self) -> None:
        """Batches of an earlier call still cost money: their requests are reserved again."""
        live = {id_ for chunk in self._folder.live for id_ in self._folder.sent(chunk)}
        for job in self._run.jobs() if live else ():
            if job.request.id in live:
                self._reserve(job)

    async def _follow(self, stopped: asyncio.Event) -> None:
        """Submits, polls and collects until no chunk is live."""
        poll_s = min(FIRST_POLL_S, self._config.batch_poll_s)
        troubles = 0
        while self._folder.live and not stopped.is_set():
            try:
                for chunk in self._folder.live:
                    await self._advance(chunk)
                troubles = 0
            except openai.APIError as error:
                words = self._api.explain(error)
                self._run.say(f"{self._url}: {words}; going on")
                troubles += 1
                if troubles >= self._config.max_attempts:
                    raise DistillError(
                        f"{self._url}: {words}, {troubles} times in a row; the batches are under way, and the same "
                        "command goes on with them"
                    ) from None
            self._run.counters.in_flight = len(self._reserved)
            with suppress(TimeoutError):
                await asyncio.wait_for(stopped.wait(), poll_s if self._folder.live else 0)
            poll_s = min(poll_s * 1.5, self._config.batch_poll_s)

    async def _advance(self, chunk: Chunk) -> None:
        if chunk.file_id is None:
            chunk.file_id = await self._api.upload(self._folder.file(chunk, "input"))
            self._folder.save()
        if chunk.batch_id is None:
            others = [other for other in self._folder.live if other.batch_id and other.status not in ENDED]
            if chunk.status == FULL and others:
                return  # until one of them has ended
            batch = await self._api.find(chunk.name) or await self._api.create(chunk.name, chunk.file_id)
            chunk.batch_id, chunk.status = batch.id, batch.status
            self._folder.save()
            self._run.say(f"batch {chunk.batch_id} is {chunk.status} ({self._folder.file(chunk, 'input').name})")
            return
        batch = await self._api.retrieve(chunk.batch_id)
        if batch.status != chunk.status:
            chunk.status = batch.status
            self._folder.save()
        if batch.request_counts and batch.status == "in_progress":
            counts = batch.request_counts
            self._run.say(f"batch {batch.id}: {counts.completed} of {counts.total} done, {counts.failed} failed")
        if batch.status in ENDED:
            await self._end(chunk, batch)

    async def _end(self, chunk: Chunk, batch: Batch) -> None:
        errors = (batch.errors.data if batch.errors else None) or []
        if batch.status == "failed" and any(error.code == FULL for error in errors):
            chunk.batch_id, chunk.status = None, FULL
            self._folder.save()
            self._run.say(f"batch {batch.id}: the account's limit is enqueued; it is created again when another ends")
            return
        for kind, file_id in (("output", batch.output_file_id), ("error", batch.error_file_id)):
            if file_id:
                file = self._folder.file(chunk, kind)
                await self._api.download(file_id, file)
                self._collect(file, chunk)
        for id_ in self._folder.sent(chunk):  # neither answered nor failed: an expired batch does no more work on them
            self._settle(id_, None)
        for journal in self._run.journals:
            journal.sync()
        chunk.collected = True
        self._folder.save()
        self._run.say(f"batch {batch.id} is {batch.status}: {self._run.counters.answered} answered in this call so far")
        if batch.status == "failed":
            words = self._api.words("; ".join(f"{error.code}: {error.message}" for error in errors[:3]))
            raise DistillError(f"batch {batch.id} failed: {words or 'it does not say why'}")

    def _collect(self, path: Path, chunk: Chunk | None = None) -> None:
        """Writes the outcomes in a file to the journals: each request's first answer, and no more."""
        outcomes = read_output(path, self._api.words)
        sent = self._folder.sent(chunk) if chunk else {}
        strangers = len(outcomes)
        for job in self._run.jobs():
            id_ = job.request.id
            if id_ not in outcomes:
                continue
            strangers -= 1
            if id_ not in self._done:
                self._take(job, outcomes[id_], sent.get(id_) or self._dialect.sent(job.request.sampling), chunk)
        if strangers:
            self._run.say(f"{path}: ignored {strangers} answers that the run has already, or that nothing asks for")

    def _take(self, job: Job, outcome: Answer | Fault, sampling: dict[str, Any], chunk: Chunk | None) -> None:
        """Records an outcome; one that may heal, or that teaches something, leaves the request to another batch."""
        id_ = job.request.id
        job.dialect = self._written_in
        if chunk and isinstance(outcome, Fault) and self._dialect.teaches(outcome, job):
            self._settle(id_, outcome)
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
        self._settle(id_, outcome)

    def _settle(self, id_: str, outcome: Answer | Fault | None) -> None:
        """Gives back what a request reserved, but for what it cost; None: no outcome, and no cost."""
        if reservation := self._reserved.pop(id_, None):
            usage = outcome.usage if outcome else None
            billed = isinstance(outcome, Answer) or (isinstance(outcome, Fault) and outcome.status == 200)
            journaled = [outcome.usage] if isinstance(outcome, Answer) else []
            self._run.budget.settle(reservation, usage, billed=billed, journaled=journaled)

    def _leave(self) -> None:
        """Leaves the batches at work. The call that collects them reserves again what they may cost."""
        for id_ in list(self._reserved):
            self._settle(id_, None)
        ids = [chunk.batch_id for chunk in self._folder.live if chunk.batch_id]
        if ids:
            self._run.say(
                f"{', '.join(ids)} go on at {self._url}; the same command collects them. To cancel one: "
                f"POST {self._url}/batches/<id>/cancel"
            )
