"""Tokens a second and memory of a model on the engine the project serves with, asked by the project's own client.

Starts one vLLM server, warms it up, sends prompts (the held-out ones first, then the run's others), ends it. Writes the
client's files under evaluation/speed-<model>/ in the run directory, and the server's log beside them.

Every model gets the same settings, prompts and machine. Answers end where the model ends them, so the lengths differ:
the figure is tokens a second, and the mean length stands beside it.
"""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from evaluate.models import engine_folder
from evaluate.results import Measurement, SpeedResult, sample_rows
from generate.engine import Summary, generate
from pipeline.errors import DistillError
from pipeline.recipe import BudgetConfig, GenerateConfig, PromptsConfig, Recipe, TeacherConfig
from pipeline.records import Completion, Kept, Prompt, encode_line, read_jsonl
from pipeline.rundir import RunDir, replacing
from serve.command import choose_device
from serve.machine import detect
from serve.server import Server, free_port, serving

WARM_UP_REQUESTS = 8
WARM_UP_TOKENS = 8
DYING_S = 5.0  # for a server that stops answering to end


def measure_speed(measurement: Measurement, recipe: Recipe, run: RunDir, rows: Sequence[Kept]) -> SpeedResult:
    """Serves the model, times it, and has it answer a few prompts in full (a student only: the teacher has).

    Raises DistillError if the server does not start or no request succeeds.
    """
    key = measurement.subject.key
    folder = run.path / "evaluation" / f"speed-{key}"
    shutil.rmtree(folder, ignore_errors=True)  # a timing is never continued: it starts anew
    folder.mkdir(parents=True)
    model = str(engine_folder(measurement.subject, run))
    port = free_port()
    held_out = _questions(rows)
    prompts = _questions([*rows, *(read_jsonl(run.prompts, Prompt) if run.prompts.is_file() else ())])
    with serving(model, port=port, config=recipe.serve, log=folder / "server.log", served_name=key) as server:
        try:
            _ask(recipe, server, folder / "warm-up", held_out, min(WARM_UP_REQUESTS, len(held_out)), WARM_UP_TOKENS)
            wanted = recipe.evaluate
            timed = _ask(recipe, server, folder / "timed", prompts, wanted.speed_requests, wanted.speed_max_tokens)
            peak = server.peak_rss()
            answers = {} if key == "teacher" else _sample_answers(recipe, server, folder / "samples", rows)
        except DistillError as error:
            if server.wait(DYING_S) is not None:
                raise server.failure(f"while the {measurement.subject.label} was timed") from error
            raise
    if not timed.completion_tokens:
        raise DistillError(f"{measurement.subject.label}: no request was answered; see {folder / 'timed'}")
    device = choose_device(recipe.serve, detect())
    return SpeedResult(
        fingerprint=measurement.fingerprint,
        device=device,
        requests=timed.requests,
        failed=timed.failed,
        completion_tokens=timed.completion_tokens,
        wall_s=timed.wall_s,
        startup_s=server.startup_s,
        peak_rss_bytes=peak if device == "cpu" else None,
        answers=answers,
    )


def _sample_answers(recipe: Recipe, server: Server, folder: Path, rows: Sequence[Kept]) -> dict[str, str]:
    chosen = _questions(sample_rows(rows))
    _ask(recipe, server, folder, chosen, len(chosen), recipe.sampling.max_tokens)
    return {done.prompt_id: done.text for done in read_jsonl(RunDir(folder).completions, Completion)}


def _questions(rows: Iterable[Kept | Prompt]) -> list[Prompt]:
    """The different prompts of the rows, in their order."""
    prompts = (
        row if isinstance(row, Prompt) else Prompt(id=row.prompt_id, messages=row.messages, slots=row.slots)
        for row in rows
    )
    return [*{prompt.id: prompt for prompt in prompts}.values()]


def _ask(
    recipe: Recipe, server: Server, folder: Path, prompts: Sequence[Prompt], requests: int, max_tokens: int
) -> Summary:
    """Sends the prompts, over and over until there are `requests` of them, through `generate`."""
    folder.mkdir(parents=True)
    questions = folder / "questions.jsonl"
    with replacing(questions) as file:
        for prompt in prompts:
            file.write(encode_line(prompt))
    asking = recipe.model_copy(
        update={
            "teacher": TeacherConfig(model=server.served_name, base_url=server.base_url, api_key_env="VLLM_API_KEY"),
            "prompts": PromptsConfig(file=questions, count=requests),
            "sampling": recipe.sampling.model_copy(update={"max_tokens": max_tokens}),
            "generate": GenerateConfig(concurrency=recipe.evaluate.speed_concurrency),
            "budget": BudgetConfig(),
        }
    )
    return generate(asking, RunDir(folder), quiet=True)
