"""Sends requests to one endpoint and returns its answers, or what went wrong with them (generate.verdict).

HTTP only: retries nothing, limits nothing (generate.endpoint and generate.loop do). On aiohttp itself and uvloop,
not on the openai package: that package spends 0.7 ms and more on each request (measured by `python -m
benchmarks.client`; docs/benchmarks.md has the figures), which is what a client that must keep hundreds of requests in
flight cannot spare. The package's part is the Batch API (generate.batch). Bodies go out as bytes that were built once,
answers are decoded once. aiohttp's hidden limits (100 connections, 300 s) are all set here.
"""

import asyncio
import os
import re
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

import aiohttp
import msgspec
from yarl import URL

from generate.verdict import Answer, CallFailed, Rejected, Transient, read_answer, read_error, shortened
from pipeline.address import is_private, proxy_of
from pipeline.errors import DistillError, RecipeError
from pipeline.lineage import versions
from pipeline.recipe import TeacherConfig

CONNECT_TIMEOUT_S = 10.0
PROBE_TIMEOUT_S = 10.0
KEEPALIVE_S = 4.0  # vLLM closes an idle connection after 5: close first, so that none dies under a request


class _Model(msgspec.Struct):
    id: str


class _Listing(msgspec.Struct):
    data: list[_Model]


class Client:
    """One connection pool to one endpoint, for a whole run; use as an async context manager in the running loop."""

    def __init__(
        self, teacher: TeacherConfig, url: str, *, on_headers: Callable[[Mapping[str, str]], None] | None = None
    ) -> None:
        """`on_headers` is shown the headers of every reply."""
        self.url = url
        self._key_env, self._key, self._on_headers = teacher.api_key_env, teacher.api_key(), on_headers
        self._chat = URL(f"{url}/chat/completions").update_query(teacher.query)
        self._models = URL(f"{url}/models").update_query(teacher.query)
        self._metrics = URL(f"{url.removesuffix('/v1')}/metrics")
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
            headers=headers_of(teacher),
            cookie_jar=aiohttp.DummyCookieJar(),
            proxy=proxy_of(url),  # not by trust_env: that asks two threads a request, and takes passwords from .netrc
        )

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def ask(self, body: bytes, timeout_s: float) -> Answer:
        """Sends one chat request and returns its answer within `timeout_s`. Raises Transient, Refused or Rejected."""
        try:
            # A timeout of the transport would start again with every byte.
            async with (
                asyncio.timeout(timeout_s),
                self._session.post(self._chat, data=body, allow_redirects=False) as response,
            ):
                said = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._explain(error, timeout_s) from None
        if self._on_headers:
            self._on_headers(response.headers)
        if 200 <= response.status < 300:
            return read_answer(said, self._words)
        raise self._located(read_error(response.status, said, response.headers, self._words))

    async def check_reachable(self) -> str | None:
        """None when something answers at the URL, whatever it says; else why nothing does."""
        try:
            async with (
                asyncio.timeout(PROBE_TIMEOUT_S),
                self._session.get(self._models, allow_redirects=False) as response,
            ):
                await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            failed = self._explain(error, PROBE_TIMEOUT_S)
            if failed.error == "unreachable":
                return failed.message
        return None

    async def models(self) -> list[str]:
        """The models that the endpoint lists; none where it lists none."""
        said = await self._get(self._models)
        try:
            return [model.id for model in msgspec.json.decode(said or b"", type=_Listing).data]
        except (msgspec.DecodeError, UnicodeDecodeError):
            return []

    async def metrics(self) -> str | None:
        """What the server says at `/metrics`; None where it says nothing."""
        said = await self._get(self._metrics)
        return said.decode(errors="replace") if said else None

    async def _get(self, url: URL) -> bytes | None:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S), self._session.get(url, allow_redirects=False) as response:
                said = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError):
            return None
        return said if response.status == 200 else None

    def _located(self, failed: CallFailed) -> CallFailed:
        """Adds to an error that ends the run where it came from and what fixes it."""
        if not isinstance(failed, Rejected):
            return failed
        if failed.error == "insufficient_quota":
            message = f"{self.url}: the quota is used up ({failed.message}); top it up"
        elif failed.error == "unauthorized":
            state = "holds a key that it refuses" if self._key else "is not set"
            message = f"{self.url} answers {failed.status} ({failed.message}): {self._key_env} {state}"
        else:
            message = f"{self.url} answers {failed.status} ({failed.message})"
        return Rejected(failed.error, message, failed.status)

    def _explain(self, error: BaseException, timeout_s: float) -> Transient:
        if isinstance(error, aiohttp.ClientConnectorError):
            said = self._words(error.os_error.strerror or str(error.os_error))
            through = "the proxy of the environment: " if isinstance(error, aiohttp.ClientProxyConnectionError) else ""
            return Transient("unreachable", through + said)
        message = self._words(str(error)) or type(error).__name__
        if isinstance(error, aiohttp.ConnectionTimeoutError | aiohttp.InvalidURL):
            return Transient("unreachable", message)
        if isinstance(error, TimeoutError):
            return Transient("timeout", f"no whole answer within {timeout_s:g} s")
        return Transient("connection_lost", message)

    def _words(self, said: str) -> str:
        """What a server said as one line, not too long; without the key, which some repeat in their errors."""
        return shortened(said.replace(self._key.get_secret_value(), "[key]") if self._key else said)


