"""What is asked: prompts from a template, or from the rows of a file (generate.sources).

Reads the recipe and the file it names, and writes nothing. Prompts are streamed, so a long run never holds them all.
What makes a request of a prompt is in generate.jobs.

A row has `messages` (a list of {"role", "content"}) or `prompt` (the user's words), and may have `reference`, `id`,
`slots` and `tools`, under these names or those of `prompts.columns`. All its other columns are kept in `columns`.
"""

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import islice
from typing import Any, get_args

import msgspec

from generate.grammar import Grammar
from generate.idset import IdSet
from generate.sources import TOO_DEEP, read_rows, without_nulls
from pipeline.errors import DataError, RecipeError
from pipeline.instructions import INSTRUCTIONS
from pipeline.prompts_config import PromptsConfig, RowPart
from pipeline.recipe import Recipe
from pipeline.records import LONGEST_LINE, LONGEST_PROMPT, Json, Message, Prompt, Slots, as_text, question_text
from pipeline.turns_and_tools import Turn, conversation, read_tools

ID_BYTES = 8
SHAPE = (
    "`prompt`, each `content` and each slot are text (no images, no lists of parts), `id` is text or a whole number; "
    "write it so, or name other columns in prompts.columns"
)
_encoder = msgspec.json.Encoder()


class PromptRow(msgspec.Struct, frozen=True):
    """One row of a prompt file."""

    messages: list[Turn] | None = None
    prompt: str | None = None
    slots: Slots | None = None
    id: str | int | None = None
    reference: Any = None
    columns: Json = {}
    tools: list[Any] | str | None = None  # or their JSON


def iter_prompts(recipe: Recipe) -> Iterator[Prompt]:
    """Streams the prompts of the recipe: `prompts.count` of them, or all of a file that has no more.

    A template's prompts come in a random order that `prompts.seed` decides, those of a file in the order of the file.
    A template repeats none before each has come once. A repeat has the same id, because it is the same question; the
    requests made of it differ. Raises RecipeError or DataError at the first error.
    """
    config = recipe.prompts
    if config.template is not None:
        return _from_template(config)
    if config.slots:
        raise RecipeError("prompts.slots is for a template; the rows of prompts.file have their own `slots`")
    return islice(_rows(config), config.count)


def grammar_size(recipe: Recipe) -> int | None:
    """How many different prompts the template makes; None for prompts from a file. Raises RecipeError."""
    return Grammar(recipe.prompts).size if recipe.prompts.template is not None else None


def prompt_id(messages: list[Message], tools: Sequence[Json] = ()) -> str:
    """16 hex digits of the BLAKE2b hash of the messages and the tools, if any: the same question, the same id."""
    asked = _encoder.encode([messages, tools] if tools else messages)
    return blake2b(asked, digest_size=ID_BYTES).hexdigest()


def _from_template(config: PromptsConfig) -> Iterator[Prompt]:
    grammar = Grammar(config)
    for text, slots in grammar.draw(config.count or 0, config.seed):
        row = PromptRow(prompt=text, slots=slots, reference=grammar.reference(slots))
        try:
            yield make_prompt(row, config)
        except ValueError as error:
            raise RecipeError(f"prompts.template with {slots}: {error}") from None


def _rows(config: PromptsConfig) -> Iterator[Prompt]:
    """The rows as prompts. Rows with one `id` must be one prompt, rows with one question of one group.

    To know, 16 bytes of each `id` are kept, and as many of each question where there are groups.
    """
    ids, prompts, questions, grouped = IdSet(), IdSet(), IdSet(), IdSet()
    where = None
    for where, prompt in _prompts_of_rows(config):
        if prompt.id != (question := prompt_id(prompt.messages, prompt.tools)):
            new_id, new_prompt = ids.add(prompt.id), prompts.add(f"{prompt.id} {question}")
            if new_prompt and not new_id:
                first = next(at for at, other in _prompts_of_rows(config) if other.id == prompt.id)
                raise DataError(f"{where}: id {prompt.id!r} is that of {first}, which is another prompt")
        if config.group is not None:
            group, asked = _group(where, prompt, config), question_text(prompt.messages)
            new_question, new_pair = questions.add(asked), grouped.add(f"{asked}\0{group}")
            if new_pair and not new_question:
                raise DataError(
                    f"{where}: another row has the same question and another {config.group!r}, so the question would "
                    "be in two groups; give both rows one value"
                )
        yield prompt
    if where is None:
        raise DataError(f"{config.file}: no prompts in it")


def _prompts_of_rows(config: PromptsConfig) -> Iterator[tuple[str, Prompt]]:
    """The prompt of each row, and where it stands. Raises DataError at the first that is wrong."""
    for where, row in read_rows(config):
        try:
            yield where, make_prompt(_prompt_row(row, config), config)
        except msgspec.ValidationError as error:
            raise DataError(f"{where}: {error}; {SHAPE}") from None
        except ValueError as error:
            raise DataError(f"{where}: {error}") from None
        except RecursionError:
            raise DataError(f"{where}: {TOO_DEEP}") from None


