"""Generates: every prompt of a recipe answered once by its teacher, whatever was answered before.

Reads the recipe, the prompts and the journals of the run. Writes recipe.yaml, prompts.jsonl, completions.jsonl,
failures.jsonl and the `generate` section of lineage.json. Takes no lock: the caller holds the run. Who asks is in
generate.asking, in this process or in several; files that survive a kill are generate.journal's.
"""

from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import IO, Any

import msgspec
from rich.console import Console

from generate.asking import Left, ask, ask_in_batches, run_loop
from generate.budget import Budget
from generate.client import check_teacher
from generate.idset import IdSet
from generate.jobs import build_jobs
from generate.journal import Contents, Journal, read_journal
from generate.prices import PICO, price_of
from generate.progress import Counters, Display
from generate.prompts import grammar_size, iter_prompts
from generate.workers import ask_in_shares
from pipeline.lineage import read_lineage, record_lineage, versions
from pipeline.recipe import Recipe
from pipeline.records import Completion, Failure, Prompt, encode_line
from pipeline.rundir import RunDir, replacing


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What a run has now, and what this call did. Tokens are as the server counted them, 0 where it did not."""

    requests: int
    completed: int  # in all
    failed: int  # for good, in all: no answer, and not to be asked again but by `retry_failures`
    resumed: int  # answered by an earlier call
    answered: int  # by this call
    prompt_tokens: int  # of this call
    completion_tokens: int  # of this call
    wall_s: float  # of this call
    errors: dict[str, int]  # this call's failures by type
    cost_usd: float | None = None  # of all calls; None where the teacher's price is not known


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is there to do: counts of requests."""

    requests: int
    repeats: int  # of them ask a question again
    answered: int  # already
    failed: int  # already, and left alone
    to_ask: int


def generate(
    recipe: Recipe,
    run: RunDir,
    *,
    quiet: bool = False,
    retry_failures: bool = False,
    write_batches: bool = False,
    collect: Path | None = None,
) -> Summary:
    """Asks the teacher everything that the recipe's run has no answer to.

    Requests that failed for good in an earlier call are asked again only with `retry_failures`. `quiet` leaves out the
    progress, not the warnings. `write_batches` only writes batch files, and `collect` only takes in the output of one.
    Raises DistillError when the run cannot go on (what was answered is kept, and the next call goes on from there), its
    UsageErrors before anything is asked, and KeyboardInterrupt once interrupted.
    """
    check_teacher(recipe.teacher)
    read_lineage(run)  # raises now rather than at the end
    started = datetime.now(UTC)
    run.path.mkdir(parents=True, exist_ok=True)
    with Journal(run.completions, Completion) as completions, Journal(run.failures, Failure) as failures:
        left = Left(completions.found.ids, failures.found.ids, retry_failures=retry_failures)
        budget = Budget.open(recipe, run, completions.found)
        with replacing(run.prompts) as file:
            plan = _survey(recipe, left, file)
        run.save_recipe(recipe)
        counters = Counters(total=plan.requests, resumed=plan.answered, failed_before=plan.failed)
        display = Display(counters, Console(stderr=True), quiet=quiet)
        for message in _findings(recipe, plan, completions, failures):
            display.say(message)
        try:
            by_batch = recipe.generate.mode == "batch" or write_batches or collect is not None
            if plan.to_ask and by_batch:
                from generate.batch import Batches  # here: the openai package takes half a second to import

                jobs = partial(left.jobs, recipe)
                batches = Batches(recipe, run, jobs, completions, failures, counters, budget, display.say)
                if collect is not None:
                    batches.collect(collect)
                elif write_batches:
                    for path in batches.write():
                        display.say(f"{path}")
                else:
                    run_loop(ask_in_batches(batches, display))
            elif plan.to_ask and recipe.generate.processes > 1:
                run_loop(ask_in_shares(recipe, run, retry_failures=retry_failures, counters=counters, display=display))
            elif plan.to_ask:
                run_loop(ask(recipe, left, completions, failures, counters, budget, display))
        except BaseException:
            with suppress(OSError):  # the disk may be what ended the run: that is the error to tell
                budget.save()
                record_lineage(run, "generate", _lineage(recipe, run, plan, completions, counters, started))
            raise
        budget.save()
        lineage = _lineage(recipe, run, plan, completions, counters, started)
        record_lineage(run, "generate", lineage)
    return _summary(plan, counters, lineage["spent"]["usd"])


