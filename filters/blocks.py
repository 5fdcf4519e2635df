"""The rules over a block of lines of completions.jsonl: in a process of its own, if there are several blocks."""

from collections.abc import Iterator
from typing import NamedTuple

import msgspec
import numpy as np

from filters.answer import as_answer
from filters.fresh import FreshValues
from filters.groups import SAMPLE, sample_of
from filters.minhash import Array
from filters.rows import decode_completion, dropped_line, kept_line
from filters.ruleset import RuleSet
from filters.sketches import Text, question_of, sketch
from filters.stream import Line
from filters.tally import Tally
from pipeline.filters_config import DedupConfig
from pipeline.records import LONGEST_LINE, Completion, encode_line, said


class Block(NamedTuple):
    """What the rules made of a block of lines."""

    tally: Tally
    passed: bytes  # lines of kept.jsonl
    dropped: bytes  # lines of dropped.jsonl
    samples: Array  # of filters.groups.SAMPLE, a row per answer; `start` is its offset in `passed` or `dropped`
    sketch: Array | None  # of the answers that passed; None if duplicates are not looked for


def check_lines(
    lines: Iterator[Line], rules: RuleSet, dedup: DedupConfig | None, fresh: FreshValues | None, *, results: bool
) -> Block:
    """Runs every rule on every line of a block, after the line has the `fresh` values of its prompt.

    `results`: what verifiers make of the answers will be compared.
    """
    tally, passed, dropped = Tally(), bytearray(), bytearray()
    texts: list[Text] = []
    samples = []
    for _, line in lines:
        tally.lines += 1
        if line is None:
            tally.count_bad(f"over {LONGEST_LINE >> 20} MiB in one line: no answer is so long")
            continue
        if line.isspace():
            continue
        try:
            row: Completion = decode_completion(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            if line.endswith(b"\n") or isinstance(error, msgspec.ValidationError):
                tally.count_bad(str(error))
            else:
                tally.torn = True
            continue
        if fresh and (updated := fresh.updated(row)) is not row:
            row, line = updated, encode_line(updated)
        answer = as_answer(row)
        checked = rules.check(answer)
        tally.count(row.id, answer, checked.reasons)
        samples.append(sample_of(row, checked, len(dropped if checked.reasons else passed), results=results))
        if checked.reasons:
            dropped += dropped_line(line, checked.reasons)
            continue
        if dedup:
            texts.append(Text(row.id, len(passed), said(row), question_of(row.messages)))
        passed += kept_line(line, checked.scores)
    made = sketch(texts, dedup) if dedup else None
    return Block(tally, bytes(passed), bytes(dropped), np.array(samples, SAMPLE), made)
