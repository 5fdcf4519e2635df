"""The evaluation of a run, in one line: prepare, measure, report, write.

Perplexity comes first, one model in memory at a time; then one server per model, for speed and probes; then the
perplexity of the teacher's answers to unseen values; the judge last. Each result is taken from the cache under
evaluation/ or measured and written there, so a stopped evaluation continues where it was.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from evaluate.document import Report, read_report
from evaluate.figures.accuracy import verify_rules
from evaluate.figures.quality import probe_answers
from evaluate.measure.lm_eval import find_command, measure_tasks
from evaluate.measure.pairwise import find_judge, judge_answers, judged_fingerprint
from evaluate.measure.perplexity import choose_rows, measure_perplexity
from evaluate.measure.probes import choose_probes, choose_questions
from evaluate.measure.results import (
    FOLDER,
    Entry,
    JudgeResult,
    PerplexityResult,
    Plan,
    ProbeResult,
    Results,
    SpeedResult,
    TaskResult,
    read_test,
)
from evaluate.measure.serving import (
    answer_probes,
    answer_questions,
    measure_speed,
    recipe_for,
    serve_subject,
    speed_prompts,
)
from evaluate.models import AFTER, BEFORE, TEACHER, Subject, as_asked, choose_precision, digest_subject, subjects
from evaluate.report.assemble import build_report, report_fingerprint
from evaluate.report.checklist import check_run
from evaluate.report.html import publish
from filters.answer import as_answer
from filters.run import recipe_rules
from pipeline.address import is_loopback, is_port_open
from pipeline.errors import DistillError, UsageError
from pipeline.lineage import record_lineage
from pipeline.recipe import Recipe
from pipeline.records import Kept, Prompt
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
    if recipe.evaluate.lm_eval and measure and speed:
        find_command()
    scored = _score(plan, "perplexity", plan.rows, "test answers", measure=measure)
    served = {subject.key: _serve_one(plan, subject, measure=measure and speed) for subject in plan.models}
    probed = _answers(served, "probes")
    unseen = _score(plan, "unseen", _unseen_rows(plan, probed), "answers to unseen values", measure=measure)
    judged, problem, error = _judge(plan, probed, measure=measure)
    told = {f"{key}_told": result for key, result in _answers(served, "verify-told").items()}
    results = Results(
        scored=scored,
        unseen=unseen,
        timed={key: one.speed for key, one in served.items() if one.speed},
        probed=probed,
        verified=_answers(served, "verify") | told,
        tasks={key: one.tasks for key, one in served.items() if one.tasks},
        judged=judged,
    )
    if not (scored or results.timed or probed or results.verified):
        raise UsageError(f"{run.path / FOLDER}: nothing measured yet; run evaluate without --report-only")

    old = read_report(run)
    current = old and old.fingerprint == report_fingerprint(plan, results) and run.report_html.is_file()
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
        verify=verify_rules(recipe, recipe_path),
        questions=choose_questions(recipe, run),
        dtype=dtype,
        device=device,
        weights={subject.key: digest_subject(subject) for subject in models},
        force=force,
    )


def _score(plan: Plan, name: str, rows: Sequence[Kept], what: str, *, measure: bool) -> dict[str, PerplexityResult]:
    """How every model scores the rows."""
    found = {}
    for subject in (model for model in plan.models if rows and model.folder):
        asked = as_asked(plan.recipe, subject, rows)
        entry = plan.entry(name, subject, asked)
        result = None if plan.force else entry.read(PerplexityResult)
        if result is None and measure:
            say(f"{subject.label}: perplexity of {len(rows)} {what} ({plan.dtype} on {plan.device})")
            result = entry.write(measure_perplexity(subject, asked, dtype=plan.dtype, device=plan.device))
        if result:
            found[subject.key] = result
    return found


class Interview(NamedTuple):
    """Prompts that one model answers."""

    name: str  # probes; verify; verify-told: a student that is told what the teacher is told
    prompts: list[Prompt]
    asked: list[Prompt]  # the same, as this model is asked them
    timed: int  # how many of them, from the first, are asked again to time the answers
    entry: Entry

    def ask(self, recipe: Recipe, folder: Path) -> ProbeResult:
        """Asks the recipe's teacher, which may be a server of ours."""
        if self.name == "probes":
            return answer_probes(recipe, folder / self.name, self.prompts, self.asked)
        return answer_questions(recipe, folder / self.name, self.prompts, self.asked, self.asked[: self.timed])


