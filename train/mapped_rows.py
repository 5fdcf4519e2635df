"""Rows in files that are mapped into memory, beside which `datasets` keeps what it makes of them: their tokens.

Writes <folder of the checkpoints>-rows/<process>/, which is of no use when the training has ended.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.processes import launched

BATCH = 100  # rows that are in memory at once


def mapped_rows(examples: Sequence[dict[str, Any]], work: Path, part: str) -> Any:
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
