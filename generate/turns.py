"""`prompts.user`: a second model plays the user. One run is several passes of `generate`, each with its journals.

    turns/1-teacher/   the answers to the prompts
    turns/1-user/      the user's next messages; then 2-teacher, 2-user, …
    the run itself     the answers to the last messages, each record with its whole conversation

The prompts of a pass are written anew from the journals of the passes before it, always the same. So a killed run goes
on where it was, and asks nothing twice. A conversation ends early, and is left out, where a request failed, or an
answer was cut off or calls tools.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from generate.budget import known_price, shared_budget
from generate.client import check_teacher
from generate.context import asked_rows
from generate.jobs import build_jobs
from generate.prompts import iter_prompts
from pipeline.errors import DataError
from pipeline.lineage import read_lineage, spent_in_all
from pipeline.prompts_config import PromptsConfig, UserConfig
from pipeline.recipe import Recipe
from pipeline.records import Completion, Message, Prompt, Request, asked_fields
from pipeline.rundir import RunDir, write_jsonl

OPENING = "Write your first message."  # chat templates want a conversation to begin with the role `user`
OTHER_SIDE = {"user": "assistant", "assistant": "user"}
SYSTEM = (
    "You play the user who talks to an assistant. Write the user's next message, and nothing else: react to what the "
    "assistant said last, ask a follow-up question or for a change. Write in the user's language, and briefly."
)


def passes(recipe: Recipe, run: RunDir) -> Iterator[tuple[Recipe, RunDir]]:
    """What is to be asked, and the run that is asked it. When the next pass is taken, the one before must be done.

    A recipe without `prompts.user` has one pass, itself. All passes of the run share the budget; those that an earlier
    recipe with more turns has left count too. Raises DataError if no conversation goes on, RecipeError if the budget
    needs a price that is not known.
    """
    user = recipe.prompts.user

    def asking(prompts: PromptsConfig, folder: RunDir) -> Recipe:
        others = [other for other in (run, *turn_folders(run)) if other.path != folder.path]
        return recipe.model_copy(update={"prompts": prompts, "budget": shared_budget(recipe.budget, others)})

    if user is None:
        yield asking(recipe.prompts, run), run
        return
    asked_of_user = _as_user(recipe, user)
    known_price(asked_of_user)
    check_teacher(asked_of_user.teacher)
    _check_names(recipe)

    own, turns = recipe.prompts, run.path / "turns"
    prompts = own.model_copy(update={"user": None})
    for number in range(1, user.turns + 1):
        answers, replies = (
            RunDir(turns / f"{number}-{side}", internal=True, first=number == 1) for side in ("teacher", "user")
        )
        teacher = asking(prompts, answers)
        yield teacher, answers
        questions = _written(replies.path / "questions.jsonl", _for_user(answers, teacher, user))
        player = _as_user(asking(PromptsConfig(file=questions), replies), user)
        yield player, replies
        said = {request.prompt_id: text for request, text in _whole(replies, player)}
        questions = _written(answers.path / "next.jsonl", _for_teacher(answers, teacher, said))
        parts = own.model_dump(include={"seed", "validation", "test", "group"})
        prompts = PromptsConfig(file=questions, **parts)
    yield asking(prompts.model_copy(update={"user": user}), run), run


def turn_folders(run: RunDir) -> list[RunDir]:
    """The passes before the last that a run has, also those of an earlier recipe with more turns."""
    return [RunDir(path) for path in sorted((run.path / "turns").glob("*/"))]


def described(user: UserConfig, run: RunDir) -> dict[str, Any]:
    """The user for lineage.json, and what the passes before the last have cost."""
    before = [read_lineage(folder).get("generate", {}).get("spent", {}) for folder in turn_folders(run)]
    return {"model": user.model, "turns": user.turns, "spent_before": spent_in_all(before)}


def _as_user(recipe: Recipe, user: UserConfig) -> Recipe:
    return recipe.model_copy(
        update={
            "teacher": recipe.teacher.another(user, "prompts.user"),
            "sampling": recipe.sampling.model_copy(
                update={"max_tokens": user.max_tokens, "logprobs": None, "extra": {}}
            ),
        }
    )


def _written(path: Path, prompts: Iterator[Prompt]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(path, prompts)
    if not path.stat().st_size:
        raise DataError(f"{path}: no conversation goes on: every request failed, or was cut off, or calls tools")
    return path


def _for_user(answers: RunDir, teacher: Recipe, user: UserConfig) -> Iterator[Prompt]:
    for request, text in _whole(answers, teacher):
        turns = [*request.messages, Message("assistant", text)]
        yield Prompt(id=_conversation(request), messages=as_the_user_sees(turns, user.system or SYSTEM))


def _for_teacher(answers: RunDir, teacher: Recipe, said: dict[str, str]) -> Iterator[Prompt]:
    """`said`: the user's message by conversation."""
    for request, text in _whole(answers, teacher):
        id_ = _conversation(request)
        if id_ in said:
            turns = [*request.messages, Message("assistant", text), Message("user", said[id_])]
            yield Prompt(id=id_, **asked_fields(request) | {"messages": turns})


def _conversation(row: Request) -> str:
    """Names the conversation: several samples of one prompt are several conversations."""
    return f"{row.prompt_id}.{row.sample}" if row.sample else row.prompt_id


def _check_names(recipe: Recipe) -> None:
    """Raises DataError where two conversations would have one name: of a row `1.1`, and of the second sample of `1`."""
    named: dict[str, str] = {}
    for job in build_jobs(iter_prompts(recipe), recipe):
        name, id_ = _conversation(job.request), job.request.prompt_id
        if (other := named.setdefault(name, id_)) != id_:
            raise DataError(f"the prompts {other!r} and {id_!r} would share the conversation {name!r}: rename one")


def _whole(folder: RunDir, recipe: Recipe) -> Iterator[tuple[Request, str]]:
    """The answers of a pass with which a conversation can go on: what the recipe asks, and the answer's text."""
    ended = 0
    for request, row in asked_rows(recipe, folder.completions, Completion):
        if row.finish_reason == "length" or row.tool_calls:
            ended += 1
        else:
            yield request, row.text
    if ended:
        print(f"{folder.path}: {ended} conversations end here: cut off, or with a tool call", file=sys.stderr)


def as_the_user_sees(messages: list[Message], system: str) -> list[Message]:
    """The conversation with its roles swapped, without the system's words, tool calls and their results."""
    turns = [Message("system", system), Message("user", OPENING)]
    for message in messages:
        role = OTHER_SIDE.get(message.role)
        if role == turns[-1].role and message.content:
            turns[-1] = Message(role, f"{turns[-1].content}\n\n{message.content}")
        elif role and message.content:
            turns.append(Message(role, message.content))
    return turns
