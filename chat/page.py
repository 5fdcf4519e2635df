"""The chat page: what it asks for, beside the page itself (pipeline.local_page). Keeps no conversation: the page does.

Answers go to the page as JSON, a line per piece, and are set as text, never as markup. A page that goes away, or
stops an answer, closes the connection: the request to the model is closed with it.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, Literal

import msgspec
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from chat.answer import Answered, answer
from chat.conversation import questions_to_try, system_of
from chat.models import Model
from pipeline.errors import DistillError
from pipeline.local_page import page_app
from pipeline.recipe import Recipe
from pipeline.records import Json, Message
from pipeline.rundir import RunDir
from pipeline.students import TEACHER

PAGE = Path(__file__).with_name("page.html")


class PageTurn(BaseModel):
    """One turn of a conversation, as the page has it."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str


class ChatRequest(BaseModel):
    """A conversation that a model is to go on with."""

    model: str
    turns: list[PageTurn]


def chat_page(recipe: Recipe, run: RunDir, models: Sequence[Model], token: str) -> FastAPI:
    """The application."""
    app, turn = page_app(PAGE, token), asyncio.Lock()
    by_name = {model.name: model for model in models}
    begin = msgspec.to_builtins(system_of(recipe, run))
    student = recipe.student.model if recipe.student else ""
    questions = questions_to_try(recipe, run)
    sampling = ", ".join(f"{name} {value}" for name, value in recipe.sampling.fields().items() if name != "seed")

    @app.get("/{token}/state")
    async def state() -> dict[str, Any]:
        shown = [
            {name: getattr(model, name) for name in ("name", "label", "told", "state", "said")}
            | {"model": recipe.teacher.model if model.key == TEACHER else student}
            for model in models
        ]
        return {
            "run": run.name,
            "models": shown,
            "begin": begin,
            "questions": questions,
            "sampling": sampling,
        }

    @app.post("/{token}/ask")
    async def ask(asked: ChatRequest) -> StreamingResponse:
        if asked.model not in by_name or not asked.turns:
            raise HTTPException(422)
        conversation = [Message(one.role, one.content) for one in asked.turns]
        return StreamingResponse(_lines(by_name[asked.model], conversation, turn), media_type="application/x-ndjson")

    return app


async def _lines(model: Model, conversation: Sequence[Message], turn: asyncio.Lock) -> AsyncIterator[str]:
    """The lines of one answer: `text` as it comes, in the end `whole` with its figures, or `error`."""
    try:
        async with aclosing(answer(model, conversation, turn)) as pieces:
            async for piece in pieces:
                if isinstance(piece, Answered):
                    yield _line({"whole": piece.text, "reasoning": piece.reasoning, "figures": piece.figures})
                else:
                    yield _line({"text": piece})
    except DistillError as error:
        ended = model.server is not None and model.server.wait(0) is not None
        said = model.server.failure("while it was asked") if ended and model.server else error
        yield _line({"error": str(said)})


def _line(event: Json) -> str:
    return json.dumps(event) + "\n"
