"""Where a prompt stands among all prompts, by which a recipe puts it into a part: training, validation or test.

A hash decides: of `prompts.seed` and the normalised conversation, or what the prompt shares with others of its group
(`prompts.group`). The other prompts, their order and the filters have no part in it. So the part is known when prompts
are made and stays when a run grows. Every stage, and every run with the same seed and shares, agrees on it. The same
question in other spacing or case is in the same part.
Pure: reads and writes nothing.
"""

from hashlib import blake2b
from typing import Any

from pipeline.records import Asked


def position(text: str, seed: int) -> float:
    """A number in [0, 1), as good as random, that is the same for the same text and seed."""
    return int.from_bytes(blake2b(f"{seed}\0{text}".encode(), digest_size=6).digest()) / (1 << 48)


def value_of(row: Asked, name: str) -> Any:
    """The value of a column or a slot, None if there is neither. The order of a slot's chosen values says nothing."""
    if name in row.columns:
        return row.columns[name]
    value = row.slots.get(name)
    return sorted(value) if isinstance(value, list) else value
