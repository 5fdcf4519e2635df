"""The verifier sql, with friendly and with hostile queries, on a shop of two tables."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from filters.answer import RuleSettings
from filters.verify import worker
from tests.filters.verifying import SHOP, outcome, settings_of, verify

CITIES = "SELECT city, count(*) FROM customers GROUP BY city"
NUMBERS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i FROM n"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("shop")
    (folder / "shop.sql").write_text(SHOP)
    yield folder


@pytest.fixture(scope="module")
def settings(shop: Path) -> RuleSettings:
    return settings_of("sql", shop, database="shop.sql", seconds=0.5)


@pytest.mark.parametrize(
    ("query", "reference", "expected"),
    [
        (f"```sql\n{CITIES};\n```", CITIES, "passes"),
        ("SELECT city AS town, sum(1) FROM customers GROUP BY 1 ORDER BY 2", CITIES, "passes"),
        ("SELECT count(*), city FROM customers GROUP BY city", CITIES, "sql result"),
        ("SELECT name, city FROM customers", "SELECT name FROM customers", "sql result"),
        ("SELECT 9e999", "SELECT 9e999", "passes"),
        ("SELECT 1.5", "SELECT 9e999", "sql result"),
        ("SELECT NULL, 2 UNION ALL SELECT NULL, 1", "SELECT NULL, 1 UNION ALL SELECT NULL, 2", "passes"),
        ("SELECT name FROM customers ORDER BY id", "SELECT name FROM customers ORDER BY id DESC", "sql result"),
        (
            "SELECT name FROM customers ORDER BY id",
            "SELECT name FROM (SELECT * FROM customers ORDER BY id DESC)",
            "passes",
        ),
        ("SELECT name FROM customers ORDER BY id", "SELECT name FROM customers -- ORDER BY id DESC", "passes"),
        ("SELECT name FROM customers WHERE id < 3", "SELECT name FROM customers", "sql result"),
        ("SELECT name FROM customers WHERE id < 3", "SELECT name FROM customers ORDER BY id", "sql result"),
        ("SELECT sum(total) / 3 * 3 FROM orders", "SELECT sum(total) FROM orders", "passes"),
        ("SELECT sum(total) + 1 FROM orders", "SELECT sum(total) FROM orders", "sql result"),
        ("SELECT 3.0, NULL", "SELECT 3, NULL", "passes"),
        ("SELECT '3'", "SELECT 3", "sql result"),
        ("SELECT 20260101001", "SELECT 20260101002", "sql result"),
        ("SELECT 9.9999999 UNION ALL SELECT 5", "SELECT 10.0 UNION ALL SELECT 5", "passes"),
        (
            "SELECT 9.9999999, 'y' UNION ALL SELECT 10.0, 'x' UNION ALL SELECT NULL, x'00'",
            "SELECT NULL, x'00' UNION ALL SELECT 10.0, 'x' UNION ALL SELECT 10.0, 'y'",
            "passes",
        ),
        (
            "SELECT 10.0, 'x' UNION ALL SELECT 10.0, 'x'",
            "SELECT 10.0, 'x' UNION ALL SELECT 10.0, 'y'",
            "sql result",
        ),
        ("SELECT name FROM customers WHERE id > 9", "SELECT 1 WHERE 0", "passes"),
        ("SELECT year(total) FROM orders", "SELECT 1", "sql error"),
        ("I would count them.", "SELECT 1", "sql error"),
        ("", "SELECT 1", "sql statement"),
        ("SELECT 1", "SELECT nothing_there", "unverified sql"),
        ("SELECT 1", 1, "unverified sql"),
        # hostile
        ("DROP TABLE customers", "SELECT 1", "sql forbidden"),
        ("SELECT 1; DROP TABLE customers", "SELECT 1", "sql statement"),
        ("DELETE FROM customers", "SELECT 1", "sql forbidden"),
        ("ATTACH 'stolen.db' AS x", "SELECT 1", "sql forbidden"),
        ("VACUUM INTO 'stolen.db'", "SELECT 1", "sql forbidden"),
        ("PRAGMA query_only = OFF", "SELECT 1", "sql forbidden"),
        ("SELECT * FROM pragma_database_list", "SELECT 1", "sql forbidden"),
        ("SELECT load_extension('x')", "SELECT 1", "sql forbidden"),
        ("SELECT readfile('/etc/passwd')", "SELECT 1", "sql error"),
        ("SELECT randomblob(2000000000)", "SELECT 1", "sql forbidden"),
        ("SELECT zeroblob(2000000000)", "SELECT 1", "sql forbidden"),
        ("/* */ EXPLAIN SELECT 1", None, "sql statement"),
        (f"{'-' * 80}\nSELECT 1", "SELECT 1", "passes"),
        (f"{'/* a */' * 40}SELECT 1", "SELECT 1", "passes"),
        (f"{'-' * 80}\n/* a */ -- b\nEXPLAIN SELECT 1", None, "sql statement"),
        ("SELECT count(*) FROM orders a, orders b, orders c, orders d", "SELECT 1", "sql time"),
        ("SELECT * FROM orders a, orders b, orders c", "SELECT 1", "sql size"),
        (f"{NUMBERS} LIMIT 10001) SELECT i FROM n", "SELECT 1", "sql size"),
        (f"{NUMBERS} LIMIT 2000) SELECT printf('%.*c', 1000, 'x') FROM n", "SELECT 1", "sql size"),
        (f"{NUMBERS}) SELECT max(i) FROM n", "SELECT 1", "sql time"),
        ("SELECT " + "(" * 10_000 + "1" + ")" * 10_000, "SELECT 1", "sql error"),
    ],
)
def test_sql(settings: RuleSettings, query: str, reference: str | None, expected: str) -> None:
    assert outcome(verify("sql", query, settings, reference)) == expected
    assert outcome(verify("sql", CITIES, settings, CITIES)) == "passes"  # the next one is judged, nothing is lost


def test_a_text_that_memory_cannot_hold_ends_its_query_alone(settings: RuleSettings) -> None:
    """SQLite's releases differ on whether it is the query's fault."""
    said = verify("sql", "SELECT printf('%.*c', 2000000000, 'x')", settings, "SELECT 1")
    assert outcome(said) in ("sql error", "unverified sql")
    assert outcome(verify("sql", CITIES, settings, CITIES)) == "passes"


def test_results_of_the_same_rows_are_the_same(settings: RuleSettings) -> None:
    one, other, third = (
        verify("sql", f"SELECT {what} FROM customers ORDER BY {order}", settings).result
        for what, order in (("name", "id"), ("name AS who", "id DESC"), ("city", "id"))
    )
    assert one == other != third
    assert one == '["Ada"]\n["Bo"]\n["Cy"]'
    assert (
        verify("sql", "SELECT 0.1 + 0.2, 3.0, 1.5, NULL, x'0a'", settings).result
        == '[0.3, 3, 1.5, null, {"blob": "0a"}]'
    )
    long = verify("sql", "SELECT printf('%.*c', 200, 'x')", settings).result
    assert long is not None and len(long) == 32  # a hash


def test_a_query_that_must_find_something(shop: Path) -> None:
    settings = settings_of("sql", shop, database="shop.sql", returns_rows=True, reference=False)
    assert outcome(verify("sql", "SELECT 1 WHERE 0", settings, "SELECT 1 WHERE 0")) == "sql rows"
    assert outcome(verify("sql", "SELECT 2", settings, "SELECT 1")) == "passes"
    always = settings_of("sql", shop, database="shop.sql", reference=True, field="query")
    for row, problem in (
        (None, "no reference"),
        ({"sql": "SELECT 1"}, "no key `query`"),
        ("SELECT 1", "no key `query`"),
    ):
        said = verify("sql", "SELECT 1", always, row)
        assert outcome(said) == "unverified sql" and said.reason and said.reason.note.endswith(problem)
    assert outcome(verify("sql", "SELECT 1", always, {"query": "SELECT 1"})) == "passes"


def test_numbers_may_differ_by_a_share_whatever_the_order_of_the_rows(shop: Path) -> None:
    near = settings_of("sql", shop, database="shop.sql", tolerance=0.1)
    reference = "SELECT 1.0 UNION ALL SELECT 1.1"
    assert outcome(verify("sql", "SELECT 1.05 UNION ALL SELECT 0.95", near, reference)) == "passes"
    assert outcome(verify("sql", "SELECT 0.95 UNION ALL SELECT 0.95", near, reference)) == "sql result"


def test_a_database_is_read_where_it_lies_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "shop.sqlite"
    connection = sqlite3.connect(file)
    connection.executescript("PRAGMA journal_mode = WAL;" + SHOP)
    with pytest.raises(ValidationError, match=r"shop\.sqlite-wal holds changes"):
        settings_of("sql", tmp_path, database="shop.sqlite")
    connection.close()
    before = file.read_bytes()
    settings = settings_of("sql", tmp_path, database="shop.sqlite")
    for query in ("DROP TABLE customers", CITIES):
        verify("sql", query, settings)
    assert verify("sql", CITIES, settings).result == '["Bonn", 1]\n["Oslo", 2]'
    assert file.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["shop.sqlite"]


def test_a_new_worker_loads_the_database_before_the_time_of_a_query_runs(
    settings: RuleSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, exchange = list[tuple[Any, float]](), worker.Worker._exchange

    def noted(self: worker.Worker, request: Any, seconds: float) -> Any:
        seen.append(([*request[1:2]], seconds))
        return exchange(self, request, seconds)

    verify("sql", CITIES, settings)
    assert worker._worker
    worker._worker.close()
    monkeypatch.setattr(worker.Worker, "_exchange", noted)
    for _ in range(2):
        assert outcome(verify("sql", CITIES, settings)) == "passes"
    assert seen == [([], 60), (["load"], 60), (["check"], 4), (["check"], 4)]


def test_what_is_no_database_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "wrong.sql").write_text("CREATE TABEL x")
    (tmp_path / "wrong.db").write_text("no database" * 100)
    for name, problem in (("wrong.sql", "syntax error"), ("wrong.db", "not a database"), ("none.db", "no such file")):
        with pytest.raises(ValidationError, match=problem):
            settings_of("sql", tmp_path, database=name)
