"""The evaluation of a run, in one line: prepare, measure, report, write.

Perplexity comes first, one model in memory at a time; then one server per model, for speed and probes; then the
perplexity of the teacher's answers to unseen values; the judge last. Each result is taken from the cache under
evaluation/ or measured and written there, so a stopped evaluation continues where it was.
"""

import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from evaluate.document import Report, read_report
from evaluate.figures.accuracy import verify_rules
from evaluate.figures.quality import probe_answers, probe_rules
from evaluate.measure.lm_eval import find_command, measure_tasks
from evaluate.measure.pairwise import find_judge, judge_answers, judged_fingerprint
from evaluate.measure.perplexity import choose_rows, measure_perplexity
from evaluate.measure.probes import choose_probes, choose_questions
from evaluate.measure.results import (
    ASKED_TEACHER,
    FOLDER,
    Entry,
    JudgeResult,
    PerplexityResult,
    Plan,
    ProbeResult,
    Result,
    Results,
    SpeedResult,
    TaskResult,
    read_test,
)
from evaluate.measure.serving import (
    answer_probes,
    answer_questions,
    measure_speed,
    serve_subject,
    speed_prompts,
    with_rest_of_budget,
    with_server,
)
from evaluate.models import Subject, as_asked, choose_precision, digest_subject, never_asked, other_teacher, subjects
from evaluate.report.assemble import build_report, report_fingerprint
from evaluate.report.checklist import check_run
from evaluate.report.html import publish
from filters.answer import as_answer
from pipeline.adapters import is_quantised
from pipeline.address import is_loopback, is_port_open
from pipeline.errors import DistillError, RecipeError, RequestsFailed, UsageError
from pipeline.instructions import told_in_words
from pipeline.lineage import read_lineage, record_lineage
from pipeline.recipe import Recipe
from pipeline.records import Kept, Prompt
from pipeline.rundir import RunDir
from pipeline.students import AFTER, BEFORE, TEACHER
from serve.command import check_tools
from serve.server import Server


def evaluate_run(
    recipe: Recipe,
    run: RunDir,
    recipe_path: Path,
    *,
    report_only: bool = False,
    speed: bool = True,
    force: bool = False,
    flags: Sequence[str] = (),
) -> Report:
    """Measures, and writes the report; takes no lock itself. Returns the report, also if it was up to date.

    `flags` are the recipe values given on top of the file, for the commands in the report. `report_only` measures
    nothing, `speed=False` starts no server, `force` measures again what is cached. Raises UsageError if there is no
    student or no test row, and what the judge raises once the report is written.
    """
    plan = make_plan(recipe, run, recipe_path, measure=not report_only, serve=speed, force=force)
    _tell_models(plan)
    if plan.serve:
        _check_serving(plan)
    scored = _score(plan, "perplexity", plan.rows, "test answers")
    served = {subject.key: _serve_one(plan, subject) for subject in plan.models}

    def measured(name: str) -> dict[str, Any]:
        return {key: found[name] for key, found in served.items() if name in found}

    probed = measured("probes")
    unseen = _score(plan, "unseen", _unseen_rows(plan, probed), "answers to unseen values")
    judged, problem, error = _judge(plan, probed)
    if unanswered := _unanswered(plan, served):
        problem, error = "; ".join(filter(None, (unanswered, problem))), error or RequestsFailed(unanswered)
    results = Results(
        scored=scored,
        unseen=unseen,
        timed=measured("speed"),
        probed=probed,
        verified=measured("verify") | {f"{key}_told": own for key, own in measured("verify-told").items()},
        tasks=measured("tasks"),
        judged=judged,
    )
    if not (scored or results.timed or probed or results.verified):
        raise UsageError(f"{run.path / FOLDER}: nothing measured yet; run evaluate without --report-only")

    old = read_report(run)
    current = old and old.fingerprint == report_fingerprint(plan, results) and run.report_html.is_file()
    if old and current and plan.measure and not problem:
        if read_lineage(run).get("evaluate", {}).get("fingerprint") != old.fingerprint:
            _record(run, old)  # the call that wrote the report was killed, or a training has removed the section
        say(f"{run.report}: the report is up to date (--force measures again)")
        return old
    report = build_report(plan, results, problem, given=shlex.join([str(recipe_path), *flags]))
    report = msgspec.structs.replace(report, checklist=check_run(recipe, run, report))
    if report_only and old:
        _tell_gone(old, report)
    publish(run, report)
    _record(run, report)
    if error and plan.measure:
        raise error
    return report


def make_plan(
    recipe: Recipe, run: RunDir, recipe_path: Path, *, measure: bool = True, serve: bool = True, force: bool = False
) -> Plan:
    """Reads the run and chooses models, rows and prompts. Raises UsageError if there is no student or no test row."""
    models = subjects(recipe, run)
    test_rows = read_test(run)
    rows = choose_rows(test_rows, recipe.evaluate.max_rows)
    dtype, device = choose_precision(models)
    timing = speed_prompts(recipe, run, rows)
    return Plan(
        recipe=recipe,
        folder=recipe_path.parent,
        run=run,
        rules=probe_rules(recipe, recipe_path),
        models=models,
        test_rows=len(test_rows),
        rows=rows,
        timing=timing,
        timing_answers=speed_prompts(recipe, run, rows, taken=timing) if recipe.evaluate.verify else [],
        probes=choose_probes(recipe, run, test_rows),
        verify=verify_rules(recipe, recipe_path),
        questions=choose_questions(recipe, run, test_rows),
        dtype=dtype,
        device=device,
        weights={subject.key: digest_subject(subject) for subject in models},
        measure=measure,
        serve=measure and serve,
        force=measure and force,
    )


