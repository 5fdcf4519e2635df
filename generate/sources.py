"""The rows that prompts are made of: JSONL, CSV, Parquet, a `datasets` folder, a data set of the Hub, or a Python file.

Reads what `prompts.file` names, and writes nothing. Every reader streams a row at a time, as JSON values under the
user's own names, and can be read again from the start. What a row means is in generate.prompts.

JSON has no dates, decimals or bytes. Of Parquet, `datasets` and Python, dates and times become ISO 8601 text, decimals
text with all their digits, bytes Base64 text, infinite numbers the text `inf` or `-inf`, and NaN (of pandas, a missing
cell) null.
"""

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from pipeline.errors import DataError, RecipeError, UsageError
from pipeline.prompts_config import HUB, PromptsConfig
from pipeline.records import BOM, Json
from pipeline.user_code import load_function

LONGEST_CELL = 16 << 20  # characters of a CSV cell: a longer one is a quote that nobody closed
ROWS_AT_ONCE = 256  # of Parquet
ACCEPTED = (
    'accepted are JSONL in UTF-8, one {"messages": […]} or {"prompt": "…"} per line, .csv, .tsv, .parquet, a folder '
    "saved by `datasets`, hub:<owner>/<name>, and a .py file with a function rows(); unpack a .gz or .zst first, and "
    "save an .xlsx as .csv"
)
TOO_DEEP = "a value is nested too deeply; make it flatter, or text"
HALF_PAIR = "half of a surrogate pair, which UTF-8 cannot write; remove it"

Row = tuple[str, Json]  # where it stands, for messages, and its values by column


def read_rows(config: PromptsConfig) -> Iterator[Row]:
    """Streams the rows of `prompts.file`. Raises DataError at the first that cannot be read, and names it."""
    path = config.file or Path()
    if str(path).startswith(HUB):
        rows = _hub_rows(path, config.split)
    elif path.is_dir():
        rows = _folder_rows(path, config.split)
    elif config.split is not None:
        raise RecipeError(f"prompts.split is for a `datasets` folder or the Hub; {path} has no splits: remove it")
    else:
        rows = READERS.get(path.suffix.lower(), _jsonl_rows)(path)
    for where, row in rows:
        for name in config.json_columns:
            row[name] = _decoded(where, name, row)
        yield where, row


def _decoded(where: str, name: str, row: Json) -> Any:
    """The JSON in a column of text. A value that is no text stays."""
    if name not in row:
        raise DataError(f"{where}: no column {name!r}, which prompts.json_columns names; there are {', '.join(row)}")
    try:
        return msgspec.json.decode(row[name]) if isinstance(row[name], str) else row[name]
    except RecursionError:
        raise DataError(f"{where}: column {name!r}: {TOO_DEEP}") from None
    except msgspec.DecodeError as error:
        raise DataError(
            f"{where}: column {name!r} is not JSON ({error}): {row[name][:60]!r}; fix it, or take the column out of "
            "prompts.json_columns"
        ) from None


def _jsonl_rows(path: Path) -> Iterator[Row]:
    decoder = msgspec.json.Decoder(Json)
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(BOM) if number == 1 else line
            if not line.strip():
                continue
            try:
                yield f"{path}:{number}", decoder.decode(line)
            except RecursionError:
                raise DataError(f"{path}:{number}: {TOO_DEEP}") from None
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                why = _python_only(line) or f"{error}; {ACCEPTED}"
                raise DataError(f"{path}:{number}: {why}") from None


