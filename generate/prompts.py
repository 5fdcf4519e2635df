"""What is asked: prompts from a template, a JSONL file, or a folder that `datasets` saved.

Reads the recipe and the file it names; writes nothing. Prompts stream: a long run never holds them all. What makes a
request of a prompt is in generate.jobs.

A JSONL line, like a row of a data set, has `messages` (a list of {"role", "content"}) or `prompt` (the user's words),
and may have `slots` and `id`; anything else in it is left alone.
"""

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from generate.grammar import Grammar
from pipeline.errors import DataError, RecipeError, UsageError
from pipeline.recipe import PromptsConfig, Recipe
from pipeline.records import Message, Prompt, Slots

ROLES = ("system", "developer", "user", "assistant")
ID_BYTES = 8
BOM = b"\xef\xbb\xbf"

_encoder = msgspec.json.Encoder()


class PromptRow(msgspec.Struct, frozen=True):
    """One row of a prompt file, as the user wrote it."""

    messages: list[Message] | None = None
    prompt: str | None = None
    slots: Slots | None = None
    id: str | None = None


def build_prompts(recipe: Recipe) -> list[Prompt]:
    """All prompts of the recipe, in order. See `iter_prompts`."""
    return list(iter_prompts(recipe))


def iter_prompts(recipe: Recipe) -> Iterator[Prompt]:
    """Streams the prompts of the recipe: `prompts.count` of them, or all of the file.

    A template's prompts come in a random order that `prompts.seed` decides, a file's in its own. No prompt repeats
    before every one has been there once; a repeat has the same id, for it is the same question (the requests made of
    it differ). Raises RecipeError or DataError at the first thing that is wrong.
    """
    config = recipe.prompts
    if config.template is not None and config.count is not None:
        return _from_template(config, config.count)
    assert config.file is not None  # PromptsConfig sees to it that there is one source
    if config.slots:
        raise RecipeError("prompts.slots is for a template; the rows of prompts.file bring their own `slots`")
    return _from_file(config, config.file)


def grammar_size(recipe: Recipe) -> int | None:
    """How many different prompts the template makes; None for prompts from a file. Raises RecipeError."""
    return Grammar(recipe.prompts).size if recipe.prompts.template is not None else None


def prompt_id(messages: list[Message]) -> str:
    """16 hex digits of the BLAKE2b hash of the messages: the same words, the same id."""
    return blake2b(_encoder.encode(messages), digest_size=ID_BYTES).hexdigest()


def _from_template(config: PromptsConfig, count: int) -> Iterator[Prompt]:
    for text, slots in Grammar(config).draw(count, config.seed):
        try:
            yield make_prompt(PromptRow(prompt=text, slots=slots), config.system)
        except ValueError as error:
            raise RecipeError(f"prompts.template with {slots}: {error}") from None


def _from_file(config: PromptsConfig, path: Path) -> Iterator[Prompt]:
    """The rows once for all of the file, and again from the top while `count` asks for more."""
    left = config.count
    while left is None or left > 0:
        number = 0
        for prompt in islice(_rows(path, config.system), left):
            number += 1
            yield prompt
        if not number:
            raise DataError(f"{path}: no prompts in it")
        if left is None:
            return
        left -= number


def _rows(path: Path, system: str | None) -> Iterator[Prompt]:
    rows = _dataset_rows(path) if path.is_dir() else _jsonl_rows(path)
    for where, row in rows:
        try:
            yield make_prompt(row, system)
        except ValueError as error:
            raise DataError(f"{where}: {error}") from None


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
                raise DataError(f"{path}:{number}: {error}") from None


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
    """The prompt of a row; `system` goes before where the row has no such message. Raises ValueError if it is wrong."""
    if (row.messages is None) == (row.prompt is None):
        raise ValueError("give either `messages` or `prompt`")
    messages = row.messages if row.messages is not None else [Message(role="user", content=row.prompt or "")]
    if not messages:
        raise ValueError("`messages` is empty")
    for message in messages:
        if message.role not in ROLES:
            raise ValueError(f"role {message.role!r} is not one of {', '.join(ROLES)}")
    if not messages[-1].content.strip():
        raise ValueError("the prompt is empty")
    if system is not None and messages[0].role not in ("system", "developer"):
        messages = [Message(role="system", content=system), *messages]
    try:
        return Prompt(id=row.id or prompt_id(messages), messages=messages, slots=row.slots or {})
    except UnicodeEncodeError:
        raise ValueError("the text holds half of a surrogate pair, which UTF-8 cannot write") from None
