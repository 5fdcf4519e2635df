"""The evaluation of a run: measures what is not measured yet, then writes report.json and report.html.

Perplexity comes first, one model in memory at a time; then one server a model, for speed and probes; then the
perplexity of the teacher's answers to unseen values; the judge last. A result is on disk as soon as it is there, so a
stopped evaluation goes on where it was.
"""

import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import msgspec

from evaluate.document import Report, read_report
from evaluate.figures.quality import probe_answers
from evaluate.machine import choose_precision
from evaluate.measure.pairwise import Judge, find_judge, judge_answers, judged_fingerprint
from evaluate.measure.perplexity import choose_rows, score_rows
from evaluate.measure.probes import ProbePrompts, choose_probes
from evaluate.measure.results import (
    TEACHER,
    JudgeResult,
    Measurement,
    Measurements,
    PerplexityResult,
    ProbeResult,
    Results,
    SpeedResult,
    probe_row,
    read_held_out,
    read_result,
    write_result,
)
from evaluate.measure.serving import answer_probes, measure_served
from evaluate.measure.speed import speed_prompts
from evaluate.models import Subject, is_local, load, subjects
from evaluate.report.assemble import Measured, build_report, report_fingerprint
from evaluate.report.checklist import check_run
from evaluate.report.html import publish
from filters.answer import as_answer
from filters.ruleset import RuleSet
from filters.run import recipe_rules
from pipeline.errors import DistillError, UsageError
from pipeline.lineage import record_lineage
from pipeline.recipe import Recipe
from pipeline.records import Kept, Prompt
from pipeline.rundir import RunDir

Found = TypeVar("Found", PerplexityResult, SpeedResult, ProbeResult)


@dataclass(frozen=True)
class Work:
    """What is evaluated on what, decided before anything is measured."""

    recipe: Recipe
    run: RunDir
    rules: RuleSet
    models: list[Subject]
    measurements: list[Measurements]  # of the models, in their order
    held_out: int
    rows: list[Kept]  # for perplexity
    timing: list[Prompt]
    probes: ProbePrompts
    dtype: str
    device: str

    @property
    def here(self) -> list[Measurements]:
        """Those of the models whose weights are on this machine."""
        return [one for one in self.measurements if one.subject.folder is not None]

    @property
    def answering(self) -> list[Measurements]:
        """Those of the models that answer the probes: a teacher elsewhere only where the recipe says so."""
        ask_teacher = self.recipe.evaluate.ask_teacher
        asked = [
            one
            for one in self.measurements
            if one.subject.folder is not None or (one.subject.key == TEACHER and ask_teacher)
        ]
        return asked if self.probes.all else []


def evaluate_run(
    recipe: Recipe,
    run: RunDir,
    recipe_path: Path,
    *,
    report_only: bool = False,
    speed: bool = True,
    force: bool = False,
) -> Report:
    """Measures, and writes the report; takes no lock itself. Returns the report, also if it was up to date.

    `report_only` measures nothing, `speed=False` starts no server, `force` measures again what is there. Raises
    UsageError where there is no student or no held-out row, and what the judge raises once the report is written.
    """
    work = _prepare(recipe, run, recipe_path)
    for subject in work.models:
        if subject.missing:
            say(f"{subject.label}: not available: {subject.missing}")
    if force and not report_only:
        _forget(work, served=speed)
    if not report_only:
        _score(work, [one.perplexity(work.rows, work.dtype) for one in work.here], work.rows, "held-out answers")
        if speed:
            _serve(work)
        rows = _unseen_rows(work)
        if rows:
            _score(work, [one.unseen(rows, work.dtype) for one in work.here], rows, "answers to unseen values")
    problems, error = [], None
    if not report_only:
        try:
            problems = _judge(work)
        except DistillError as raised:
            error = raised
            problems = [f"The judge's scores and win rates are not complete: {raised}"]
    results = _results(work)
    if not results:
        raise UsageError(f"{run.path / 'evaluation'}: nothing measured yet; run evaluate without --report-only")
    old = read_report(run)
    fingerprint = report_fingerprint(recipe, run, results)
    if old and old.fingerprint == fingerprint and run.report_html.is_file() and not report_only and not problems:
        say(f"{run.report}: the report is up to date (--force measures again)")
        return old
    measured = Measured(work.models, work.held_out, work.rows, work.probes, work.rules, results, problems)
    report = build_report(recipe, run, measured)
    report = msgspec.structs.replace(report, checklist=check_run(recipe, run, report))
    _write(run, report)
    if error:
        raise error
    return report


def _prepare(recipe: Recipe, run: RunDir, recipe_path: Path) -> Work:
    models = subjects(recipe, run)
    held_out = read_held_out(run)
    rows = choose_rows(held_out, recipe.evaluate.max_rows)
    rules = recipe_rules(recipe, recipe_path)
    dtype, device = choose_precision(models)
    return Work(
        recipe=recipe,
        run=run,
        rules=rules,
        models=models,
        measurements=[Measurements(subject, recipe, run) for subject in models],
        held_out=len(held_out),
        rows=rows,
        timing=speed_prompts(recipe, run, rows),
        probes=choose_probes(recipe, run, held_out),
        dtype=dtype,
        device=device,
    )


