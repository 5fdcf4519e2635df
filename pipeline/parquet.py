"""`python -m pipeline.parquet RUN_OR_FILE`: the records of a run as Parquet, one file beside each JSONL file.

Reads prompts, completions, failures, kept and dropped rows and preferences, and writes `<name>.parquet` in place of an
older one. Text, numbers, messages and `tool_calls` have columns of their own types. Every other field, such as
`reference`, `columns`, `slots` and `scores`, is JSON text in a column, which `prompts.json_columns` reads back.
"""

import argparse
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from pipeline.cli import run_stage
from pipeline.errors import UsageError
from pipeline.records import Completion, Dropped, Failure, Kept, Message, Part, Preference, Prompt, read_jsonl
from pipeline.rundir import replacing

RECORDS: Mapping[str, type[msgspec.Struct]] = {
    "prompts.jsonl": Prompt,
    "completions.jsonl": Completion,
    "failures.jsonl": Failure,
    "kept.jsonl": Kept,
    "dropped.jsonl": Dropped,
    "validation.jsonl": Kept,
    "test.jsonl": Kept,
    "preferences.jsonl": Preference,
}
ROWS_AT_ONCE = 5000  # held in memory, and in a row group


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.parquet", description="Writes a run's records as Parquet."
    )
    parser.add_argument("path", type=Path, help=f"a run's folder, or one of its files: {', '.join(RECORDS)}")
    path = parser.parse_args().path
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder; give the folder of a run, or one of its files")
    found = [path / name for name in RECORDS if (path / name).exists()] if path.is_dir() else [path]
    if not found:
        raise UsageError(f"{path}: no files of records in it; give the folder of a run that has asked its teacher")
    for source in found:
        print(to_parquet(source))


def to_parquet(source: Path) -> Path:
    """Writes a file of records as Parquet beside it. Raises UsageError, or DataError `path:line: reason`."""
    if (kind := RECORDS.get(source.name)) is None:
        raise UsageError(f"{source}: not a file of records; there are {', '.join(RECORDS)}")
    try:
        import pyarrow
        from pyarrow.parquet import ParquetWriter
    except ImportError:
        raise UsageError("Parquet needs the package pyarrow, which `make setup` installs") from None
    target, types, rows = source.with_suffix(".parquet"), _types(kind), read_jsonl(source, kind)
    schema = pyarrow.schema([(name, kind_of or pyarrow.string()) for name, kind_of in types.items()])
    with replacing(target) as file, ParquetWriter(file, schema) as writer:
        while some := list(islice(rows, ROWS_AT_ONCE)):
            values = [{name: _value(getattr(row, name), types[name]) for name in types} for row in some]
            writer.write_batch(pyarrow.RecordBatch.from_pylist(values, schema=schema))
    return target


def _types(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """The Arrow type of each field; None: JSON text."""
    import pyarrow as pa

    text = pa.string()
    call = pa.struct({"id": text, "type": text, "function": pa.struct({"name": text, "arguments": text})})
    turn = pa.struct({"role": text, "content": text, "tool_calls": pa.list_(call), "tool_call_id": text})
    types = {
        str: text,
        int: pa.int64(),
        int | None: pa.int64(),
        float: pa.float64(),
        Part | None: text,
        list[Message]: pa.list_(turn),
    }
    known = {name: types.get(hint) for name, hint in get_type_hints(kind).items()}
    return known | ({"tool_calls": pa.list_(call)} if "tool_calls" in known else {})


def _value(value: Any, kind: Any) -> Any:
    if kind is None and value is not None:
        return msgspec.json.encode(value).decode()
    return msgspec.to_builtins(value)


if __name__ == "__main__":
    run_stage(main)
