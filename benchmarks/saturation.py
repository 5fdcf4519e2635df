"""`python -m benchmarks.saturation`: our client through a real server against the same engine without one.

Both sides have the same prompts, seeds (`--seeds sent`, `none`, or both) and lengths (`--tokens`, several with commas;
`ignore_eos`), the same engine arguments (`--slots` is max_num_seqs, `--args` are more), and a model that is warm. They
take turns. R is the offline side's time over ours: for the whole run, and for its steady part, which is all but the
first and the last answer of each slot. The last line of a table compares `concurrency: auto` with fixed numbers.
"""

import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks import offline
from benchmarks.measure import auto_or_whole, flags, measured, one_of, several, show, steady_seconds, whole
from benchmarks.runs import answer_ends, bodies, recipe_for, run_quietly
from generate.reply import EMPTY
from pipeline.cli import run_stage
from pipeline.errors import UsageError
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir
from pipeline.serve_config import ServeConfig
from serve.server import free_port, serving

MODEL = "embedded:smollm2-135m"
OFFLINE = "offline"
CLOCK_S = 0.001  # what records round their times to


class Figures(NamedTuple):
    """One run's figures."""

    per_s: float  # tokens
    steady_s: float
    cpu_ms: float = 0.0  # of the client, per request


def main() -> None:
    sizes = {"requests": 256, "tokens": "48", "slots": 64, "concurrency": "auto,32,64,128", "runs": 3}
    kinds = {"tokens": several(whole), "concurrency": several(auto_or_whole), "seeds": several(one_of("sent", "none"))}
    options = flags(__doc__, kinds, model=MODEL, **sizes, seeds="sent", args="")
    if options.requests <= 2 * options.slots:
        raise UsageError(f"--requests must be more than twice --slots ({options.slots}), got {options.requests}")
    sides = (OFFLINE, *options.concurrency)
    config = ServeConfig(kv_cache_gib=1, args=["--max-num-seqs", str(options.slots), *options.args.split()])
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(options.model, port=free_port(), config=config) as server,
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as engine,
    ):

        def recipe(side: str, requests: int, tokens: int, seeds: str) -> Recipe:
            sampling = {"max_tokens": tokens, "seed": 0 if seeds == "sent" else None, "extra": {"ignore_eos": True}}
            teacher, settings = {"model": server.served_name}, {"concurrency": "auto" if side == OFFLINE else side}
            return recipe_for(Path(folder), server.base_url, requests, teacher, sampling=sampling, generate=settings)

        engine.submit(offline.load, server.command.argv[3:], server.command.env).result()  # the arguments alone
        try:
            for tokens, seeds in product(options.tokens, options.seeds):
                warm_up = recipe(OFFLINE, options.slots, tokens, seeds)
                engine.submit(offline.answer, bodies(warm_up)).result()
                run_quietly(warm_up, RunDir(Path(folder) / f"warm-up-{tokens}-{seeds}"))
                taken: dict[str, list[Figures]] = {side: [] for side in sides}
                for side in list(taken) * options.runs:
                    made, slots = recipe(side, options.requests, tokens, seeds), options.slots
                    taken[side].append(alone(engine, made, slots) if side == OFFLINE else through(made, slots))
                    print(tokens, seeds, side, taken[side][-1], file=sys.stderr, flush=True)
                print(f"{tokens} tokens, seeds {seeds}\n{describe(medians(taken))}", flush=True)
        finally:
            engine.submit(offline.unload).result()


def medians(taken: dict[str, list[Figures]]) -> dict[str, Figures]:
    return {side: Figures(*map(median, zip(*runs, strict=True))) for side, runs in taken.items()}


def alone(engine: ProcessPoolExecutor, recipe: Recipe, slots: int) -> Figures:
    """All requests given to the engine at once."""
    tokens, seconds, ends = engine.submit(offline.answer, bodies(recipe)).result()
    return Figures(tokens / seconds, steady_seconds(ends, slots))


def through(recipe: Recipe, slots: int) -> Figures:
    """One run of `generate` against the server."""
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(Path(folder))
        summary, _, cpu_s, _ = measured(run_quietly, recipe, run)
        steady_s = steady_seconds(answer_ends(run), slots)
    # Random weights may say nothing but special tokens. Such an answer is none, and was computed all the same.
    assert summary.failed == sum(summary.errors.get(error, 0) for error in EMPTY), summary
    tokens = summary.requests * recipe.sampling.max_tokens
    return Figures(tokens / summary.wall_s, steady_s, 1000 * cpu_s / summary.requests)


def describe(found: dict[str, Figures]) -> str:
    """The table, and how `auto` compares with the best fixed number."""
    limit = found[OFFLINE]
    rows = [("side", "tok/s", "R whole", "R steady", "client CPU ms/request")]
    for side, one in found.items():
        name, cpu_ms = (OFFLINE, "-") if side == OFFLINE else (f"client, {side}", f"{one.cpu_ms:.2f}")
        ratios = f"{one.per_s / limit.per_s:.3f}", f"{limit.steady_s / max(one.steady_s, CLOCK_S):.3f}"
        rows.append((name, f"{one.per_s:.1f}", *ratios, cpu_ms))
    fixed = [one.per_s for side, one in found.items() if side not in (OFFLINE, "auto")]
    if "auto" not in found or not fixed:
        return show(rows)
    return f"{show(rows)}\nauto gives {found['auto'].per_s / max(fixed):.3f} of the best fixed number"


if __name__ == "__main__":
    run_stage(main)