def _group(where: str, prompt: Prompt, config: PromptsConfig) -> str:
    """A prompt's group, as text. Raises DataError if the row has no such column."""
    if config.group not in (*prompt.columns, *prompt.slots):
        there = ", ".join((*prompt.columns, *prompt.slots)) or "none"
        raise DataError(
            f"{where}: no column {config.group!r}, which prompts.group names; there are {there} (a row with null there "
            "is in no group)"
        )
    return as_text(config.group_of(prompt))


def _prompt_row(row: Json, config: PromptsConfig) -> PromptRow:
    """A row by what its columns mean; all others go to `columns`. Raises ValueError, or msgspec's ValidationError."""
    columns, parts = dict(row), dict[str, Any]()
    for part in get_args(RowPart):
        name = config.columns.get(part, part)
        if name in row:
            parts[part] = row[name]
            columns.pop(name, None)  # one column may be two parts: an id that is the reference, too
        elif part in config.columns and name is not None:
            raise ValueError(f"no column {name!r}, which prompts.columns names; there are {', '.join(row) or 'none'}")
    if "prompt" not in parts and "messages" not in parts:
        raise ValueError(
            "give either `messages` or `prompt`, or name its column, as in prompts.columns: {prompt: question}; the "
            f"row has {', '.join(row) or 'no columns'}"
        )
    messages, own_name = parts.get("messages"), config.columns.get("messages") or "messages"
    if isinstance(messages, str):
        raise ValueError(
            f"`{own_name}` is text, {messages[:60]!r}; if it is JSON, add it to prompts.json_columns; if it is a "
            f"question, name it as one, as in prompts.columns: {{prompt: {own_name}, messages: null}}"
        )
    for turn in messages if isinstance(messages, list) else ():
        if isinstance(turn, dict) and "role" not in turn:
            raise ValueError(
                f"a turn has {', '.join(turn) or 'nothing'}; it must have role (system, user or assistant) and "
                'content, as in {"role": "user", "content": "Hi"}: rename its keys'
            )
    if isinstance(messages, list) and any(_says_more(turn) for turn in messages):
        columns[own_name] = messages
    if isinstance(inner := columns.get("columns"), dict):  # a line of some run's prompts.jsonl
        del columns["columns"]
        if both := inner.keys() & columns.keys():
            raise ValueError(f"{', '.join(sorted(both))} stands both in `columns` and beside it; rename one")
        columns |= inner
    if (answers := config.answers) is not None and answers not in columns:
        if answers not in row:
            raise ValueError(f"no column {answers!r}, which prompts.answers names; there are {', '.join(row)}")
        columns[answers] = row[answers]  # it is another part, too, as the reference
    return msgspec.convert({**without_nulls(parts), "reference": parts.get("reference"), "columns": columns}, PromptRow)


def _says_more(turn: Any) -> bool:
    """Whether a turn has keys that a Message has no room for."""
    return isinstance(turn, dict) and any(turn[key] is not None for key in turn.keys() - set(Message.__struct_fields__))


def make_prompt(row: PromptRow, config: PromptsConfig) -> Prompt:
    """The prompt of a row, with the recipe's `system` if it has no such message, and its `tools` if it names none.

    Raises ValueError if a row is wrong.
    """
    if (row.messages is None) == (row.prompt is None):
        raise ValueError("the prompt is empty" if row.prompt is None else "give either `messages` or `prompt`")
    turns = row.messages if row.messages is not None else [Turn("user", row.prompt)]
    if not turns:
        raise ValueError("`messages` is empty")
    if turns[-1].role == "assistant":
        raise ValueError("the prompt ends with an assistant turn; it must end with the turn that the teacher answers")
    messages = conversation(turns)
    if not messages[-1].content.strip() and messages[-1].role != "tool":
        raise ValueError("the prompt is empty")
    try:
        tools = config.tools if row.tools is None else read_tools(row.tools)
    except ValueError as error:
        raise ValueError(f"tools {error}") from None
    if config.system is not None and messages[0].role not in INSTRUCTIONS:
        messages = [Message(role="system", content=config.system), *messages]
    try:
        prompt = Prompt(
            id=prompt_id(messages, tools) if row.id in (None, "") else str(row.id),
            messages=messages,
            slots=row.slots or {},
            reference=row.reference,
            columns=row.columns,
            tools=tools,
        )
        size = len(_encoder.encode(prompt))
    except UnicodeEncodeError:
        raise ValueError("the text holds half of a surrogate pair, which UTF-8 cannot write") from None
    if size > LONGEST_PROMPT:
        raise ValueError(
            f"the row has {size / (1 << 20):.1f} MiB, at most {LONGEST_PROMPT >> 20} are taken, as the filters read no "
            f"line over {LONGEST_LINE >> 20} MiB; shorten it, or leave columns out"
        )
    return prompt
