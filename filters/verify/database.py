"""The worker's side of the verifier `sql`: runs one query on a read-only SQLite file and describes its result.

Nothing but reading is authorised, and time, memory, rows and bytes are limited. Results are cached: the reference's is
computed once for all samples of a prompt that come one after another.
"""

import hashlib
import json
import re
import sqlite3
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from filters.verify.extract import same_number

_MEMORY = 256 << 20  # bytes that SQLite may take in all
_LONGEST = 1 << 20  # bytes of one value, and of a whole result
_ROWS = 10_000
_STEPS = 2_000  # virtual machine steps between two looks at the clock
_ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
_FORBIDDEN = {"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer", "zeroblob", "randomblob"}
_LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: _LONGEST,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 100_000,
    sqlite3.SQLITE_LIMIT_COLUMN: 200,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 200,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 50,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 200,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}
_TYPES = {type(None): 0, int: 1, float: 1, str: 2, bytes: 3}  # the order of values
_TOKENS = re.compile(r"'[^']*'|\"[^\"]*\"|`[^`]*`|\[[^]]*]|--[^\n]*|/\*.*?\*/|[()]|\border\s+by\b", re.I | re.DOTALL)
_EXPLAIN = re.compile(r"(?:\s|--[^\n]*+|/\*(?>.*?\*/))*+explain\b", re.I | re.DOTALL)

Rows = Sequence[tuple[Any, ...]]


class Result(NamedTuple):
    """What came of a query: `what` went wrong and `note` on it, or its rows."""

    what: str = ""
    note: str = ""
    rows: Rows = ()


def load(file: str) -> None:
    """Opens a database before the time of a query runs: a large script takes long. Raises sqlite3.Error."""
    _connect(file)


def check(file: str, query: str, reference: str | None, seconds: float, tolerance: float | None) -> dict[str, Any]:
    """The answer's result, and whether the reference's is the same.

    Rows count in their order if the reference has an ORDER BY at its top level; `tolerance` is a share of a number.
    Raises ValueError if the reference does not run.
    """
    mine = run(file, query, seconds)
    if mine.what:
        return {"what": mine.what, "note": mine.note}
    ordered = reference is not None and has_order(reference)
    lines = [_line(row) for row in mine.rows]  # equal for equal results: the names of the columns do not count
    text = "\n".join(lines if ordered else sorted(lines))
    short = text if len(text) <= 200 else hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    found: dict[str, Any] = {"what": "", "rows": len(mine.rows), "result": short, "same": None}
    if reference is not None:
        gold = run(file, reference, seconds)
        if gold.what:
            raise ValueError(f"the reference has no result: {gold.note}")
        found |= {"same": _same(mine.rows, gold.rows, ordered, tolerance), "wanted_rows": len(gold.rows)}
    return found


def _same(mine: Rows, gold: Rows, ordered: bool, tolerance: float | None) -> bool:
    if len(mine) != len(gold):
        return False
    if ordered:
        return all(_same_row(one, other, tolerance) for one, other in zip(mine, gold, strict=True))
    left = sorted(gold, key=_sort_key)
    for row in sorted(mine, key=_sort_key):  # so that a row's match is among the first ones that are left
        match = next((place for place, other in enumerate(left) if _same_row(row, other, tolerance)), None)
        if match is None:
            return False
        del left[match]
    return True


def _sort_key(row: Sequence[Any]) -> list[tuple[int, Any]]:
    """NULL, numbers by size, texts, blobs."""
    return [(_TYPES[type(value)], value) for value in row]


def _same_row(mine: Sequence[Any], gold: Sequence[Any], tolerance: float | None) -> bool:
    return len(mine) == len(gold) and all(_equal(a, b, tolerance) for a, b in zip(mine, gold, strict=True))


def _equal(mine: Any, gold: Any, tolerance: float | None) -> bool:
    if isinstance(mine, int | float) and isinstance(gold, int | float):
        return same_number(mine, gold, tolerance)
    return bool(mine == gold)


def _line(row: Sequence[Any]) -> str:
    return json.dumps([_cell(value) for value in row])


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        rounded = float(f"{value:.9g}")  # what computing in another order does not change
        return int(rounded) if rounded.is_integer() else rounded
    return {"blob": value.hex()} if isinstance(value, bytes) else value


def has_order(query: str) -> bool:
    """Whether a query has an ORDER BY outside of all brackets."""
    depth = 0
    for token in _TOKENS.findall(query):
        depth += {"(": 1, ")": -1}.get(token, 0)
        if depth == 0 and token[0] in "oO":
            return True
    return False


@lru_cache(200)
def run(file: str, query: str, seconds: float) -> Result:
    """Runs one query, for at most `seconds` of processor time."""
    connection = _connect(file)
    deadline = time.process_time() + seconds
    connection.set_progress_handler(lambda: time.process_time() > deadline, _STEPS)
    rows: list[tuple[Any, ...]] = []
    size = 0
    try:
        cursor = connection.execute(query)
        if cursor.description is None or _EXPLAIN.match(query):
            return Result("statement", "it is no query")
        for row in cursor:
            rows.append(row)
            size += sum(len(value) for value in row if isinstance(value, str | bytes)) + 8 * len(row)
            if len(rows) > _ROWS or size > _LONGEST:
                cursor.close()
                return Result("size", f"more than {_ROWS:,} rows or {_LONGEST >> 20} MiB")
    except MemoryError:
        return Result("size", f"more than {_MEMORY >> 20} MiB of memory")
    except (sqlite3.Error, sqlite3.Warning, ValueError, UnicodeError) as error:  # ValueError: a zero byte in the query
        if str(error) == "interrupted":
            return Result("time", f"{seconds:g} s")
        if "one statement" in str(error):
            return Result("statement", "more than one statement")
        if "authoriz" in str(error):  # `not authorized`, `authorization denied`
            return Result("forbidden", str(error))
        return Result("error", str(error))
    return Result(rows=rows)


@lru_cache
def _connect(file: str) -> sqlite3.Connection:
    """A SQLite file, opened to read only, or a script, run on a database in memory. Raises sqlite3.Error.

    `immutable`: SQLite takes no lock and makes no file beside it; the file must not change meanwhile.
    """
    script = file.endswith(".sql")
    address = ":memory:" if script else f"{Path(file).as_uri()}?mode=ro&immutable=1"
    connection = sqlite3.connect(address, uri=not script, isolation_level=None)
    connection.executescript(Path(file).read_text(encoding="utf-8") if script else "SELECT 1 FROM sqlite_master")
    for pragma in (f"hard_heap_limit = {_MEMORY}", "temp_store = MEMORY", "query_only = ON", "trusted_schema = OFF"):
        connection.execute(f"PRAGMA {pragma}").fetchall()
    for limit, value in _LIMITS.items():
        connection.setlimit(limit, value)
    connection.text_factory = lambda text: text.decode("utf-8", "replace")
    connection.set_authorizer(_authorize)
    return connection


def _authorize(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    allowed = action in _ALLOWED and not (action == sqlite3.SQLITE_FUNCTION and str(second).lower() in _FORBIDDEN)
    return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY
