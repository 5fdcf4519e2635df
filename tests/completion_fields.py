"""The fields of a completion, for tests that care for some of them only."""

from typing import Any

from pipeline.records import Message, Usage


def completion_fields(row_id: str, text: str, **changes: Any) -> dict[str, Any]:
    return {
        "id": row_id,
        "prompt_id": "p",
        "messages": [Message("user", "q")],
        "endpoint": "http://127.0.0.1:1/v1",
        "sampling": {},
        "text": text,
        "finish_reason": "stop",
        "model": "m",
        "usage": Usage(),
        "latency_s": 0.1,
        "attempts": 1,
        "created": "2026-01-01T00:00:00Z",
        **changes,
    }
