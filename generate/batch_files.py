"""The files of a run's batches: requests, answers, and the state of each batch. No network.

    batches/state.json          the chunks, and how far each is
    batches/001.input.jsonl     a chunk's requests, as OpenAI's Batch API and `vllm run-batch` read them
    batches/001.output.jsonl    its answers, as they were downloaded

Every file appears by rename, so a killed process leaves the old state or the new one.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec

from generate.jobs import Job
from generate.prices import Price
from generate.reply import Answer, Fault, read_answer, read_error
from generate.tokens import bound
from pipeline.records import read_json, read_jsonl
from pipeline.rundir import replacing, write_json

MOST_REQUESTS = 50_000  # per file (OpenAI, "Batch API", rate limits)
MOST_BYTES = 190_000_000  # of 200 MB
PATH = b"/v1/chat/completions"
FIX = (
    "it says which batches are under way: fix it, or move its folder away to ask again; if it is of another version, "
    "finish the batches with that one"
)
ENDED = ("completed", "failed", "expired", "cancelled")  # statuses of a batch
FULL = "token_limit_exceeded"  # of a chunk: the account has its limit enqueued, so its batch is created later
NO_LINE = Fault("no_response", "the batch ended without a line for this request")
NO_OUTCOME = Fault("no_response", "the batch ended without an answer")  # of a line without `response` and `error`
COLLECTED = '"collected": true'  # what a user sets in state.json to give a batch up


class Chunk(msgspec.Struct, kw_only=True):
    """A file of requests that becomes one batch, and how far it is."""

    name: str  # 001, 002, …
    requests: int
    file_id: str | None = None  # once it is uploaded
    batch_id: str | None = None  # once it is created
    status: str = "written"
    price: Price | None = None  # when it was written; None: not known, or a file of an older version
    prompt_tokens: int = 0  # the most that its requests can have; 0: a file of an older version
    completion_tokens: int = 0  # likewise
    collecting: bool = False  # it is charged, and is being recorded, or a call was killed while it was
    unsaid_tokens: int = 0  # from then on: the part of its cost that the journals do not say
    unsaid_cost: int = 0  # likewise, in pico-dollars
    collected: bool = False  # all that came of it is in the journals


class _State(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    key: str  # tells this run's batches from others of the same account
    chunks: list[Chunk] = []


def chunks_in(path: Path) -> list[Chunk]:
    """The chunks in a run's `batches/`. Raises DataError."""
    state = read_json(path / "state.json", _State, FIX)
    return state.chunks if state else []


def under_way(path: Path) -> list[Chunk]:
    """The chunks there that were uploaded and are not collected: each has a batch, or may have one."""
    return [chunk for chunk in chunks_in(path) if chunk.file_id and not chunk.collected]


class Folder:
    """The run's `batches/`."""

    def __init__(self, path: Path) -> None:
        """Raises DataError if the state exists and cannot be read."""
        self.path, self._file = path, path / "state.json"
        path.mkdir(parents=True, exist_ok=True)
        self.state = read_json(self._file, _State, FIX) or _State(key=uuid4().hex)

    @property
    def live(self) -> list[Chunk]:
        """The chunks that are not collected yet."""
        return [chunk for chunk in self.state.chunks if not chunk.collected]

    @property
    def any_at_work(self) -> bool:
        """Whether a batch of this run has not ended."""
        return any(chunk.batch_id and chunk.status not in ENDED for chunk in self.live)

    def save(self) -> None:
        write_json(self._file, self.state)

    def file(self, chunk: Chunk, kind: str) -> Path:
        """A chunk's `input`, `output` or `error` file."""
        return self.path / f"{chunk.name}.{kind}.jsonl"

    def is_recorded(self, output: Path) -> bool:
        """Whether it is the output of a batch that this run has downloaded, and has recorded to the end."""
        recorded = (chunk for chunk in self.state.chunks if chunk.collecting and chunk.collected)
        return output.resolve() in {self.file(chunk, "output").resolve() for chunk in recorded}

    def sent(self, chunk: Chunk) -> dict[str, dict[str, Any]]:
        """The sampling values that each request of a chunk went out with, by its id."""
        others = ("model", "messages", "tools")
        return {
            line.custom_id: {name: value for name, value in line.body.items() if name not in others}
            for line in read_jsonl(self.file(chunk, "input"), _Input)
        }

    def write(self, jobs: Iterable[Job], price: Price | None, most: int | None = None) -> list[Chunk]:
        """Writes the requests as chunks, streamed. The chunks are in the state when this returns.

        `price`: of their tokens. `most`: requests per chunk, if fewer than MOST_REQUESTS.
        """
        chunks: list[Chunk] = []
        jobs = iter(jobs)
        job = next(jobs, None)
        while job is not None:
            number, size = len(self.state.chunks) + len(chunks) + 1, 0
            chunk = Chunk(name=f"{number:03}", requests=0, price=price)
            with replacing(self.file(chunk, "input")) as file:
                while job is not None:
                    line = input_line(job)
                    if size and (chunk.requests >= (most or MOST_REQUESTS) or size + len(line) > MOST_BYTES):
                        break
                    size += file.write(line)
                    chunk.requests += 1
                    chunk.prompt_tokens += bound(len(job.body))
                    chunk.completion_tokens += job.request.sampling["max_tokens"]
                    job = next(jobs, None)
            chunks.append(chunk)
        self.state.chunks += chunks
        self.save()
        return chunks


class _Input(msgspec.Struct):
    custom_id: str
    body: dict[str, Any] = {}


class _Response(msgspec.Struct):
    status_code: int
    body: msgspec.Raw = msgspec.Raw(b"")


class _Output(msgspec.Struct):
    custom_id: str
    response: _Response | None = None
    error: dict[str, Any] | str | None = None


def input_line(job: Job) -> bytes:
    """An encoded request as one line of a batch file, with the body that would be sent online."""
    return b'{"custom_id":"%s","method":"POST","url":"%s","body":%s}\n' % (job.request.id.encode(), PATH, job.body)


def read_output(path: Path, words: Callable[[str], str]) -> dict[str, Answer | Fault]:
    """What first became of each request in a batch's output or error file. Raises DataError `path:line: reason`.

    `words` shortens what the provider said and hides secrets in it.
    """
    outcomes: dict[str, Answer | Fault] = {}
    for output in read_jsonl(path, _Output):
        if output.custom_id not in outcomes:
            outcomes[output.custom_id] = _outcome(output, words)
    return outcomes


def _outcome(output: _Output, words: Callable[[str], str]) -> Answer | Fault:
    response, error = output.response, output.error or {}
    if response and response.status_code >= 400 and error and bytes(response.body) in (b"", b"null"):  # as vLLM refuses
        return read_error(response.status_code, msgspec.json.encode(error), {}, words)
    if isinstance(error, str):
        error = {"message": error}
    code, message = error.get("code"), error.get("message")
    if response is None or code or message:
        return Fault(words(str(code or NO_OUTCOME.error)), words(str(message or NO_OUTCOME.message)))
    status, body = response.status_code, bytes(response.body)
    return read_answer(body, words) if status == 200 else read_error(status, body, {}, words)
