"""What a reply of the endpoint means: an answer, or the error that it carries. Pure: reads and writes nothing.

    CallFailed
    ├── Transient   can heal: 408, 429 for rate, 5xx, connection lost, timeout, truncated or no JSON
    ├── Refused     final for this request: any other 4xx, an answer with no text or of the wrong shape
    └── Rejected    final for the run: 401, 403, an exhausted quota, a model or URL that is not there

docs/generation.md lists them all, with what becomes of each.
"""

import json
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from time import time
from typing import Annotated, Any, NamedTuple

import msgspec

from pipeline.records import Usage

MESSAGE_CHARS = 1000  # of a server's words, kept in an error


class CallFailed(Exception):
    """One attempt that brought no answer: the error's type, the HTTP status (None: no reply), the server's words."""

    def __init__(
        self,
        error: str,
        message: str,
        status: int | None = None,
        *,
        retry_after: float = 0,
        usage: Usage | None = None,
        parameter: str | None = None,
    ) -> None:
        super().__init__(message)
        self.error, self.message, self.status, self.retry_after = error, message, status, retry_after
        self.usage = usage  # where the server counted it all the same
        self.parameter = parameter  # which the server says is wrong

    @property
    def maybe_billed(self) -> bool:
        """Whether the endpoint may have worked for it: an answer that was no use, or one that never came whole."""
        return self.status == 200 or (self.status is None and self.error != "unreachable")


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


_Tokens = Annotated[int, msgspec.Meta(ge=0, le=2**40)]  # anything else is no count


class _Details(msgspec.Struct):
    reasoning_tokens: _Tokens | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: _Tokens | None = None
    completion_tokens: _Tokens | None = None
    total_tokens: _Tokens | None = None
    completion_tokens_details: _Details | None = None


class _Message(msgspec.Struct):
    content: str | None = None
    refusal: str | None = None


class _Choice(msgspec.Struct):
    message: _Message
    finish_reason: str | None = None


class _Reply(msgspec.Struct):
    choices: list[_Choice] | None = None
    model: str | None = None
    usage: _Usage | None = None
    error: object = None


_decoder = msgspec.json.Decoder(_Reply)


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
    choice, usage = reply.choices[0], _usage(reply.usage)
    text, reason = choice.message.content or "", choice.finish_reason or "unknown"
    if reason == "content_filter":
        raise Refused("content_filter", "the provider's content filter cut the answer", 200, usage=usage)
    if not text.strip():
        if choice.message.refusal:
            raise Refused("refusal", f"the model refuses: {words(choice.message.refusal)}", 200, usage=usage)
        thought = f", {usage.reasoning_tokens} reasoning tokens" if usage.reasoning_tokens else ""
        raise Refused("empty_answer", f"the answer has no text (finish_reason {reason}{thought})", 200, usage=usage)
    return Answer(text, reason, reply.model, usage)


def read_error(
    status: int, body: bytes, headers: Mapping[str, str], words: Callable[[str], str] = shortened
) -> CallFailed:
    """What a reply other than 200 means. The messages of a Rejected name no URL and no key: the client adds them."""
    said = _said(body)
    message = words(said.message) or "no words"
    if status == 429 and "insufficient_quota" in (said.code, said.type):
        return Rejected("insufficient_quota", message, status)
    if status == 429:
        return Transient("rate_limited", message, status, retry_after=retry_after(headers))
    if status == 408 or status >= 500:
        return Transient("server_error", message, status, retry_after=retry_after(headers))
    if status in (401, 403):
        return Rejected("unauthorized", message, status)
    if status < 400:
        return Rejected("not_found", f"it redirects to {headers.get('location', 'nowhere')}", status)
    if status in (404, 405):
        return Rejected("not_found", message, status)
    kind = "content_filter" if said.code == "content_filter" else "bad_request"
    return Refused(kind, message, status, parameter=said.param)


def retry_after(headers: Mapping[str, str], now: float | None = None) -> float:
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


class _Said(NamedTuple):
    message: str
    code: str | None = None
    type: str | None = None
    param: str | None = None


def _said(body: bytes) -> _Said:
    """A server's words out of an error's body: OpenAI's shape, FastAPI's `detail`, or whatever else it is."""
    text = body.decode(errors="replace")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return _Said(text)
    inner = data.get("error", data) if isinstance(data, dict) else data
    if not isinstance(inner, dict):
        return _Said(inner if isinstance(inner, str) else text)
    message = inner.get("message")
    code, kind, param = (_text(inner.get(name)) for name in ("code", "type", "param"))
    return _Said(message if isinstance(message, str) and message.strip() else text, code, kind, param)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _usage(usage: _Usage | None) -> Usage:
    if usage is None:
        return Usage()
    details, completion_tokens = usage.completion_tokens_details, usage.completion_tokens
    if completion_tokens is not None and usage.prompt_tokens is not None and usage.total_tokens is not None:
        # Some (xAI, gateways to Gemini) bill reasoning as completion and count it in the total alone.
        completion_tokens = max(completion_tokens, usage.total_tokens - usage.prompt_tokens)
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=completion_tokens,
        reasoning_tokens=details.reasoning_tokens if details else None,
    )


def _decode(body: bytes, words: Callable[[str], str]) -> _Reply:
    try:
        return _decoder.decode(body)
    except (ValueError, RecursionError):
        pass  # not as it should be: is there an answer in it all the same?
    try:
        return msgspec.convert(_repaired(json.loads(body)), _Reply)
    except (msgspec.ValidationError, RecursionError) as error:
        raise Refused(
            "wrong_shape",
            f"not a chat completion: {error}: {words(body.decode(errors='replace')) or 'nothing at all'}",
            200,
        ) from None
    except ValueError:
        raise Transient(
            "not_json", f"no JSON, or cut short: {words(body.decode(errors='replace')) or 'nothing at all'}", 200
        ) from None


def _repaired(data: Any) -> Any:
    """A reply with what is odd in it put right, as far as its text does not depend on it: it has been paid for.

    Half a surrogate pair ("\\ud83d") is U+FFFD: Python reads it, UTF-8 cannot write it. A content of parts (Mistral's
    models that think) is the text of its text parts. A `usage` that is no count is none.
    """
    text = json.dumps(data, ensure_ascii=False)
    data = json.loads(text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace"))
    if not isinstance(data, dict):
        return data
    try:
        data["usage"] = msgspec.convert(data.get("usage"), _Usage | None, strict=False)
    except msgspec.ValidationError:
        data["usage"] = None
    data["model"] = _text(data.get("model"))
    for choice in data["choices"] if isinstance(data.get("choices"), list) else []:
        if isinstance(choice, dict):
            choice["finish_reason"] = _text(choice.get("finish_reason"))
            message = choice.get("message")
            if isinstance(message, dict) and isinstance(message.get("content"), list):
                message["content"] = "".join(map(_part_text, message["content"]))
    return data


def _part_text(part: Any) -> str:
    """The text of a content's part; none of one that is a thought, or no text at all."""
    return (_text(part.get("text")) or "") if isinstance(part, dict) and part.get("type") == "text" else ""