def _interviews(plan: Plan, subject: Subject) -> list[Interview]:
    """What a model is asked. A teacher elsewhere is asked only if the recipe says so, and not timed."""
    recipe, here = plan.recipe, subject.folder is not None
    if not here and not (subject.key == TEACHER and recipe.evaluate.ask_teacher):
        return []
    told = [True] if subject.key == BEFORE and (recipe.teacher.system or recipe.teacher.examples) else []
    timed = len(plan.questions.seen) if here and subject.key in (TEACHER, AFTER) else 0
    rounds = [("probes", plan.probes.all, False, 0), ("verify", plan.questions.all, False, timed)]
    rounds += [("verify-told", plan.questions.all, True, 0)] * len(told)
    found = []
    for name, prompts, telling, again in rounds:
        if prompts:
            asked = as_asked(recipe, subject, prompts, told=telling)
            found.append(Interview(name, prompts, asked, again, plan.entry(name, subject, asked)))
    return found


class Served(NamedTuple):
    """What needs a server, of one model."""

    speed: SpeedResult | None
    answers: dict[str, ProbeResult]  # by interview
    tasks: TaskResult | None


def _answers(served: Mapping[str, Served], name: str) -> dict[str, ProbeResult]:
    return {key: one.answers[name] for key, one in served.items() if name in one.answers}


def _serve_one(plan: Plan, subject: Subject, *, measure: bool) -> Served:
    """Speed, answers and tasks of one model, on one server; the answers of a teacher elsewhere."""
    recipe, fresh, here = plan.recipe, plan.force and measure, subject.folder is not None
    interviews, timing = _interviews(plan, subject), plan.entry("speed", subject, plan.timing)
    speed = timing.read(SpeedResult) if here and not fresh else None
    testing = plan.entry("tasks", subject, [])
    tests = here and bool(recipe.evaluate.lm_eval)
    tasks = testing.read(TaskResult) if tests and not fresh else None
    found = {} if fresh else {one.name: one.entry.read(ProbeResult) for one in interviews}
    answers = {name: result for name, result in found.items() if result}
    missing = [one for one in interviews if measure and one.name not in answers]
    lacks_speed, lacks_tasks = measure and here and not speed, measure and tests and not tasks
    if not (lacks_speed or lacks_tasks or missing):
        return Served(speed, answers, tasks)
    wanted = ["its speed"] * lacks_speed + [f"{len(one.prompts)} prompts ({one.name})" for one in missing]
    wanted += recipe.evaluate.lm_eval * lacks_tasks
    if not here:
        say(f"{subject.label}: {' and '.join(wanted)}, asked at {recipe.teacher.url}")
        asked = plan.run.path / FOLDER / "asked-teacher"
        return Served(None, answers | {one.name: one.entry.write(one.ask(recipe, asked)) for one in missing}, None)
    url = recipe.teacher.url
    if lacks_speed and is_loopback(url) and is_port_open(url):
        say(f"warning: something answers at {url}; stop it, or it takes its share of the speed")
    say(f"{subject.label}: starting vLLM, about a minute, for {' and '.join(wanted)}")
    with serve_subject(recipe, plan.run, subject) as (server, folder):
        if lacks_speed:
            speed = timing.write(measure_speed(recipe, server, folder, plan.timing))
            say(f"{subject.label}: {min(speed.rates):.1f} to {max(speed.rates):.1f} tokens/s")
        for one in missing:
            answers[one.name] = one.entry.write(one.ask(recipe_for(recipe, server), folder))
        if lacks_tasks:
            tasks = testing.write(measure_tasks(recipe, server, folder))
    return Served(speed, answers, tasks)


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
        "right": {m.key: own.value for m in report.models if (own := m.figure("verified", "accuracy"))},
        "promise": {claim.name: claim.verdict for claim in headline.claims if claim.value},
        "rows": report.rows.scored,
        "fingerprint": report.fingerprint,
        "versions": report.versions,
    }
    record_lineage(run, "evaluate", section)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
