"""Generates: every prompt of a recipe answered once by its teacher, whatever was answered before.

Reads the recipe, the prompts and the journals of the run. Writes recipe.yaml, prompts.jsonl, completions.jsonl,
failures.jsonl and the `generate` section of lineage.json. Takes no lock: the caller holds the run, or uses the API in
generate/__init__.py. The requests are sent by generate.online, generate.workers or generate.batch; files that survive a
kill are generate.journal's.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import msgspec
from rich.console import Console

from generate.budget import Budget
from generate.client import check_teacher
from generate.context import Finished, Interrupted, Left, Outcome, Run, raise_unless_finished
from generate.jobs import build_jobs
from generate.journal import Contents, Journal, read_journal
from generate.online import on_signals, run_loop, send_from_here
from generate.prices import PICO, price_of
from generate.progress import Counters, Display
from generate.prompts import grammar_size, iter_prompts
from generate.workers import send_from_workers
from pipeline.lineage import read_lineage, record_lineage, versions
from pipeline.recipe import Recipe
from pipeline.records import Completion, Failure, Prompt, encode_line
from pipeline.rundir import RunDir, replacing

if TYPE_CHECKING:
    from generate.batch import Batches


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What a run has now, and what this call did. Tokens are as the server counted them, 0 where it did not."""

    requests: int
    completed: int  # in all
    failed: int  # for good, in all: no answer, and not asked again without `retry_failures`
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
    with _opened(recipe, run, quiet=quiet, retry_failures=retry_failures) as call:
        if not call.plan.to_ask:
            pass
        elif collect is not None:
            call.batches().collect(collect)
        elif write_batches:
            for path in call.batches().write():
                call.display.say(f"{path}")
        else:
            raise_unless_finished(run_loop(call.send(signals=True)), call.run.budget)
    return call.summary()


async def agenerate(recipe: Recipe, run: RunDir, *, quiet: bool = False, retry_failures: bool = False) -> Summary:
    """As `generate`, in the running event loop. Leaves signals alone; a cancelled call keeps what was answered."""
    with _opened(recipe, run, quiet=quiet, retry_failures=retry_failures) as call:
        if call.plan.to_ask:
            raise_unless_finished(await call.send(signals=False), call.run.budget)
    return call.summary()


def pending(recipe: Recipe, run: RunDir) -> int:
    """How many requests of the recipe are left to ask: neither answered nor failed for good. Changes nothing."""
    answered, failed = read_journal(run.completions, Completion).ids, read_journal(run.failures, Failure).ids
    return _survey(recipe, Left(answered, failed, retry_failures=False), None).to_ask


@dataclass
class _Call:
    """One call of `generate`: the run, what it is to do, and what it says."""

    run: Run
    plan: Plan
    display: Display
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    lineage: dict[str, Any] = field(default_factory=dict)  # once saved

    async def send(self, *, signals: bool) -> Outcome:
        """Sends what is left, as the recipe says."""
        config = self.run.recipe.generate
        if config.mode == "batch":
            outcome = await self._send_batches(signals=signals)
        elif config.processes > 1:
            outcome = await send_from_workers(self.run, self.display, signals=signals)
        else:
            outcome = await send_from_here(self.run, self.display, signals=signals)
        if isinstance(outcome, Interrupted):
            self.display.stopped("still to come" if config.mode == "batch" else "still to ask")
        return outcome

    def batches(self) -> "Batches":
        """The Batch API's side of the run."""
        from generate.batch import Batches  # here: the openai package takes half a second to import

        return Batches(self.run)

    async def _send_batches(self, *, signals: bool) -> Outcome:
        stopped = asyncio.Event()
        with on_signals(stopped.set if signals else None):
            await self.batches().run(stopped)
        return Interrupted() if stopped.is_set() else Finished()

    def save(self) -> None:
        """Saves what was spent, and the call in lineage.json."""
        self.run.budget.save()
        self.lineage = _lineage(self)
        record_lineage(self.run.dir, "generate", self.lineage)

    def summary(self) -> Summary:
        """The counts, once saved."""
        plan, counters = self.plan, self.run.counters
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
            cost_usd=self.lineage["spent"]["usd"],
        )


@contextmanager
def _opened(recipe: Recipe, run_dir: RunDir, *, quiet: bool, retry_failures: bool) -> Iterator[_Call]:
    """Opens the run, and says what there is to do. However the block ends, what was done and spent is saved."""
    check_teacher(recipe.teacher)
    read_lineage(run_dir)  # raises now rather than at the end
    run_dir.path.mkdir(parents=True, exist_ok=True)
    with Journal(run_dir.completions, Completion) as completions, Journal(run_dir.failures, Failure) as failures:
        left = Left(completions.found.ids, failures.found.ids, retry_failures=retry_failures)
        budget = Budget.open(recipe, run_dir, completions.found)
        with replacing(run_dir.prompts) as file:
            plan = _survey(recipe, left, file)
        run_dir.save_recipe(recipe)
        counters = Counters(total=plan.requests, resumed=plan.answered, failed_before=plan.failed)
        display = Display(counters, Console(stderr=True), quiet=quiet)
        run = Run(
            recipe=recipe,
            dir=run_dir,
            completions=completions,
            failures=failures,
            left=left,
            budget=budget,
            counters=counters,
            say=display.say,
            show=display.tick,
        )
        for message in _findings(run, plan):
            display.say(message)
        call = _Call(run, plan, display)
        try:
            yield call
        except BaseException:
            with suppress(OSError):  # the disk may be what ended the run: that is the error to tell
                call.save()
            raise
        call.save()


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


def _findings(run: Run, plan: Plan) -> Iterator[str]:
    """What the user should know before the first request goes out."""
    for journal in (run.completions, run.failures):
        if journal.found.torn_bytes:
            yield f"{journal.path}: cut off a torn last line ({journal.found.torn_bytes} bytes)"
    if plan.repeats:
        distinct = plan.requests - plan.repeats
        yield (
            f"warning: {plan.requests} prompts asked for, but only {distinct} differ: {plan.repeats} ask the same "
            "again; add prompts or slot values, or lower prompts.count"
        )
    strangers = len(run.completions.found.ids) - plan.answered
    if strangers:
        yield (
            f"warning: {run.completions.path} also holds {strangers} answers that this recipe does not ask for (other "
            "prompts, sampling, model or endpoint); later stages read them too. Another --run keeps them apart"
        )
    if plan.answered or plan.failed:
        yield f"{run.recipe.name}: {plan.requests} requests, {plan.answered} answered already, {plan.to_ask} to ask"
    if plan.failed:
        yield f"{plan.failed} requests failed for good earlier and are left alone; --retry-failures asks them again"


def _lineage(call: _Call) -> dict[str, Any]:
    """The run so far; tokens and the model's names are those of all of completions.jsonl."""
    recipe, plan, counters = call.run.recipe, call.plan, call.run.counters
    found = call.run.completions.found
    prompt_tokens = found.prompt_tokens + counters.prompt_tokens
    completion_tokens = found.completion_tokens + counters.completion_tokens
    now = Contents(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
    spent, price = Budget.open(recipe, call.run.dir, now).spent, price_of(recipe.teacher, recipe.generate.mode)
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
        "spent": {"tokens": spent.tokens, "usd": spent.cost / PICO if price or spent.cost else None},
        "last_call": {
            "started": call.started.isoformat(timespec="seconds"),
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            "answered": counters.answered,
            "failed": counters.failed,
            "wall_s": round(counters.seconds, 3),
        },
        "versions": versions("openai", "aiohttp", "uvloop", "msgspec", "tenacity"),
    }
