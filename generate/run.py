"""Generates: every prompt of a recipe answered once by its teacher, whatever was answered before.

Reads the recipe, the prompts and the journals of the run. Writes recipe.yaml, prompts.jsonl and the `generate` section
of lineage.json, while it holds the run's lock. The requests are sent by generate.online, generate.workers,
generate.batch or a cluster (scale.generation), which write the journals (generate.journal).
"""

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from rich.console import Console

from generate.batch_files import COLLECTED, under_way
from generate.client import check_teacher
from generate.context import Left, Outcome, Run, opened_run
from generate.event_loop import on_signals, run_loop
from generate.given import take_in
from generate.idset import IdSet
from generate.journal import read_journal
from generate.metrics import served
from generate.online import send_from_here
from generate.progress import Counters, Display, prompt_warnings, requests_of
from generate.summary import Summary, save, save_asked, spent_of_run, sum_of_passes, summary_of
from generate.turns import passes
from generate.workers import send_from_workers
from pipeline.errors import DataError, RecipeError, UsageError
from pipeline.lineage import read_lineage
from pipeline.progress import reporting
from pipeline.recipe import Recipe, load_recipe
from pipeline.records import Completion, Failure, Prompt, asked_fields, encode_line
from pipeline.rundir import RunDir, replacing

if TYPE_CHECKING:
    from generate.batch import Batches


class Sender(Protocol):
    """Sends all that a run has left, and says how that ended."""

    async def __call__(self, run: Run, *, signals: bool) -> Outcome: ...


def generate(
    recipe: Recipe | Path | str,
    run: RunDir | Path | str | None = None,
    *,
    quiet: bool = False,
    retry_failures: bool = False,
    write_batches: bool = False,
    collect: Path | None = None,
    send: Sender | None = None,
) -> Summary:
    """Asks everything that the run has no answer to, as `python -m generate` does, and returns the counts.

    `recipe`: a Recipe, taken as it is, or the path of one, which `DISTILL_*` variables override. `run`: its folder;
    `runs/<name of the recipe>` without one. The run is locked meanwhile. `quiet`: no progress. `retry_failures`: asks
    again what failed for good earlier. `write_batches` only writes batch files, and `collect` only takes in the output
    of one. `send` sends in place of this machine: a cluster (scale.generation).
    Raises DistillError when it cannot go on (what was answered is kept, and the next call goes on from there), OSError
    where a file or folder cannot be written, KeyboardInterrupt after Ctrl-C. Failed requests raise nothing:
    `Summary.failed`.
    """
    recipe, run = _resolved(recipe, run)
    if collect is None:
        check_stored(recipe, run)
    if recipe.prompts.user and (write_batches or collect):
        raise UsageError("batch files are of one pass, prompts.user has several: use generate.mode batch")
    if recipe.prompts.answers and (write_batches or collect):
        raise UsageError("prompts.answers: the rows bring their answers, so there is no batch; leave the flag out")
    done = []
    with run.locked(new=True):
        for asking, folder in passes(recipe, run):
            with _opened(asking, folder, recipe, quiet=quiet, retry_failures=retry_failures) as (call, display):
                if collect is not None:
                    _batches(call).collect(collect)
                elif not _has_work(call):
                    pass
                elif recipe.prompts.answers:
                    take_in(call)
                elif write_batches:
                    for path in _batches(call).write():
                        call.say(str(path))
                elif outcome := run_loop(_send(call, display, signals=True, send=send)):
                    raise outcome
            done.append(summary_of(call))
    return sum_of_passes(done, run)


async def agenerate(
    recipe: Recipe | Path | str,
    run: RunDir | Path | str | None = None,
    *,
    quiet: bool = False,
    retry_failures: bool = False,
) -> Summary:
    """As `generate`, in the running event loop. Leaves signals alone: cancel the task to stop it.

    A cancelled call abandons the requests in flight; what was answered is kept.
    """
    recipe, run = _resolved(recipe, run)
    check_stored(recipe, run)
    done = []
    with run.locked(new=True):
        for asking, folder in passes(recipe, run):
            with _opened(asking, folder, recipe, quiet=quiet, retry_failures=retry_failures) as (call, display):
                if recipe.prompts.answers:
                    await asyncio.to_thread(take_in, call)
                elif _has_work(call) and (outcome := await _send(call, display, signals=False)):
                    raise outcome
            done.append(summary_of(call))
    return sum_of_passes(done, run)


