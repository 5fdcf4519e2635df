"""The records that stages hand to each other: JSONL, UTF-8, one object a line.

Reads and writes nothing but such lines. Decoding checks types; a bad line is a DataError `path:line: reason`. A field
that has its default value is left out of the line, except in `usage`.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from pipeline.errors import DataError

BOM = b"\xef\xbb\xbf"  # byte order mark: Notepad and Excel begin a file with it
LONGEST_LINE = 1 << 24  # bytes of a record; filters take no longer line
LONGEST_PROMPT = LONGEST_LINE - (1 << 20)  # bytes of a prompt with all that its row has: the rest is for the answer

Part = Literal["train", "validation", "test"]
Slots = dict[str, str | list[str]]
Json = dict[str, Any]  # a JSON object


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """One chat turn, as the OpenAI chat format has it."""

    role: str
    content: str
    tool_calls: list[Json] = []  # of an assistant turn: {"id", "type": "function", "function": {"name", "arguments"}}
    tool_call_id: str = ""  # of a turn with the role `tool`: the call that it answers


class Prompt(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One question, as the student will be asked it. `slots` holds what the template was filled with, for adherence."""

    id: str
    messages: list[Message]
    slots: Slots = {}
    reference: Any = None  # what a right answer is held against: any JSON; None: nothing is known
    columns: Json = {}  # the row's further columns, as the user wrote them
    tools: list[Json] = []  # the functions that the teacher may call, in the OpenAI format
    part: Part | None = None  # what it is for in its run (pipeline.prompts_config); None: it belongs to no run


