"""What is measured once and kept: one file a model and a measurement, under evaluation/ in the run directory.

    evaluation/perplexity-<model>.json    the score of every held-out row
    evaluation/speed-<model>.json         tokens/s, memory, and a few answers in full

Each carries the fingerprint of what it was measured on. A stopped evaluation goes on where it was, and a figure of
another student, other rows or other settings is never taken for one of this run.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from evaluate.models import Subject, digest_subject
from evaluate.perplexity import RowScore, choose_rows
from pipeline.errors import DataError, UsageError
from pipeline.recipe import Recipe
from pipeline.records import Kept, read_jsonl
from pipeline.rundir import RunDir, replacing


class PerplexityResult(msgspec.Struct, frozen=True, kw_only=True):
    """How a model scored the held-out rows."""

    fingerprint: str
    dtype: str
    device: str
    wall_s: float
    scores: list[RowScore]


class SpeedResult(msgspec.Struct, frozen=True, kw_only=True):
    """How a model ran on the engine."""

    fingerprint: str
    device: str  # gpu or cpu, as the engine used it
    requests: int
    failed: int
    completion_tokens: int
    wall_s: float  # from the first request to the last answer
    startup_s: float
    peak_rss_bytes: int | None  # of all the server's processes; None on a GPU, where it says nothing
    answers: dict[str, str]  # prompt id → an answer with the recipe's own sampling


SAMPLES = 4  # prompts whose answers are kept in full, for reading side by side

Result = TypeVar("Result", PerplexityResult, SpeedResult)


@dataclass(frozen=True)
class Measurement:
    """One thing to measure: where its result is kept and what it depends on."""

    subject: Subject
    path: Path
    fingerprint: str

    def saved(self, kind: type[Result]) -> Result | None:
        """The result on disk if it is of exactly this; None otherwise."""
        try:
            result = msgspec.json.decode(self.path.read_bytes(), type=kind)
        except (FileNotFoundError, msgspec.DecodeError):
            return None
        return result if result.fingerprint == self.fingerprint else None

    def save(self, result: PerplexityResult | SpeedResult) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as file:
            file.write(msgspec.json.encode(result))


def read_held_out(run: RunDir, limit: int) -> tuple[list[Kept], int]:
    """The rows to score (at most `limit`) and how many rows were held out. Raises UsageError or DataError."""
    if not run.held_out.is_file():
        raise UsageError(f"{run.held_out}: no held-out rows; run train first, it sets them apart")
    rows = list(read_jsonl(run.held_out, Kept))
    if not rows:
        raise DataError(f"{run.held_out}: no rows in it; raise train.held_out or keep more answers, and train again")
    return choose_rows(rows, limit), len(rows)


def perplexity_measurement(subject: Subject, run: RunDir, rows: list[Kept], dtype: str) -> Measurement:
    fingerprint = _hash(digest_subject(subject), _rows_digest(rows), dtype)
    return Measurement(subject, run.path / "evaluation" / f"perplexity-{subject.key}.json", fingerprint)


def speed_measurement(subject: Subject, recipe: Recipe, run: RunDir, rows: list[Kept]) -> Measurement:
    settings = recipe.model_dump_json(include={"evaluate", "sampling", "serve"})
    fingerprint = _hash(digest_subject(subject), _rows_digest(rows), settings)
    return Measurement(subject, run.path / "evaluation" / f"speed-{subject.key}.json", fingerprint)


def sample_rows(rows: Sequence[Kept]) -> list[Kept]:
    """The rows shown side by side: the first of each of a few prompts."""
    first = {row.prompt_id: row for row in reversed(rows)}
    return [row for row in rows if first[row.prompt_id] is row][:SAMPLES]


def _rows_digest(rows: list[Kept]) -> str:
    return _hash(*(f"{row.id} {row.finish_reason} {row.text}" for row in rows))


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
