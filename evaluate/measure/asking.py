"""Asks a model prompts through the project's own client, and reads what it answered. Writes the client's files."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from evaluate.measure.results import ProbeAnswer
from generate.run import Summary, generate
from pipeline.recipe import BudgetConfig, GenerateConfig, PromptsConfig, Recipe, TeacherConfig
from pipeline.records import Completion, Failure, Prompt, read_jsonl
from pipeline.rundir import RunDir, write_jsonl
from serve.server import Server


def asking(
    recipe: Recipe,
    server: Server,
    *,
    max_tokens: int | None = None,
    concurrency: Literal["auto"] | int = "auto",
) -> Recipe:
    """The recipe with a server of ours in the teacher's place, and nothing to pay."""
    sampling = {} if max_tokens is None else {"max_tokens": max_tokens}
    return recipe.model_copy(
        update={
            "teacher": TeacherConfig(model=server.served_name, base_url=server.base_url, api_key_env="VLLM_API_KEY"),
            "sampling": recipe.sampling.model_copy(update=sampling),
            "generate": GenerateConfig(concurrency=concurrency),
            "budget": BudgetConfig(),
        }
    )


def ask(recipe: Recipe, folder: Path, prompts: Sequence[Prompt], count: int | None = None) -> Summary:
    """Sends the prompts, over and over until there are `count` of them, through `generate`."""
    folder.mkdir(parents=True, exist_ok=True)
    questions = folder / "questions.jsonl"
    write_jsonl(questions, prompts)
    wanted = recipe.model_copy(update={"prompts": PromptsConfig(file=questions, count=count)})
    return generate(wanted, RunDir(folder), quiet=True)


def answers_in(folder: Path, prompts: Sequence[Prompt]) -> list[ProbeAnswer]:
    """What was answered to the prompts, in their order, once each.

    A model that ended at once has said nothing: `generate` takes that for a failure, here it is an empty answer.
    Requests that failed for any other reason have none.
    """
    found = {answer.prompt_id: answer for answer in (*_silences(folder), *_completions(folder))}
    return [found[prompt.id] for prompt in prompts if prompt.id in found]


def _completions(folder: Path) -> Iterator[ProbeAnswer]:
    path = RunDir(folder).completions
    for row in read_jsonl(path, Completion) if path.exists() else ():
        yield ProbeAnswer(row.prompt_id, row.text, row.finish_reason, row.usage.completion_tokens)


def _silences(folder: Path) -> Iterator[ProbeAnswer]:
    path = RunDir(folder).failures
    for row in read_jsonl(path, Failure) if path.exists() else ():
        if row.error == "empty_answer":
            yield ProbeAnswer(row.prompt_id, "", "stop" if "finish_reason stop" in row.message else "unknown", None)