def _check_serving(plan: Plan) -> None:
    """Raises UsageError if servers would refuse what they are asked, or lm-eval's command is missing."""
    check_tools(plan.recipe, [*plan.timing, *plan.timing_answers, *plan.probes.all, *plan.questions.all])
    if plan.recipe.evaluate.lm_eval:
        find_command()


def _tell_models(plan: Plan) -> None:
    if taught := other_teacher(plan.recipe, plan.run):
        say(f"warning: {taught}")
    for subject in plan.models:
        if subject.missing:
            say(f"{subject.label}: not available: {subject.missing}")
        if subject.missing and subject.key == TEACHER and (note := never_asked(plan.recipe)):
            say(note)


def _score(plan: Plan, name: str, rows: Sequence[Kept], what: str) -> dict[str, PerplexityResult]:
    """How every model scores the rows."""
    found = {}
    for subject in plan.models if rows else ():
        if subject.folder is None:
            continue
        asked = as_asked(plan.recipe, subject, rows)
        entry = plan.entry(name, subject, asked)
        result = None if plan.force else entry.read(PerplexityResult)
        if result is None and plan.measure:
            say(f"{subject.label}: perplexity of {len(rows)} {what} ({plan.dtype} on {plan.device})")
            try:
                scores = measure_perplexity(subject, asked, plan.recipe.train, dtype=plan.dtype, device=plan.device)
                result = _cache(plan, subject, entry, scores)
            except RecipeError as error:
                if not is_quantised(subject.folder):
                    raise
                say(f"warning: {subject.label}: perplexity not available: {error}")
        if result:
            found[subject.key] = result
    return found


class Measurement(NamedTuple):
    """Something that is measured of one model on its server."""

    what: str  # in words
    kind: type[Any]  # of its result
    entry: Entry
    measure: Callable[[Server | None, Path], Any]  # on a server of ours, or where the teacher answers; with a folder


def _measurements(plan: Plan, subject: Subject) -> dict[str, Measurement]:
    """What a model is measured in, by name. A teacher elsewhere is asked only if the recipe says so, and not timed."""
    recipe, here, found = plan.recipe, subject.folder is not None, dict[str, Measurement]()
    if here:
        entry, timing = plan.entry("speed", subject, plan.timing), partial(measure_speed, recipe, prompts=plan.timing)
        found["speed"] = Measurement("its speed", SpeedResult, entry, timing)
    if here or (subject.key == TEACHER and recipe.evaluate.ask_teacher):
        timed = plan.timing_answers if here and subject.key in (TEACHER, AFTER) else []
        if plan.probes.all:
            found["probes"] = _interview(plan, subject, "probes", plan.probes.all)
        if plan.questions.all:
            found["verify"] = _interview(plan, subject, "verify", plan.questions.all, timed=timed)
        if plan.questions.all and subject.key == BEFORE and told_in_words(recipe.teacher):
            found["verify-told"] = _interview(plan, subject, "verify-told", plan.questions.all, told=True)
    if here and recipe.evaluate.lm_eval:
        what, entry = " and ".join(recipe.evaluate.lm_eval), plan.entry("tasks", subject, [])
        found["tasks"] = Measurement(what, TaskResult, entry, partial(measure_tasks, recipe))
    return found


def _interview(
    plan: Plan, subject: Subject, name: str, prompts: list[Prompt], *, told: bool = False, timed: Sequence[Prompt] = ()
) -> Measurement:
    """Prompts that a model answers. `told`: a student is told what the teacher is told. `timed`: others, asked before
    them to time the answers.
    """
    asked, timing = (as_asked(plan.recipe, subject, ours, told=told) for ours in (prompts, timed))

    def ask(server: Server | None, folder: Path) -> ProbeResult:
        recipe = with_server(plan.recipe, server) if server else with_rest_of_budget(plan.recipe, folder, name)
        if name == "probes":
            return answer_probes(recipe, folder / name, prompts, asked)
        return answer_questions(recipe, folder / name, prompts, asked, timing)

    entry = plan.entry(name, subject, [*asked, *timing])
    return Measurement(f"{len(prompts)} prompts ({name})", ProbeResult, entry, ask)


