"""`--dry-run`: what a run would ask, and what that would cost, before anything is sent. Writes nothing.

Prompt tokens are counted where the teacher's tokenizer is at hand (generate.tokens). Elsewhere the answers that the run
already has say how many there are, and without any there is a bound. Completion tokens are known as a bound, and as an
expectation once there are answers.
"""

import msgspec

from generate.asking import Left
from generate.budget import Budget
from generate.client import check_teacher
from generate.dialect import Dialect
from generate.journal import Contents, read_journal
from generate.prices import AS_OF, PICO, Price, price_of
from generate.prompts import iter_prompts
from generate.requests import build_jobs
from generate.tokens import bound, counter
from pipeline.recipe import Recipe
from pipeline.records import Completion, Failure
from pipeline.rundir import RunDir

ENOUGH_ANSWERS = 20  # to expect others to be like them


class DryRun(msgspec.Struct, frozen=True, kw_only=True):
    """What there is to ask, in tokens and USD; None where it cannot be known."""

    requests: int
    answered: int
    failed: int
    to_ask: int
    prompt_tokens: int  # at most, unless `counted`
    counted: bool
    expected_prompt_tokens: int | None
    completion_tokens: int  # at most
    expected_completion_tokens: int | None
    spent_tokens: int
    cost: float | None  # at most
    expected_cost: float | None
    spent: float


def dry_run(recipe: Recipe, run: RunDir, *, retry_failures: bool = False) -> DryRun:
    """Goes through all prompts and the run's journals. Raises the UsageErrors that the run itself would."""
    check_teacher(recipe.teacher)
    found = read_journal(run.completions, Completion)
    failed = read_journal(run.failures, Failure)
    left = Left(found.ids, failed.ids, retry_failures=retry_failures)
    price, spent = price_of(recipe.teacher, recipe.generate.mode), Budget.open(recipe, run, found).spent
    count, dialect = counter(recipe.teacher.model), Dialect()
    requests = answered = skipped = to_ask = prompt_tokens = 0
    for job in build_jobs(iter_prompts(recipe), recipe):
        requests += 1
        if job.request.id in left.answered:
            answered += 1
        elif job.request.id in left.failed:
            skipped += 1
        else:
            to_ask += 1
            prompt_tokens += count(job.request.messages) if count else bound(len(dialect.body(job)))
    most = to_ask * recipe.sampling.max_tokens
    per_prompt, per_answer = _means(found)
    expected_prompts = prompt_tokens if count else _times(per_prompt, to_ask)
    expected_answers = _times(per_answer, to_ask)
    known = price is not None and expected_prompts is not None and expected_answers is not None
    return DryRun(
        requests=requests,
        answered=answered,
        failed=skipped,
        to_ask=to_ask,
        prompt_tokens=prompt_tokens,
        counted=count is not None,
        expected_prompt_tokens=expected_prompts,
        completion_tokens=most,
        expected_completion_tokens=expected_answers,
        spent_tokens=spent.tokens,
        cost=_usd(price, prompt_tokens, most),
        expected_cost=_usd(price, expected_prompts or 0, expected_answers or 0) if known else None,
        spent=spent.cost / PICO,
    )


def describe(recipe: Recipe, dry: DryRun) -> list[str]:
    """The plan in a few lines."""
    lines = [
        f"{recipe.name}: {dry.requests:,} requests, {dry.answered:,} answered already, {dry.failed:,} failed and left "
        f"alone, {dry.to_ask:,} to ask of {recipe.teacher.model} at {', '.join(recipe.teacher.urls)}",
        f"prompt tokens: {dry.prompt_tokens:,} counted with the teacher's tokenizer"
        if dry.counted
        else f"prompt tokens: at most {dry.prompt_tokens:,} (a token a byte: the tokenizer is not at hand)"
        + (f", about {dry.expected_prompt_tokens:,} as in the answers so far" if dry.expected_prompt_tokens else ""),
        f"completion tokens: at most {dry.completion_tokens:,} (sampling.max_tokens each)"
        + (
            f", about {dry.expected_completion_tokens:,} as in the answers so far"
            if dry.expected_completion_tokens is not None
            else ""
        ),
    ]
    if dry.cost is None:
        lines.append("cost: not known; set teacher.price: {input: …, output: …} in USD a million tokens")
    else:
        expected = f", about ${dry.expected_cost:,.4f} expected" if dry.expected_cost is not None else ""
        source = "teacher.price" if recipe.teacher.price else f"the price table of {AS_OF}"
        batch = "; half of the online price" if recipe.generate.mode == "batch" else "; generate.mode batch is half"
        lines.append(f"cost: at most ${dry.cost:,.4f}{expected}, by {source}{batch}")
        lines.append(f"spent so far: ${dry.spent:,.4f}, {dry.spent_tokens:,} tokens")
    return lines + _over_budget(recipe, dry)


def _over_budget(recipe: Recipe, dry: DryRun) -> list[str]:
    budget = recipe.budget
    lines = []
    if budget.usd is not None and dry.cost is not None:
        verdict = (
            "is enough for all" if dry.spent + dry.cost <= budget.usd else "may end the run before its end (exit 3)"
        )
        lines.append(f"budget.usd {budget.usd:g} {verdict}")
    if budget.tokens is not None:
        most = dry.spent_tokens + dry.prompt_tokens + dry.completion_tokens
        verdict = "is enough for all" if most <= budget.tokens else "may end the run before its end (exit 3)"
        lines.append(f"budget.tokens {budget.tokens:,} {verdict}")
    return lines


def _means(found: Contents) -> tuple[float | None, float | None]:
    """Prompt and completion tokens of an answer so far."""
    answers = len(found.ids)
    if answers < ENOUGH_ANSWERS or not found.completion_tokens:
        return None, None
    return found.prompt_tokens / answers, found.completion_tokens / answers


def _times(mean: float | None, count: int) -> int | None:
    return None if mean is None else round(mean * count)


def _usd(price: Price | None, prompt_tokens: int, completion_tokens: int) -> float | None:
    return price.cost(prompt_tokens, completion_tokens) / PICO if price else None