def _resolved(recipe: Recipe | Path | str, run: RunDir | Path | str | None) -> tuple[Recipe, RunDir]:
    if not isinstance(recipe, Recipe):
        if not isinstance(recipe, str | Path):
            raise UsageError(
                f"recipe: a Recipe or its path is needed, got {type(recipe).__name__}; Recipe(**keys) makes one"
            )
        recipe = load_recipe(Path(recipe))
    if isinstance(run, RunDir):
        return recipe, run
    if re.match("[a-z0-9]+:/", str(run)):
        raise UsageError(f"{run}: a folder is needed here; for a run in a store: python -m generate RECIPE --run {run}")
    run = RunDir(Path(run) if run else Path("runs") / recipe.name)
    return recipe, run


def pending(recipe: Recipe, run: RunDir) -> int:
    """How many requests of the recipe are left to ask: neither answered nor failed for good. Asks nothing.

    Of a recipe with `prompts.user` those of the first pass that has any: the next ones depend on their answers.
    """
    for asking, folder in passes(recipe, run):
        answered, failed = read_journal(folder.completions, Completion), read_journal(folder.failures, Failure)
        counters = Counters()
        for _ in Left(answered.ids, failed.ids, retry_failures=False).survey(asking, counters):
            pass
        if counters.left:
            return counters.left
    return 0


def unasked(recipe: Recipe, run: RunDir) -> int:
    """How many answers of a run the recipe does not ask for: of other prompts, sampling, model or endpoint."""
    if not run.completions.is_file() or not (answered := read_journal(run.completions, Completion).ids):
        return 0
    *_, (asking, _) = passes(recipe, run)
    counters = Counters()
    for _ in Left(answered, IdSet(), retry_failures=False).survey(asking, counters):
        pass
    return len(answered) - counters.resumed


def check_stored(recipe: Recipe, run: RunDir) -> None:
    """Raises RecipeError if the training needs logprobs of answers still to be asked, and none would be stored."""
    needed = recipe.train.method == "kd" and recipe.train.kd.teacher == "stored" and not run.internal
    if needed and recipe.sampling.logprobs is None and pending(recipe, run):
        raise RecipeError(
            "train.kd.teacher is stored, but sampling.logprobs is null, so nothing would be stored of the answers: set "
            "it, as in sampling.logprobs: 20, or use train.kd.teacher: local or served; nothing was asked"
        )


@contextmanager
def _opened(
    recipe: Recipe, folder: RunDir, whole: Recipe, *, quiet: bool, retry_failures: bool
) -> Iterator[tuple[Run, Display]]:
    """Opens the run of one pass, and says what there is to do. `whole` is the recipe as the user has it.

    However the block ends, what was done and spent is saved.
    """
    check_teacher(recipe.teacher)
    retry_failures |= recipe.prompts.answers is not None  # a row that had no answer may have one now
    read_lineage(folder)  # raises now rather than at the end
    folder.path.mkdir(parents=True, exist_ok=True)
    counters = Counters()
    display = Display(counters, Console(stderr=True), quiet=quiet)
    with opened_run(recipe, folder, counters, say=display.say, show=display.tick, retry_failures=retry_failures) as run:
        with replacing(folder.prompts) as file:
            jobs = run.left.survey(recipe, counters)
            if not quiet:
                jobs = reporting(jobs, lambda count: f"{count:,} requests looked at so far", display.say)
            for request in (job.request for job in jobs):
                if request.sample % recipe.prompts.samples == 0:  # one line, however many samples a prompt has
                    part = recipe.prompts.part_of(request)
                    file.write(encode_line(Prompt(id=request.prompt_id, **asked_fields(request), part=part)))
        folder.save_recipe(whole)
        for message in _findings(run, whole):
            run.say(message)
        counters.started = monotonic()
        if counters.left:
            save_asked(run)
        try:
            yield run, display
        except BaseException:
            with suppress(OSError):  # the disk may be what ended the run: that is the error to tell
                save(run)
            raise
        save(run)