def _serve_one(plan: Plan, subject: Subject) -> dict[str, Any]:
    """What is measured of one model, on one server; of a teacher elsewhere, its answers."""
    wanted, found = _measurements(plan, subject), dict[str, Any]()
    if not (plan.force and plan.serve):
        cached = {name: one.entry.read(one.kind) for name, one in wanted.items()}
        found = {name: result for name, result in cached.items() if result}
    missing = {name: one for name, one in wanted.items() if plan.serve and (name not in found or _failed(found[name]))}
    if not missing:
        return found
    what, url = " and ".join(one.what for one in missing.values()), plan.recipe.teacher.url
    if subject.folder is None:
        say(f"{subject.label}: {what}, asked at {url}")
        folder = plan.run.path / FOLDER / ASKED_TEACHER
        return found | {name: one.entry.write(one.measure(None, folder)) for name, one in missing.items()}
    if "speed" in missing and is_loopback(url) and is_port_open(url):
        say(f"warning: something answers at {url}; stop it, or it takes its share of the speed")
    say(f"{subject.label}: starting vLLM, about a minute, for {what}")
    with serve_subject(plan.recipe, plan.run, subject) as (server, folder):
        for name, one in missing.items():
            found[name] = _cache(plan, subject, one.entry, one.measure(server, folder))
            if name == "speed":
                rates = found[name].rates
                say(f"{subject.label}: {min(rates):.1f} to {max(rates):.1f} tokens/s")
    return found


def _cache(plan: Plan, subject: Subject, entry: Entry, result: Result) -> Result:
    """Writes what was measured of a model. Raises DistillError if its weights are others than the plan names."""
    if digest_subject(subject) != plan.weights[subject.key]:
        raise DistillError(
            f"{subject.label}: {subject.adapter or subject.folder} changed while it was measured; "
            "run the same command again"
        )
    return entry.write(result)


def _tell_gone(old: Report, new: Report) -> None:
    """Says which models of the old report have figures there that the new one lacks."""

    def measured(one: Report) -> dict[str, set[tuple[str, str]]]:
        return {
            model.label: {(part, name) for part, own in model.figures.items() for name in own} for model in one.models
        }

    before, now = measured(old), measured(new)
    if gone := ", ".join(label for label, names in before.items() if names - now.get(label, set())):
        say(
            f"warning: what was measured of {gone} is of other weights, rows or settings, or its file is gone, and "
            "leaves the report; evaluate measures it again"
        )


def _failed(result: Any) -> int:
    """Requests without an answer, which the next call makes again."""
    return result.failed if isinstance(result, ProbeResult) else 0


def _unanswered(plan: Plan, served: dict[str, dict[str, Any]]) -> str:
    """Which models left how many requests without an answer; empty if none did."""
    lost = {subject.label: sum(map(_failed, served[subject.key].values())) for subject in plan.models}
    told = ", ".join(f"{count:,} to {label}" for label, count in lost.items() if count)
    return f"Some requests failed for good ({told}): evaluate again, and they are made again" if told else ""


def _unseen_rows(plan: Plan, probed: dict[str, ProbeResult]) -> list[Kept]:
    """The teacher's answers to probes with unseen values that pass the rules, as test rows do."""
    unseen = {prompt.id for prompt in plan.probes.unseen}
    rows = probed[TEACHER].answers if TEACHER in probed else []
    return [row for row in rows if row.prompt_id in unseen and row.text and not plan.rules.reasons(as_answer(row))]


def _judge(plan: Plan, probed: dict[str, ProbeResult]) -> tuple[JudgeResult | None, str, DistillError | None]:
    """What the judge says; what of it is missing, and the error that is raised for it once the report is written."""
    judge, answers = find_judge(plan.recipe, plan.run), probe_answers(plan.probes, probed)
    if judge is None or not any(answers.values()):
        return None, "", None
    entry = Entry(plan.run.path / FOLDER / "judged.json", judged_fingerprint(judge, answers))
    judged, missing = entry.read(JudgeResult), "The judge's scores and win rates are not complete: "
    if plan.measure and (judged is None or judged.failed or plan.force):
        name, url = judge.endpoint.model, judge.endpoint.url
        if is_loopback(url) and not is_port_open(url):
            why = f"The judge was not asked: nothing answers at {url}; start {name} there, and evaluate again."
            say(f"warning: {why}")
            return judged, why, None
        say(f"judge {name}: {sum(map(len, answers.values()))} answers and their pairs")
        try:
            judged = entry.write(judge_answers(judge, plan.run, answers))
        except DistillError as error:
            return judged, f"{missing}{error}", error
    if judged is None or not judged.failed:
        return judged, "", None
    requests = f"{judged.failed:,} of the requests to {judged.model}"
    why = f"{missing}{requests} failed for good; evaluate again, and they are made again"
    return judged, why, RequestsFailed(why)


def _record(run: RunDir, report: Report) -> None:
    headline = report.headline
    section = {
        "created": report.created,
        "headline": headline.text,
        "perplexity": {m.key: own.value for m in report.models if (own := m.figure("test", "perplexity"))},
        "right": {m.key: own.value for m in report.models if (own := m.figure("verified", "accuracy"))},
        "promise": {claim.name: claim.verdict for claim in headline.claims if claim.value},
        "rows": report.rows.scored,
        "prompts": report.accuracy.prompts if report.accuracy else {},
        "fingerprint": report.fingerprint,
        "versions": report.versions,
    }
    record_lineage(run, "evaluate", section)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
