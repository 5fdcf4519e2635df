"""Chunks worked on by several processes: what a worker raises reaches the caller, however slow the caller is."""

import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from filters import stream as chunks
from pipeline.errors import DistillError


def test_a_worker_that_fails_before_it_is_told_its_place_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"a\nb\nc\nd\n")
    monkeypatch.setattr(chunks, "CHUNK", 2)
    monkeypatch.setattr(chunks, "PARALLEL_FROM", 0)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    receive = chunks._receive

    def receive_late(end: Connection) -> Any:
        got = receive(end)
        time.sleep(0.2)  # a busy machine: the worker is at its next chunk before it hears where the last one goes
        return got

    def work(chunk: chunks.Chunk) -> tuple[int, tuple[bytes, ...]]:
        if chunk.lines == [b"c"]:
            raise DistillError("full moon")
        return 1, (b"",)

    monkeypatch.setattr(chunks, "_receive", receive_late)
    with (tmp_path / "out").open("wb") as out, pytest.raises(DistillError, match="full moon"):
        list(chunks.process(path, path.stat().st_size, work, (out,)))
