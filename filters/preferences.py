"""preferences.jsonl: pairs of a kept answer and one that a rule drops, to the same prompt, as TRL's DPOTrainer reads
them. Reads the new kept.jsonl and dropped.jsonl again, at the lines of the pairs.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np

from filters.minhash import Array
from pipeline.prompts_config import PromptsConfig
from pipeline.records import Completion, Message, Preference, encode_line, said


def write_preferences(
    file: BinaryIO, most: int, kept: tuple[Path, Array], wrong: tuple[Path, Array], prompts: PromptsConfig
) -> None:
    """Writes at most so many pairs for each prompt, and none for the prompts of the test part.

    `kept` and `wrong`: a file, and the answers in it that count (`filters.groups.SAMPLE`).
    """
    with kept[0].open("rb") as kept_file, wrong[0].open("rb") as wrong_file:
        for pairs in _pairs(kept[1], wrong[1]):
            rows = ((_row(kept_file, chosen_at), _row(wrong_file, rejected_at)) for chosen_at, rejected_at in pairs)
            for chosen, rejected in islice(filter(_comparable, rows), most):
                if prompts.part_of(chosen) == "test":
                    break
                file.write(
                    encode_line(
                        Preference(
                            id=f"{chosen.id}:{rejected.id}",
                            prompt=chosen.messages,
                            chosen=[_turn(chosen)],
                            rejected=[_turn(rejected)],
                            tools=chosen.tools,
                        )
                    )
                )


def _pairs(kept: Array, wrong: Array) -> Iterator[list[tuple[int, int]]]:
    """For each prompt with answers of both kinds, the offsets of their lines, paired: none is left out."""
    kept, wrong = np.sort(kept, order=["prompt", "sample"]), np.sort(wrong, order=["prompt", "sample"])
    prompts = np.intersect1d(kept["prompt"], wrong["prompt"])
    for good, bad in zip(_starts(kept, prompts), _starts(wrong, prompts), strict=True):
        yield [(good[n % len(good)], bad[n % len(bad)]) for n in range(max(len(good), len(bad)))]


def _comparable(pair: tuple[Completion, Completion]) -> bool:
    """Not conversations that go on otherwise, nor the same text twice: a rule of the reasoning may drop one of them."""
    chosen, rejected = pair
    return chosen.messages == rejected.messages and said(chosen) != said(rejected)


def _starts(rows: Array, prompts: Array) -> Iterator[list[int]]:
    """For each prompt, the offsets of its lines. All are looked up at once: each look-up copies the rows' prompts."""
    first, end = (np.searchsorted(rows["prompt"], prompts, side).tolist() for side in ("left", "right"))
    for one, last in zip(first, end, strict=True):
        yield rows["start"][one:last].tolist()


def _row(file: BinaryIO, start: int) -> Completion:
    file.seek(start)
    return _decode(file.readline())


_decode = msgspec.json.Decoder(Completion).decode


def _turn(row: Completion) -> Message:
    return Message(role="assistant", content=row.text, tool_calls=row.tool_calls)
