"""How many tokens a prompt has: counted if the teacher's tokenizer is on this machine, otherwise an upper bound.

Reads the tokenizer.json and the chat template of a local, embedded or cached model. Downloads nothing, and needs only
the `tokenizers` package. For any other teacher there is a bound that holds for every byte-level tokenizer: one token
for each byte, and what a chat template may add.
"""

import json
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipeline.errors import UsageError
from pipeline.models import local_folder
from pipeline.records import Json, Message
from pipeline.turns_and_tools import template_turns

TEMPLATE_TOKENS = 64  # that a chat template may add: roles, turns, and its own system prompt

Count = Callable[[list[Message], list[Json]], int | None]


def counter(model: str) -> Count | None:
    """A function that counts a prompt's tokens as the teacher's server does, chat template and tools included.

    None if the tokenizer or the template is not on this machine. The count is None for a prompt that the template
    refuses; some refuse a system message. Raises UsageError if the model's files are broken.
    """
    folder = _folder(model)
    if folder is None or not (folder / "tokenizer.json").is_file():
        return None
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return None
    try:
        settings = _settings(folder)
        template = settings.pop("chat_template", None)
        if not isinstance(template, str):
            return None
        # `generation` marks the assistant's words for training. It adds nothing to a prompt.
        template = re.sub(r"({%[-+]?\s*)generation\b", r"\1if true", template)
        template = re.sub(r"({%[-+]?\s*end)generation\b", r"\1if", template)
        render = _environment().from_string(template).render
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # `tokenizers` raises nothing narrower
        raise UsageError(f"model {model}: {folder} holds no usable tokenizer: {' '.join(str(error).split())}") from None
    tokenizer.no_truncation()  # whatever the file says: a server does not cut a prompt
    tokenizer.no_padding()

    def count(messages: list[Message], tools: list[Json]) -> int | None:
        try:
            text = render(
                messages=template_turns(messages), tools=tools or None, add_generation_prompt=True, **settings
            )
        except TemplateError:
            return None
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    return count


def bound(body_bytes: int) -> int:
    """The most prompt tokens that a request of so many bytes can have."""
    return body_bytes + TEMPLATE_TOKENS


def _folder(model: str) -> Path | None:
    """Where the model's files are on this machine."""
    if (folder := local_folder(model)) is not None:
        return folder
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model, "tokenizer.json")
    except (ImportError, ValueError):  # not installed, or a name that the Hub cannot have
        return None
    return Path(found).parent if isinstance(found, str) else None


def _environment() -> ImmutableSandboxedEnvironment:
    """jinja2 as transformers sets it up: chat templates are written for that."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson` of transformers, which escapes no HTML; parameters in its order."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _settings(folder: Path) -> dict[str, Any]:
    """What a chat template may use: the special tokens, and the template itself."""
    path = folder / "tokenizer_config.json"
    raw: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
    settings = {
        name: value["content"] if isinstance(value, dict) else value
        for name, value in raw.items()
        if name in ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template") and value is not None
    }
    if (separate := folder / "chat_template.jinja").is_file():
        settings["chat_template"] = separate.read_text(encoding="utf-8")
    elif isinstance(several := settings.get("chat_template"), list):  # several templates, by name
        settings["chat_template"] = {one["name"]: one["template"] for one in several}.get("default")
    return settings
