"""Lines read as bytes are what msgspec reads: the same are good, and the same values are in them."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import msgspec
import numba.core.caching
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from filters.answer import as_answer
from filters.batch import Batch, _Row, read_batch
from filters.compiled import PLACES, compiled
from filters.lines import first_alike, join_pairs
from filters.stream import Chunk
from pipeline.records import encode_line
from tests.filters.test_run import completion

LINES = [
    encode_line(completion(1, '토끼가 "안녕"\n 했어요.', things=["당근", "비"])),
    encode_line(completion(2, "A rabbit. é 🐇", temperature="0")),
    encode_line(completion(3, "", finish_reason="length")).replace(b'"seed":3', b'"seed":-3,"min_p":0.05'),
    encode_line(completion(4, "x")).replace(b'"slots":{},', b"").replace(b":", b" : ").replace(b",", b" ,"),
]
PIECES = [
    *(b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b" ", b"\t", b"\r", b"\x01", b"0", b"1", b"-", b".", b"e", b"+"),
    *(
        b"00",
        b".0",
        b".5",
        b"e5",
        b"e400",
        b"12345678901234567890",
        b"null",
        b"true",
        b'"a"',
        b'"text":"b",',
        b'"x":1,',
    ),
    *(rb"\n", rb"\u0041", rb"\ud800", rb"\x", "가".encode(), b"\xea", b"\x80", b'"te\\u0078t":"c",', b"{}", b"[1]"),
]
ODD_NUMBERS = [
    b"01",
    b"1.0",
    b"1.5",
    b"1.",
    b".5",
    b"1e5",
    b"1e400",
    b"-1",
    b"-01",
    b"1-1",
    b"-",
    b"1+1",
    b"9" * 20,
    b"9" * 400,
    b"9" * 400 + b".5",
]
ODD_ESCAPES = [rb"\u0041", rb"\ud800", rb"\ud83d\udc07", rb"\u00", rb"\u00G0", rb"\x41", rb"\/", rb"\b", b"\x01"]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A line with a stretch replaced."""
    line = draw(st.sampled_from(LINES))[:-1]
    at = draw(st.integers(0, len(line)))
    size = draw(st.integers(0, 3) | st.integers(0, 60))
    return line[:at] + draw(st.sampled_from([b"", *PIECES])) + line[at + size :] + b"\n"


@given(st.lists(st.sampled_from(LINES) | damaged(), min_size=1, max_size=4))
@example([LINES[0].replace(b'"text"', rb'"te\u0078t"'), LINES[0]])
@example([LINES[0].replace(b'"text"', b'"text" '), LINES[0].replace(b'"text"', b'"next" ')])
@example([LINES[0].replace(b'"seed"', rb'"s\need"'), LINES[0]])
@example([LINES[0].replace(b"}\n", b"} \n"), LINES[0]])
def test_lines_are_read_as_msgspec_reads_them(lines: list[bytes]) -> None:
    check_lines(lines)


def check_lines(lines: list[bytes]) -> None:
    good = []
    for line in lines:
        try:
            good.append(msgspec.json.decode(line, type=_Row))
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
    read = read_batch(Chunk(b"".join(lines)))
    assert len(read.batch) == len(good) and len(read.bad) == len(lines) - len(good)
    assert [read.batch.answer(index) for index in range(len(good))] == [as_answer(row) for row in good]
    assert read.batch.lengths().tolist() == [len(as_answer(row).text) for row in good]
    assert [read.batch.id(index) for index in range(len(good))] == [row.id for row in good]
    written = bytes(read.batch.written(np.arange(len(good)), [b"}\n"] * len(good)))
    assert [msgspec.json.decode(line, type=_Row) for line in written.split(b"\n")[:-1]] == good


@pytest.mark.parametrize(
    ("field", "value"),
    [*product([b'"attempts":1', b'"latency_s":0.25'], ODD_NUMBERS), *product([b'"text":"'], ODD_ESCAPES)],
)
def test_an_odd_value_is_checked_beside_usual_ones(field: bytes, value: bytes) -> None:
    odd = LINES[0].replace(field, field[: field.index(b":") + 1] + value if value in ODD_NUMBERS else field + value)
    check_lines([LINES[0], odd])
    check_lines([odd, LINES[0]])


