"""What long work says of how far it is."""

import threading

import pytest

from pipeline.progress import reporting, reporting_time


def test_long_work_says_how_far_it_is_and_short_work_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = 0.0, list[str]()
    monkeypatch.setattr("pipeline.progress.monotonic", lambda: now)
    for item in reporting(range(2 * 3600), "{:,} rows".format, said.append):
        assert item == now
        now += 1.0
        if now == 9:
            assert said == []
        if now == 62:  # a line is due once the item is done
            assert said == ["10 rows", "20 rows", "30 rows", "40 rows", "50 rows", "60 rows"]
    assert 150 < len(said) < 160  # each 10 s until 200 s, then ln(1200/200) / ln(1.05) = 37, then one a minute: 100


def test_work_without_steps_says_how_long_it_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = threading.Event()
    with reporting_time("a thing", lambda _: told.set()):
        assert not told.wait(0.05)
    monkeypatch.setattr("pipeline.progress.REPORT_S", 0.01)
    threads = threading.active_count()
    with reporting_time("tokenising 9 rows", lambda line: (print(line), told.set())):
        assert told.wait(10)
    assert threading.active_count() == threads
    assert "tokenising 9 rows: 0 s so far" in capsys.readouterr().out
