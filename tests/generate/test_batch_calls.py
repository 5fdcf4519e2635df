"""How calls with batches end, and what they cost: interrupts, errors, kills, changed recipes, files by hand."""

import asyncio
import json
import os
import shutil
import signal
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from generate import batch_files
from generate.batch import Batches
from generate.batch_api import BatchApi
from generate.jobs import build_jobs
from generate.prompts import iter_prompts
from generate.run import generate
from pipeline.errors import BudgetReached, DataError, DistillError, UsageError
from pipeline.lineage import read_lineage
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir
from tests.servers.fake_batch_api import batch_recipe, expired, fake_batches, line, priced
from tests.servers.misbehaving_server import completions, failures, misbehaving, recipe_for, reply


def _interrupt_after_first_step(patch: pytest.MonkeyPatch) -> None:
    advance = Batches._advance
    calls = 0

    async def once(self: Batches, part: Any) -> None:
        nonlocal calls
        calls += 1
        await advance(self, part)
        if calls == 1:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(0.01)  # for the handler

    patch.setattr(Batches, "_advance", once)


def _interrupted(recipe: Recipe, run: RunDir) -> None:
    """A call that Ctrl-C ends as soon as its first batch is created."""
    with pytest.MonkeyPatch.context() as patch:
        _interrupt_after_first_step(patch)
        with pytest.raises(KeyboardInterrupt):
            generate(recipe, run, quiet=True)


