"""Asks the endpoint for one answer, and says of everything that can go wrong what it means for the request.

Reads and writes HTTP only; retries nothing (generate.engine does). AsyncOpenAI brings credentials, URL and error
types, on aiohttp. Bodies go out as the bytes that were built once, and answers are decoded once, by msgspec: the
package's own models would cost more than the request. Its hidden limits (100 connections, 600 s) are all set here.

    CallFailed
    ├── Transient   can heal: 408, 429 for rate, 5xx, connection lost, timeout, truncated or no JSON
    ├── Refused     final for this request: any other 4xx, an answer with no text or of the wrong shape
    └── Rejected    final for the run: 401, 403, an exhausted quota, a model or URL that is not there
"""

import asyncio
import json
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from time import time
from typing import NamedTuple
from urllib.parse import urlsplit

import aiohttp
import httpx2
import msgspec
import openai

from pipeline.errors import DistillError, RecipeError
from pipeline.recipe import TeacherConfig
from pipeline.records import Usage

CONNECT_TIMEOUT_S = 10.0
PROBE_TIMEOUT_S = 10.0
KEEPALIVE_S = 4.0  # vLLM closes an idle connection after 5: close first, so that none dies under a request
MESSAGE_CHARS = 1000  # of a server's words, kept in an error
JSON_HEADERS = {"Content-Type": "application/json"}


class CallFailed(Exception):
    """One attempt that brought no answer: the error's type, the HTTP status (None: no reply), the server's words."""

    def __init__(self, error: str, message: str, status: int | None = None, retry_after: float = 0) -> None:
        super().__init__(message)
        self.error, self.message, self.status, self.retry_after = error, message, status, retry_after


class Transient(CallFailed):
    """May heal: worth another attempt, not before `retry_after` seconds."""


class Refused(CallFailed):
    """This request will never be answered."""


class Rejected(CallFailed):
    """No request of this run will be answered."""


class Answer(NamedTuple):
    """What the teacher said."""

    text: str
    finish_reason: str
    model: str | None
    usage: Usage


class _Message(msgspec.Struct):
    content: str | None = None
    refusal: str | None = None


class _Choice(msgspec.Struct):
    message: _Message
    finish_reason: str | None = None


class _Reply(msgspec.Struct):
    choices: list[_Choice] | None = None
    model: str | None = None
    usage: Usage | None = None
    error: object = None


_decoder = msgspec.json.Decoder(_Reply)


