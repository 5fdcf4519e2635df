"""The evaluation of a run: measures what is not measured yet, then writes report.json and report.html.

Perplexity comes first, one model in memory at a time; then each server in turn. A result is on disk as soon as it is
there, so a stopped evaluation goes on where it was.
"""

import socket
import sys
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

import msgspec

from evaluate.assemble import Results, build_report, report_fingerprint
from evaluate.checklist import check_run
from evaluate.html import render_html
from evaluate.machine import choose_precision
from evaluate.models import is_local, load, subjects
from evaluate.perplexity import score_rows
from evaluate.report import Report, read_report, write_report
from evaluate.results import (
    Measurement,
    PerplexityResult,
    SpeedResult,
    perplexity_measurement,
    read_held_out,
    speed_measurement,
)
from evaluate.speed import measure_speed
from pipeline.errors import DistillError, UsageError
from pipeline.lineage import record_lineage
from pipeline.recipe import Recipe
from pipeline.records import Kept
from pipeline.rundir import RunDir, replacing

TIMED = ("teacher", "student_after")  # before training the student has the shape it has after


def evaluate_run(
    recipe: Recipe, run: RunDir, *, report_only: bool = False, speed: bool = True, force: bool = False
) -> Report:
    """Measures, and writes the report; takes no lock itself. Returns the report, also if it was up to date.

    `report_only` measures nothing, `speed=False` starts no server, `force` measures again what is there. Raises
    UsageError where there is no student or no held-out row.
    """
    models = subjects(recipe, run)
    rows, held_out = read_held_out(run, recipe.evaluate.max_rows)
    dtype, device = choose_precision(models)
    scoring = [perplexity_measurement(s, run, rows, dtype) for s in models if s.folder is not None]
    timing = [speed_measurement(m.subject, recipe, run, rows) for m in scoring if m.subject.key in TIMED]
    for subject in models:
        if subject.missing:
            say(f"{subject.label}: not available: {subject.missing}")
    if force and not report_only:
        for measurement in (*scoring, *(timing if speed else ())):
            measurement.path.unlink(missing_ok=True)
    if not report_only:
        for measurement in scoring:
            if measurement.saved(PerplexityResult) is None:
                measurement.save(_measure_perplexity(measurement, rows, dtype, device))
        untimed = [m for m in timing if m.saved(SpeedResult) is None] if speed else []
        if untimed and answers(recipe.teacher.url):
            say(f"warning: something answers at {recipe.teacher.url}; stop it, or it takes its share of the speed")
        for measurement in untimed:
            measurement.save(_measure_speed(measurement, recipe, run, rows))
    results = _results(scoring, timing)
    if not any(results):
        raise UsageError(f"{run.path / 'evaluation'}: nothing measured yet; run evaluate without --report-only")
    old = read_report(run)
    if old and old.fingerprint == report_fingerprint(run, results) and run.report_html.is_file() and not report_only:
        say(f"{run.report}: the report is up to date (--force measures again)")
        return old
    report = build_report(recipe, run, models, rows, held_out, results)
    report = msgspec.structs.replace(report, checklist=check_run(recipe, run, report))
    _write(run, report)
    return report


def _measure_perplexity(measurement: Measurement, rows: list[Kept], dtype: str, device: str) -> PerplexityResult:
    import torch
    import transformers
    from rich.console import Console
    from rich.progress import Progress

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    label = measurement.subject.label
    say(f"{label}: perplexity of {len(rows)} held-out answers ({dtype} on {device})")
    started = time.monotonic()
    model, tokenizer = load(measurement.subject, dtype=dtype, device=device)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=len(rows))
        scores = score_rows(model, tokenizer, rows, progress=lambda done: bar.advance(task, done))
    del model
    if device == "cuda":
        torch.cuda.empty_cache()
    if not scores:
        raise DistillError(f"{label}: no held-out row fits its context; use shorter prompts or another student")
    return PerplexityResult(
        fingerprint=measurement.fingerprint,
        dtype=dtype,
        device=device,
        wall_s=time.monotonic() - started,
        scores=scores,
    )


def _measure_speed(measurement: Measurement, recipe: Recipe, run: RunDir, rows: list[Kept]) -> SpeedResult:
    wanted = recipe.evaluate
    say(
        f"{measurement.subject.label}: starting vLLM, then {wanted.speed_requests} requests, "
        f"{wanted.speed_concurrency} at once (a minute or two before the first)"
    )
    result = measure_speed(measurement, recipe, run, rows)
    say(f"{measurement.subject.label}: {result.completion_tokens / result.wall_s:.1f} tokens/s")
    return result


def _results(scoring: Sequence[Measurement], timing: Sequence[Measurement]) -> Results:
    scored = {m.subject.key: m.saved(PerplexityResult) for m in scoring}
    timed = {m.subject.key: m.saved(SpeedResult) for m in timing}
    return (
        {key: result for key, result in scored.items() if result},
        {key: result for key, result in timed.items() if result},
    )


def _write(run: RunDir, report: Report) -> None:
    with replacing(run.report_html) as file:
        file.write(render_html(report).encode())
    write_report(run, report)
    headline = report.headline
    record_lineage(
        run,
        "evaluate",
        {
            "created": report.created,
            "headline": headline.text,
            "perplexity_teacher": headline.perplexity_teacher,
            "perplexity_before": headline.perplexity_before,
            "perplexity_after": headline.perplexity_after,
            "parameters_share": headline.parameters_share,
            "speed_ratio": headline.speed_ratio,
            "rows": report.rows.scored,
            "fingerprint": report.fingerprint,
            "versions": report.versions,
        },
    )


def answers(url: str) -> bool:
    """Whether something listens there, on this machine: a teacher that is still being served, most likely."""
    address = urlsplit(url)
    if not is_local(url):
        return False
    try:
        with socket.create_connection((address.hostname, address.port or 80), timeout=1):
            return True
    except OSError:
        return False


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
