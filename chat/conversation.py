"""What a conversation begins with, and questions to try: out of the recipe and the run's test prompts."""

from collections.abc import Iterator
from itertools import islice

import msgspec

from pipeline.instructions import INSTRUCTIONS, with_system_of_rows
from pipeline.recipe import Recipe
from pipeline.records import Json, Message, Prompt, as_text, read_jsonl
from pipeline.rundir import RunDir
from pipeline.students import other_parts, trained_section

QUESTIONS = 50  # to try, at most


def system_of(recipe: Recipe, run: RunDir) -> list[Message]:
    """The instructions that every prompt of the run has; what only one model is told is added where it is asked."""
    system = with_system_of_rows(recipe, trained_section(run.student)).prompts.system
    return [Message("system", system)] if system else []


def questions_to_try(recipe: Recipe, run: RunDir) -> list[Json]:
    """Test prompts of one question, which no training saw: text, instructions, and the right answer if it is known."""
    if not run.prompts.is_file() or other_parts(recipe, run.student) is not None:
        return []
    return list(islice(_questions(recipe, run), QUESTIONS))


def _questions(recipe: Recipe, run: RunDir) -> Iterator[Json]:
    for prompt in read_jsonl(run.prompts, Prompt):
        if recipe.prompts.part_of(prompt) != "test":
            continue
        *before, last = prompt.messages
        if last.role == "user" and all(message.role in INSTRUCTIONS for message in before):
            right = None if prompt.reference is None else as_text(prompt.reference)
            yield {"text": last.content, "begin": msgspec.to_builtins(before), "right": right}