class Usage(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Tokens as the server counted them; None if it did not say."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    reasoning_tokens: int | None = None  # part of the completion's: spent before the answer began


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What identifies one answer. `id` is the hash of all that determines it (see generate.jobs)."""

    id: str
    prompt_id: str
    messages: list[Message]  # as the student will be asked; what only the teacher is told is in the recipe
    slots: Slots = {}
    reference: Any = None  # with `columns`: the prompt's own; not part of the identity
    columns: Json = {}
    tools: list[Json] = []  # the prompt's own
    sample: int = 0  # the number of this answer among those to the same question
    endpoint: str
    sampling: Json


Asked = Prompt | Request  # a prompt, or a record made of it: a request, an answer


def asked_fields(record: Asked) -> Json:
    """The fields that a prompt and every record made of it have in common, by name."""
    return {name: getattr(record, name) for name in ("messages", "slots", "reference", "columns", "tools")}


class Completion(Request, frozen=True, kw_only=True):
    """One teacher answer: the only shape that leaves `generate`. An error never becomes `text`."""

    text: str  # without the reasoning; may be empty if there are tool calls
    reasoning: str = ""  # what the model thought before it answered
    tool_calls: list[Json] = []  # in the OpenAI format, as in Message
    finish_reason: str
    model: str  # as the server named it
    usage: Usage
    latency_s: float  # of the attempt that succeeded
    attempts: int
    created: str  # ISO 8601, UTC


class Failure(Request, frozen=True, kw_only=True):
    """One request that failed for good."""

    model: str  # as requested
    error: str  # the error's type
    status: int | None  # the HTTP status; None: no reply
    message: str
    attempts: int
    created: str  # ISO 8601, UTC
    usage: Usage | None = None  # of the last attempt, as `latency_s`; None: no reply that has it
    latency_s: float = 0.0


class TokenLogprobs(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the teacher would have said at each token of an answer: a line of logprobs.jsonl.

    Arrays are little-endian, in rows, without a header (base64 in the line): `chosen` int32 (tokens), `likeliest` int32
    (tokens, top), `logprobs` float16 (tokens, top), in nats. A token is an id, or an index into `names` unless that is
    empty; -1 fills rows that have fewer than `top` tokens.
    """

    id: str  # of the answer; of two lines with one id the later counts
    top: int
    chosen: bytes
    likeliest: bytes
    logprobs: bytes
    names: list[bytes] = []  # the tokens' bytes, if the server gave no ids


class Kept(Completion, frozen=True, kw_only=True):
    """An answer worth learning from."""

    scores: dict[str, float] = {}


class Preference(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Two answers to one prompt, one of them the better."""

    id: str  # of the answer preferred, a colon, and the id of the other
    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: list[Json] = []


class Reason(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Why one rule drops an answer, as data; `filters.reasons.describe` says it in words. Unset fields stay out."""

    rule: str  # its label in reports: `length`, `length#2`, the name of a user's function
    what: str = ""  # what was looked at, where a rule looks at several things: a setting, a script, `answer`, `prompt`
    value: int | float | None = None  # what was measured: characters, occurrences, a share (0 to 1), a score, a rank
    at_least: int | float | None = None  # the limit that `value` is under
    at_most: int | float | None = None  # the limit that `value` is over
    count: int | None = None  # how often it occurs, or how many of `total`
    total: int | None = None
    n: int | None = None  # words of an n-gram, sentences of a span
    found: str = ""  # the words of the answer that decided
    allowed: list[str] = []  # what would have been right in place of `found`
    missing: dict[str, list[str]] = {}  # slot: values that the answer does not name
    of: str = ""  # id of the row that this one is like
    source: str = ""  # the run or file which has that row; empty: this run
    similarity: float | None = None  # Jaccard, 0 to 1; None: the same text, once folded
    scores: dict[str, int] = {}  # the judge's criteria under the minimum
    note: str = ""  # the words of a user's function, or of the judge's server


class Dropped(Completion, frozen=True, kw_only=True):
    """An answer left out: `rule` is the first that dropped it, `detail` every rule's reason, in the rules' order."""

    rule: str
    detail: list[Reason]


def folded(text: str) -> str:
    """A text normalised for comparison: Unicode form, case and spacing do not matter."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def said(turn: "Message | Completion") -> str:
    """What a turn or an answer says, as one text: tool calls follow the words, each with its arguments."""
    words = turn.content if isinstance(turn, Message) else turn.text
    if not turn.tool_calls:
        return words
    calls = [f"{call['function']['name']} {call['function']['arguments']}" for call in turn.tool_calls]
    return "\n".join([words, *calls] if words else calls)


def question_text(messages: Sequence[Message]) -> str:
    """A conversation as one text, normalised for comparison: equal for the same question."""
    return "\0".join(folded(part) for message in messages for part in (message.role, said(message)))


def as_text(value: Any) -> str:
    """A JSON value, a reference for one, as people read it: a text as it is, anything else as JSON."""
    return value if isinstance(value, str) else _encoder.encode(value).decode()


Record = TypeVar("Record")
Value = TypeVar("Value")

_encoder = msgspec.json.Encoder()


def encode_line(record: msgspec.Struct) -> bytes:
    """One JSONL line, its newline included."""
    return _encoder.encode(record) + b"\n"


def read_jsonl(path: Path, kind: type[Record]) -> Iterator[Record]:
    """Streams the records of a JSONL file. Blank lines and a byte order mark are ignored.

    Raises DataError `path:line: reason` at the first line that is not a `kind`, or if the file does not exist.
    """
    decoder = msgspec.json.Decoder(kind)
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; run the stage that writes it first") from None
    with file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(BOM)
            if not line.strip():
                continue
            try:
                yield decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise DataError(f"{path}:{number}: {error}") from None


def read_json(path: Path, kind: type[Value], fix: str) -> Value | None:
    """The value of a JSON file; None if there is no file. Raises DataError, with the fix, if it is no `kind`."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    return decode_json(data, kind, path, fix)


def decode_json(data: bytes, kind: type[Value], where: Path | str, fix: str) -> Value:
    """A value out of its JSON. Raises DataError `where: reason; fix`."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{where}: {error}; {fix}") from None
