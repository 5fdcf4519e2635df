"""What one attempt brought: answers, or a `Fault` in the place of one. Facts only: generate.verdict says what follows.

Pure: reads the bytes, status and headers of an HTTP reply. Every text in the result went through the `words` that the
caller gives, which hides secrets (pipeline.address) and shortens.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from itertools import accumulate, pairwise
from time import time
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec

from pipeline.reasoning import split_reasoning
from pipeline.records import Json, Usage
from pipeline.turns_and_tools import ToolCall

Shape = TypeVar("Shape")

MESSAGE_CHARS = 1000  # of a server's words, kept in an error
# Finish reasons. The answer is not whole: of vLLM, SGLang and gateways, DeepSeek, Zhipu.
BROKEN_OFF = ("error", "abort", "insufficient_system_resource", "network_error")
# A filter cut it: OpenAI's, which Gemini gives with a cause behind a colon; and, through gateways, Gemini's own,
# Anthropic's (`refusal`), Bedrock's and Zhipu's (`sensitive`).
FILTERED = (
    *("content_filter", "safety", "recitation", "prohibited_content", "blocklist", "spii", "sensitive"),
    *("refusal", "content_filtered", "guardrail_intervened"),
)
EMPTY = ("empty_answer", "thought_cut_off")  # faults of a model that ended, or was cut, before it said anything
# Others' words for `stop` and `length`: of Together and TGI, Anthropic and Bedrock, and, through gateways, Gemini.
ENDINGS = dict.fromkeys(("stop", "eos", "eos_token", "end_turn", "stop_sequence"), "stop") | {"max_tokens": "length"}
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # what could move the cursor of a terminal, or worse
TITLE = re.compile(r"\A\s*<(?:!doctype html|html)\b.*?<title>([^<]*\S[^<]*)</title>", re.IGNORECASE | re.DOTALL)
TOO_LARGE = re.compile(r"\bRequest too large for ")  # OpenAI's 429 to one that has more tokens than a minute allows
GATEWAY_TIMEOUTS = (504, 524)  # the server behind it may go on
# A quota that is used up, so that waiting for seconds does not help: by its code or type (OpenAI, LiteLLM), or by words
# (Anthropic, LiteLLM, xAI, Fireworks). Gemini names the quota; even for that of a day it says to wait for seconds.
QUOTA_CODES = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "budget_exceeded"}
QUOTA_WORDS = re.compile(
    rb"credit balance is too low to access|Budget has been exceeded!.{0,200}Max budget|ExceededBudget: |"
    rb"[Ee]xceeded budget for (?:model|deployment)|monthly spending limit(?:\. To continue| or failure to pay)|"
    rb'"quotaId": ?"\w*PerDay'
)


class Answer(NamedTuple):
    """What the teacher said."""

    text: str
    finish_reason: str
    model: str | None  # as the server named it
    usage: Usage
    reasoning: str = ""  # what it thought before
    tool_calls: Sequence[Json] = ()  # as in a Message
    logprobs: Any = None  # of its tokens, as the server gave them


class Fault(NamedTuple):
    """An attempt that brought no answer."""

    error: str  # its type, as in failures.jsonl; docs/generation.md lists them
    message: str  # the server's words
    status: int | None = None  # HTTP; None: no reply
    retry_after_s: float = 0.0  # how long the server asks to wait
    usage: Usage | None = None  # where the server counted the tokens all the same; of a choice: its part
    parameter: str | None = None  # the field of the request that the server says is wrong

    @property
    def maybe_billed(self) -> bool:
        """Whether the endpoint may have worked on it: an answer of no use, or one that never came whole."""
        never_whole = self.status is None and self.error != "unreachable"
        return self.status == 200 or self.status in GATEWAY_TIMEOUTS or never_whole


_Tokens = Annotated[int, msgspec.Meta(ge=0, le=2**40)]  # anything else is no count


class Choices(NamedTuple):
    """A reply of success: each choice is an answer, or what came in its place."""

    outcomes: list[Answer | Fault]
    usage: Usage  # of all of them; each has its part of it


class _Details(msgspec.Struct):
    reasoning_tokens: _Tokens | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: _Tokens | None = None
    completion_tokens: _Tokens | None = None
    total_tokens: _Tokens | None = None
    completion_tokens_details: _Details | None = None


class _Message(msgspec.Struct):
    content: str | list[Any] | None = None
    refusal: str | None = None
    reasoning: Any = None  # vLLM, OpenRouter
    reasoning_content: Any = None  # DeepSeek, SGLang, older vLLM
    tool_calls: list[ToolCall] | None = None


class _Choice(msgspec.Struct):
    message: _Message
    error: Any = None  # OpenRouter
    finish_reason: Any = None
    logprobs: Any = None


class _Reply(msgspec.Struct):
    choices: list[_Choice] | None = None
    model: Any = None
    usage: Any = None
    error: Any = None


_decoder = msgspec.json.Decoder(_Reply)


def shortened(said: str) -> str:
    """One line of at most MESSAGE_CHARS characters that a file and a terminal can take, and how many there were."""
    line = " ".join(CONTROL.sub(" ", said).split()).encode(errors="replace").decode()
    return line if len(line) <= MESSAGE_CHARS else f"{line[:MESSAGE_CHARS]}… ({len(line)} characters)"


def read_answer(body: bytes, words: Callable[[str], str] = shortened) -> Answer | Fault:
    """The one answer in a reply of success, or why there is none."""
    reply = read_choices(body, words)
    return reply if isinstance(reply, Fault) else reply.outcomes[0]


def read_choices(body: bytes, words: Callable[[str], str] = shortened, most: int = 1) -> Choices | Fault:
    """The choices in a reply of success, the first `most` of them, or why there are none."""
    reply = decode(_decoder, body, words)
    if isinstance(reply, Fault):
        return reply
    # A gateway passes on an error of the model behind it; without choices an empty one is an error, too.
    if reply.error or (reply.error is not None and not reply.choices):
        status = 200 if reply.choices else _status_in(reply.error)
        if status != 200:
            return read_error(status, body, {}, words)
        return Fault("error_in_answer", words(str(reply.error)), 200)
    if not reply.choices:
        return Fault("no_choices", f"no `choices` in the answer: {words(body.decode(errors='replace'))}", 200)
    choices, usage, model = reply.choices[:most], read_usage(reply.usage), _text(reply.model)
    model = words(model) if model else model  # it is shown in cards, too
    said = [_said_by(choice.message) for choice in choices]
    if usage.completion_tokens == 0 and any(map(any, said)):  # a gateway that does not count
        usage = msgspec.structs.replace(usage, completion_tokens=None)
    usages = [usage] if len(choices) == 1 else _divided(usage, said)
    outcomes = [_read(*one, model, words) for one in zip(choices, said, usages, strict=True)]
    return Choices(outcomes, usage)


class _Said(NamedTuple):
    """What the model says in one choice."""

    reasoning: str
    text: str
    calls: list[Json]


def _read(choice: _Choice, said: _Said, usage: Usage, model: str | None, words: Callable[[str], str]) -> Answer | Fault:
    """The answer of a choice, or why it is none."""
    reasoning, text, calls = said
    reason = words(_text(choice.finish_reason) or "unknown")
    reason = ENDINGS.get(reason.lower(), reason)
    if broken := broken_off(reason, choice.error, words):
        return broken._replace(usage=usage)
    if not text.strip() and not calls:
        if choice.message.refusal:
            return Fault("refusal", f"the model refuses: {words(choice.message.refusal)}", 200, usage=usage)
        return _empty(reason, said, usage)
    return Answer(text, reason, model, usage, reasoning, calls, choice.logprobs)


def _status_in(error: Any) -> int:
    """The HTTP status that an error in a reply of success says in `code` (OpenRouter); 200 if it says none."""
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) and 400 <= code < 600 else 200


def broken_off(reason: Any, error: Any, words: Callable[[str], str]) -> Fault | None:
    """Why an answer is not whole, by its finish reason and the error that came with it; None if it may be."""
    if error or reason in BROKEN_OFF:
        return Fault("error_in_answer", words(str(error or f"finish_reason {reason}")), 200)
    if str(reason).partition(":")[0].lower() in FILTERED:
        return Fault("content_filter", "the provider's content filter cut the answer", 200)
    return None


def read_error(status: int, body: bytes, headers: Mapping[str, str], words: Callable[[str], str] = shortened) -> Fault:
    """What a reply without success says."""
    error = _error_in(body)
    message = words(error.message) or "no words"
    if status < 400:
        return Fault("not_found", words(f"it redirects to {headers.get('location', 'nowhere')}"), status)
    if status == 407:
        return Fault("unreachable", f"the proxy of the environment answers 407: {message}", status)
    used_up = {error.code, error.type} & QUOTA_CODES or QUOTA_WORDS.search(body)
    if status == 402 or (status < 500 and used_up):
        return Fault("insufficient_quota", message, status)
    if status == 429 and not TOO_LARGE.search(message):
        return Fault("rate_limited", message, status, retry_after_s=retry_after(headers) or _retry_delay(body, headers))
    if status == 408 or status >= 500:
        return Fault("server_error", message, status, retry_after_s=retry_after(headers))
    if status == 400 and (b"API_KEY_INVALID" in body or message.startswith("Incorrect API key")):  # Gemini, xAI
        return Fault("unauthorized", message, status)
    named = {401: "unauthorized", 403: "forbidden", 404: "not_found", 405: "not_found"}
    kind = "content_filter" if error.code == "content_filter" else named.get(status, "bad_request")
    return Fault(kind, message, status, parameter=error.param)


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds to wait as the server asks: `retry-after-ms`, or `Retry-After` in seconds or as a date; else 0.

    A date is held against the server's own clock (`Date`): this machine's may be wrong.
    """
    try:
        if "retry-after-ms" in headers:
            seconds = float(headers["retry-after-ms"]) / 1000
        else:
            seconds = float(headers.get("retry-after", 0))
    except ValueError:
        moment = _moment(headers.get("retry-after", ""))
        seconds = moment - (_moment(headers.get("date", "")) or time()) if moment else 0
    return seconds if 0 < seconds < float("inf") else 0