def _forget(work: Work, *, served: bool) -> None:
    """Removes what is about to be measured again."""
    gone = [one.perplexity(work.rows, work.dtype) for one in work.here]
    if served:
        gone += [one.speed(work.timing) for one in work.here]
        gone += [one.probes(work.probes.all) for one in work.answering]
    for measurement in gone:
        measurement.path.unlink(missing_ok=True)


def _score(work: Work, measurements: Sequence[Measurement], rows: list[Kept], what: str) -> None:
    """Perplexity of the rows under every model that has not scored them yet."""
    for measurement in measurements:
        if measurement.saved(PerplexityResult) is None:
            say(f"{measurement.subject.label}: perplexity of {len(rows)} {what} ({work.dtype} on {work.device})")
            measurement.save(_measure_perplexity(measurement, rows, work.dtype, work.device))


def _measure_perplexity(measurement: Measurement, rows: list[Kept], dtype: str, device: str) -> PerplexityResult:
    import torch
    import transformers
    from rich.console import Console
    from rich.progress import Progress

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    label = measurement.subject.label
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


def _serve(work: Work) -> None:
    """Speed and probes of every model that lacks either, one server each."""
    answering = {one.subject.key: one.probes(work.probes.all) for one in work.answering}
    warned = False
    for one in work.here:
        timing, probing = one.speed(work.timing), answering.get(one.subject.key)
        speed = timing.saved(SpeedResult) is None
        probes = probing is not None and probing.saved(ProbeResult) is None
        if not speed and not probes:
            continue
        if speed and not warned and answers(work.recipe.teacher.url):
            say(f"warning: something answers at {work.recipe.teacher.url}; stop it, or it takes its share of the speed")
            warned = True
        wanted = (["its speed"] if speed else []) + ([f"{len(work.probes.all)} probes"] if probes else [])
        say(f"{one.subject.label}: starting vLLM, about a minute, for {' and '.join(wanted)}")
        measure_served(
            work.recipe,
            work.run,
            speed=(timing, work.timing) if speed else None,
            probes=(probing, work.probes.all) if probing and probes else None,
        )
        if found := timing.saved(SpeedResult):
            rates = [burst.completion_tokens / burst.wall_s for burst in found.bursts]
            say(f"{one.subject.label}: {min(rates):.1f} to {max(rates):.1f} tokens/s")
    probing = answering.get(TEACHER)
    if probing and probing.subject.folder is None and probing.saved(ProbeResult) is None:
        say(f"{probing.subject.label}: {len(work.probes.all)} probes, asked at {work.recipe.teacher.url}")
        folder = work.run.path / "evaluation" / "asked-teacher"
        probing.save(answer_probes(work.recipe, folder, probing, work.probes.all))


def _unseen_rows(work: Work) -> list[Kept]:
    """The teacher's answers to probes with unseen values that pass the rules, as held-out rows do."""
    probed = next((one.probes(work.probes.all) for one in work.answering if one.subject.key == TEACHER), None)
    saved = probed.saved(ProbeResult) if probed else None
    if not saved:
        return []
    prompts = {prompt.id: prompt for prompt in work.probes.unseen}
    rows = [probe_row(TEACHER, prompts[a.prompt_id], a) for a in saved.answers if a.prompt_id in prompts]
    return [row for row in rows if row.text and not work.rules.reasons(as_answer(row))]


def _judge(work: Work) -> list[str]:
    """Has the judge say what it has not said yet. Returns why it cannot, where nothing answers at its address."""
    judge = find_judge(work.recipe)
    given = probe_answers(work.probes, _probed(work))
    if judge is None or not any(given.values()) or _judged(work, judge):
        return []
    if is_local(judge.url) and not answers(judge.url):
        why = f"The judge was not asked: nothing answers at {judge.url}; start {judge.model} there, and evaluate again."
        say(f"warning: {why}")
        return [why]
    say(f"judge {judge.model}: {sum(map(len, given.values()))} answers and their pairs")
    write_result(_judged_path(work), judge_answers(judge, work.run, given))
    return []


def _judged_path(work: Work) -> Path:
    return work.run.path / "evaluation" / "judged.json"


def _judged(work: Work, judge: Judge) -> JudgeResult | None:
    fingerprint = judged_fingerprint(judge, probe_answers(work.probes, _probed(work)))
    return read_result(_judged_path(work), fingerprint, JudgeResult)


def _probed(work: Work) -> dict[str, ProbeResult]:
    return _saved([one.probes(work.probes.all) for one in work.answering], ProbeResult)


def _results(work: Work) -> Results:
    rows, judge = _unseen_rows(work), find_judge(work.recipe)
    unseen = [one.unseen(rows, work.dtype) for one in work.here] if rows else []
    return Results(
        scored=_saved([one.perplexity(work.rows, work.dtype) for one in work.here], PerplexityResult),
        unseen=_saved(unseen, PerplexityResult),
        timed=_saved([one.speed(work.timing) for one in work.here], SpeedResult),
        probed=_probed(work),
        judged=_judged(work, judge) if judge else None,
    )


def _saved(measurements: Sequence[Measurement], kind: type[Found]) -> dict[str, Found]:
    found = {measurement.subject.key: measurement.saved(kind) for measurement in measurements}
    return {key: result for key, result in found.items() if result is not None}


def _write(run: RunDir, report: Report) -> None:
    publish(run, report)
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
            "verdict": headline.verdict,
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
