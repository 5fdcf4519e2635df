"""`--dry-run`: what a run would ask, and what that would cost, before anything is sent. Writes nothing.

Prompt tokens are counted if the teacher's tokenizer is on this machine (generate.tokens). Otherwise the answers that
the run already has say how many to expect, and without answers there is an upper bound. Completion tokens have an upper
bound, and an expected number once there are answers. Attempts that fail after the teacher has worked on them cost more.
"""

from dataclasses import dataclass, field

from generate.budget import known_price, spend_under_way, spent_so_far
from generate.client import check_teacher
from generate.context import Left
from generate.dialect import Dialect
from generate.jobs import shared
from generate.journal import read_journal
from generate.prices import PICO, PRICED_TOKENS, Price, source_of
from generate.progress import Counters, prompt_warnings, requests_of
from generate.targets import urls_now
from generate.tokens import bound, counter
from pipeline.address import is_private
from pipeline.errors import RecipeError
from pipeline.progress import reporting
from pipeline.recipe import Recipe
from pipeline.records import Completion, Failure
from pipeline.rundir import RunDir

ENOUGH_ANSWERS = 20  # to expect others to be like them


@dataclass(kw_only=True)
class DryRun:
    """What there is to ask, in tokens and USD; None if it cannot be known."""

    price: Price | None
    spent_tokens: int
    spent: float
    prompts: int = 0
    requests: int = 0  # prompts × prompts.samples
    answered: int = 0
    to_ask: int = 0
    sent: int = 0  # the HTTP requests of these: fewer where samples share one
    prompt_tokens: int = 0  # at most, unless `counted`
    counted: bool = True
    long_prompts: int = 0  # requests that may have more prompt tokens than the price table is for
    reserved_tokens: int = 0  # the most that a request reserves of a budget beyond its counted prompt
    completion_tokens: int = 0  # at most
    expected_prompt_tokens: int | None = None
    expected_completion_tokens: int | None = None
    warnings: list[str] = field(default_factory=list)  # of the prompts

    @property
    def cost(self) -> float | None:
        """At most."""
        return self.price and self.price.cost(self.prompt_tokens, self.completion_tokens) / PICO

    @property
    def expected_cost(self) -> float | None:
        if self.price is None or self.expected_prompt_tokens is None or self.expected_completion_tokens is None:
            return None
        return self.price.cost(self.expected_prompt_tokens, self.expected_completion_tokens) / PICO


def dry_run(recipe: Recipe, run: RunDir, *, retry_failures: bool = False) -> DryRun:
    """Reads all prompts and the run's journals. Raises the UsageErrors that the run itself would."""
    check_teacher(recipe.teacher)
    found = read_journal(run.completions, Completion)
    left = Left(found.ids, read_journal(run.failures, Failure).ids, retry_failures=retry_failures)
    price, spent = known_price(recipe), spent_so_far(recipe.budget, run, found)
    if recipe.generate.mode == "batch":  # what is under way is collected, and stands among what is to be asked
        spent -= spend_under_way(run)
    count, dialect = counter(recipe.teacher.model), Dialect()
    dry = DryRun(price=price, spent_tokens=spent.tokens, spent=spent.cost / PICO)
    counters = Counters()
    looked_at = reporting(left.survey(recipe, counters), lambda count: f"{count:,} requests looked at so far")
    jobs = filter(left.has, looked_at)
    for job in filter(None, shared(jobs)) if recipe.generate.share_prompt else jobs:
        dry.sent += 1
        dry.to_ask += job.choices
        most, counted = bound(len(dialect.body(job))), count(job.told, job.request.tools) if count else None
        tokens = most if counted is None else counted
        dry.counted &= counted is not None
        dry.prompt_tokens += tokens
        dry.long_prompts += tokens > PRICED_TOKENS
        dry.reserved_tokens = max(dry.reserved_tokens, most - tokens)
    dry.prompts, dry.requests, dry.answered = counters.prompts, counters.total, counters.resumed
    dry.warnings = list(prompt_warnings(recipe.prompts, counters))
    try:
        urls_now(recipe.teacher)
    except RecipeError as error:  # `serve --cluster` may write the file later
        dry.warnings.append(f"warning: {error}")
    dry.completion_tokens = dry.to_ask * recipe.sampling.max_tokens
    dry.expected_prompt_tokens = dry.prompt_tokens if dry.counted else None
    if found.counted >= ENOUGH_ANSWERS:
        share = dry.to_ask / found.counted
        dry.expected_completion_tokens = round(share * found.completion_tokens)
        if not dry.counted:
            dry.expected_prompt_tokens = round(share * found.prompt_tokens)
    return dry