def test_an_interrupt_leaves_the_batch_at_work_and_says_so(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    with fake_batches() as fake:
        _interrupted(batch_recipe(fake, 10), run)
        told = " ".join(capsys.readouterr().err.split())
        assert "batch_1 go on at" in told
        assert "/batches/<id>/cancel" in told
        assert generate(batch_recipe(fake, 10), run, quiet=True).answered == 10
        assert len(fake.batches) == 1


@pytest.mark.parametrize(
    ("message", "param", "failed"), [("too long", None, 4), ("'seed' is not supported", "seed", 0)]
)
def test_a_later_call_learns_from_a_refusal_as_the_one_that_made_the_batch(
    run: RunDir, message: str, param: str | None, failed: int
) -> None:
    """The run has answers, and so a dialect: each refused request went into one more batch, just as it was."""

    def outcome(custom_id: str, body: dict[str, Any], number: int) -> dict[str, Any]:
        if body["messages"][-1]["content"] in ("say 0", "say 1") or (param and param not in body):
            return line(custom_id)
        return line(custom_id, 400, {"error": {"message": message, "param": param}})

    with fake_batches(outcome=outcome) as fake:
        assert generate(batch_recipe(fake, 2), run, quiet=True).answered == 2
        _interrupted(batch_recipe(fake, 6), run)
        assert generate(batch_recipe(fake, 6), run, quiet=True).failed == failed
        assert len(fake.batches) == (2 if failed else 3)


def test_a_batch_from_before_a_lesson_fails_no_request(run: RunDir, tmp_path: Path) -> None:
    def outcome(custom_id: str, body: dict[str, Any], number: int) -> dict[str, Any]:
        if "seed" not in body:
            return line(custom_id)
        return line(custom_id, 400, {"error": {"message": "'seed' is not supported", "param": "seed"}})

    with fake_batches(outcome=outcome) as fake:
        _interrupted(batch_recipe(fake, 4), run)
        generate(batch_recipe(fake, 5), other := RunDir(tmp_path / "other"), quiet=True)
        run.completions.write_bytes(other.completions.read_bytes().splitlines(keepends=True)[4])  # as from online
        assert generate(batch_recipe(fake, 5), run, quiet=True).answered == 4
    assert not failures(run)


def test_an_interrupt_creates_no_further_batch(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_files, "MOST_REQUESTS", 2)
    with fake_batches() as fake:
        _interrupted(batch_recipe(fake, 10), run)
        assert len(fake.batches) == 1
        assert generate(batch_recipe(fake, 10), run, quiet=True).answered == 10
        assert set(fake.asked.values()) == {1}


@pytest.mark.parametrize("times", [1, 2])
def test_an_interrupt_during_an_upload(run: RunDir, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """One waits for the upload and creates no batch; a second one does not wait."""
    upload = BatchApi.upload

    async def interrupted(self: BatchApi, path: Path) -> str:
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(0.01)
        if times == 2:
            await asyncio.wait_for(asyncio.Event().wait(), 10)
        return await upload(self, path)

    monkeypatch.setattr(BatchApi, "upload", interrupted)
    with fake_batches() as fake:
        with pytest.raises(KeyboardInterrupt):
            generate(batch_recipe(fake, 2), run, quiet=True)
        assert (len(fake.files), len(fake.batches)) == (2 - times, 0)


@pytest.mark.parametrize("unauthorized", [True, False])
def test_another_model_after_a_batch_that_was_never_created(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, unauthorized: bool
) -> None:
    """Its requests are no longer the run's: they are not sent, whether or not they were uploaded."""

    async def refused(self: BatchApi, chunk: str, file_id: str) -> Any:
        raise DistillError("the quota is used up")

    with fake_batches(unauthorized=unauthorized) as fake:
        with monkeypatch.context() as patch:
            patch.setattr(BatchApi, "create", refused)
            with pytest.raises(DistillError):
                generate(batch_recipe(fake, 4, teacher=priced(fake, "dear")), run, quiet=True)
        fake.unauthorized = False
        assert generate(batch_recipe(fake, 4, teacher=priced(fake, "cheap")), run, quiet=True).cost_usd == 24
        sent = [json.loads(fake.files[batch["input_file_id"]].splitlines()[0]) for batch in fake.batches.values()]
    assert [text["body"]["model"] for text in sent] == ["cheap"]


def test_a_batch_for_another_model_is_paid_all_the_same(run: RunDir) -> None:
    with fake_batches() as fake:
        _interrupted(batch_recipe(fake, 4, teacher=priced(fake, "first")), run)
        summary = generate(batch_recipe(fake, 4, teacher=priced(fake, "second")), run, quiet=True)
    assert (summary.answered, summary.cost_usd) == (4, 48)


@pytest.mark.parametrize(
    ("model", "price", "cost"),
    [
        ("stub", 1_000_000, 4 * 12),
        ("stub", 4_000_000, 4 * 12),
        ("stub", None, 4 * 12),
        ("other", 1_000_000, 4 * 12 + 4 * 6),
        ("other", None, 4 * 12),
    ],
)
def test_a_batch_costs_what_it_did_when_it_was_made(run: RunDir, model: str, price: float | None, cost: float) -> None:
    with fake_batches() as fake:
        _interrupted(batch_recipe(fake, 4, teacher=priced(fake, usd=2_000_000)), run)
        now = {"model": model, "base_url": fake.url} if price is None else priced(fake, model, price)
        for _ in range(2):
            assert generate(batch_recipe(fake, 4, teacher=now), run, quiet=True).cost_usd == cost


def test_a_batch_without_a_price_costs_what_it_does_now(run: RunDir) -> None:
    """An older version made it, or its price was not known."""
    with fake_batches() as fake:
        _interrupted(batch_recipe(fake, 4, teacher={"model": "stub", "base_url": fake.url}), run)
        assert generate(batch_recipe(fake, 4, teacher=priced(fake)), run, quiet=True).cost_usd == 4 * 6


def test_a_file_that_the_account_no_longer_has_is_uploaded_again(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_batches() as fake:
        with monkeypatch.context() as patch:
            patch.setattr(BatchApi, "create", _stop)
            with pytest.raises(KeyboardInterrupt):
                generate(batch_recipe(fake, 4), run, quiet=True)
        fake.files.clear()
        assert generate(batch_recipe(fake, 4), run, quiet=True).answered == 4
        assert fake.calls["upload"] == 2


@pytest.mark.parametrize(("gone", "status"), [("batches", 404), ("batches", 400), ("files", 404)])
@pytest.mark.parametrize("mode", ["batch", "online"])
def test_a_batch_that_the_account_does_not_know_can_be_given_up(
    run: RunDir, gone: str, status: int, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with fake_batches(unknown_id=status) as fake, misbehaving() as server:
        recipe = batch_recipe(fake, 4)
        _interrupted(recipe, run)
        if gone == "batches":
            fake.batches.clear()
        else:
            fake.batches["batch_1"] |= {"status": "completed", "output_file_id": "file-9"}
        capsys.readouterr()
        with pytest.raises(DistillError, match="does not know batch batch_1 or its files") as caught:
            generate(recipe, run, quiet=True)
        assert "go on at" not in capsys.readouterr().err
        state = run.path / "batches" / "state.json"
        assert f'set "collected": true in chunk 001 of {state}' in str(caught.value)
        state.write_text(state.read_text().replace('"collected": false', '"collected": true'))
        budget = {"tokens": 10**6}
        asking = recipe if mode == "batch" else recipe_for(server, 4, budget=budget)
        assert generate(asking, run, quiet=True).answered == 4
        assert read_lineage(run)["generate"]["spent"]["tokens"] == 4 * 12


def test_online_says_what_batches_are_under_way(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    with fake_batches() as fake:
        recipe = batch_recipe(fake, 4)
        _interrupted(recipe, run)
        capsys.readouterr()
        online = recipe.generate.model_copy(update={"mode": "online", "max_attempts": 1})
        with suppress(DistillError):  # the fake answers batches only
            generate(recipe.model_copy(update={"generate": online}), run, quiet=True)
    assert "warning: batches under way: batch_1." in " ".join(capsys.readouterr().err.split())


def test_a_budget_holds_back_what_it_does_not_cover(run: RunDir) -> None:
    with fake_batches() as fake:
        sections = {"budget": {"tokens": 1500}, "sampling": {"max_tokens": 5}}
        with pytest.raises(BudgetReached):
            generate(batch_recipe(fake, 200, **sections), run, quiet=True)
        assert 0 < 12 * len(fake.asked) <= 1500
        assert len(completions(run)) == len(fake.asked)


def test_requests_that_the_budget_leaves_out_of_the_files_are_counted(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_for("http://127.0.0.1:9/v1", 100, budget={"tokens": 3000}, sampling={"max_tokens": 5})
    generate(recipe, run, quiet=True, write_batches=True)
    written = len(_ids(run.path / "batches/001.input.jsonl"))
    said = " ".join(capsys.readouterr().err.split())
    assert f"{written} requests in 1 batch file(s)" in said
    assert 0 < written < 100 and f"the budget does not cover the other {100 - written}, which are left out" in said


def test_half_the_price(run: RunDir) -> None:
    with fake_batches() as fake:
        teacher = {"model": "stub", "base_url": fake.url, "price": {"input": 1_000_000, "output": 1_000_000}}
        assert generate(batch_recipe(fake, 10, teacher=teacher), run, quiet=True).cost_usd == 60.0


@pytest.mark.parametrize("script", [{"unauthorized": True}, {"failing_polls": 3}])
def test_a_call_that_ends_by_an_error_pays_only_for_answers(run: RunDir, script: dict[str, Any]) -> None:
    with fake_batches(**script) as fake:
        recipe = batch_recipe(fake, 4, teacher=priced(fake))
        with pytest.raises(DistillError):
            generate(recipe, run, quiet=True)
        fake.unauthorized = False
        assert generate(recipe, run, quiet=True).cost_usd == 24


def test_a_call_that_is_killed_pays_only_for_answers(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, killed = BatchApi.create, tmp_path / "killed"

    async def copied(self: BatchApi, chunk: str, file_id: str) -> Any:
        batch = await create(self, chunk, file_id)
        shutil.copytree(run.path, killed)  # what a kill at this moment leaves
        return batch

    with fake_batches() as fake:
        recipe = batch_recipe(fake, 4, teacher=priced(fake))
        monkeypatch.setattr(BatchApi, "create", copied)
        assert generate(recipe, run, quiet=True).cost_usd == 24
        monkeypatch.undo()
        assert generate(recipe, RunDir(killed), quiet=True).cost_usd == 24
        assert len(fake.batches) == 1


def test_copies_of_a_run_do_not_take_each_others_batches(run: RunDir, tmp_path: Path) -> None:
    """Both mark their batches with the same key, and number their files alike."""
    with fake_batches() as fake:
        generate(batch_recipe(fake, 2, teacher=priced(fake)), run, quiet=True)
        copy = RunDir(Path(shutil.copytree(run.path, tmp_path / "copy")))
        for folder, count in ((run, 5), (copy, 3)):
            summary = generate(batch_recipe(fake, count, teacher=priced(fake)), folder, quiet=True)
            assert (summary.completed, summary.cost_usd) == (count, count * 6)
    assert len(fake.batches) == 3


def test_an_answer_without_usage_costs_as_much_as_it_could(run: RunDir) -> None:
    with fake_batches(outcome=lambda id_, body, batch: line(id_, body=reply("four", usage=False))) as fake:
        recipe = batch_recipe(fake, 1, teacher=priced(fake), sampling={"max_tokens": 5})
        assert (generate(recipe, run, quiet=True).cost_usd or 0) > 6


def test_files_by_hand(run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_for("http://127.0.0.1:9/v1", 4)  # nothing is there, and nothing is asked
    generate(recipe, run, quiet=True, write_batches=True)
    written = run.path / "batches" / "001.input.jsonl"
    assert "".join(str(written).split()) in "".join(capsys.readouterr().err.split())
    output = tmp_path / "out.jsonl"
    ids = [json.loads(text)["custom_id"] for text in written.read_text().splitlines()]
    output.write_text("".join(json.dumps(text) + "\n" for text in [*map(line, ids[:3]), expired(ids[3])]))
    assert generate(recipe, run, quiet=True, collect=output).answered == 3
    (tmp_path / "folder").mkdir()
    for wrong in ("nothing.jsonl", "folder"):
        with pytest.raises(UsageError, match=f"{wrong}: no file of this name; give the output of a batch"):
            generate(recipe, run, quiet=True, collect=tmp_path / wrong)
    output.write_text("")
    for wrong in (written, output):
        with pytest.raises(DataError, match=rf"{wrong.name}: no line has a `response` or an `error`; give the output"):
            generate(recipe, run, quiet=True, collect=wrong)
    output.write_text("{\n")
    with pytest.raises(UsageError, match=r"out\.jsonl:1: "):
        generate(recipe, run, quiet=True, collect=output)


def _ids(path: Path) -> list[str]:
    return [json.loads(text)["custom_id"] for text in path.read_text().splitlines()]


def test_answers_by_hand_that_are_not_taken_in_say_why(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere, output = "http://127.0.0.1:9/v1", tmp_path / "out.jsonl"
    four, six, colder = recipe_for(nowhere, 4), recipe_for(nowhere, 6), {"temperature": 0.1}
    ids = [job.request.id for job in build_jobs(iter_prompts(six), six)]
    output.write_text("".join(json.dumps(line(id_)) + "\n" for id_ in ids))
    assert generate(four, run, quiet=True, collect=output).answered == 4
    assert "ignored 2 answers that nothing asks for" in " ".join(capsys.readouterr().err.split())
    assert generate(six, run, quiet=True, collect=output).answered == 2
    assert "ignored 4 answers to requests that have one" in " ".join(capsys.readouterr().err.split())
    assert generate(six, run, quiet=True, collect=output).answered == 0
    other = RunDir(tmp_path / "other")
    with pytest.raises(DataError, match=r"out\.jsonl: of other prompts, sampling, model or endpoint than"):
        generate(recipe_for(nowhere, 6, sampling=colder), other, quiet=True, collect=output)
    assert "ignored 6 answers that nothing asks for" in " ".join(capsys.readouterr().err.split())


def test_files_by_hand_are_those_of_the_recipe_as_it_is(run: RunDir, tmp_path: Path) -> None:
    nowhere, output, batches = "http://127.0.0.1:9/v1", tmp_path / "out.jsonl", run.path / "batches"
    generate(recipe_for(nowhere, 4), run, quiet=True, write_batches=True)
    first = _ids(batches / "001.input.jsonl")
    generate(recipe_for(nowhere, 6), run, quiet=True, write_batches=True)  # more prompts
    assert set(first) < set(_ids(batches / "002.input.jsonl"))
    output.write_text("".join(json.dumps(line(id_)) + "\n" for id_ in first))  # the older file was still at work
    assert generate(recipe_for(nowhere, 6), run, quiet=True, collect=output).answered == 4
    generate(recipe_for(nowhere, 6), run, quiet=True, write_batches=True)  # what is left
    assert len(_ids(batches / "003.input.jsonl")) == 2
    generate(recipe_for(nowhere, 6, sampling={"temperature": 0.1}), run, quiet=True, write_batches=True)
    texts = (batches / "004.input.jsonl").read_text().splitlines()
    assert [json.loads(text)["body"]["temperature"] for text in texts] == [0.1] * 6


def test_what_vllm_refuses_has_its_reason(run: RunDir, tmp_path: Path) -> None:
    recipe, output = recipe_for("http://127.0.0.1:9/v1", 4), tmp_path / "out.jsonl"
    generate(recipe, run, quiet=True, write_batches=True)
    ids = _ids(run.path / "batches" / "001.input.jsonl")

    def refused(custom_id: str, status: int, error: Any) -> dict[str, Any]:
        response = {"status_code": status, "request_id": "vllm-batch-1", "body": None}
        return {"id": "vllm-1", "custom_id": custom_id, "response": response, "error": error}

    said = {"error": {"message": "maximum context length is 8192 tokens", "type": "BadRequestError", "code": 400}}
    texts = [
        line(ids[0]),
        refused(ids[1], 400, said),
        refused(ids[2], 400, "must not be sent in stream mode"),
        refused(ids[3], 500, said),
    ]
    output.write_text("".join(json.dumps(text) + "\n" for text in texts))
    summary = generate(recipe, run, quiet=True, collect=output)
    assert (summary.answered, summary.failed) == (1, 2)  # the last may be answered another time
    assert {(failure.error, failure.status, failure.message) for failure in failures(run)} == {
        ("bad_request", 400, "maximum context length is 8192 tokens"),
        ("bad_request", 400, "must not be sent in stream mode"),
    }


def _written_only(recipe: Recipe, run: RunDir) -> None:
    """A call that is stopped when its files are written, before one of them is sent."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchApi, "upload", _stop)
        with pytest.raises(KeyboardInterrupt):
            generate(recipe, run, quiet=True)


async def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_file_that_was_not_sent_is_written_anew_once_some_is_answered(run: RunDir) -> None:
    """Else all of it would be paid a second time, over the budget."""
    with fake_batches() as fake:
        _written_only(batch_recipe(fake, 6), run)
        with pytest.MonkeyPatch.context() as patch:  # three of the six, as if they had been asked online
            patch.setattr(batch_files, "MOST_REQUESTS", 3)
            other = RunDir(run.path / "other")
            generate(batch_recipe(fake, 3), other, quiet=True)
            run.completions.write_bytes(other.completions.read_bytes())
        assert generate(batch_recipe(fake, 6), run, quiet=True).completed == 6
        assert set(fake.asked.values()) == {1} and len(fake.asked) == 6
    assert len(completions(run)) == 6


def test_a_file_that_was_not_sent_is_not_sent_over_a_budget_that_was_lowered(run: RunDir) -> None:
    with fake_batches() as fake:
        _written_only(batch_recipe(fake, 6, sampling={"max_tokens": 5}), run)
        tight = batch_recipe(fake, 6, sampling={"max_tokens": 5}, budget={"tokens": 250})
        with pytest.raises(BudgetReached):
            generate(tight, run, quiet=True)
        assert 0 < 12 * sum(fake.asked.values()) <= 250
        assert generate(batch_recipe(fake, 6, sampling={"max_tokens": 5}), run, quiet=True).completed == 6
        assert set(fake.asked.values()) == {1}


def test_a_file_that_was_not_sent_is_sent_if_nothing_has_changed(run: RunDir) -> None:
    with fake_batches() as fake:
        _written_only(batch_recipe(fake, 6), run)
        assert generate(batch_recipe(fake, 6), run, quiet=True).answered == 6
    assert [path.name for path in (run.path / "batches").glob("*.input.jsonl")] == ["001.input.jsonl"]


def test_answers_that_a_batch_brings_a_second_time_are_paid(run: RunDir) -> None:
    """The batch is at work while the same requests are answered another way."""
    with fake_batches() as fake:
        recipe = batch_recipe(fake, 4, teacher=priced(fake))
        _interrupted(recipe, run)
        other = RunDir(run.path / "other")
        generate(batch_recipe(fake, 4, teacher=priced(fake)), other, quiet=True)
        run.completions.write_bytes(other.completions.read_bytes())
        before = generate(batch_recipe(fake, 4, teacher=priced(fake)), other, quiet=True).cost_usd
        assert before == 4 * 6
        found = generate(batch_recipe(fake, 5, teacher=priced(fake)), run, quiet=True)
    assert found.completed == 5 and found.cost_usd == (4 + 4 + 1) * 6


def test_what_answers_with_a_page_has_no_batches(run: RunDir) -> None:
    class Page(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<html>Sign in</html>")

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(DistillError, match=r"/v1/files answers with no JSON; check teacher\.base_url"):
            generate(batch_recipe(f"http://127.0.0.1:{server.server_port}/v1", 2), run, quiet=True)
        server.shutdown()
