"""Batches of earlier calls: what they may cost and have cost counts, and what they answer is kept."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from generate.batch_api import BatchApi
from generate.context import Run
from generate.dry_run import dry_run
from generate.run import generate
from pipeline import rundir
from pipeline.errors import BudgetReached, DataError, DistillError
from pipeline.lineage import read_lineage
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir
from tests.servers.fake_batch_api import FakeBatches, batch_recipe, fake_batches, line, priced
from tests.servers.misbehaving_server import misbehaving, recipe_for, reply

LONG = {"template": "x" * 2000 + " {n}", "slots": {"n": [str(number) for number in range(10)]}}


def left_at_work(fake: FakeBatches, recipe: Recipe, run: RunDir, *, retry_failures: bool = False) -> None:
    """A call that ends while its batch is at work."""
    fake.failing_polls = 99
    with pytest.raises(DistillError, match="the batches are under way"):
        generate(recipe, run, quiet=True, retry_failures=retry_failures)
    fake.failing_polls = 0


def test_a_batch_of_another_version_is_not_asked_again(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with fake_batches() as fake:
        recipe = batch_recipe(fake)
        left_at_work(fake, recipe, run)
        part = {"name": "001", "file_id": "file-1", "batch_id": "batch_1", "status": "validating", "collected": False}
        (run.path / "batches/state.json").write_text(json.dumps({"key": "k", "parts": [part]}))
        with pytest.raises(DataError, match=r"state\.json: .*field `parts`; .*of another version, .*with that one"):
            generate(recipe, run, quiet=True)
        assert set(fake.asked.values()) == {1}


def tokens_spent(run: RunDir) -> int:
    tokens: int = read_lineage(run)["generate"]["spent"]["tokens"]
    return tokens


def counted(body: dict[str, Any]) -> dict[str, Any]:
    """A reply whose prompt has a token for each byte of the request."""
    prompt_tokens = len(json.dumps(body))
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": 5, "total_tokens": prompt_tokens + 5}
    return {**reply("answer"), "usage": usage}


def test_a_file_of_an_earlier_call_is_not_sent_if_the_budget_does_not_cover_its_prompts(run: RunDir) -> None:
    with fake_batches(outcome=lambda id_, body, batch: line(id_, body=counted(body))) as fake:
        long = {"prompts": {**LONG, "count": 10}, "sampling": {"max_tokens": 50}}
        generate(batch_recipe(fake, **long), run, quiet=True, write_batches=True)
        with pytest.raises(BudgetReached):
            generate(batch_recipe(fake, budget={"tokens": 3000}, **long), run, quiet=True)
        assert sum(fake.asked.values()) == 1 and 2000 < tokens_spent(run) <= 3000


def test_a_file_is_not_sent_beside_a_batch_that_has_the_budget(run: RunDir) -> None:
    with fake_batches() as fake, pytest.MonkeyPatch.context() as patch:
        patch.setattr("generate.batch_files.MOST_REQUESTS", 5)
        recipe = batch_recipe(fake, 10, sampling={"max_tokens": 5})
        left_at_work(fake, recipe, run)
        state = json.loads((run.path / "batches/state.json").read_text())
        state["chunks"][1] |= {"batch_id": None, "file_id": None, "status": "written"}  # as if killed before
        (run.path / "batches/state.json").write_text(json.dumps(state))
        del fake.batches["batch_2"]
        most = sum(chunk["prompt_tokens"] + chunk["completion_tokens"] for chunk in state["chunks"])
        generate(batch_recipe(fake, 10, sampling={"max_tokens": 5}, budget={"tokens": most - 1}), run, quiet=True)
        assert (run.path / "batches/003.input.jsonl").exists()  # written anew, once the first had ended


def test_answers_without_usage_cost_the_same_if_a_later_call_collects_them(tmp_path: Path) -> None:
    runs = [RunDir(tmp_path / name) for name in ("at_once", "later")]
    with fake_batches(outcome=lambda id_, body, batch: line(id_, body=reply("answer", usage=False))) as fake:
        recipe = batch_recipe(fake, prompts={**LONG, "count": 5}, sampling={"max_tokens": 50}, budget={"tokens": 10**6})
        left_at_work(fake, recipe, runs[1])
        for run in runs:
            generate(recipe, run, quiet=True)
    assert tokens_spent(runs[0]) == tokens_spent(runs[1]) > 10_000


def test_online_a_batch_under_way_counts_as_the_most_that_it_can_cost(run: RunDir) -> None:
    with fake_batches() as fake, misbehaving() as server:
        asking = batch_recipe(fake, 10, sampling={"max_tokens": 5})
        left_at_work(fake, asking, run)
        (chunk,) = json.loads((run.path / "batches/state.json").read_text())["chunks"]
        texts = (run.path / "batches/001.input.jsonl").read_text().splitlines()
        bodies = [json.dumps(json.loads(text)["body"], separators=(",", ":")) for text in texts]
        most = sum(len(body) + 64 for body in bodies), 10 * 5  # a token per byte, and the chat template
        assert (chunk["prompt_tokens"], chunk["completion_tokens"]) == most
        budget = {"tokens": sum(most) + 400}
        with pytest.raises(BudgetReached):
            generate(
                recipe_for(server, 40, generate={"concurrency": 1}, sampling={"max_tokens": 5}, budget=budget),
                run,
                quiet=True,
            )
        assert 0 < 12 * len(server.asked) <= 400
        assert tokens_spent(run) == budget["tokens"] - 400 + 12 * len(server.asked)
        generate(asking, run, quiet=True)
        assert tokens_spent(run) == 12 * (len(server.asked) + 10)  # it is collected: what it cost is known


def test_a_batch_that_is_too_large_gives_back_what_it_was_to_cost(run: RunDir) -> None:
    with fake_batches(most_enqueued=3) as fake:
        left_at_work(fake, batch_recipe(fake, 6, sampling={"max_tokens": 5}), run)
        (chunk,) = json.loads((run.path / "batches/state.json").read_text())["chunks"]
        budget = {"tokens": chunk["prompt_tokens"] + chunk["completion_tokens"]}
        summary = generate(batch_recipe(fake, 6, sampling={"max_tokens": 5}, budget=budget), run, quiet=True)
        assert summary.completed == 6


def test_a_dry_run_counts_a_batch_under_way_once(run: RunDir) -> None:
    with fake_batches() as fake:
        recipe = batch_recipe(fake, 6, teacher=priced(fake))
        left_at_work(fake, recipe, run)
        assert dry_run(recipe, run).spent == 0
        online = recipe.model_copy(update={"generate": recipe.generate.model_copy(update={"mode": "online"})})
        assert dry_run(online, run).spent > 0


def test_a_batch_is_collected_though_nothing_is_left_to_ask(run: RunDir) -> None:
    with fake_batches() as fake:
        few, many = (batch_recipe(fake, count, teacher=priced(fake)) for count in (3, 8))
        generate(few, run, quiet=True)
        left_at_work(fake, many, run)
        assert generate(few, run, quiet=True).cost_usd == (3 + 5) * 6


def test_answers_that_nothing_asked_for_are_brought_back_without_a_second_charge(run: RunDir) -> None:
    with fake_batches() as fake:
        few, many = (batch_recipe(fake, count, teacher=priced(fake)) for count in (3, 10))
        left_at_work(fake, many, run)
        assert generate(few, run, quiet=True).cost_usd == 10 * 6
        for answered in (7, 0):
            summary = generate(many, run, quiet=True, collect=run.path / "batches/001.output.jsonl")
            assert (summary.answered, summary.completed, summary.cost_usd) == (answered, 10, 10 * 6)
        assert generate(many, run, quiet=True).cost_usd == 10 * 6 and tokens_spent(run) == 10 * 12


def test_answers_to_a_retry_are_kept_by_the_plain_command(run: RunDir) -> None:
    broken = True

    def outcome(id_: str, body: dict[str, Any], batch: int) -> dict[str, Any]:
        bad = broken and body["messages"][-1]["content"] in ("say 0", "say 1")
        return line(id_, 400, {"error": {"message": "no such thing", "code": "x"}}) if bad else line(id_)

    with fake_batches(outcome=outcome) as fake:
        assert generate(batch_recipe(fake, 4), run, quiet=True).failed == 2
        broken = False
        left_at_work(fake, batch_recipe(fake, 4), run, retry_failures=True)
        summary = generate(batch_recipe(fake, 6), run, quiet=True)
    assert (summary.completed, summary.answered, summary.failed) == (6, 4, 0)


def test_a_file_by_hand_of_a_retry_is_collected_without_the_flag(run: RunDir, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with fake_batches(
        outcome=lambda id_, body, batch: line(id_, 400, {"error": {"message": "no", "code": "x"}})
    ) as fake:
        recipe = batch_recipe(fake, 2)
        assert generate(recipe, run, quiet=True).failed == 2
    generate(recipe, run, quiet=True, retry_failures=True, write_batches=True)
    written = (run.path / "batches" / "002.input.jsonl").read_text().splitlines()
    output.write_text("".join(json.dumps(line(json.loads(text)["custom_id"])) + "\n" for text in written))
    summary = generate(recipe, run, quiet=True, collect=output)
    assert (summary.completed, summary.failed) == (2, 0)


def answered_another_way(recipe: Recipe, run: RunDir) -> None:
    """The answers of another run in the journal, as if they had been asked online."""
    other = RunDir(run.path / "other")
    generate(recipe, other, quiet=True)
    run.completions.write_bytes(other.completions.read_bytes())


@pytest.mark.parametrize("end", ["cut", "killed"])
def test_answers_that_were_bought_twice_are_paid_twice_after_a_download_that_broke(run: RunDir, end: str) -> None:
    with fake_batches() as fake:
        recipe = batch_recipe(fake, 4, teacher=priced(fake))
        left_at_work(fake, recipe, run)
        answered_another_way(recipe, run)
        if end == "cut":
            fake.cut_downloads = 1
        else:
            with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(BatchApi, "download", killed)
                generate(recipe, run, quiet=True)
        found = generate(batch_recipe(fake, 5, teacher=priced(fake)), run, quiet=True)
    assert (found.completed, found.cost_usd) == (5, (4 + 4 + 1) * 6)


def test_answers_without_usage_that_nothing_asks_for_are_paid_at_their_most(run: RunDir) -> None:
    """All four are answered another way while the batch is at work; those of the batch cost nothing."""
    with fake_batches(outcome=lambda id_, body, batch: line(id_, body=reply("answer", usage=False))) as fake:
        recipe = batch_recipe(fake, 4, teacher=priced(fake))
        left_at_work(fake, recipe, run)
        (chunk,) = json.loads((run.path / "batches/state.json").read_text())["chunks"]
        answered_another_way(recipe, run)
        found = generate(recipe, run, quiet=True)
    most = 0.5 * (chunk["prompt_tokens"] + chunk["completion_tokens"])
    assert most <= found.cost_usd < most + 0.5 * 4  # each request's part of it, rounded up


@pytest.mark.parametrize("usage", [True, False])
def test_a_call_that_is_killed_while_it_records_a_batch_loses_none_of_its_cost(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, usage: bool
) -> None:
    """Two of the six requests are answered another way meanwhile, and one has an empty answer. Each costs as ever."""

    def outcome(id_: str, body: dict[str, Any], batch: int) -> dict[str, Any]:
        return line(id_, body=reply("" if body["messages"][-1]["content"] == "say 5" else "four", usage=usage))

    with fake_batches(outcome=outcome) as fake:
        few, all_ = (batch_recipe(fake, count, teacher=priced(fake)) for count in (2, 6))
        left_at_work(fake, all_, run)
        answered_another_way(few, run)
        record, copy = Run.record_answers, tmp_path / "copy"

        def copied(self: Run, *answers: Any) -> None:
            record(self, *answers)
            if self.counters.answered == 2:
                shutil.copytree(run.path, copy)  # what a kill at this moment leaves

        with monkeypatch.context() as patch:
            patch.setattr(Run, "record_answers", copied)
            whole = generate(all_, run, quiet=True)
        resumed = generate(all_, RunDir(copy), quiet=True)
        assert len(fake.batches) == 2
    assert (whole.completed, resumed.completed) == (5, 5)
    assert resumed.cost_usd == whole.cost_usd
    assert not usage or whole.cost_usd == (2 + 6) * 6


def test_a_call_that_is_killed_after_any_change_on_disk_costs_as_ever(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six answers of $6 each, one of them empty, which is paid and in no journal of answers."""

    def outcome(id_: str, body: dict[str, Any], batch: int) -> dict[str, Any]:
        return line(id_, body=reply("" if body["messages"][-1]["content"] == "say 5" else "four"))

    copies: list[RunDir] = []

    def copied(path: Path) -> None:
        copies.append(RunDir(tmp_path / f"copy{len(copies)}"))
        shutil.copytree(run.path, copies[-1].path)  # what a kill at this moment leaves

    with fake_batches(outcome=outcome) as fake:
        recipe = batch_recipe(fake, 6, teacher=priced(fake))
        recipe = recipe.model_copy(update={"generate": recipe.generate.model_copy(update={"max_attempts": 1})})
        with monkeypatch.context() as patch:
            patch.setattr(rundir, "sync_path", copied)
            generate(recipe, run, quiet=True)
        found = [generate(recipe, copy, quiet=True) for copy in (run, *copies)]
    assert len(copies) > 10
    assert {(one.completed, one.failed, one.cost_usd) for one in found} == {(5, 1, 6 * 6)}


async def killed(*_: object) -> None:
    raise KeyboardInterrupt
