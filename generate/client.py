"""Sends requests to one endpoint and returns what came of them: answers and faults (generate.reply).

HTTP only: it retries nothing and limits nothing (generate.loop and generate.endpoint do). It uses aiohttp and uvloop
instead of the openai package, which spends 0.7 ms and more per request (`python -m benchmarks.client` measures it;
docs/benchmarks.md has the figures): too much for a client that keeps hundreds of requests in flight. The package is
used for the Batch API (generate.batch). Bodies go out as bytes that were built once; answers are decoded once.
aiohttp's hidden limits (100 connections, 300 s) are all set here. Every message that leaves this module went through
the teacher's Redactor.
"""

import asyncio
import json
import os
import re
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import NamedTuple
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from generate.reply import Choices, Fault, read_choices, read_error, shortened
from pipeline.address import VARIABLE, Redactor, is_private, proxy_of
from pipeline.errors import DistillError, RecipeError
from pipeline.lineage import versions
from pipeline.teacher_config import TeacherConfig

CONNECT_TIMEOUT_S = 10.0
PROBE_TIMEOUT_S = 10.0
READ_S = 1.0  # for what waits to be read when this process goes on after a pause
MOST_BYTES = 64 << 20  # of a reply: a longer one is no answer to a chat request
HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")  # RFC 9110, 5.6.2
KEEPALIVE_S = 4.0  # vLLM closes an idle connection after 5: close first, so that none dies under a request


