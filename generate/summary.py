"""What a call leaves of a run: its counts for the caller, and the `generate` section of lineage.json."""

from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from generate.budget import spent_by, spent_in
from generate.context import Run
from generate.journal import Contents
from generate.prices import PICO, price_of
from generate.progress import EndpointCounts
from generate.prompts import grammar_size
from generate.turns import described, turn_folders
from pipeline.lineage import read_lineage, record_lineage, versions
from pipeline.rundir import RunDir


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What a run has now, and what this call did. Tokens are as the server counted them, 0 where it did not."""

    prompts: int
    requests: int  # prompts × prompts.samples
    completed: int  # in all
    failed: int  # for good, in all, and not answered since; asked again only with `retry_failures`
    resumed: int  # answered by an earlier call
    answered: int  # by this call
    prompt_tokens: int  # of this call
    completion_tokens: int  # of this call
    reasoning_tokens: int = 0  # of them
    wall_s: float  # of this call
    errors: dict[str, int]  # this call's failures by type
    cost_usd: float | None = None  # of all calls; None where the teacher's price is not known
    endpoints: dict[str, EndpointCounts] = {}  # what each has done in this call; of several passes, in the last one


def summary_of(run: Run) -> Summary:
    """The counts of one pass."""
    counters = run.counters
    return Summary(
        prompts=counters.prompts,
        requests=counters.total,
        completed=counters.resumed + counters.answered,
        failed=counters.without_answer,
        resumed=counters.resumed,
        answered=counters.answered,
        prompt_tokens=counters.prompt_tokens,
        completion_tokens=counters.completion_tokens,
        reasoning_tokens=counters.reasoning_tokens,
        wall_s=round(counters.seconds, 3),
        errors=dict(counters.errors),
        cost_usd=spent_of_run(run)["usd"],
        endpoints=counters.by_endpoint(),
    )


def sum_of_passes(passes: list[Summary], run: RunDir) -> Summary:
    """The summary of a run of several passes: the last one, with what the others cost, and the requests they lost."""
    *earlier, last = passes
    lost = sum(one.failed for one in earlier)
    unknown = any(one.cost_usd is None for one in passes)
    return msgspec.structs.replace(
        last,
        requests=last.requests + lost,
        failed=last.failed + lost,
        prompt_tokens=sum(one.prompt_tokens for one in passes),
        completion_tokens=sum(one.completion_tokens for one in passes),
        reasoning_tokens=sum(one.reasoning_tokens for one in passes),
        wall_s=round(sum(one.wall_s for one in passes), 3),
        errors=dict(sum((Counter(one.errors) for one in passes), Counter())),
        cost_usd=None if unknown else (last.cost_usd or 0) + spent_by(turn_folders(run)).cost / PICO,
    )


def save_asked(run: Run) -> None:
    """Saves which model this call is about to ask, and how many answers there are now: a killed call saves no more."""
    before = read_lineage(run.dir).get("generate", {})
    asking = {"model": run.recipe.teacher.model, "answers": len(run.completions.found.ids)}
    teacher = {**_teachers(run), "served": sorted(_answers(run).models), "asking": asking}
    record_lineage(run.dir, "generate", {**before, "teacher": teacher})


def save(run: Run) -> None:
    """Saves what was spent, and the run so far in lineage.json."""
    run.budget.save()
    recipe, counters, now, answers = run.recipe, run.counters, datetime.now(UTC), _answers(run)
    nodes = msgspec.to_builtins(counters.nodes) or read_lineage(run.dir).get("generate", {}).get("nodes")
    record_lineage(
        run.dir,
        "generate",
        {
            "teacher": {**_teachers(run), "served": sorted(answers.models)},
            **({"given": given} if (given := recipe.prompts.answers) else {}),
            "endpoints": [] if given else recipe.teacher.urls,
            "sampling": {} if given else recipe.sampling.fields(),
            "prompts": {
                "asked": counters.prompts,
                "distinct": counters.distinct,
                "samples": recipe.prompts.samples,
                "grammar": grammar_size(recipe),
            },
            "requests": counters.total,
            "completed": counters.resumed + counters.answered,
            "failed": counters.without_answer,
            "prompt_tokens": answers.prompt_tokens,
            "completion_tokens": answers.completion_tokens,
            "reasoning_tokens": answers.reasoning_tokens,
            "spent": spent_of_run(run),
            **({"user": described(recipe.prompts.user, run.dir)} if recipe.prompts.user else {}),
            **({"nodes": nodes} if nodes else {}),
            "last_call": {
                "started": (now - timedelta(seconds=counters.seconds)).isoformat(timespec="seconds"),
                "ended": now.isoformat(timespec="seconds"),
                "answered": counters.answered,
                "failed": counters.failed,
                "wall_s": round(counters.seconds, 3),
                "by_endpoint": {
                    name: {"answered": counts.answered, "completion_tokens": counts.completion_tokens}
                    for name, counts in counters.by_endpoint().items()
                },
            },
            "versions": versions("openai", "aiohttp", "uvloop", "msgspec", "tenacity"),
        },
    )


def _teachers(run: Run) -> dict[str, Any]:
    """The recipe's teacher, and the `earlier` ones whose answers the run still holds: they alone, if it gave none."""
    before, held = read_lineage(run.dir).get("generate", {}).get("teacher", {}), len(run.completions.found.ids)
    names = [before["asked"], *before.get("earlier", ())] if held and before.get("served") else []
    if (killed := before.get("asking")) and killed["answers"] < held:  # a call that could not save what it has done
        names.insert(0, killed["model"])
    if run.counters.resumed + run.counters.answered or not names:
        model = run.recipe.teacher.model
        names = [model, *sorted({*names} - {model})]
    asked, *earlier = dict.fromkeys(names)
    return {"asked": asked, **({"earlier": earlier} if earlier else {})}


def _answers(run: Run) -> Contents:
    """What completions.jsonl holds now, without its ids: what it held, and this call's answers."""
    found, counters = run.completions.found, run.counters
    return Contents(
        models=found.models + Counter(counters.models),
        prompt_tokens=found.prompt_tokens + counters.prompt_tokens,
        completion_tokens=found.completion_tokens + counters.completion_tokens,
        reasoning_tokens=found.reasoning_tokens + counters.reasoning_tokens,
    )


def spent_of_run(run: Run) -> dict[str, Any]:
    """Tokens and USD of all calls, with what failed attempts may have cost; USD is None while no price is known."""
    spent = spent_in(run.dir, _answers(run))
    price = price_of(run.recipe.teacher, run.recipe.generate.mode)
    return {"tokens": spent.tokens, "usd": spent.cost / PICO if price or spent.cost else None}
