"""OpenAI's Files and Batches, as published, on a real local HTTP server: for what only a paid account has.

Objects and statuses as in the API reference ("Batch", "Files"): validating → in_progress → finalizing → completed, or
failed, expired, cancelled; output in another order than the input; lines that failed in an error file of their own;
batches listed newest first, in pages. A step is taken each time a batch is looked at, so tests need not wait.
Faults are scripted by the fields of `FakeBatches`.
"""

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from aiohttp import BodyPartReader, web

from pipeline.recipe import Recipe
from tests.servers.misbehaving_server import recipe_for, reply

STEPS = ("validating", "in_progress", "finalizing")
MOST_REQUESTS = 50_000


@dataclass
class FakeBatches:
    """The account, and what is to go wrong."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    batches: dict[str, dict[str, Any]] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)  # custom_ids that a batch was created with
    calls: Counter[str] = field(default_factory=Counter)
    outcome: Callable[[str, dict[str, Any], int], dict[str, Any]] | None = None  # custom_id, body, batch number → line
    ends: list[str] = field(default_factory=list)  # status of the first, second, … batch; "completed" beyond
    answered_share: float = 1.0  # of a batch that ends otherwise than completed
    lose_reply_of_create: int = 0  # so many creations succeed and are never heard of
    failing_polls: int = 0  # so many answers of 500
    cut_downloads: int = 0
    most_enqueued: int | None = None  # requests of a batch; a larger one fails with token_limit_exceeded
    most_live: int = 99  # batches that may be enqueued; more fail with token_limit_exceeded
    page: int = 2
    unauthorized: bool = False
    no_quota: bool = False
    unknown_model: int = 0  # so many batches fail as a whole
    unknown_id: int = 404  # the status for an id that the account does not know


def batch_recipe(fake: FakeBatches | str, count: int = 10, **sections: Any) -> Recipe:
    url = fake if isinstance(fake, str) else fake.url
    config = {"mode": "batch", "batch_poll_s": 0.01, "max_attempts": 3, "request_timeout_s": 5}
    return recipe_for(url, count, generate=config, **sections)


def priced(fake: FakeBatches, model: str = "stub", usd: float = 1_000_000) -> dict[str, Any]:
    """A teacher whose batch tokens cost $0.50 each: an answer of the fake, $6."""
    return {"model": model, "base_url": fake.url, "price": {"input": usd, "output": usd}}


def line(custom_id: str, status: int = 200, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """One line of an output or error file."""
    response = {
        "status_code": status,
        "request_id": "r",
        "body": reply(f"answer to {custom_id}") if body is None else body,
    }
    return {"id": f"batch_req_{custom_id}", "custom_id": custom_id, "response": response, "error": None}


def expired(custom_id: str) -> dict[str, Any]:
    """The line of a request that the batch had no time for."""
    error = {
        "code": "batch_expired",
        "message": "This request could not be executed before the completion window expired.",
    }
    return {"id": f"batch_req_{custom_id}", "custom_id": custom_id, "response": None, "error": error}


def _problem(status: int, message: str, code: str | None = None) -> web.Response:
    return web.json_response(
        {"error": {"message": message, "type": "invalid_request_error", "code": code}}, status=status
    )


def _app(fake: FakeBatches) -> web.Application:
    async def upload(request: web.Request) -> web.Response:
        if fake.unauthorized:
            return _problem(401, "Incorrect API key provided", "invalid_api_key")
        fake.calls["upload"] += 1
        if fake.no_quota:
            return _problem(429, "You exceeded your current quota", "insufficient_quota")
        data, purpose = b"", ""
        async for part in await request.multipart():
            assert isinstance(part, BodyPartReader)
            if part.name == "file":
                data = bytes(await part.read())
            elif part.name == "purpose":
                purpose = await part.text()
        assert purpose == "batch"
        name = f"file-{len(fake.files) + 1}"
        fake.files[name] = data
        return web.json_response(_file(name, data))

    async def create(request: web.Request) -> web.Response:
        asked = await request.json()
        assert (asked["endpoint"], asked["completion_window"]) == ("/v1/chat/completions", "24h")
        if asked["input_file_id"] not in fake.files:
            return _problem(400, "no such file")
        lines = [json.loads(text) for text in fake.files[asked["input_file_id"]].splitlines()]
        number = len(fake.batches)
        batch = {
            "id": f"batch_{number + 1}",
            "object": "batch",
            "endpoint": asked["endpoint"],
            "errors": None,
            "input_file_id": asked["input_file_id"],
            "completion_window": "24h",
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": 1_700_000_000 + number,
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "metadata": asked.get("metadata"),
        }
        live = sum(other["status"] in STEPS for other in fake.batches.values())
        fake.batches[batch["id"]] = batch
        bad = [
            text for text in lines if set(text) != {"custom_id", "method", "url", "body"} or text["method"] != "POST"
        ]
        if live >= fake.most_live or len(lines) > (fake.most_enqueued or MOST_REQUESTS):
            _failed(batch, "token_limit_exceeded", "Enqueued token limit reached for this organization.")
        elif len(fake.batches) <= fake.unknown_model:
            _failed(batch, "model_not_found", "The model `m` does not exist.")
        elif bad or len(lines) > MOST_REQUESTS or len({text["custom_id"] for text in lines}) < len(lines):
            _failed(batch, "invalid_json_line", "a line is wrong, or there are too many")
        else:
            fake.asked.update(text["custom_id"] for text in lines)
        if fake.lose_reply_of_create:
            fake.lose_reply_of_create -= 1
            assert request.transport is not None
            request.transport.abort()
        return web.json_response(batch)

    async def retrieve(request: web.Request) -> web.Response:
        if fake.failing_polls:
            fake.failing_polls -= 1
            return _problem(500, "try again")
        if (batch := fake.batches.get(request.match_info["id"])) is None:
            return _problem(fake.unknown_id, "No batch found with that id")
        _step(fake, batch)
        return web.json_response(batch)

    async def listing(request: web.Request) -> web.Response:
        names = list(reversed(fake.batches))
        after = request.query.get("after")
        start = names.index(after) + 1 if after else 0
        page = [fake.batches[name] for name in names[start : start + fake.page]]
        more = start + fake.page < len(names)
        ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {}
        return web.json_response({"object": "list", "data": page, "has_more": more, **ends})

    async def content(request: web.Request) -> web.StreamResponse:
        if (data := fake.files.get(request.match_info["id"])) is None:
            return _problem(404, "No such File object")
        if not fake.cut_downloads:
            return web.Response(body=data)
        fake.cut_downloads -= 1
        response = web.StreamResponse(headers={"Content-Length": str(len(data))})
        await response.prepare(request)
        await response.write(data[: len(data) // 2])
        assert request.transport is not None
        request.transport.close()
        return response

    app = web.Application(client_max_size=1 << 30)
    app.router.add_post("/v1/files", upload)
    app.router.add_get("/v1/files/{id}/content", content)
    app.router.add_post("/v1/batches", create)
    app.router.add_get("/v1/batches", listing)
    app.router.add_get("/v1/batches/{id}", retrieve)
    return app


def _file(name: str, data: bytes) -> dict[str, Any]:
    return {
        "id": name,
        "object": "file",
        "bytes": len(data),
        "created_at": 1_700_000_000,
        "filename": "x.jsonl",
        "purpose": "batch",
        "status": "processed",
    }


def _failed(batch: dict[str, Any], code: str, message: str) -> None:
    batch["status"] = "failed"
    batch["errors"] = {"object": "list", "data": [{"code": code, "message": message, "param": None, "line": None}]}


def _step(fake: FakeBatches, batch: dict[str, Any]) -> None:
    """Takes a batch one status further; the last step writes its files."""
    if batch["status"] not in STEPS:
        return
    at = STEPS.index(batch["status"])
    if at + 1 < len(STEPS):
        batch["status"] = STEPS[at + 1]
        batch["request_counts"]["total"] = len(fake.files[batch["input_file_id"]].splitlines())
        return
    number = int(batch["id"].removeprefix("batch_")) - 1
    end = fake.ends[number] if number < len(fake.ends) else "completed"
    lines = [json.loads(text) for text in fake.files[batch["input_file_id"]].splitlines()]
    share = 1.0 if end == "completed" else fake.answered_share
    worked = lines[: int(share * len(lines))]
    made = [
        fake.outcome(text["custom_id"], text["body"], number) if fake.outcome else line(text["custom_id"])
        for text in worked
    ]
    made += [expired(text["custom_id"]) for text in lines[len(worked) :]]
    good = [text for text in made if text["response"] and text["response"]["status_code"] == 200]
    bad = [text for text in made if text not in good]
    for kind, texts in (("output_file_id", good), ("error_file_id", bad)):
        if texts:
            name = f"file-{len(fake.files) + 1}"
            fake.files[name] = "".join(json.dumps(text) + "\n" for text in reversed(texts)).encode()
            batch[kind] = name
    batch["request_counts"] = {"total": len(lines), "completed": len(good), "failed": len(bad)}
    batch["status"] = end


@contextmanager
def fake_batches(**script: Any) -> Iterator[FakeBatches]:
    """Serves an account until the block ends."""
    fake = FakeBatches(**script)
    ready, loop = threading.Event(), asyncio.new_event_loop()

    async def start() -> web.AppRunner:
        runner = web.AppRunner(_app(fake), access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        return runner

    def serve() -> None:
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(start())
        ready.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield fake
    finally:
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
