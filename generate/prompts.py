"""What is asked: prompts from a template, a JSONL file, or a folder that `datasets` saved.

Reads the recipe and the file it names, and writes nothing. Prompts are streamed, so a long run never holds them all.
What makes a request of a prompt is in generate.jobs.

A JSONL line, like a row of a data set, has `messages` (a list of {"role", "content"}) or `prompt` (the user's words),
and may have `slots` and `id`. Other keys are ignored.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from hashlib import blake2b
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import msgspec

from generate.grammar import Grammar
from generate.idset import IdSet
from pipeline.errors import DataError, RecipeError, UsageError
from pipeline.recipe import PromptsConfig, Recipe
from pipeline.records import Message, Prompt, Slots

ROLES = ("system", "developer", "user", "assistant")
ID_BYTES = 8
BOM = b"\xef\xbb\xbf"
ACCEPTED = (
    'accepted are JSONL in UTF-8, one {"messages": […]} or {"prompt": "…"} per line, or a folder saved by `datasets`'
)
_encoder = msgspec.json.Encoder()


class PromptRow(msgspec.Struct, frozen=True):
    """One row of a prompt file, as the user wrote it."""

    messages: list[Message] | None = None
    prompt: str | None = None
    slots: Slots | None = None
    id: str | None = None
    reference: Any = None


def iter_prompts(recipe: Recipe) -> Iterator[Prompt]:
    """Streams the prompts of the recipe: `prompts.count` of them, or all of the file.

    A template's prompts come in a random order that `prompts.seed` decides, those of a file in the order of the file.
    No prompt repeats before each has come once. A repeat has the same id, because it is the same question; the requests
    made of it differ. Raises RecipeError or DataError at the first error.
    """
    config = recipe.prompts
    if config.template is not None:
        return _from_template(config)
    if config.slots:
        raise RecipeError("prompts.slots is for a template; the rows of prompts.file have their own `slots`")
    assert config.file is not None  # PromptsConfig checks that there is one source
    if config.count is None:
        return _rows(config.file, config.system)
    again_and_again = (_rows(config.file, config.system) for _ in repeat(None))
    return islice(chain.from_iterable(again_and_again), config.count)


def grammar_size(recipe: Recipe) -> int | None:
    """How many different prompts the template makes; None for prompts from a file. Raises RecipeError."""
    return Grammar(recipe.prompts).size if recipe.prompts.template is not None else None


def prompt_id(messages: list[Message]) -> str:
    """16 hex digits of the BLAKE2b hash of the messages: the same words, the same id."""
    return blake2b(_encoder.encode(messages), digest_size=ID_BYTES).hexdigest()


def _from_template(config: PromptsConfig) -> Iterator[Prompt]:
    grammar = Grammar(config)
    for text, slots in grammar.draw(config.count or 0, config.seed):
        row = PromptRow(prompt=text, slots=slots, reference=grammar.reference(slots))
        try:
            yield make_prompt(row, config.system)
        except ValueError as error:
            raise RecipeError(f"prompts.template with {slots}: {error}") from None


def _rows(path: Path, system: str | None) -> Iterator[Prompt]:
    """The rows as prompts. Two rows with one `id` must be one prompt; 16 bytes per `id` are kept to know."""
    read = partial(_dataset_rows if path.is_dir() else _jsonl_rows, path)
    ids, prompts = IdSet(), IdSet()
    where = None
    for where, row in read():
        try:
            prompt = make_prompt(row, system)
        except ValueError as error:
            raise DataError(f"{where}: {error}") from None
        if row.id is not None:
            new_id, new_prompt = ids.add(row.id), prompts.add(f"{row.id} {prompt_id(prompt.messages)}")
            if new_prompt and not new_id:
                first = next(earlier for earlier, other in read() if other.id == row.id)
                raise DataError(f"{where}: id {row.id!r} is that of {first}, which is another prompt")
        yield prompt
    if where is None:
        raise DataError(f"{path}: no prompts in it")


def _jsonl_rows(path: Path) -> Iterator[tuple[str, PromptRow]]:
    decoder = msgspec.json.Decoder(PromptRow)
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"prompts.file {path}: {error.strerror or error}") from None
    with file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(BOM) if number == 1 else line
            if not line.strip():
                continue
            try:
                yield f"{path}:{number}", decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise DataError(f"{path}:{number}: {error}; {ACCEPTED}") from None


def _dataset_rows(path: Path) -> Iterator[tuple[str, PromptRow]]:
    for number, row in enumerate(_load_dataset(path)):
        where = f"{path}: row {number}"
        present = {key: value for key, value in row.items() if value is not None}
        if isinstance(present.get("slots"), dict):  # Arrow gives every row all keys that any row has
            present["slots"] = {key: value for key, value in present["slots"].items() if value is not None}
        try:
            yield where, msgspec.convert(present, PromptRow)
        except msgspec.ValidationError as error:
            raise DataError(f"{where}: {error}") from None


def _load_dataset(path: Path) -> Iterable[dict[str, Any]]:
    try:
        from datasets import Dataset, DatasetDict, load_from_disk
    except ImportError:
        raise UsageError(
            f"prompts.file {path}: reading a `datasets` folder needs that package; run `make setup` with the `train` "
            "extra, or give a JSONL file"
        ) from None
    try:
        loaded = load_from_disk(str(path))
    except (FileNotFoundError, ValueError) as error:
        raise DataError(
            f"prompts.file {path}: not a folder that `datasets` saved: {' '.join(str(error).split())}"
        ) from None
    if isinstance(loaded, DatasetDict):
        raise DataError(f"prompts.file {path}: holds the splits {', '.join(loaded)}; give one of them: {path}/<split>")
    assert isinstance(loaded, Dataset)
    rows: Iterable[dict[str, Any]] = loaded
    return rows


def make_prompt(row: PromptRow, system: str | None = None) -> Prompt:
    """The prompt of a row; `system` comes first if the row has no such message. Raises ValueError if a row is wrong."""
    if (row.messages is None) == (row.prompt is None):
        raise ValueError("give either `messages` or `prompt`")
    messages = row.messages if row.messages is not None else [Message(role="user", content=row.prompt or "")]
    if not messages:
        raise ValueError("`messages` is empty")
    for message in messages:
        if message.role not in ROLES:
            raise ValueError(f"role {message.role!r} is not one of {', '.join(ROLES)}")
    if messages[-1].role == "assistant":
        raise ValueError("the prompt ends with an assistant turn; it must end with the turn that the teacher answers")
    if not messages[-1].content.strip():
        raise ValueError("the prompt is empty")
    if system is not None and messages[0].role not in ("system", "developer"):
        messages = [Message(role="system", content=system), *messages]
    try:
        return Prompt(
            id=row.id or prompt_id(messages), messages=messages, slots=row.slots or {}, reference=row.reference
        )
    except UnicodeEncodeError:
        raise ValueError("the text holds half of a surrogate pair, which UTF-8 cannot write") from None
