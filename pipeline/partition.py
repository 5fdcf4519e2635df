"""Where a prompt stands among all prompts, by which a recipe puts it into a part: training, validation or test.

A hash of the normalised conversation and `prompts.seed` decides. The other prompts, their order and the filters have no
part in it. So the part is known when prompts are made and stays when a run grows. Every stage, and every run with the
same seed and shares, agrees on it. The same question in other spacing or case is in the same part.
Pure: reads and writes nothing.
"""

from collections.abc import Sequence
from hashlib import blake2b

from pipeline.records import Message, question_text


def position(messages: Sequence[Message], seed: int) -> float:
    """A number in [0, 1), as good as random, that is the same for the same question and seed."""
    digest = blake2b(f"{seed}\0{question_text(messages)}".encode(), digest_size=6).digest()
    return int.from_bytes(digest) / (1 << 48)
