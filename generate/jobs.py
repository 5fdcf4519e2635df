"""What identifies one answer, and the record of what became of it.

A request's id is a hash of all that determines its answer: messages, what else the teacher is told, tools, every
sampling value, the model asked for, the first of its endpoints, and the sample number. So a resumed run never repeats
or mixes a request, and a changed recipe never takes an old answer for its own. Pure: reads and writes nothing.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any, NamedTuple

import msgspec

from generate.idset import IdSet
from generate.prompts import ID_BYTES, prompt_id
from generate.reply import Answer, Fault
from pipeline.chat import told_to_teacher
from pipeline.recipe import Recipe
from pipeline.records import Completion, Failure, Message, Prompt, Request, asked_fields

SEED_BITS = 31  # what every server takes

_encoder = msgspec.json.Encoder()


@dataclass(slots=True)
class Job:
    """One request on its way to an answer."""

    request: Request
    told: list[Message]  # to the teacher: the request's messages and what the recipe tells the teacher alone
    model: str  # as it is asked for
    body: bytes = b""  # what is sent, encoded once (generate.dialect)
    dialect: int = 0  # the version of the dialect that encoded it
    attempts: int = 0
    spent_s: float = 0.0  # in flight, over all attempts


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
    sampling, samples = recipe.sampling.fields(), recipe.prompts.samples
    for number, prompt in enumerate(prompts):
        question = prompt_id(prompt.messages, prompt.tools)
        if not seen.add(question):
            repeats[question] += 1
        if number % partition.of == partition.part:
            first = repeats.get(question, 0) * samples
            told = told_to_teacher(prompt.messages, recipe.teacher)
            for sample in range(first, first + samples):
                yield _build_job(prompt, told, recipe, sampling, sample)


def _build_job(prompt: Prompt, told: list[Message], recipe: Recipe, sampling: dict[str, Any], sample: int) -> Job:
    """The job of a prompt. `sampling.seed` in it is the request's own, derived from the recipe's and the identity."""
    model, endpoint = recipe.teacher.model, recipe.teacher.url
    identity = [prompt.messages, sorted(sampling.items()), model, endpoint, sample]
    if told != prompt.messages or prompt.tools:  # otherwise nothing is added: old ids stay
        identity += [told, prompt.tools]
    digest = blake2b(_encoder.encode(identity), digest_size=ID_BYTES + 8).digest()
    request = Request(
        id=digest[:ID_BYTES].hex(),
        prompt_id=prompt.id,
        **asked_fields(prompt),
        sample=sample,
        endpoint=endpoint,
        sampling={**sampling, "seed": int.from_bytes(digest[ID_BYTES:]) % (1 << SEED_BITS)},
    )
    return Job(request, told, model)


def completed(job: Job, answer: Answer, *, latency_s: float, endpoint: str, sampling: dict[str, Any]) -> Completion:
    """The record of an answer from `endpoint` to the `sampling` values as they were sent."""
    return Completion(
        **_identity(job, endpoint, sampling),
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


def failed(job: Job, fault: Fault, *, endpoint: str, sampling: dict[str, Any]) -> Failure:
    """The record of a request that failed for good."""
    return Failure(
        **_identity(job, endpoint, sampling),
        model=job.model,
        error=fault.error,
        status=fault.status,
        message=fault.message,
        attempts=job.attempts,
        created=_now(),
    )


def _identity(job: Job, endpoint: str, sampling: dict[str, Any]) -> dict[str, Any]:
    return {**msgspec.structs.asdict(job.request), "endpoint": endpoint, "sampling": sampling}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