def test_no_type_asks_what_a_string_or_number_is() -> None:
    """Else lines of one shape could not stand for each other."""

    def check(kind: msgspec.inspect.Type) -> None:
        if isinstance(kind, msgspec.inspect.StructType):
            for field in kind.fields:
                check(field.type)
        elif isinstance(kind, msgspec.inspect.UnionType):
            for other in kind.types:
                check(other)
        elif isinstance(kind, msgspec.inspect.DictType):
            check(kind.key_type)
            check(kind.value_type)
        elif isinstance(kind, msgspec.inspect.ListType):
            check(kind.item_type)
        else:
            plain = msgspec.inspect.StrType, msgspec.inspect.IntType, msgspec.inspect.FloatType
            assert kind in [*(of_any() for of_any in plain), msgspec.inspect.NoneType(), msgspec.inspect.AnyType()]

    check(msgspec.inspect.type_info(_Row))


@pytest.mark.parametrize("shapes", [2, 31, 32, 33, 40])
def test_lines_of_many_shapes_are_read(shapes: int) -> None:
    rows = [completion(number, f"{number}", **{f"slot{number % shapes}": "가"}) for number in range(3 * shapes)]
    bad = completion(1, "!", **{f"slot{shapes - 1}": "가"})
    batch = Batch(b"".join(map(encode_line, rows)))
    assert [batch.answer(index) for index in range(len(rows))] == [as_answer(row) for row in rows]
    lines = read_batch(Chunk(b"".join(map(encode_line, [*rows, bad])).replace(b'"text":"!"', b'"text":1')))
    assert [number for number, _ in lines.bad] == [len(rows) + 1]


def test_lines_of_a_long_shape_are_read() -> None:
    rows = [completion(number, "가", **{f"slot{index}": "비" for index in range(600)}) for number in range(3)]
    batch = Batch(b"".join(map(encode_line, rows)))
    assert [batch.answer(index) for index in range(len(rows))] == [as_answer(row) for row in rows]


@given(st.lists(st.text("ab가", max_size=12).map(str.encode), max_size=20))
def test_the_first_that_is_alike(values: list[bytes]) -> None:
    data = np.frombuffer(b"".join(values), np.uint8)
    sizes = np.array(list(map(len, values)), np.int64)
    found = np.empty(len(values), np.int64)
    first_alike(data, np.cumsum(sizes) - sizes, np.cumsum(sizes), found)
    assert found.tolist() == [values.index(value) for value in values]


@given(st.lists(st.tuples(st.binary(max_size=5), st.binary(max_size=5)), max_size=6))
def test_pairs_are_joined(pairs: list[tuple[bytes, bytes]]) -> None:
    whole = b"".join(first + second for first, second in pairs)
    sizes = np.array([[len(first), len(second)] for first, second in pairs], np.int64).reshape(-1, 2)
    starts = np.cumsum(sizes[:, 0]) - sizes[:, 0]
    data, tails = (
        np.frombuffer(b"".join(parts), np.uint8) for parts in (zip(*pairs, strict=True) if pairs else ([], []))
    )
    joined = np.empty(len(whole), np.uint8)
    join_pairs(data, starts, starts + sizes[:, 0], tails, np.cumsum(sizes[:, 1]), joined)
    assert joined.tobytes() == whole


def test_it_compiles_where_nothing_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.core.caching.CacheImpl, "_locator_classes", [])

    def double(values):  # type: ignore[no-untyped-def]
        return values[0] * 2

    assert compiled(numba.types.int64(PLACES))(double)(np.array([21])) == 42


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_byte_beyond_an_array_is_touched(tmp_path: Path) -> None:
    """What is compiled checks no bounds; compiled with such checks it does the same."""
    files = [str(Path(__file__).with_name(name)) for name in ("test_lines.py", "test_batch.py")]
    environment = {**os.environ, "NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
