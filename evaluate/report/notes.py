"""What a reader must know to read the figures right, in sentences: on what, how, and how far they can be trusted."""

from collections.abc import Iterator, Mapping, Sequence

from evaluate.document import ProbeSet, Rows, Scope
from evaluate.figures.accuracy import VerifiedAnswers
from evaluate.figures.quality import FEW, PROMPTS_TO_DIFFER
from evaluate.figures.statistics import Figures
from evaluate.measure.results import Plan, Results, RowScore
from evaluate.models import other_teacher, student_lineage
from pipeline.instructions import told_in_words
from pipeline.lineage import read_lineage
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir
from pipeline.students import AFTER, TEACHER
from serve.command import KV_TOKENS

SOURCES = {
    "slots": "new combinations of the recipe's slot values, which no prompt of the run had",
    "file": "the prompts of evaluate.probes_file",
    "test": "test prompts, whether the filters kept the teacher's answers or not",
}


def of_rows(
    plan: Plan, results: Results, problem: str, rows: Rows, scores: Mapping[str, Sequence[RowScore]]
) -> Iterator[str]:
    """Of perplexity and its rows; `scores` are of those that every model was scored on."""
    yield from (f"{model.label}: not available: {model.missing}" for model in plan.models if model.missing)
    yield from filter(None, [other_teacher(plan.recipe, plan.run), plan.probes.note, problem])
    if again := " and ".join(stages_again(plan.run)):
        yield (
            f"The answers were {again} again after the student was trained: the drops shown, and the checklist's "
            "prompts and answers, are of the run as it is now."
        )
    if results.scored:
        kinds = ", ".join(sorted({f"{result.dtype} on {result.device}" for result in results.scored.values()}))
        yield f"Perplexity: the teacher's test answers, teacher-forced ({kinds}); 95% bootstrap intervals over prompts."
        for model in plan.models:
            if model.folder and model.key not in results.scored:
                yield f"{model.label}: perplexity was not measured."
        if TEACHER in scores:
            yield "These answers are the teacher's own, which favours the teacher."
        if len({tuple(score.tokens for score in own) for own in scores.values()}) > 1:
            lengths = (sum(one.characters for one in own) / sum(one.tokens for one in own) for own in scores.values())
            labels = {model.key: model.label for model in plan.models}
            told = ", ".join(f"{labels[key]} {length:.2f}" for key, length in zip(scores, lengths, strict=True))
            yield (
                "The models' tokenizers differ: compare teacher and student by bits per character. Tokens per second "
                f"are of each model's own tokens, which hold so many characters of these answers: {told}."
            )
    if rows.teacher_answers:
        yield (
            f"Of the teacher's {rows.teacher_answers:,} answers to the test prompts {rows.teacher_kept:,} pass the "
            f"filters ({rows.teacher_kept / rows.teacher_answers:.1%}). Perplexity is of the kept ones only."
        )


def stages_again(run: RunDir) -> list[str]:
    """What was done to the answers in another way, or to others, since the student learned from them."""
    now, then = read_lineage(run), student_lineage(run)

    def differs(stage: str, *names: str) -> bool:
        return any(now.get(stage, {}).get(name) != then.get(stage, {}).get(name) for name in names)

    again = {
        "generated": differs("generate", "teacher", "sampling", "prompts", "completed"),
        "filtered": differs("filters", "rules", "rows", "kept"),
    }
    return [done for done, other in again.items() if other]