def _python_only(line: bytes) -> str | None:
    """What a line has that Python's `json` takes and writes, but JSON does not have: msgspec calls it malformed."""
    constants = list[str]()
    try:
        json.dumps(json.loads(line, parse_constant=constants.append), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return HALF_PAIR
    except (ValueError, RecursionError):
        return None
    return f"{constants[0]}, which JSON does not have; write null" if constants else None


def _csv_rows(path: Path) -> Iterator[Row]:
    """Values are text, and null where the cell is empty. Of comma, semicolon and tab, the first line's most frequent
    separates.
    """
    csv.field_size_limit(LONGEST_CELL)
    with _opened(path) as file:
        texts = (line.decode("utf-8-sig") if number == 0 else line.decode() for number, line in enumerate(file))
        number = 1
        try:
            first = next(texts, "")
            reader = csv.reader(chain([first], texts), delimiter=max(",;\t", key=first.count), strict=True)
            names = [name.strip() for name in next(reader, [])]
            if first and not names:
                raise DataError(f"{path}:1: the line is empty, but the first line names the columns; remove it")
            _check_names(f"{path}:1", names)
            while True:
                number = reader.line_num + 1
                if (cells := next(reader, None)) is None:
                    return
                if cells and len(cells) != len(names):
                    raise DataError(
                        f"{path}:{number}: {len(cells)} cells for {len(names)} columns, beginning with "
                        f"{cells[0][:60]!r}; put a cell that holds a separator or a line break in quotes"
                    )
                if cells:
                    yield f"{path}:{number}", {name: cell or None for name, cell in zip(names, cells, strict=True)}
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: {error}; save it as CSV UTF-8") from None
        except csv.Error as error:
            raise DataError(f"{path}:{number}: {error}; save it as CSV with quotes in pairs") from None


def _check_names(where: str, names: list[str]) -> None:
    if len(set(names)) < len(names) or "" in names:
        raise DataError(f"{where}: each column needs a name of its own, got {', '.join(map(repr, names))}")


def _parquet_rows(path: Path) -> Iterator[Row]:
    parquet = _imported(path, "pyarrow.parquet")

    def rows() -> Iterator[Json]:
        with _opened(path) as file:
            opened = parquet.ParquetFile(file)
            _check_names(str(path), opened.schema_arrow.names)
            for batch in opened.iter_batches(batch_size=ROWS_AT_ONCE):
                yield from batch.to_pylist()

    return _of_arrow(path, _guarded(path, rows, "write it as Parquet again, without columns that cannot be read"))


def _folder_rows(path: Path, split: str | None) -> Iterator[Row]:
    datasets = _imported(path, "datasets")

    def rows() -> Iterable[Json]:
        return _one_split(path, datasets.load_from_disk(str(path)), split)

    advice = (
        "give a folder that `datasets` saved (save_to_disk; rows() of a .py file may read several other files), "
        "without columns that cannot be read"
    )
    return _of_arrow(path, _guarded(path, rows, advice))


def _hub_rows(path: Path, split: str | None) -> Iterator[Row]:
    """Streams a data set of the Hub; what comes after owner and name is its subset."""
    datasets = _imported(path, "datasets")
    owner, name, subset = [*str(path).removeprefix(HUB).split("/", 2), None, None][:3]
    repository = f"{owner}/{name}" if name else owner

    def rows() -> Iterable[Json]:
        return _one_split(path, datasets.load_dataset(repository, subset, streaming=True), split)

    advice = "check the name, the subset and the network, or give a file or folder"
    return _of_arrow(path, _guarded(path, rows, advice))


def _python_rows(path: Path) -> Iterator[Row]:
    rows = load_function(path, "rows", "prompts.file")
    return _plain(path, _guarded(path, rows, "rows() must yield every row as a dict, the same rows each time"))


READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {  # by the end of the name; JSONL under any other
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
    ".py": _python_rows,
}


def _opened(path: Path) -> Any:
    if path.exists() and not path.is_file():  # a pipe, as of a shell's `<(…)`
        raise DataError(f"prompts.file {path}: no ordinary file, and rows are read several times; save them in one")
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"prompts.file {path}: {error.strerror or error}") from None


def _imported(path: Path, package: str) -> Any:
    """A package that only some files need. Raises UsageError if it is not installed."""
    try:
        return import_module(package)
    except ImportError:
        raise UsageError(
            f"prompts.file {path}: reading it needs the package {package.partition('.')[0]}, which `make setup` "
            "installs; or give a JSONL or CSV file"
        ) from None