def check_teacher(teacher: TeacherConfig) -> None:
    """Raises RecipeError if a URL carries what belongs elsewhere, or a header cannot be sent."""
    for url in teacher.urls:
        parts = urlsplit(url)
        if "@" in parts.netloc:
            raise RecipeError("teacher.base_url holds a user or password; put the key where teacher.api_key_env says")
        if parts.query or parts.fragment:
            raise RecipeError(
                f"teacher.base_url {url} holds a query or fragment, and the path goes on behind it; put "
                "`name: value` into teacher.query"
            )
        if parts.path.endswith("/chat/completions"):
            raise RecipeError(f"teacher.base_url {url} is too long: leave /chat/completions out, the client adds it")
    for name, value in headers_of(teacher).items():
        if not (name + value).isprintable():
            where = teacher.api_key_env if name == teacher.api_key_header else f"teacher.headers.{name}"
            raise RecipeError(f"{where} holds a line break or another character that no HTTP header can carry")


def headers_of(teacher: TeacherConfig) -> dict[str, str]:
    """What goes with every request: the key, and the recipe's own headers with their variables filled in."""
    headers = {
        "Content-Type": "application/json",
        "User-Agent": f"distillate/{versions()['distillate']}",
    }
    key = teacher.api_key()
    bearer = teacher.api_key_header.lower() == "authorization"
    if key:
        secret = key.get_secret_value()
        headers[teacher.api_key_header] = f"Bearer {secret}" if bearer else secret
    return {**headers, **{name: _filled(name, value) for name, value in teacher.headers.items()}}


def _filled(name: str, value: str) -> str:
    def look_up(match: re.Match[str]) -> str:
        try:
            return os.environ[match[1]]
        except KeyError:
            raise RecipeError(f"teacher.headers.{name}: the variable {match[1]} is not set") from None

    return re.sub(r"\$\{(\w+)\}", look_up, value)


def no_endpoint(teacher: TeacherConfig, url: str, why: str) -> DistillError:
    """The error for an endpoint that is not there."""
    if is_private(url):
        fix = "start the teacher with `make serve`, or set teacher.base_url to one that runs"
    else:
        key = "" if teacher.api_key() else f"; {teacher.api_key_env}, which holds its key, is not set either"
        fix = f"check teacher.base_url, the network and the proxy{key}"
    return DistillError(f"no endpoint at {url} ({why}); {fix}")
