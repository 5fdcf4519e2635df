"""The sample that a person reviews: kept and dropped answers mixed, half of each, every dropping rule in turn.

Reads kept.jsonl and dropped.jsonl in one pass. Writes nothing. A sample holds all that the page shows, and how many
answers each stratum had, so that what is found in it can be weighted back to the run.
"""

import random

import msgspec

from filters.rows import filtered_rows
from pipeline.errors import DataError
from pipeline.records import Completion, Dropped, Slots, said
from pipeline.rundir import RunDir

KEPT = "kept"  # the stratum of the answers that were kept; the others are named by their rule


class Item(msgspec.Struct, frozen=True, kw_only=True):
    """One answer to review. The page does not show its stratum."""

    id: str
    stratum: str
    system: str
    question: str
    text: str
    slots: Slots = {}


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """The answers to review, in their order."""

    seed: int
    population: dict[str, int]  # answers by stratum, in the whole run
    items: list[Item]


def draw(run: RunDir, size: int, seed: int) -> Sample:
    """Draws `size` answers, or all if the run has fewer. Raises DataError if there is nothing to draw from."""
    rng = random.Random(seed)
    population: dict[str, int] = {}
    drawn: dict[str, list[Item]] = {}
    for row in filtered_rows(run):
        stratum = row.rule if isinstance(row, Dropped) else KEPT
        population[stratum] = count = population.get(stratum, 0) + 1
        items = drawn.setdefault(stratum, [])
        if len(items) < size:
            items.append(_item(stratum, row))
        elif (place := rng.randrange(count)) < size:  # reservoir sampling: each is drawn with the same chance
            items[place] = _item(stratum, row)
    if not drawn:
        raise DataError(f"{run.kept}: no answers; run `python -m generate` and `python -m filters` first")
    for items in drawn.values():
        rng.shuffle(items)
    chosen = _allot(drawn, size)
    rng.shuffle(chosen)
    return Sample(seed=seed, population=population, items=chosen)


def _item(stratum: str, row: Completion) -> Item:
    return Item(
        id=row.id,
        stratum=stratum,
        system="\n\n".join(turn.content for turn in row.messages if turn.role == "system"),
        question="\n\n".join(turn.content for turn in row.messages if turn.role != "system"),
        text=said(row),
        slots=row.slots,
    )


def _allot(drawn: dict[str, list[Item]], size: int) -> list[Item]:
    """Half of them kept, the other half from the rules in turn; where one side has too few, the other fills up."""
    kept = drawn.pop(KEPT, [])
    turns = max((len(items) for items in drawn.values()), default=0)
    dropped = [items[turn] for turn in range(turns) for _, items in sorted(drawn.items()) if turn < len(items)]
    from_kept = min(len(kept), max((size + 1) // 2, size - len(dropped)))
    return kept[:from_kept] + dropped[: size - from_kept]
