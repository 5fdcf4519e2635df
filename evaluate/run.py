"""The evaluation of a run, in one line: prepare, measure, report, write.

Perplexity comes first, one model in memory at a time; then one server per model, for speed and probes; then the
perplexity of the teacher's answers to unseen values; the judge last. Each result is taken from the cache under
evaluation/ or measured and written there, so a stopped evaluation continues where it was.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from evaluate.document import Report, read_report
from evaluate.figures.quality import probe_answers
from evaluate.measure.pairwise import find_judge, judge_answers, judged_fingerprint
from evaluate.measure.perplexity import choose_rows, measure_perplexity
from evaluate.measure.probes import choose_probes
from evaluate.measure.results import (
    FOLDER,
    Entry,
    JudgeResult,
    PerplexityResult,
    Plan,
    ProbeResult,
    Results,
    SpeedResult,
    read_test,
)
from evaluate.measure.serving import answer_probes, measure_speed, recipe_for, serve_subject, speed_prompts
from evaluate.models import TEACHER, Subject, choose_precision, digest_subject, subjects
from evaluate.report.assemble import build_report, report_fingerprint
from evaluate.report.checklist import check_run
from evaluate.report.html import publish
from filters.answer import as_answer
from filters.run import recipe_rules
from pipeline.address import is_loopback, is_port_open
from pipeline.errors import DistillError, UsageError
from pipeline.lineage import record_lineage
from pipeline.recipe import Recipe
from pipeline.records import Kept
from pipeline.rundir import RunDir


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

    `report_only` measures nothing, `speed=False` starts no server, `force` measures again what is cached. Raises
    UsageError if there is no student or no test row, and what the judge raises once the report is written.
    """
    plan = make_plan(recipe, run, recipe_path, force=force and not report_only)
    for subject in plan.models:
        if subject.missing:
            say(f"{subject.label}: not available: {subject.missing}")
    measure = not report_only
    scored = _score(plan, "perplexity", plan.rows, "test answers", measure=measure)
    timed, probed = _serve(plan, measure=measure and speed)
    unseen = _score(plan, "unseen", _unseen_rows(plan, probed), "answers to unseen values", measure=measure)
    judged, problem, error = _judge(plan, probed, measure=measure)
    results = Results(scored, unseen, timed, probed, judged)
    if not (scored or timed or probed):
        raise UsageError(f"{run.path / FOLDER}: nothing measured yet; run evaluate without --report-only")

    old = read_report(run)
    current = old and old.fingerprint == report_fingerprint(recipe, run, results) and run.report_html.is_file()
    if old and current and measure and not problem:
        say(f"{run.report}: the report is up to date (--force measures again)")
        return old
    report = build_report(plan, results, problem)
    report = msgspec.structs.replace(report, checklist=check_run(recipe, run, report))
    publish(run, report)
    _record(run, report)
    if error:
        raise error
    return report


def make_plan(recipe: Recipe, run: RunDir, recipe_path: Path, *, force: bool = False) -> Plan:
    """Reads the run and chooses models, rows and prompts. Raises UsageError if there is no student or no test row."""
    models = subjects(recipe, run)
    test_rows = read_test(run)
    rows = choose_rows(test_rows, recipe.evaluate.max_rows)
    dtype, device = choose_precision(models)
    return Plan(
        recipe=recipe,
        run=run,
        rules=recipe_rules(recipe, recipe_path),
        models=models,
        test_rows=len(test_rows),
        rows=rows,
        timing=speed_prompts(recipe, run, rows),
        probes=choose_probes(recipe, run, test_rows),
        dtype=dtype,
        device=device,
        weights={subject.key: digest_subject(subject) for subject in models},
        force=force,
    )


def _score(plan: Plan, name: str, rows: Sequence[Kept], what: str, *, measure: bool) -> dict[str, PerplexityResult]:
    """How every model scores the rows."""
    found = {}
    for subject in (model for model in plan.models if rows and model.folder):
        entry = plan.entry(name, subject, rows)
        result = None if plan.force else entry.read(PerplexityResult)
        if result is None and measure:
            say(f"{subject.label}: perplexity of {len(rows)} {what} ({plan.dtype} on {plan.device})")
            result = entry.write(measure_perplexity(subject, rows, dtype=plan.dtype, device=plan.device))
        if result:
            found[subject.key] = result
    return found


