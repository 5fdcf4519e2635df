"""The review page's server: one page, and what it asks for, under a random token. Writes through the session only.

It listens on 127.0.0.1, answers to that name and localhost alone (so no page of the web can reach it by a name of its
own), and shows nothing without the token. Texts go to the page as JSON and are set as text, never as markup.
"""

import secrets
from pathlib import Path
from typing import Any, Literal

import msgspec
from fastapi import Depends, FastAPI, HTTPException
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, Field
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request

from filters.review.session import Session

PAGE = Path(__file__).with_name("page.html")
POLICY = "default-src 'none'; style-src 'nonce-{0}'; script-src 'nonce-{0}'; connect-src 'self'; base-uri 'none'"


class Given(BaseModel):
    """A verdict on the answer that the page shows."""

    id: str
    verdict: Literal["accept", "reject", "skip"] = "skip"
    score: int | None = Field(None, ge=1, le=5)


def create_app(session: Session, token: str) -> FastAPI:
    """The application. Its handlers run one after the other: each is done before the next begins."""

    async def known(request: Request) -> None:
        if not secrets.compare_digest(request.path_params["token"].encode(), token.encode()):
            raise HTTPException(404)

    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, dependencies=[Depends(known)])
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])

    def state() -> dict[str, Any]:
        item = session.current
        shown = msgspec.to_builtins(item) if item else None
        if shown:
            del shown["stratum"]  # blind
        return {"done": session.done, "total": len(session.sample.items), "item": shown, "undo": bool(session.verdicts)}

    @app.get("/{token}/")
    async def page() -> HTMLResponse:
        nonce = secrets.token_urlsafe(16)
        headers = {
            "Content-Security-Policy": POLICY.format(nonce),
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
        }
        return HTMLResponse(PAGE.read_text(encoding="utf-8").replace("{nonce}", nonce), headers=headers)

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
