"""The account's limit of enqueued tokens: batches wait for room, and those that are too large become smaller."""

from typing import Any

import pytest

from generate import batch_files
from generate.batch import Batches
from generate.run import generate
from pipeline.errors import DistillError
from pipeline.rundir import RunDir
from tests.servers.fake_batch_api import batch_recipe, fake_batches
from tests.servers.misbehaving_server import whole


def test_a_full_account_gets_one_batch_after_the_other(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_files, "MOST_REQUESTS", 4)
    with fake_batches(most_live=1) as fake:
        assert generate(batch_recipe(fake, 12), run, quiet=True).answered == 12
        assert set(fake.asked.values()) == {1}
    assert whole(run, 12)


def test_a_batch_too_large_for_the_account_becomes_smaller_ones(run: RunDir) -> None:
    """The account takes files of three requests; alone, a larger one would be refused for ever."""
    with fake_batches(most_enqueued=3) as fake:
        assert generate(batch_recipe(fake, 10), run, quiet=True).answered == 10
        assert set(fake.asked.values()) == {1}
    assert whole(run, 10)


def test_an_account_that_takes_no_batch_at_all_is_told(run: RunDir) -> None:
    with fake_batches(most_live=0) as fake:
        with pytest.raises(DistillError, match=r"no batch of one request fits the account's limit"):
            generate(batch_recipe(fake, 3), run, quiet=True)
        assert not fake.asked


def test_a_batch_waits_while_those_of_other_runs_have_the_accounts_limit(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The account takes two batches at a time. It is created again when one has ended, and it is not split."""
    polls, next_poll_s = 0, Batches._next_poll_s

    def counted(self: Batches, _: Any = None) -> float:
        nonlocal polls
        polls += 1
        if polls == 6:
            fake.batches["batch_2"]["status"] = "completed"
        return next_poll_s(self)

    monkeypatch.setattr(Batches, "_next_poll_s", counted)
    with fake_batches(most_live=2) as fake:
        fake.batches = {id_: {"id": id_, "status": "in_progress"} for id_ in ("batch_1", "batch_2")}
        assert generate(batch_recipe(fake, 10), run, quiet=True).answered == 10
        assert (fake.calls["upload"], set(fake.asked.values())) == (1, {1})
        statuses = [batch["status"] for batch in fake.batches.values()]
    assert statuses == ["in_progress", "completed", "failed", "completed"]


def test_a_batch_that_the_account_had_no_room_for_is_not_said_to_be_at_work(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    with fake_batches(most_live=0, failing_polls=99) as fake, pytest.raises(DistillError):
        generate(batch_recipe(fake, 2), run, quiet=True)
    said = capsys.readouterr().err
    assert "batch_1 is failed" in said and "go on at" not in said
