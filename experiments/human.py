"""Rows that people wrote, from a file of the user's. Reads it; writes nothing."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from evaluate.measure.results import answer_row
from generate.prompts import PromptRow, make_prompt
from pipeline.errors import DataError, UsageError
from pipeline.prompts_config import PromptsConfig
from pipeline.records import Json, Kept, Message, Prompt, question_text, read_jsonl
from pipeline.turns_and_tools import Turn


class HumanRow(msgspec.Struct, frozen=True):
    """A line that people wrote: `prompt` and `completion`, or `messages` that end with the assistant's.

    Its other keys are columns, as in a file of prompts.
    """

    prompt: str | None = None
    completion: str | None = None
    messages: list[Message] | None = None

    def conversation(self) -> list[Message]:
        """The question, and the assistant's answer last. Raises ValueError if the row has no such thing."""
        match self.prompt, self.completion, self.messages:
            case str(prompt), str(completion), None:
                turns = [Message("user", prompt), Message("assistant", completion)]
            case None, None, [*turns]:
                pass
            case _:
                raise ValueError("give either `prompt` and `completion`, or `messages`")
        if not turns or turns[-1].role != "assistant":
            raise ValueError("`messages` must end with the assistant's")
        if not turns[-1].content.strip():
            raise ValueError("the answer is empty")
        return turns


def read_human(path: Path, config: PromptsConfig, asked: Sequence[Prompt] = ()) -> list[Kept]:
    """The rows as kept ones. Raises DataError, which names the row, and UsageError if there is no file.

    A row that does not say its group has the group of the same question in the prompts `asked`, or none.
    """
    if not path.is_file():
        raise UsageError(f"--human {path}: no such file; give a JSONL of rows with prompt and completion, or messages")
    rows, groups = [], {question_text(prompt.messages): config.group_of(prompt) for prompt in asked}
    for number, line in enumerate(read_jsonl(path, dict), start=1):
        columns: Json = {name: value for name, value in line.items() if name not in HumanRow.__struct_fields__}
        try:
            *question, answer = msgspec.convert(line, HumanRow).conversation()
            turns = [Turn(turn.role, turn.content) for turn in question]
            prompt = make_prompt(PromptRow(messages=turns, columns=columns), config)
        except ValueError as error:
            raise DataError(f"{path}: row {number}: {error}") from None
        if config.group is not None and config.group not in columns:
            group = groups.get(question_text(prompt.messages))
            prompt = msgspec.structs.replace(prompt, columns={**columns, config.group: group})
        rows.append(answer_row("human", prompt, answer.content))
    if not rows:
        raise DataError(f"{path}: no rows in it")
    return rows