def _serve(plan: Plan, *, measure: bool) -> tuple[dict[str, SpeedResult], dict[str, ProbeResult]]:
    """Speed and probes of every model."""
    timed: dict[str, SpeedResult] = {}
    probed: dict[str, ProbeResult] = {}
    for subject in plan.models:
        speed, answers = _serve_one(plan, subject, measure=measure)
        timed |= {subject.key: speed} if speed else {}
        probed |= {subject.key: answers} if answers else {}
    return timed, probed


def _serve_one(plan: Plan, subject: Subject, *, measure: bool) -> tuple[SpeedResult | None, ProbeResult | None]:
    """Speed and probes of one model, on one server; a teacher elsewhere is asked where it is, and not timed."""
    recipe, prompts, fresh = plan.recipe, plan.probes.all, plan.force and measure
    timing, probing = plan.entry("speed", subject, plan.timing), plan.entry("probes", subject, prompts)
    here, probes = subject.folder is not None, plan.answers_probes(subject)
    speed = timing.read(SpeedResult) if here and not fresh else None
    answers = probing.read(ProbeResult) if probes and not fresh else None
    lacks_speed, lacks_answers = measure and here and not speed, measure and probes and not answers
    if lacks_answers and not here:
        say(f"{subject.label}: {len(prompts)} probes, asked at {recipe.teacher.url}")
        return None, probing.write(answer_probes(recipe, plan.run.path / FOLDER / "asked-teacher", prompts))
    if not lacks_speed and not lacks_answers:
        return speed, answers
    url = recipe.teacher.url
    if lacks_speed and is_loopback(url) and is_port_open(url):
        say(f"warning: something answers at {url}; stop it, or it takes its share of the speed")
    wanted = ["its speed"] * lacks_speed + [f"{len(prompts)} probes"] * lacks_answers
    say(f"{subject.label}: starting vLLM, about a minute, for {' and '.join(wanted)}")
    with serve_subject(recipe, plan.run, subject) as (server, folder):
        if lacks_speed:
            speed = timing.write(measure_speed(recipe, server, folder, plan.timing))
            say(f"{subject.label}: {min(speed.rates):.1f} to {max(speed.rates):.1f} tokens/s")
        if lacks_answers:
            answers = probing.write(answer_probes(recipe_for(recipe, server), folder / "probes", prompts))
    return speed, answers


def _unseen_rows(plan: Plan, probed: dict[str, ProbeResult]) -> list[Kept]:
    """The teacher's answers to probes with unseen values that pass the rules, as test rows do."""
    unseen = {prompt.id for prompt in plan.probes.unseen}
    rows = probed[TEACHER].answers if TEACHER in probed else []
    return [row for row in rows if row.prompt_id in unseen and row.text and not plan.rules.reasons(as_answer(row))]


def _judge(
    plan: Plan, probed: dict[str, ProbeResult], *, measure: bool
) -> tuple[JudgeResult | None, str, DistillError | None]:
    """What the judge says; else why it says nothing, with the error if there was one."""
    judge, answers = find_judge(plan.recipe), probe_answers(plan.probes, probed)
    if judge is None or not any(answers.values()):
        return None, "", None
    entry = Entry(plan.run.path / FOLDER / "judged.json", judged_fingerprint(judge, answers))
    judged = entry.read(JudgeResult)
    if judged or not measure:
        return judged, "", None
    if is_loopback(judge.url) and not is_port_open(judge.url):
        why = f"The judge was not asked: nothing answers at {judge.url}; start {judge.model} there, and evaluate again."
        say(f"warning: {why}")
        return None, why, None
    say(f"judge {judge.model}: {sum(map(len, answers.values()))} answers and their pairs")
    try:
        return entry.write(judge_answers(judge, plan.run, answers)), "", None
    except DistillError as error:
        return None, f"The judge's scores and win rates are not complete: {error}", error


def _record(run: RunDir, report: Report) -> None:
    headline = report.headline
    section = {
        "created": report.created,
        "headline": headline.text,
        "perplexity": {m.key: own.value for m in report.models if (own := m.figure("test", "perplexity"))},
        "promise": {claim.name: claim.verdict for claim in headline.claims if claim.value},
        "rows": report.rows.scored,
        "fingerprint": report.fingerprint,
        "versions": report.versions,
    }
    record_lineage(run, "evaluate", section)


def say(text: str) -> None:
    """Tells a person about the progress."""
    print(text, file=sys.stderr, flush=True)