class Client:
    """One connection pool to one endpoint, for a whole run; use as an async context manager."""

    def __init__(self, teacher: TeacherConfig, *, connections: int, timeout_s: float) -> None:
        """`connections` requests may be out at once, each for `timeout_s` seconds in all."""
        self.url = teacher.base_url
        self._key_env, self._key, self._timeout_s = teacher.api_key_env, teacher.api_key(), timeout_s
        timeout = httpx2.Timeout(timeout_s, connect=min(CONNECT_TIMEOUT_S, timeout_s), pool=None)
        limits = httpx2.Limits(
            max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=KEEPALIVE_S
        )
        self._openai = openai.AsyncOpenAI(
            api_key=self._key.get_secret_value() if self._key else "none",  # a local server takes any
            base_url=teacher.base_url,
            max_retries=0,
            timeout=timeout,
            # A proxy set in the environment is for the outside, never for a server on this machine.
            http_client=openai.DefaultAioHttpClient(
                timeout=timeout, limits=limits, trust_env=not _is_loopback(self.url), follow_redirects=False
            ),
        )

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._openai.close()

    async def ask(self, body: bytes) -> Answer:
        """Sends one chat request and returns its answer. Raises Transient, Refused or Rejected."""
        try:
            async with asyncio.timeout(self._timeout_s):  # the transport's own timeout starts again with every byte
                response = await self._openai.post(
                    "/chat/completions", cast_to=httpx2.Response, content=body, options={"headers": JSON_HEADERS}
                )
            return read_answer(response.content, self._words)
        except openai.APIStatusError as error:
            raise self._explain_status(error) from None
        except (openai.APIConnectionError, aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._explain_connection(error) from None

    async def check_reachable(self) -> None:
        """Raises DistillError when nothing listens at the URL; what it says there is left to the first request."""
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                await self._openai.get("/models", cast_to=httpx2.Response)
        except (openai.APIConnectionError, aiohttp.ClientError, OSError) as error:
            failed = self._explain_connection(error)
            if failed.error == "unreachable":
                raise DistillError(
                    f"no endpoint at {self.url} ({failed.message}); start the teacher with `make serve`, or set "
                    "teacher.base_url to one that runs"
                ) from None
        except (openai.APIStatusError, TimeoutError):
            return  # something is there: that is all this asks

    async def models(self) -> list[str]:
        """The models that the endpoint lists; none where it lists none."""
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                listing = await self._openai.get("/models", cast_to=httpx2.Response)
            return [str(model["id"]) for model in json.loads(listing.content)["data"]]
        except (openai.APIError, aiohttp.ClientError, OSError, ValueError, LookupError, TypeError):
            return []

    def _explain_status(self, error: openai.APIStatusError) -> CallFailed:
        status, words = error.status_code, self._words(_said(error)) or error.response.reason_phrase or "no words"
        if status == 429 and "insufficient_quota" in (error.code, error.type):
            return Rejected("insufficient_quota", f"{self.url}: the quota is used up ({words}); top it up", status)
        if status == 429 or status == 408 or status >= 500:
            kind = "rate_limited" if status == 429 else "server_error"
            return Transient(kind, words, status, retry_after(error.response.headers))
        if status in (401, 403):
            state = "holds a key that it refuses" if self._key else "is not set"
            return Rejected("unauthorized", f"{self.url} answers {status} ({words}): {self._key_env} {state}", status)
        if status in (404, 405) or status < 400:
            return Rejected("not_found", f"{self.url} answers {status} ({words})", status)
        return Refused("bad_request", words, status)

    def _explain_connection(self, error: BaseException) -> Transient:
        """Names a connection error by what lies at its root: the layers between call a reset a timeout."""
        causes = [error]
        while (cause := causes[-1].__cause__) is not None:
            causes.append(cause)
        root = next((cause for cause in causes if isinstance(cause, aiohttp.ClientError | OSError)), error)
        message = self._words(str(root)) or type(root).__name__
        if isinstance(root, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
            return Transient("unreachable", message)
        if isinstance(root, TimeoutError):
            return Transient("timeout", f"no whole answer within {self._timeout_s:g} s")
        return Transient("connection_lost", message)

    def _words(self, said: str) -> str:
        """What a server said as one line, not too long; without the key, which some repeat in their errors."""
        return shortened(said.replace(self._key.get_secret_value(), "[key]") if self._key else said)


def check_url(url: str) -> None:
    """Raises RecipeError if the URL carries a user or a password: it is written into every record."""
    if "@" in urlsplit(url).netloc:
        raise RecipeError("teacher.base_url holds a user or password; put the key where teacher.api_key_env says")


def shortened(said: str) -> str:
    """One line of at most MESSAGE_CHARS characters, and how many there were."""
    line = " ".join(said.split())
    return line if len(line) <= MESSAGE_CHARS else f"{line[:MESSAGE_CHARS]}… ({len(line)} characters)"


def read_answer(body: bytes, words: Callable[[str], str] = shortened) -> Answer:
    """The answer in a 200 reply. Raises Transient where the reply is cut or no JSON, Refused where it has no text."""
    reply = _decode(body, words)
    if not reply.choices:
        if reply.error is not None:  # a gateway's way of passing on an error of the model behind it
            raise Transient("error_in_answer", words(str(reply.error)), 200)
        raise Refused("no_choices", f"no `choices` in the answer: {words(body.decode())}", 200)
    choice = reply.choices[0]
    text, reason = choice.message.content or "", choice.finish_reason or "unknown"
    if not text.strip():
        said = f"; refusal: {words(choice.message.refusal)}" if choice.message.refusal else ""
        raise Refused("empty_answer", f"the answer has no text (finish_reason {reason}){said}", 200)
    return Answer(text, reason, reply.model, reply.usage or Usage())


def _decode(body: bytes, words: Callable[[str], str]) -> _Reply:
    try:
        try:
            return _decoder.decode(body)
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError:
            return _decoder.decode(_without_surrogates(body))
    except msgspec.ValidationError as error:
        raise Refused(
            "wrong_shape",
            f"not a chat completion: {error}: {words(body.decode(errors='replace')) or 'nothing at all'}",
            200,
        ) from None
    except ValueError:
        raise Transient(
            "not_json", f"no JSON, or cut short: {words(body.decode(errors='replace')) or 'nothing at all'}", 200
        ) from None


def _without_surrogates(body: bytes) -> bytes:
    r"""The same JSON with U+FFFD for half a surrogate pair ("\ud83d"): Python reads it, UTF-8 cannot write it."""
    text = json.dumps(json.loads(body), ensure_ascii=False)
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()


def retry_after(headers: httpx2.Headers, now: float | None = None) -> float:
    """Seconds to wait as the server asks: `retry-after-ms`, or `Retry-After` in seconds or as a date; else 0."""
    try:
        if "retry-after-ms" in headers:
            seconds = float(headers["retry-after-ms"]) / 1000
        else:
            seconds = float(headers.get("retry-after", 0))
    except ValueError:
        try:
            moment = parsedate_to_datetime(headers.get("retry-after", ""))
        except ValueError:
            return 0
        seconds = moment.timestamp() - (time() if now is None else now)
    return seconds if 0 < seconds < float("inf") else 0


def _said(error: openai.APIStatusError) -> str:
    """What the server said, without what the package puts around it."""
    if error.status_code < 400:
        return f"it redirects to {error.response.headers.get('location', 'nowhere')}"
    said = error.body.get("message") if isinstance(error.body, dict) else None
    return said if isinstance(said, str) and said.strip() else error.response.text


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