def _retry_delay(body: bytes, headers: Mapping[str, str]) -> float:
    """Seconds to wait as the body says in place of a header: of Gemini (google.rpc.RetryInfo), OpenRouter; else 0."""
    if found := re.search(rb'"retryDelay":\s*"(\d+(?:\.\d+)?)s"', body):
        return float(found[1])
    found = re.search(rb'"X-RateLimit-Reset":\s*"(\d{13})"', body)  # milliseconds since 1970
    return max(int(found[1]) / 1000 - (_moment(headers.get("date", "")) or time()), 0.0) if found else 0.0


def _moment(date: str) -> float | None:
    try:
        return parsedate_to_datetime(date).timestamp()
    except (ValueError, OverflowError):
        return None


class _ErrorBody(NamedTuple):
    message: str
    code: str | None = None
    type: str | None = None
    param: str | None = None


def _error_in(body: bytes) -> _ErrorBody:
    """A server's words from the body of an error: OpenAI's shape, FastAPI's `detail`, or whatever else it is."""
    text = body.decode(errors="replace")
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        page = TITLE.search(text)  # of a proxy, or Cloudflare
        return _ErrorBody(f"a web page: {page[1].strip()}" if page else text)
    if isinstance(data, list) and data:  # Gemini
        data = data[0]
    inner = data.get("error", data) if isinstance(data, dict) else data
    if not isinstance(inner, dict):
        return _ErrorBody(_text(inner) or text)
    message, code, kind, param = (_text(inner.get(name)) for name in ("message", "code", "type", "param"))
    match inner.get("detail"):
        case [{"loc": [*_, str(field)]}, *_]:  # [{"loc": ["body", "seed"], …}]
            param = param or field
    param = None if param in ("", "None") else param  # LiteLLM's words for none
    message = message if message and message.strip() else text
    match inner.get("metadata"):
        case {"raw": str(raw)} if raw.strip():  # OpenRouter: what the provider said
            provider = _error_in(raw.encode(errors="replace"))
            message, code, param = f"{message}: {provider.message}", code or provider.code, param or provider.param
    return _ErrorBody(message, code, kind, param)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def read_usage(said: Any) -> Usage:
    """The tokens that the server counted; unknown where it says nothing, or what is no count."""
    try:
        usage = msgspec.convert(said or {}, _Usage, strict=False)
    except msgspec.ValidationError:
        return Usage()
    details, completion_tokens = usage.completion_tokens_details, usage.completion_tokens
    if usage.prompt_tokens == 0:
        return Usage()  # no prompt has no tokens: a gateway that does not count
    if usage.prompt_tokens is not None and usage.total_tokens is not None:
        # Some (xAI, Gemini) bill reasoning as completion and count it in the total alone.
        completion_tokens = max(completion_tokens or 0, usage.total_tokens - usage.prompt_tokens) or completion_tokens
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=completion_tokens,
        reasoning_tokens=details.reasoning_tokens if details else None,
    )