def describe(recipe: Recipe, dry: DryRun) -> list[str]:
    if dry.counted:
        prompts = f"prompt tokens: {dry.prompt_tokens:,} counted with the teacher's tokenizer"
    else:
        bound_of = "one token per byte, because the tokenizer is not on this machine"
        prompts = f"prompt tokens: at most {dry.prompt_tokens:,} ({bound_of}){_about(dry.expected_prompt_tokens)}"
    failed = dry.requests - dry.answered - dry.to_ask
    lines = [
        f"{recipe.name}: {requests_of(dry.requests, dry.prompts)}, {dry.answered:,} answered already, {failed:,} "
        f"failed and left alone, {dry.to_ask:,} to ask of {recipe.teacher.model} at {', '.join(recipe.teacher.urls)}"
        + (f", sent as {dry.sent:,} (generate.share_prompt)" if dry.sent < dry.to_ask else ""),
        prompts,
        f"completion tokens: at most {dry.completion_tokens:,} (sampling.max_tokens each)"
        f"{_about(dry.expected_completion_tokens)}",
    ]
    if dry.expected_completion_tokens is None and dry.to_ask:
        needed = f"{ENOUGH_ANSWERS} answers whose tokens the teacher counted"
        lines.append(f"expected numbers need {needed}: run a small prompts.count first")
    return lines + _cost(recipe, dry) + _over_budget(recipe, dry) + dry.warnings


def _about(expected: int | None) -> str:
    return "" if expected is None else f", about {expected:,} if they are like the answers so far"


def _cost(recipe: Recipe, dry: DryRun) -> list[str]:
    if dry.price is None or dry.cost is None:
        if is_private(recipe.teacher.url):
            return ["cost: none, the teacher is a server of your own; teacher.price sets a price"]
        return ["cost: not known; set teacher.price: {input: …, output: …} in USD per million tokens"]
    expected = "" if dry.expected_cost is None else f", about ${dry.expected_cost:,.4f} expected"
    batch = f"; if the provider has batches, generate.mode batch costs half (at most ${dry.cost / 2:,.4f})"
    if recipe.generate.mode == "batch":
        batch = f"; as a batch, which costs half (online: at most ${2 * dry.cost:,.4f})"
    elif recipe.generate.share_prompt:  # which batches do not have
        batch = ""
    rates = " and ".join(f"${rate / 1_000_000:g}" for rate in dry.price)
    lines = [
        f"cost: at most ${dry.cost:,.4f}{expected}{batch}",
        f"price: {rates} per million prompt and completion tokens, from {source_of(recipe.teacher)}",
        f"spent so far: ${dry.spent:,.4f}, {dry.spent_tokens:,} tokens",
    ]
    if dry.long_prompts and recipe.teacher.price is None:
        lines.append(
            f"warning: {dry.long_prompts:,} requests may have over {PRICED_TOKENS:,} prompt tokens, for which some "
            "providers charge more than this price; look it up and set teacher.price, so that the budget holds"
        )
    return lines


def _over_budget(recipe: Recipe, dry: DryRun) -> list[str]:
    """Whether each limit covers all, the bound that the last request reserves included."""
    budget, limits = recipe.budget, []
    if budget.usd is not None and dry.price is not None and dry.cost is not None:
        most = dry.spent + dry.cost + dry.price.cost(dry.reserved_tokens, 0) / PICO
        limits.append((f"budget.usd {budget.usd:g}", most <= budget.usd))
    if budget.tokens is not None:
        tokens = dry.spent_tokens + dry.prompt_tokens + dry.reserved_tokens + dry.completion_tokens
        limits.append((f"budget.tokens {budget.tokens:,}", tokens <= budget.tokens))
    return [f"{name} {'is enough for all' if enough else 'may end the run early (exit 3)'}" for name, enough in limits]