def _one_split(path: Path, loaded: Any, split: str | None) -> Iterable[Json]:
    """The rows of the split that is wanted; of the only one where none is named."""
    if not isinstance(loaded, dict):
        if split is not None:
            raise DataError(f"prompts.file {path}: has no splits; remove prompts.split, which is {split!r}")
        return _without_media(loaded)
    name = next(iter(loaded)) if split is None and len(loaded) == 1 else split
    if name not in loaded:
        raise DataError(f"prompts.file {path}: holds the splits {', '.join(loaded)}; set prompts.split, got {split!r}")
    return _without_media(loaded[name])


def _without_media(rows: Any) -> Iterator[Json]:
    """The rows without columns of images, sound or video, which are never decoded. A class is its name."""
    features = rows.features or {}  # None of a stream whose types nobody wrote down
    others = [name for name, feature in features.items() if not _innermost(feature, "decode_example")]
    classes = {name: feature for name, feature in features.items() if _innermost(feature, "int2str")}
    for row in rows.select_columns(others) if len(others) < len(features) else rows:
        yield row | {name: _class_name(row[name], feature) for name, feature in classes.items()}


def _innermost(feature: Any, method: str) -> bool:
    """Whether a feature of `datasets`, or what lists of it hold, has a method."""
    return hasattr(feature, method) or (hasattr(feature, "feature") and _innermost(feature.feature, method))


def _class_name(value: Any, feature: Any) -> Any:
    """The name of a ClassLabel's number, also in a list of them; null where there is none."""
    if isinstance(value, list):
        return [_class_name(inner, feature.feature) for inner in value]
    return None if value is None or value < 0 else feature.names[value]


def _guarded(path: Path, rows: Callable[[], Iterable[Json]], advice: str) -> Iterator[Json]:
    """The rows of code that is not ours, with whatever it raises told as one error."""
    try:
        yield from rows()
    except DataError:
        raise
    except (Exception, SystemExit) as error:
        raise DataError(f"prompts.file {path}: {type(error).__name__}: {_line(error)}; {advice}") from error


def _of_arrow(path: Path, rows: Iterable[Json]) -> Iterator[Row]:
    """The rows without what Arrow adds: it gives each object within a value all keys that any row has there."""
    for where, row in _plain(path, rows):
        yield where, {name: without_nulls(value) for name, value in row.items()}


def without_nulls(value: Any) -> Any:
    """A value without the keys of its objects that are null."""
    if isinstance(value, dict):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _plain(path: Path, rows: Iterable[Json]) -> Iterator[Row]:
    """The rows with every value as JSON has it."""
    for number, row in enumerate(rows):
        where = f"{path}: row {number}"
        if not isinstance(row, dict):
            raise DataError(f"{where}: a row is a dict, got {type(row).__name__}")
        yield where, {str(name): _json_value(where, name, value) for name, value in row.items()}


def _json_value(where: str, name: str, value: Any) -> Any:
    try:
        plain = _finite(msgspec.to_builtins(value, str_keys=True, enc_hook=_from_pandas))
        msgspec.json.encode([name, plain])
    except UnicodeEncodeError:
        raise DataError(f"{where}: column {name!r}: {HALF_PAIR}") from None
    except RecursionError:
        raise DataError(f"{where}: column {name!r}: {TOO_DEEP}") from None
    except TypeError as error:
        raise DataError(f"{where}: column {name!r}: {error}; make it text, or leave the column out") from None
    return plain


def _from_pandas(value: Any) -> Any:
    """Times with nanoseconds, which Arrow gives as pandas' own, missing cells, and values of numpy."""
    if type(value).__name__ in ("NaTType", "NAType"):
        return None
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"JSON has no {type(value).__name__}")


def _finite(value: Any) -> Any:
    """A value whose numbers JSON has: NaN is null, infinite ones are text."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else str(value)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