def _has_work(run: Run) -> bool:
    """Whether requests are left to ask, or batches to collect."""
    if run.recipe.generate.mode == "batch" and under_way(run.dir.path / "batches"):
        return True
    return run.counters.left > 0


async def _send(run: Run, display: Display, *, signals: bool, send: Sender | None = None) -> Outcome:
    config = run.recipe.generate
    if config.mode == "batch":
        outcome = await _send_batches(run, signals=signals)
    else:
        here = send_from_workers if config.processes > 1 else send_from_here
        with served(config, run.counters, lambda: spent_of_run(run)["usd"]), display:
            outcome = await (send or here)(run, signals=signals)
        if not outcome and not send and run.counters.left:
            file, still, total = run.recipe.prompts.file, run.counters.left, run.counters.total
            return DataError(
                f"{file}: {still} of {total} requests were not asked, because it gave other rows when read again; "
                "it must give the same rows each time"
            )
    if isinstance(outcome, KeyboardInterrupt):
        left = "still to come" if config.mode == "batch" else "still to ask"
        run.say(f"{run.counters.answered} answered in this call, {run.counters.left} {left}")
    return outcome


async def _send_batches(run: Run, *, signals: bool) -> Outcome:
    batches = _batches(run)
    sending = asyncio.ensure_future(batches.run())

    def interrupt() -> None:
        if batches.stopped.is_set():
            sending.cancel()
        else:
            run.say("stopping after the step that is under way; again to stop at once")
        batches.stopped.set()

    with on_signals(interrupt if signals else None):
        try:
            await sending
        except asyncio.CancelledError:
            if not batches.stopped.is_set():
                raise
    return KeyboardInterrupt() if batches.stopped.is_set() else None


def _batches(run: Run) -> "Batches":
    from generate.batch import Batches  # here: the openai package takes half a second to import

    return Batches(run)


def _findings(run: Run, whole: Recipe) -> Iterator[str]:
    """What the user should know before the first request goes out. `whole` is the recipe as the user has it."""
    counters = run.counters
    by_a_stage = run.dir.internal and whole.prompts.user is None  # as of an evaluation, which repeats its questions
    for journal in (run.completions, run.failures):
        if journal.found.torn_bytes:
            yield f"{journal.path}: cut off a torn last line ({journal.found.torn_bytes} bytes)"
    if not by_a_stage and run.recipe.prompts.file == whole.prompts.file:  # the user's own, not a later turn's
        yield from prompt_warnings(run.recipe.prompts, counters)
    strangers = len(run.completions.found.ids) - counters.resumed
    if strangers and not run.dir.internal:
        yield (
            f"warning: {run.completions.path} also holds {strangers} answers that this recipe does not ask for (other "
            "prompts, sampling, model or endpoint); later stages read them too. Another --run keeps them apart"
        )
    if counters.done:
        asked = requests_of(counters.total, counters.prompts)
        found = f"{asked}, {counters.resumed} answered already, {counters.left} to ask"
        yield f"{run.recipe.name}: {found}"
    if counters.left and run.recipe.generate.mode == "online" and (live := under_way(run.dir.path / "batches")):
        names = ", ".join(chunk.batch_id or chunk.name for chunk in live)
        yield (
            f"warning: batches under way: {names}. They count as the most that they can cost, and what they answer may "
            f"be bought a second time now; generate.mode batch collects them ({COLLECTED} in "
            f"{run.dir.path / 'batches' / 'state.json'} gives one up)"
        )
    if counters.failed_before and not counters.retrying:
        yield (
            f"{counters.failed_before} requests failed for good earlier and are left alone; --retry-failures asks them "
            "again"
        )
