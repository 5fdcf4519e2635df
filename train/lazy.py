"""Data larger than memory: sequences whose items are made when asked for, and rows in files mapped into memory.

Writes <folder of the checkpoints>-rows/<process>/, beside which `datasets` keeps what it makes of the rows: their
tokens. It is of no use when the training has ended.
"""

import shutil
from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import msgspec

from pipeline.records import BOM
from train.processes import launched

BATCH = 100  # rows that are in memory at once
Item = TypeVar("Item")
Record = TypeVar("Record", bound=msgspec.Struct)


class Lazy(Sequence[Item], Generic[Item]):
    """One item for each key, made anew each time: memory holds the keys alone."""

    def __init__(self, keys: Sequence[Any], make: Callable[[Any], Item]) -> None:
        self.keys, self.make = keys, make

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> "Lazy[Item]": ...
    def __getitem__(self, index: int | slice) -> "Item | Lazy[Item]":
        found = self.keys[index]
        return Lazy(found, self.make) if isinstance(index, slice) else self.make(found)


def joined(*parts: Sequence[Item]) -> Lazy[Item]:
    """The items of several sequences, one after the other."""
    starts = [0, *accumulate(map(len, parts))]

    def item(index: int) -> Item:
        part = bisect_right(starts, index) - 1
        return parts[part][index - starts[part]]

    return Lazy(range(starts[-1]), item)


def stored_records(path: Path, kind: type[Record]) -> Lazy[Record]:
    """The records of a JSONL file that was checked, read when they are asked for. Blank lines are ignored."""
    starts, place = array("Q"), 0
    with path.open("rb") as file:
        for line in file:
            if line.removeprefix(BOM).strip():
                starts.append(place)
            place += len(line)
        mapped = mmap(file.fileno(), 0, access=ACCESS_READ) if starts else None
    decoder = msgspec.json.Decoder(kind)

    def read(start: int) -> Record:
        assert mapped is not None
        end = mapped.find(b"\n", start)
        return decoder.decode(mapped[start : end if end >= 0 else len(mapped)].removeprefix(BOM))

    return Lazy(starts, read)


def stored_rows(examples: Sequence[dict[str, Any]], work: Path, part: str) -> Any:
    """The examples as a Dataset; conversations as JSON, since messages have no common shape."""
    from datasets import Dataset, Features, Json, Value
    from datasets.arrow_writer import ArrowWriter

    folder = rows_folder(work) / str(launched().rank) / part
    shutil.rmtree(folder, ignore_errors=True)  # of a training that was killed
    folder.mkdir(parents=True)
    features = Features({name: Value("string") if name == "tools" else Json() for name in examples[0]})
    with ArrowWriter(path=str(folder / "rows.arrow"), features=features, writer_batch_size=BATCH) as writer:
        for example in examples:
            writer.write(example)
        writer.finalize()
    return Dataset.from_file(str(folder / "rows.arrow"))


def rows_folder(work: Path) -> Path:
    """Where the rows lie of a training whose checkpoints are in `work`."""
    return work.with_name(f"{work.name}-rows")