def of_right_answers(plan: Plan, verified: VerifiedAnswers | None) -> Iterator[str]:
    """Of the right answers: what was asked, how, and how far they can be trusted."""
    if not verified:
        if plan.verify.rules:
            yield "The answers were not verified: no model was served."
        return
    recipe, rules = plan.recipe, ", ".join(rule.label for rule in plan.verify.rules)
    test, unseen = verified.prompts.get("verified", []), len(verified.prompts.get("verified_unseen", []))
    count, groups = len(test), len({verified.groups[prompt.id] for prompt in test})
    asked = f"{count} test prompts" + (f" of {groups} groups" if groups < count else "")
    asked += f" and {unseen} of evaluate.probes_file" if unseen else ""
    worth = ", for as many prompts as the groups are worth" if groups < count else ""
    yield (
        f"Right answers, by {rules}: {asked}, set apart before anything was filtered; temperature 0, at most "
        f"{recipe.sampling.max_tokens} tokens. Shares have Wilson's interval{worth}; differences and ratios are paired."
    )
    if count + unseen < (wanted := len(plan.questions.all)):
        yield f"Right answers are over the {count + unseen} of {wanted} prompts that every model answered."
    if told := told_in_words(recipe.teacher):
        yield f"The teacher alone is told {told}; a student is not, unless its column says told."
    if TEACHER not in verified.answers:
        yield "The teacher was not asked: its weights are not here (see evaluate.ask_teacher)."


def of_probes(recipe: Recipe, results: Results, probes: ProbeSet | None) -> Iterator[str]:
    """Of the prompts that every model answered, and their judge."""
    if probes is None:
        yield "Probes were not answered."
        return
    what = [f"{probes.seen} prompts, {SOURCES[probes.source]}"] if probes.seen else []
    if probes.unseen:
        values = ", ".join(value for values in probes.unseen_values.values() for value in values)
        what.append(f"{probes.unseen} with values never seen ({values})")
    yield f"Probes: {'; and '.join(what)}. Each model answered once, with the recipe's sampling."
    if probes.answered < (asked := probes.seen + probes.unseen):
        yield f"The probes' figures are over the {probes.answered} of {asked} that every model answered."
    if not recipe.filters.rules:
        yield "The recipe has no rules, so no share passes them."
    if TEACHER not in results.probed:
        yield "The teacher did not answer the probes: its weights are not here (see evaluate.ask_teacher)."
    if probes.judge is None:
        yield "No judge: scores and win rates were not measured."
    else:
        itself = ", which is the teacher and favours its own answers" if probes.judge_is_teacher else ""
        yield f"Judge: {probes.judge}{itself}. A win is a win in both orders; anything else is a tie."
        if probes.judged < probes.answered:
            told = f"{probes.judged} of {probes.answered} prompts"
            yield f"The judge's means are over the {told} for which it scored every model."


def of_few_prompts(figures: Mapping[Scope, Figures]) -> Iterator[str]:
    """Of differences that too few prompts stand behind."""
    counts = [one.prompts for models in figures.values() for one in models.get(AFTER, {}).values()]
    if min(counts, default=PROMPTS_TO_DIFFER) < PROMPTS_TO_DIFFER:
        yield f"No figure over {FEW} is called better or worse: its interval is too narrow."


def of_speed(recipe: Recipe, results: Results) -> Iterator[str]:
    """Of speed and peak memory."""
    machines = results.machines(verified=bool(recipe.evaluate.verify))
    if len(machines) > 1:
        where = "; ".join(machine or "one that is not recorded" for machine in machines)
        yield (
            f"Teacher and student were timed on different machines ({where}), so their speeds are not compared; "
            f"remove evaluation/{'verify' if recipe.evaluate.verify else 'speed'}-*.json and evaluate on one machine."
        )
    if not results.timed:
        yield "Speed and peak memory were not measured."
        return
    kv, wanted = recipe.serve.kv_cache_gib, recipe.evaluate
    pool = f"a KV cache of {kv:g} GiB each" if kv else f"a KV cache for up to {KV_TOKENS:,} tokens each"
    yield (
        f"Speed: vLLM with the same settings, at most {wanted.speed_max_tokens} tokens per answer. "
        f"Saturated: {wanted.speed_concurrency} requests in flight, the median of {wanted.speed_repeats} timings of "
        f"{wanted.speed_requests} requests. Alone: {wanted.speed_alone} requests, one after the other."
    )
    if all(result.device == "cpu" for result in results.timed.values()):
        yield f"Peak memory is the whole server's: weights, vLLM itself, {pool}."
    else:
        yield "Peak memory is not given: on a GPU vLLM takes the share it is told to. Compare the weights."
