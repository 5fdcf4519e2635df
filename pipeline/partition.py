"""Where a prompt stands among all prompts, by which a recipe puts it into a part: training, validation or test.

A hash decides: of `prompts.seed` and the normalised conversation, or what the prompt shares with others of its group
(`prompts.group`). The other prompts, their order and the filters have no part in it. So the part is known when prompts
are made and stays when a run grows. Every stage, and every run with the same seed and shares, agrees on it. The same
question in other spacing or case is in the same part.
Pure: reads and writes nothing.
"""

from hashlib import blake2b


def position(text: str, seed: int) -> float:
    """A number in [0, 1), as good as random, that is the same for the same text and seed."""
    return int.from_bytes(blake2b(f"{seed}\0{text}".encode(), digest_size=6).digest()) / (1 << 48)
