"""What identifies one answer, and the record of what became of it.

A request's id is a hash of all that determines its answer: messages, what else the teacher is told, tools, every
sampling value, the model asked for, the first of its endpoints, and the sample number. So a resumed run never repeats
or mixes a request, and a changed recipe never takes an old answer for its own. Pure: reads and writes nothing.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import blake2b
from itertools import groupby, islice
from typing import Any, NamedTuple

import msgspec

from generate.idset import IdSet
from generate.prompts import ID_BYTES, prompt_id
from generate.reply import Answer, Choices, Fault
from pipeline.instructions import told_to_teacher
from pipeline.recipe import Recipe
from pipeline.records import Completion, Failure, Message, Prompt, Request, asked_fields

SEED_BITS = 31  # what every server takes
MOST_CHOICES = 128  # of one HTTP request (OpenAI's limit of `n`)
PASSED = 500  # jobs that are looked at in one go: some 20 ms

_encoder = msgspec.json.Encoder()


@dataclass(slots=True)
class Job:
    """What is sent at once: one request on its way to an answer, or several that ask the same, each to its own."""

    request: Request  # the first: its seed is sent
    told: list[Message]  # to the teacher: the request's messages and what the recipe tells the teacher alone
    model: str  # as it is asked for
    body: bytes = b""  # what is sent, encoded once (generate.dialect)
    dialect: int = 0  # the version of the dialect that encoded it
    attempts: int = 0
    spent_s: float = 0.0  # in flight, over all attempts
    others: Sequence[Request] = ()  # further ones, if it asks for several choices

    @property
    def requests(self) -> list[Request]:
        return [self.request, *self.others]

    @property
    def choices(self) -> int:
        return 1 + len(self.others)

    def part(self, requests: Sequence[Request]) -> "Job":
        """A job of some of its requests, with the same past."""
        if len(requests) == self.choices:
            return self
        return replace(self, request=requests[0], others=requests[1:], body=b"")


class Partition(NamedTuple):
    """One process's part of a run: every `of`-th prompt, beginning with number `part`."""

    part: int
    of: int


WHOLE = Partition(0, 1)


def build_jobs(prompts: Iterable[Prompt], recipe: Recipe, partition: Partition = WHOLE) -> Iterator[Job]:
    """Streams `prompts.samples` jobs per prompt, each with its own sample number, id and seed.

    The same question asked again gets the sample numbers that follow. Keeps 8 bytes per prompt, to know a question
    that it has seen.
    """
    seen = IdSet()
    repeats: Counter[str] = Counter()
    asked, samples = recipe.prompts.answers is None, recipe.prompts.samples
    sampling = recipe.sampling.fields() if asked else {}
    for number, prompt in enumerate(prompts):
        question = prompt_id(prompt.messages, prompt.tools)
        if not seen.add(question):
            repeats[question] += 1
        if number % partition.of == partition.part:
            first = repeats.get(question, 0) * samples
            told = told_to_teacher(prompt.messages, recipe.teacher) if asked else prompt.messages
            for sample in range(first, first + samples):
                yield _build_job(prompt, told, recipe, sampling, sample)


def _build_job(prompt: Prompt, told: list[Message], recipe: Recipe, sampling: dict[str, Any], sample: int) -> Job:
    """The job of a prompt. `sampling.seed` in it is the request's own, derived from the recipe's and the identity.

    If the recipe has none, neither has the request.
    """
    model, endpoint = recipe.teacher.model, recipe.teacher.url if recipe.prompts.answers is None else ""
    identity = [prompt.messages, sorted(sampling.items()), model, endpoint, sample]
    if told != prompt.messages or prompt.tools:  # otherwise nothing is added: old ids stay
        identity += [told, prompt.tools]
    digest = blake2b(_encoder.encode(identity), digest_size=ID_BYTES + 8).digest()
    own_seed = {"seed": int.from_bytes(digest[ID_BYTES:]) % (1 << SEED_BITS)} if "seed" in sampling else {}
    request = Request(
        id=digest[:ID_BYTES].hex(),
        prompt_id=prompt.id,
        **asked_fields(prompt),
        sample=sample,
        endpoint=endpoint,
        sampling=sampling | own_seed,
    )
    return Job(request, told, model)


def left_of(jobs: Iterable[Job], is_left: Callable[[Job], bool]) -> Iterator[Job | None]:
    """The jobs that are left to ask; None after every PASSED others in a row, so that the caller can work meanwhile."""
    passed = 0
    for job in jobs:
        if is_left(job):
            passed = 0
            yield job
        elif (passed := passed + 1) % PASSED == 0:
            yield None


def shared(jobs: Iterator[Job | None]) -> Iterator[Job | None]:
    """Joins jobs that follow each other and ask the same: one job, whose choices are their answers. Keeps None."""
    for asked, alike in groupby(jobs, key=lambda job: job and (job.told, job.request.tools)):
        if asked is None:
            yield from alike
        while some := list(islice(filter(None, alike), MOST_CHOICES)):
            yield replace(some[0], others=[job.request for job in some[1:]])


def outcomes(job: Job, reply: Choices | Fault) -> list[tuple[Job, Answer | Fault]]:
    """What became of each request of a job. Those without a choice stay one job, as do all where none came."""
    if isinstance(reply, Fault):
        return [(job, reply)]
    requests, came = job.requests, len(reply.outcomes)
    parts = [(job.part([request]), outcome) for request, outcome in zip(requests, reply.outcomes, strict=False)]
    if missing := requests[came:]:
        said = f"{came} of {len(requests)} choices came"
        fault = Fault("missing_choice", said, 200, parameter="n" if came == 1 else None)  # one: it does not know `n`
        parts.append((replace(job.part(missing), spent_s=0.0), fault))
    return parts


def completed(job: Job, answer: Answer, *, latency_s: float, endpoint: str, sampling: dict[str, Any]) -> Completion:
    """The record of an answer from `endpoint` to a job of one request. `sampling`: the values as they were sent."""
    return Completion(
        **_identity(job.request, endpoint, sampling),
        text=answer.text,
        reasoning=answer.reasoning,
        tool_calls=list(answer.tool_calls),
        finish_reason=answer.finish_reason,
        model=answer.model or job.model,
        usage=answer.usage,
        latency_s=round(latency_s, 4),
        attempts=job.attempts,
        created=_now(),
    )


def failed(job: Job, fault: Fault, *, endpoint: str, sampling: dict[str, Any], latency_s: float = 0.0) -> list[Failure]:
    """The records of a job's requests, which have failed for good."""
    return [
        Failure(
            **_identity(request, endpoint, sampling),
            model=job.model,
            error=fault.error,
            status=fault.status,
            message=fault.message,
            attempts=job.attempts,
            created=_now(),
            usage=fault.usage,
            latency_s=round(latency_s, 4),
        )
        for request in job.requests
    ]


def _identity(request: Request, endpoint: str, sampling: dict[str, Any]) -> dict[str, Any]:
    return {**msgspec.structs.asdict(request), "endpoint": endpoint, "sampling": sampling}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
