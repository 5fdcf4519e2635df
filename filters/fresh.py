"""The newest reference and columns of each prompt, for answers that were bought before these were added or changed.

Reads prompts.jsonl. Keeps 28 bytes per prompt, and reads a prompt's line again only where an answer has other values.
"""

import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np

from pipeline.errors import DataError
from pipeline.records import Completion, Prompt, encode_line

MARKS = b'"reference":', b'"columns":'  # a line without them has neither

_decode = msgspec.json.Decoder(Prompt).decode
_encode = msgspec.json.Encoder().encode


class FreshValues:
    """An index of prompts.jsonl by question. It may be used by several processes at once."""

    def __init__(self, file: BinaryIO) -> None:
        """Raises DataError `path:line: reason` if a line is not a prompt."""
        self._file, start = file, 0
        keys, values, starts, lengths = array("Q"), array("Q"), array("q"), array("i")
        for number, line in enumerate(file, start=1):
            if not line.isspace():
                try:
                    prompt = _decode(line)
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    raise DataError(f"{file.name}:{number}: {error}; `python -m generate` writes it again") from None
                keys.append(_hash([prompt.id, prompt.messages]))
                values.append(_hash([prompt.reference, prompt.columns]))
                starts.append(start)
                lengths.append(len(line))
            start += len(line)
        order = np.argsort(np.frombuffer(keys, np.uint64))
        self._keys, self._values = np.frombuffer(keys, np.uint64)[order], np.frombuffer(values, np.uint64)[order]
        self._starts, self._lengths = np.frombuffer(starts, np.int64)[order], np.frombuffer(lengths, np.int32)[order]

    def joined(self, row: Completion, line: bytes) -> tuple[Completion, bytes]:
        """A row and its line, with the values that its prompt has now. A row of another question stays as it is."""
        key = np.uint64(_hash([row.prompt_id, row.messages]))
        at = int(np.searchsorted(self._keys, key))
        if at == len(self._keys) or self._keys[at] != key or self._values[at] == _hash([row.reference, row.columns]):
            return row, line
        prompt = _decode(os.pread(self._file.fileno(), int(self._lengths[at]), int(self._starts[at])))
        if (prompt.reference, prompt.columns) == (row.reference, row.columns):
            return row, line
        row = msgspec.structs.replace(row, reference=prompt.reference, columns=prompt.columns)
        return row, encode_line(row)


@contextmanager
def fresh_values(path: Path) -> Iterator[FreshValues | None]:
    """The index of a prompts.jsonl; None if there is no such file, or no prompt in it has a reference or columns."""
    if not path.exists():
        yield None
        return
    with path.open("rb") as file:
        some = any(mark in line for line in file for mark in MARKS)
        file.seek(0)
        yield FreshValues(file) if some else None


def _hash(value: object) -> int:
    return int.from_bytes(blake2b(_encode(value), digest_size=8).digest())