def pending(recipe: Recipe, run: RunDir) -> int:
    """How many requests of the recipe the run has no answer to; failed ones are among them. Changes nothing."""
    left = Left(read_journal(run.completions, Completion).ids, IdSet(), retry_failures=True)
    return _survey(recipe, left, None).to_ask


def _survey(recipe: Recipe, left: Left, file: IO[bytes] | None) -> Plan:
    """Counts what is there to do and writes the prompts. All of them are checked here, before any is asked."""
    requests = repeats = answered = failed = 0
    for job in build_jobs(iter_prompts(recipe), recipe):
        if file is not None:
            request, part = job.request, recipe.prompts.part_of(job.request.messages)
            prompt = Prompt(id=request.prompt_id, messages=request.messages, slots=request.slots, part=part)
            file.write(encode_line(prompt))
        requests += 1
        repeats += job.sample > 0
        if job.request.id in left.answered:
            answered += 1
        elif job.request.id in left.failed:
            failed += 1
    return Plan(
        requests=requests, repeats=repeats, answered=answered, failed=failed, to_ask=requests - answered - failed
    )


def _findings(recipe: Recipe, plan: Plan, completions: Journal, failures: Journal) -> Iterator[str]:
    """What the user should know before the first request goes out."""
    for journal in (completions, failures):
        if journal.found.torn_bytes:
            yield f"{journal.path}: cut off a torn last line ({journal.found.torn_bytes} bytes)"
    if plan.repeats:
        distinct = plan.requests - plan.repeats
        yield (
            f"warning: {plan.requests} prompts asked for, but only {distinct} differ: {plan.repeats} ask the same "
            "again; add prompts or slot values, or lower prompts.count"
        )
    strangers = len(completions.found.ids) - plan.answered
    if strangers:
        yield (
            f"warning: {completions.path} also holds {strangers} answers that this recipe does not ask for (other "
            "prompts, sampling, model or endpoint); later stages read them too. Another --run keeps them apart"
        )
    if plan.answered or plan.failed:
        yield f"{recipe.name}: {plan.requests} requests, {plan.answered} answered already, {plan.to_ask} to ask"
    if plan.failed:
        yield f"{plan.failed} requests failed for good earlier and are left alone; --retry-failures asks them again"


def _summary(plan: Plan, counters: Counters, cost_usd: float | None) -> Summary:
    return Summary(
        requests=plan.requests,
        completed=plan.answered + counters.answered,
        failed=plan.failed + counters.failed,
        resumed=plan.answered,
        answered=counters.answered,
        prompt_tokens=counters.prompt_tokens,
        completion_tokens=counters.completion_tokens,
        wall_s=round(counters.seconds, 3),
        errors=dict(counters.errors),
        cost_usd=cost_usd,
    )


def _lineage(
    recipe: Recipe, run: RunDir, plan: Plan, completions: Journal, counters: Counters, started: datetime
) -> dict[str, Any]:
    """The run so far; tokens and the model's names are those of all of completions.jsonl."""
    found = completions.found
    prompt_tokens = found.prompt_tokens + counters.prompt_tokens
    completion_tokens = found.completion_tokens + counters.completion_tokens
    now = Contents(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
    spent, price = Budget.open(recipe, run, now).spent, price_of(recipe.teacher, recipe.generate.mode)
    return {
        "teacher": {"asked": recipe.teacher.model, "served": sorted(counters.models | set(found.models))},
        "endpoints": recipe.teacher.urls,
        "sampling": recipe.sampling.fields(),
        "prompts": {"distinct": plan.requests - plan.repeats, "grammar": grammar_size(recipe)},
        "requests": plan.requests,
        "completed": plan.answered + counters.answered,
        "failed": plan.failed + counters.failed,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        # With what failed attempts may have cost; `completions.jsonl` alone may say less.
        "spent": {"tokens": spent.tokens, "usd": spent.cost / PICO if price else None},
        "last_call": {
            "started": started.isoformat(timespec="seconds"),
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            "answered": counters.answered,
            "failed": counters.failed,
            "wall_s": round(counters.seconds, 3),
        },
        "versions": versions("openai", "aiohttp", "uvloop", "msgspec", "tenacity"),
    }
