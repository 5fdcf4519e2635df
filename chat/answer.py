"""One answer, streamed: what it says as it comes, and in the end its figures."""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import msgspec

from chat.models import Model
from generate.jobs import Job, build_jobs
from generate.prices import PICO, price_of
from generate.streaming import Heard, Refused, events, streaming_session
from pipeline.address import is_loopback, is_private
from pipeline.errors import DistillError
from pipeline.reasoning import split_reasoning
from pipeline.records import Message, Prompt, Usage

LOOK_S = 0.25  # between two looks at a server that starts
SEEDS = 1 << 31
MINIMUM_WALL_S = 1e-6


class Answered(msgspec.Struct, frozen=True, kw_only=True):
    """An answer that is whole."""

    text: str  # without what the model thought
    reasoning: str
    finish_reason: str
    tokens: int  # as the server counts them, else the pieces that came
    first_token_s: float
    tokens_per_s: float  # over the whole answer, as in the report
    cost: str  # in words
    replaced: bool  # whether the student was trained again since the chat began

    @property
    def figures(self) -> str:
        """What is shown under the answer, in one line."""
        cut = ", cut off at sampling.max_tokens" if self.finish_reason == "length" else ""
        speed = f"{self.tokens_per_s:.1f} tokens/s, first after {self.first_token_s:.2f} s"
        old = "; the student was trained again meanwhile: start the chat again to ask the new one" * self.replaced
        return f"{self.tokens} tokens, {speed}, {self.cost}{cut}{old}"


async def answer(model: Model, conversation: Sequence[Message], turn: asyncio.Lock) -> AsyncGenerator[str | Answered]:
    """Asks a model, and yields its answer piece by piece; the last piece is an Answered.

    Waits for its server. Models on this machine are asked one after the other (`turn`), so that none slows another
    down. Raises DistillError (Refused) where none comes, or not all of it. Close the generator to stop the answer.
    """
    while model.state == "starting":  # noqa: ASYNC110  # another thread sets it
        await asyncio.sleep(LOOK_S)
    if model.state == "failed":
        raise DistillError(model.said)
    own = turn if is_loopback(model.recipe.teacher.url) else asyncio.Lock()
    async with own, aclosing(_ask(model, _job(model, conversation))) as pieces:
        async for piece in pieces:
            yield piece


async def _ask(model: Model, job: Job) -> AsyncGenerator[str | Answered]:
    """As `answer`. If the model refuses a setting, it is asked again without it (generate.dialect)."""
    teacher = model.recipe.teacher
    async with streaming_session(teacher, model.recipe.generate.request_timeout_s) as session:
        while True:
            begin, heard = time.perf_counter(), Heard()
            try:
                async with aclosing(events(session, teacher, model.dialect.body(job))) as coming:
                    async for event in coming:
                        if text := heard.add(event):
                            yield text
            except Refused as refused:
                if not model.dialect.teaches(refused.fault, job):
                    raise
                model.dialect.learn(refused.fault, job, lambda news: None)
                continue
            yield _whole(heard, model, begin)
            return


def _whole(heard: Heard, model: Model, begin: float) -> Answered:
    """The answer and its figures, once it has ended."""
    end = time.perf_counter()
    tagged, text = split_reasoning(heard.text)
    return Answered(
        text=text,
        reasoning=heard.thought.strip() or tagged,
        finish_reason=heard.finish_reason,
        tokens=heard.tokens,
        first_token_s=(heard.first or end) - begin,
        tokens_per_s=heard.tokens / max(end - begin, MINIMUM_WALL_S),
        cost=_cost(model, heard.usage),
        replaced=model.replaced,
    )


def _job(model: Model, conversation: Sequence[Message]) -> Job:
    """The request, by the client's own code. Each has another seed: the same question can be answered anew."""
    sampling = model.recipe.sampling.model_copy(update={"seed": secrets.randbelow(SEEDS)})
    recipe = model.recipe.model_copy(update={"sampling": sampling})
    return next(build_jobs([Prompt(id="chat", messages=model.asked(_without_thoughts(conversation)))], recipe))


def _without_thoughts(conversation: Sequence[Message]) -> list[Message]:
    """The turns without thoughts. An answer that was stopped in its thought goes, with its question."""
    turns = list[Message]()
    for turn in conversation:
        text = split_reasoning(turn.content)[1] if turn.role == "assistant" else turn.content
        if turn.role == "assistant" and not text:
            del turns[-1:]
        else:
            turns.append(Message(turn.role, text))
    return turns


def _cost(model: Model, usage: Usage) -> str:
    """What the answer cost, in words."""
    teacher = model.recipe.teacher
    price = price_of(teacher)
    if price is None:
        return "own server" if is_private(teacher.url) else "price not known"
    if usage.prompt_tokens is None or usage.completion_tokens is None:
        return "tokens not counted"
    usd = price.cost(usage.prompt_tokens, usage.completion_tokens) / PICO
    return f"{usd:.6f} USD"
