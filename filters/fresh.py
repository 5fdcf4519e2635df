"""The newest id, slots, reference and columns of each question, for answers bought before these were changed.

Reads prompts.jsonl, if its prompts are of a file, or it or completions.jsonl has a reference or columns: the id and
the slots of a template's prompt are of its text. Keeps 36 bytes per prompt, and reads a prompt's line again only where
an answer has other values.
"""

import mmap
import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np

from pipeline.errors import DataError
from pipeline.prompts_config import PromptsConfig
from pipeline.records import Completion, Prompt
from pipeline.rundir import RunDir

MARKS = b'"reference":', b'"columns":'  # a line without them has neither

_decode = msgspec.json.Decoder(Prompt).decode
_encode = msgspec.json.Encoder(order="deterministic").encode  # columns may have been put in another order


class FreshValues:
    """An index of prompts.jsonl by question. It may be used by several processes at once."""

    def __init__(self, file: BinaryIO) -> None:
        """Raises DataError `path:line: reason` if a line is not a prompt."""
        start = 0
        self._file: BinaryIO | None = file
        self._content = np.empty(0, np.uint8)  # of the file, where it is not open
        keys, ids, values, starts, lengths = array("Q"), array("Q"), array("Q"), array("q"), array("i")
        for number, line in enumerate(file, start=1):
            if not line.isspace():
                try:
                    prompt = _decode(line)
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    raise DataError(f"{file.name}:{number}: {error}; `python -m generate` writes it again") from None
                keys.append(_hash([prompt.messages, prompt.tools]))
                ids.append(_hash(prompt.id))
                values.append(_hash_of_values(prompt.id, prompt))
                starts.append(start)
                lengths.append(len(line))
            start += len(line)
        order = np.lexsort((np.frombuffer(values, np.uint64), np.frombuffer(keys, np.uint64)))
        self._keys, self._ids, self._values = (np.frombuffer(one, np.uint64)[order] for one in (keys, ids, values))
        self._starts, self._lengths = np.frombuffer(starts, np.int64)[order], np.frombuffer(lengths, np.int32)[order]

    def updated(self, row: Completion) -> Completion:
        """A row with the values that its prompt has now. Where the question stands there several times, those of the
        last with the row's id, else of the last.

        A row whose values are those of one of its prompts is returned as it is, and so is a row of another question.
        """
        key = np.uint64(_hash([row.messages, row.tools]))
        first, end = (int(np.searchsorted(self._keys, key, side)) for side in ("left", "right"))
        if first == end:
            return row
        value = np.uint64(_hash_of_values(row.prompt_id, row))
        at = first + int(np.searchsorted(self._values[first:end], value))
        if at < end and self._values[at] == value:
            return row
        same_id = self._ids[first:end] == np.uint64(_hash(row.prompt_id))
        last = first + int(np.lexsort((self._starts[first:end], same_id))[-1])
        prompt = _decode(self._line(int(self._starts[last]), int(self._lengths[last])))
        own = {"slots": prompt.slots, "reference": prompt.reference, "columns": prompt.columns}
        return msgspec.structs.replace(row, prompt_id=prompt.id, **own)

    def _line(self, start: int, length: int) -> bytes:
        if self._file is None:
            return self._content[start : start + length].tobytes()
        return os.pread(self._file.fileno(), length, start)

    def __getstate__(self) -> dict[str, Any]:
        """For another machine, with the whole file: Ray then holds it once per node."""
        content = self._content if self._file is None else np.fromfile(self._file.name, np.uint8)
        return {**self.__dict__, "_file": None, "_content": content}


@contextmanager
def fresh_values(run: RunDir, config: PromptsConfig) -> Iterator[FreshValues | None]:
    """The index of a run's prompts.jsonl; None if there is no such file, or nothing in it can have changed."""
    if run.prompts.exists() and (config.file or _has_values(run.prompts) or _has_values(run.completions)):
        with run.prompts.open("rb") as file:
            yield FreshValues(file)
    else:
        yield None


def _has_values(path: Path) -> bool:
    if not path.stat().st_size:
        return False  # it cannot be mapped
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return any(data.find(mark) >= 0 for mark in MARKS)


def _hash_of_values(prompt_id: str, one: Prompt | Completion) -> int:
    return _hash([prompt_id, one.slots, one.reference, one.columns])


def _hash(value: object) -> int:
    return int.from_bytes(blake2b(_encode(value), digest_size=8).digest())
