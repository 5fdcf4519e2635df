"""What a reader must know to read the figures right: one sentence a measurement, and what was not measured and why."""

from collections.abc import Mapping, Sequence

from evaluate.document import ModelReport, ProbeSet
from evaluate.measure.perplexity import RowScore
from evaluate.measure.results import TEACHER, Results
from pipeline.recipe import Recipe
from serve.command import KV_TOKENS

SOURCES = {
    "slots": "new combinations of the recipe's slot values, which no prompt of the run had",
    "file": "the prompts of evaluate.probes_file",
    "held_out": "the held-out prompts",
}


def write_notes(
    recipe: Recipe,
    reports: Sequence[ModelReport],
    scores: Mapping[str, list[RowScore]],
    results: Results,
    probes: ProbeSet | None,
    problems: Sequence[str],
) -> list[str]:
    """The notes of a report, in its order; `scores` are the rows that every model was scored on."""
    return [
        *(f"{report.label}: not available: {report.missing}" for report in reports if report.missing),
        *(problem for problem in problems if problem),
        *_perplexity(scores, results),
        *_probes(recipe, results, probes),
        *_speed(recipe, results),
    ]


def _perplexity(scores: Mapping[str, list[RowScore]], results: Results) -> list[str]:
    if not results.scored:
        return []
    kinds = sorted({f"{result.dtype} on {result.device}" for result in results.scored.values()})
    notes = [
        f"Perplexity: the teacher's held-out answers, teacher-forced, loss on the answer and its end only "
        f"({', '.join(kinds)}); 95% bootstrap intervals over prompts."
    ]
    if TEACHER in scores:
        notes.append("These answers are the teacher's own, which favours the teacher.")
    if len({tuple(score.tokens for score in rows) for rows in scores.values()}) > 1:
        notes.append("The models' tokenizers differ: compare teacher and student by bits per character.")
    return notes


def _probes(recipe: Recipe, results: Results, probes: ProbeSet | None) -> list[str]:
    if probes is None:
        return ["Probes were not answered."]
    what = f"Probes: {probes.seen} prompts, {SOURCES[probes.source]}" if probes.seen else "Probes"
    if probes.unseen:
        values = ", ".join(value for values in probes.unseen_values.values() for value in values)
        what += f"{'; and ' if probes.seen else ': '}{probes.unseen} with values never seen ({values})"
    notes = [f"{what}. Each model answered once, with the recipe's sampling; 95% bootstrap intervals over prompts."]
    if not recipe.filters.rules:
        notes.append("The recipe has no rules, so no share passes them.")
    if TEACHER not in results.probed:
        notes.append("The teacher did not answer the probes: its weights are not here (see evaluate.ask_teacher).")
    if probes.judge is None:
        return [*notes, "No judge: scores and win rates were not measured."]
    itself = ", which is the teacher and likes its own answers too well" if probes.judge_is_teacher else ""
    return [*notes, f"Judge: {probes.judge}{itself}. A win is a win in both orders; anything else is a tie."]


def _speed(recipe: Recipe, results: Results) -> list[str]:
    if not results.timed:
        return ["Speed and peak memory were not measured."]
    kv, wanted = recipe.serve.kv_cache_gib, recipe.evaluate
    pool = f"a KV cache of {kv:g} GiB each" if kv else f"a KV cache for up to {KV_TOKENS:,} tokens each"
    notes = [
        f"Speed: vLLM with the same settings on this machine, at most {wanted.speed_max_tokens} tokens an answer. "
        f"Saturated: {wanted.speed_concurrency} requests in flight, the median of {wanted.speed_repeats} timings of "
        f"{wanted.speed_requests} requests. Alone: {wanted.speed_alone} requests, one after the other."
    ]
    if all(result.device == "cpu" for result in results.timed.values()):
        notes.append(f"Peak memory is the whole server's: weights, vLLM itself, {pool}.")
    else:
        notes.append("Peak memory is not given: on a GPU vLLM takes the share it is told to. Compare the weights.")
    return notes
