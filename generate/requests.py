"""What identifies one answer, and the bytes that ask for it.

A request's id is a hash of all that determines its answer: messages, every sampling value, the model asked for, the
endpoint, and the sample number. So a resumed run never repeats or mixes a request, and a changed recipe never takes
an old answer for its own. Pure: reads and writes nothing.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b

import msgspec

from generate.idset import IdSet
from generate.prompts import ID_BYTES, prompt_id
from pipeline.recipe import Recipe
from pipeline.records import Prompt, Request

SEED_BITS = 31  # what every server takes

_encoder = msgspec.json.Encoder()


@dataclass(slots=True)
class Job:
    """One request on its way to an answer."""

    request: Request
    model: str  # as it is asked for
    body: bytes  # what is sent, built once
    sample: int  # 0, or how many times the same question was asked before in this run
    attempts: int = 0
    sent: float = 0.0  # time.monotonic() of the latest attempt
    sent_before: float = 0.0  # and of the one before it


def build_jobs(prompts: Iterable[Prompt], recipe: Recipe) -> Iterator[Job]:
    """Streams one job a prompt. The same question asked again gets the next sample number, and so its own id and seed.

    Keeps 8 bytes a prompt, to know a question it has seen.
    """
    seen = IdSet()
    repeats: Counter[str] = Counter()
    for prompt in prompts:
        question = prompt_id(prompt.messages)
        if not seen.add(question):
            repeats[question] += 1
        yield build_job(prompt, recipe, repeats.get(question, 0))


def build_job(prompt: Prompt, recipe: Recipe, sample: int = 0) -> Job:
    """The job of a prompt. `sampling.seed` in it is the request's own, derived from the recipe's and the identity."""
    model, endpoint = recipe.teacher.model, recipe.teacher.base_url
    sampling = recipe.sampling.model_dump()
    identity = _encoder.encode([prompt.messages, sorted(sampling.items()), model, endpoint, sample])
    digest = blake2b(identity, digest_size=ID_BYTES + 8).digest()
    sent = {**sampling, "seed": int.from_bytes(digest[ID_BYTES:]) % (1 << SEED_BITS)}
    request = Request(
        id=digest[:ID_BYTES].hex(),
        prompt_id=prompt.id,
        messages=prompt.messages,
        slots=prompt.slots,
        endpoint=endpoint,
        sampling=sent,
    )
    return Job(request, model, _encoder.encode({"model": model, "messages": prompt.messages, **sent}), sample)