def _divided(usage: Usage, said: Sequence[_Said]) -> list[Usage]:
    """Each choice's part of what all have used: the sums are exact, the parts of the completion are estimates.

    The prompt is divided evenly, thoughts and answers by their characters.
    """
    thought = min(usage.reasoning_tokens or 0, usage.completion_tokens or 0)
    parts = zip(
        _shares(usage.prompt_tokens or 0, [1 for _ in said]),
        _shares(thought, [len(one.reasoning) + 1 for one in said]),
        _shares((usage.completion_tokens or 0) - thought, [len(one.text) + len(str(one.calls)) for one in said]),
        strict=True,
    )
    return [
        Usage(
            prompt_tokens=None if usage.prompt_tokens is None else prompt,
            completion_tokens=None if usage.completion_tokens is None else thinking + answering,
            reasoning_tokens=None if usage.reasoning_tokens is None else thinking,
        )
        for prompt, thinking, answering in parts
    ]


def _shares(total: int, weights: Sequence[int]) -> list[int]:
    """Whole numbers in proportion to the weights, whose sum is `total`."""
    ends = [total * weight // sum(weights) for weight in accumulate(weights)]
    return [end - begin for begin, end in pairwise([0, *ends])]


def _said_by(message: _Message) -> _Said:
    """What the model thought, wherever the server put it, and what it answered."""
    tagged, text = split_reasoning(joined_text(message.content))
    thoughts = (_text(message.reasoning), _text(message.reasoning_content), thinking_text(message.content), tagged)
    calls = [call.json(number) for number, call in enumerate(message.tool_calls or (), start=1)]
    return _Said(next((one.strip() for one in thoughts if one and one.strip()), ""), text, calls)


def joined_text(content: Any) -> str:
    """The text of a content of parts, or of a plain one."""
    if not isinstance(content, list):
        return _text(content) or ""
    return "".join(_text(part.get("text")) or "" for part in _parts(content, "text"))


def thinking_text(content: Any) -> str:
    """What the model thought, from a content of parts (Mistral's models)."""
    return "".join(joined_text(part.get("thinking")) for part in _parts(content, "thinking"))


def _parts(content: Any, kind: str) -> list[Json]:
    parts = content if isinstance(content, list) else []
    return [part for part in parts if isinstance(part, dict) and part.get("type") == kind]


def _empty(finish_reason: str, said: _Said, usage: Usage) -> Fault:
    """An answer without text; a model that thinks may never have come to it."""
    thought = f", {usage.reasoning_tokens} reasoning tokens" if usage.reasoning_tokens else ""
    why = f"the answer has no text (finish_reason {finish_reason}{thought})"
    hidden = usage.completion_tokens and not said.text  # tokens that are in no field: Gemini does not show its thoughts
    if finish_reason == "length" and (thought or said.reasoning or hidden):
        perhaps = "" if thought or said.reasoning else "before any text, perhaps "  # or in tokens that are never text
        why += f": it was cut off {perhaps}while the model was thinking; raise sampling.max_tokens"
        return Fault("thought_cut_off", why, 200, usage=usage)
    if said.reasoning:
        why += ": all that came is reasoning; does the server's parser of it (--reasoning-parser) fit the model?"
    return Fault("empty_answer", why, 200, usage=usage)


def decode(decoder: msgspec.json.Decoder[Shape], body: bytes, words: Callable[[str], str]) -> Shape | Fault:
    """The JSON of a reply or of an event of it, or why it is none."""
    try:
        return decoder.decode(body)
    except (ValueError, RecursionError):
        pass  # Python's own reader takes more: UTF-16, NaN, and half a surrogate pair ("\ud83d")
    said = words(body.decode(errors="replace")) or "nothing at all"
    try:
        text = json.dumps(json.loads(body), ensure_ascii=False)
        # UTF-8 cannot write half a surrogate pair: it becomes U+FFFD.
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return msgspec.convert(json.loads(text), decoder.type)
    except (msgspec.ValidationError, RecursionError) as error:
        return Fault("wrong_shape", f"not a chat completion: {error}: {said}", 200)
    except ValueError:
        return Fault("not_json", f"no JSON, or cut short: {said}", 200)
