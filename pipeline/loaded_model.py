"""What a loaded tokenizer and model say: which tokens end an answer, and how much is read at once.

Imports nothing heavy, and writes no file; `without_weights` reads a model's configuration.
"""

import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def stop_tokens(tokenizer: Any, model: Any) -> set[int]:
    """Ids that end an answer: the tokenizer's EOS and all that generation stops at (an end-of-turn token is one)."""
    found: set[int] = set()
    own = getattr(model.config, "eos_token_id", None)  # one of images and text (Gemma 3) may have it in its text's part
    for value in (tokenizer.eos_token_id, model.generation_config.eos_token_id, own):
        found.update(value if isinstance(value, list | tuple) else [] if value is None else [value])
    return found


def without_weights(reference: str | Path) -> Any:
    """As much of a model, in a folder or on the Hub, as `stop_tokens` reads."""
    from transformers import AutoConfig, GenerationConfig

    model = SimpleNamespace(config=AutoConfig.from_pretrained(reference), generation_config=GenerationConfig())
    with suppress(OSError):  # it has none
        model.generation_config = GenerationConfig.from_pretrained(reference)
    return model


def end_of_turn(tokenizer: Any, stops: set[int]) -> int:
    """The id that the chat template puts after an answer: what a model must say to stop.

    It is the first token of the template's tail that is a stop token (`stops`, see `stop_tokens`) or a special token,
    and not always `eos_token`: Gemma's turns end with <end_of_turn>. Phi-3.5's end with <|end|>, a special token
    that has no name in the tokenizer, and <|endoftext|> (the EOS) stands at the end of the whole conversation.
    """
    answer = "word"
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    tail = tokenizer.encode(text[text.rindex(answer) + len(answer) :], add_special_tokens=False)
    unnamed = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = stops | unnamed | set(tokenizer.all_special_ids)
    end: int = next((token for token in tail if token in ends), tokenizer.eos_token_id)
    return end


def context_of(config: Any) -> int:
    """Tokens that a model reads at once, by its configuration; sys.maxsize if that names no limit.

    With scaled rotary embeddings it may be more than `max_position_embeddings`, which in some models does not count the
    scaling.
    """
    shape = config.get_text_config()
    limit: int = getattr(shape, "max_position_embeddings", None) or sys.maxsize
    rope = getattr(shape, "rope_parameters", None) or {}
    scaled = [kind for kind in (rope, *rope.values()) if isinstance(kind, Mapping)]  # one, or one per type of layer
    original = [(kind.get("original_max_position_embeddings") or limit, kind.get("factor") or 1) for kind in scaled]
    return max([limit, *(int(length * factor) for length, factor in original)])