class Reply(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes


class OneAddress(AbstractResolver):
    """Every name has this address. The name itself still goes into the Host header, and TLS checks it."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        family = socket.AF_INET6 if ":" in self._address else socket.AF_INET
        flags = socket.AI_NUMERICHOST
        return [ResolveResult(hostname=host, host=self._address, port=port, family=family, proto=0, flags=flags)]

    async def close(self) -> None:
        pass


class Client:
    """One connection pool to one endpoint, for a whole run; use as an async context manager in the running loop."""

    def __init__(
        self,
        teacher: TeacherConfig,
        url: str,
        *,
        address: str | None = None,
        on_headers: Callable[[Mapping[str, str]], None] | None = None,
    ) -> None:
        """`address` is the one to connect to, of those that the URL's name has. `on_headers` is shown the headers of
        every reply.
        """
        self.url = url
        self.key = f"{teacher.api_key_env} {'holds a key that it refuses' if teacher.api_key() else 'is not set'}"
        self._on_headers, self._words = on_headers, words_of(teacher)
        self._section, self._model = teacher.section, teacher.model
        self._chat = URL(f"{url}/chat/completions").update_query(teacher.query)
        self._models = URL(f"{url}/models").update_query(teacher.query)
        self._metrics = URL(f"{url.removesuffix('/v1')}/metrics")
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0, keepalive_timeout=KEEPALIVE_S, resolver=OneAddress(address) if address else None
            ),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
            headers=headers_of(teacher),
            cookie_jar=aiohttp.DummyCookieJar(),
            proxy=proxy_of(url),  # not by trust_env: it costs two threads per request, and reads .netrc
        )

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def complete(self, body: bytes, timeout_s: float, choices: int = 1) -> Choices | Fault:
        """Sends one chat request that asks for so many choices; returns them, or what came in their place, in time."""
        reply = await self._ask("POST", self._chat, timeout_s, body)
        if isinstance(reply, Fault):
            return reply
        status, headers, said = reply
        if self._on_headers:
            self._on_headers(headers)
        if 200 <= status < 300:
            return read_choices(said, self._words, choices)
        return read_error(status, said, headers, self._words)

    async def check_reachable(self) -> str | None:
        """None when something answers at the URL, whatever it says; else why nothing does."""
        reply = await self._ask("GET", self._models)
        return reply.message if isinstance(reply, Fault) and reply.error == "unreachable" else None

    async def describe_models(self) -> str:
        """What the endpoint lists as its models, as the end of a message."""
        reply = await self._ask("GET", self._models)
        try:
            names = [] if isinstance(reply, Fault) else [model["id"] for model in json.loads(reply.body)["data"]]
        except (ValueError, KeyError, TypeError):  # an error, or no JSON
            names = []
        if not names:
            return f"; it lists no models: check {self._section}.base_url"
        listed = f"; it lists {self._words(', '.join(map(str, names)))}"
        if self._model in names:
            return f"{listed}: check {self._section}.base_url"
        return f"{listed}: set {self._section}.model to one of them"

    async def metrics(self) -> str:
        """What the server says at `/metrics`; empty if it says nothing."""
        reply = await self._ask("GET", self._metrics)
        return "" if isinstance(reply, Fault) or reply.status != 200 else reply.body.decode(errors="replace")

    async def _ask(
        self, method: str, url: URL, timeout_s: float = PROBE_TIMEOUT_S, body: bytes | None = None
    ) -> Reply | Fault:
        """One HTTP request: its whole reply, whatever the status, or why there is none."""
        try:
            # A timeout of the transport would start again with every byte.
            async with (
                _limited_to(timeout_s),
                self._session.request(method, url, data=body, allow_redirects=False) as response,
            ):
                blocks, size = [], 0
                while block := await response.content.readany():
                    blocks.append(block)
                    size += len(block)
                    if size > MOST_BYTES:
                        return Fault("too_large", f"the reply is longer than {MOST_BYTES:,} bytes", response.status)
                return Reply(response.status, response.headers, b"".join(blocks))
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return read_exception(error, timeout_s, self._words)


@asynccontextmanager
async def _limited_to(seconds: float) -> AsyncIterator[None]:
    """As asyncio.timeout, but what came while this process was paused (Ctrl-Z) is read first: it is paid for."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    async with asyncio.timeout(None) as limit:

        def expire() -> None:
            now = loop.time()
            limit.reschedule(now + READ_S if now > end + READ_S else now)

        timer = loop.call_at(end, expire)
        try:
            yield
        finally:
            timer.cancel()


def words_of(teacher: TeacherConfig) -> Callable[[str], str]:
    """What makes one line of a server's words, not too long and without secrets: some servers repeat the key."""
    redacted = Redactor.of(teacher)
    return lambda said: shortened(redacted(said))


def read_exception(error: BaseException, timeout_s: float, words: Callable[[str], str] = shortened) -> Fault:
    """What an attempt without a whole reply says."""
    if isinstance(error, aiohttp.ClientConnectorError):
        said = words(error.os_error.strerror or str(error.os_error))
        through = "the proxy of the environment: " if isinstance(error, aiohttp.ClientProxyConnectionError) else ""
        return Fault("unreachable", through + said)
    if isinstance(error, aiohttp.ClientHttpProxyError):  # nothing went on to the endpoint
        return Fault("unreachable", f"the proxy of the environment answers {error.status}: {words(error.message)}")
    message = words(str(error)) or type(error).__name__
    if isinstance(error, aiohttp.ConnectionTimeoutError | aiohttp.InvalidURL):
        return Fault("unreachable", message)
    if isinstance(error, TimeoutError):
        return Fault("timeout", f"no whole answer within {timeout_s:g} s")
    return Fault("connection_lost", message)


def check_teacher(teacher: TeacherConfig) -> None:
    """Raises RecipeError if a URL carries what belongs elsewhere, or a header cannot be sent."""
    for url in teacher.urls:
        check_url(url, f"{teacher.section}.base_url")
    for key, name in (("api_key_header", teacher.api_key_header), *(("headers", name) for name in teacher.headers)):
        if not HEADER_NAME.fullmatch(name):
            raise RecipeError(f"teacher.{key}: {name!r} cannot name an HTTP header; write letters, digits and -")
    own = {name.lower() for name in teacher.headers}
    for name, value in headers_of(teacher).items():
        if not value.isprintable():
            where = f"teacher.headers.{name}" if name.lower() in own else teacher.api_key_env
            raise RecipeError(f"{where} holds a line break or another character that no HTTP header can carry")


def check_url(url: str, key: str) -> None:
    """Raises RecipeError if a URL of the recipe key carries what belongs elsewhere."""
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise RecipeError(
            f"{key} holds a user or password; put the key where {key.rpartition('.')[0]}.api_key_env says"
        )
    if parts.query or parts.fragment:
        fix = "put `name: value` into teacher.query" if key.startswith("teacher.") else "leave it out"
        raise RecipeError(f"{key} {url} holds a query or fragment, and the path goes on behind it; {fix}")
    if parts.path.endswith("/chat/completions"):
        raise RecipeError(f"{key} {url} is too long: leave /chat/completions out, the client adds it")


def headers_of(teacher: TeacherConfig) -> dict[str, str]:
    """What goes with every request: the key, and the recipe's own headers with their variables filled in.

    One of the recipe's own takes the place of ours, in upper or lower case: HTTP does not tell these apart.
    """
    usual = {"Content-Type": "application/json", "User-Agent": f"distillate/{versions()['distillate']}"}
    usual |= teacher.key_header()
    spelt = {name.lower(): name for name in usual}
    own = {spelt.get(name.lower(), name): _filled(name, value) for name, value in teacher.headers.items()}
    return {**usual, **own}


def _filled(name: str, value: str) -> str:
    try:
        return VARIABLE.sub(lambda match: os.environ[match[1]], value)
    except KeyError as error:
        raise RecipeError(f"teacher.headers.{name}: the variable {error.args[0]} is not set") from None


def no_endpoint(teacher: TeacherConfig, url: str, why: str) -> DistillError:
    if is_private(url):
        own = "the teacher with `make serve` and the same RECIPE"
        start = own if teacher.section == "teacher" else f"{teacher.model} there"
        fix = f"start {start}, or set {teacher.section}.base_url to one that runs"
    else:
        key = "" if teacher.api_key() else f"; {teacher.api_key_env}, which holds its key, is not set either"
        fix = f"check {teacher.section}.base_url, the network and the proxy{key}"
    if "certificate" in why.lower():
        fix = "name the file with its authority's certificate in SSL_CERT_FILE"
    elif "WRONG_VERSION_NUMBER" in why:  # what answers is no TLS
        fix = f"begin {teacher.section}.base_url with http://"
    return DistillError(f"no endpoint at {url} ({why}); {fix}")
