"""The review page: what it asks for, beside the page itself (pipeline.local_page). Writes through the session only.

Texts go to the page as JSON and are set as text, never as markup.
"""

from pathlib import Path
from typing import Any, Literal

import msgspec
from fastapi import FastAPI
from pydantic import BaseModel, Field

from filters.review.session import Session
from pipeline.local_page import page_app

PAGE = Path(__file__).with_name("page.html")


class Given(BaseModel):
    """A verdict on the answer that the page shows."""

    id: str
    verdict: Literal["accept", "reject", "skip"] = "skip"
    score: int | None = Field(None, ge=1, le=5)


def create_app(session: Session, token: str) -> FastAPI:
    """The application. Its handlers run one after the other: each is done before the next begins."""
    app = page_app(PAGE, token)

    def state() -> dict[str, Any]:
        item = session.current
        shown = msgspec.to_builtins(item) if item else None
        if shown:
            del shown["stratum"]  # blind
        return {"done": session.done, "total": len(session.sample.items), "item": shown, "undo": bool(session.verdicts)}

    @app.get("/{token}/state")
    async def current() -> dict[str, Any]:
        return state()

    @app.post("/{token}/verdict")
    async def verdict(given: Given) -> dict[str, Any]:
        item = session.current
        if item is not None and item.id == given.id:  # else another window was faster: show where it is
            session.record(given.verdict, given.score)
        return state()

    @app.post("/{token}/undo")
    async def undo() -> dict[str, Any]:
        session.undo()
        return state()

    return app
