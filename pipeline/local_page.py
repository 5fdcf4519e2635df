"""A page that a stage shows on this machine: its server, which only a browser with the address can reach.

It listens on 127.0.0.1 and refuses every other host name but localhost, so that no web page can reach it under a name
of its own (DNS rebinding). It shows nothing without the token in its address. The page can load and run nothing but its
own text. The functions import fastapi and uvicorn themselves, because the stages do without them.
"""

import secrets
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from pipeline.errors import DistillError, UsageError, file_error

if TYPE_CHECKING:
    from fastapi import FastAPI

HOST = "127.0.0.1"
POLICY = (
    "default-src 'none'; style-src 'nonce-{0}'; script-src 'nonce-{0}'; img-src data:; "  # data: the empty icon
    "connect-src 'self'; base-uri 'none'"
)


def page_app(page: Path, token: str) -> "FastAPI":
    """An application that shows the page at `/<token>/`; its routes begin with `/{token}/`.

    In the page, `{nonce}` is where the nonce of a style or a script goes.
    """
    from fastapi import Depends, FastAPI, HTTPException, Request
    from fastapi.responses import HTMLResponse, PlainTextResponse
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    text = page.read_text(encoding="utf-8")

    async def known(request: Request) -> None:
        if not secrets.compare_digest(request.path_params["token"].encode(), token.encode()):
            raise HTTPException(404)

    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, dependencies=[Depends(known)])
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])

    @app.exception_handler(OSError)
    async def tell(_: Request, error: OSError) -> PlainTextResponse:
        """A full disk is one line here, too; the page shows that something is wrong."""
        said = file_error(error)
        print(f"error: {said}", file=sys.stderr)
        return PlainTextResponse(said, status_code=507)

    @app.get("/{token}/")
    async def show() -> HTMLResponse:
        nonce = secrets.token_urlsafe(16)
        headers = {
            "Content-Security-Policy": POLICY.format(nonce),
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
        }
        return HTMLResponse(text.replace("{nonce}", nonce), headers=headers)

    return app


def serve_page(build: Callable[[str], "FastAPI"], *, port: int, before: str, after: str) -> None:
    """Serves what `build` makes of a token until Ctrl-C. Prints the address between `before` and `after`.

    `port` 0 takes any that is free. Raises UsageError if the port is taken or nobody would see the address,
    DistillError if a package is missing.
    """
    if sys.stdout is None:
        raise UsageError("standard output is closed, and the page's address is written there: leave it open")
    try:
        import uvicorn

        app = build(token := secrets.token_urlsafe(16))
    except ImportError as error:
        raise DistillError(f"{error.name} is not installed; `make review` installs it") from None
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
            listener.listen()
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", error)
            raise UsageError(f"--port {port}: {reason}; name another, or none for any that is free") from None
        print(f"{before}\nhttp://{HOST}:{listener.getsockname()[1]}/{token}/  ({after})", flush=True)
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1, lifespan="off")
        server = uvicorn.Server(config)
        with _ending(server.handle_exit):
            # uvicorn's own would raise the signals again when it has closed.
            server.capture_signals = nullcontext  # type: ignore[method-assign, assignment]
            server.run(sockets=[listener])


@contextmanager
def _ending(close: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM, which a hangup becomes, close the server, unless they are ignored.

    The exceptions of their usual handlers might be raised in a request, and end that in place of the server.
    """
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    taken = {number: before for number, before in usual.items() if callable(before)}
    for number in taken:
        signal.signal(number, close)
    try:
        yield
    finally:
        for number, before in taken.items():
            signal.signal(number, before)
