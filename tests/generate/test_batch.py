"""The Batch API against a faithful fake: each request answered once, whatever ends, fails, is lost or is killed."""

import json
import os
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from generate import batch_files
from generate.batch_api import BatchApi
from generate.context import Run
from generate.run import generate
from pipeline.errors import DistillError, RecipeError
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir
from tests.servers.fake_batch_api import FakeBatches, batch_recipe, expired, fake_batches, line, priced
from tests.servers.misbehaving_server import completions, failures, misbehaving, recipe_for, reply, whole


def test_every_request_is_answered_through_one_batch(run: RunDir) -> None:
    with fake_batches() as fake:
        summary = generate(batch_recipe(fake, 20), run, quiet=True)
        assert (fake.calls["upload"], len(fake.batches), set(fake.asked.values())) == (1, 1, {1})
        again = generate(batch_recipe(fake, 20), run, quiet=True)
        assert len(fake.batches) == 1
    assert (summary.answered, summary.failed, again.resumed) == (20, 0, 20)
    assert all(record.text == f"answer to {record.id}" for record in completions(run))  # each to its own
    assert {record.attempts for record in completions(run)} == {1}


def test_the_requests_are_those_that_would_be_sent_online(run: RunDir, tmp_path: Path) -> None:
    with misbehaving() as server:
        online = recipe_for(server, 5)
        generate(online, RunDir(tmp_path / "online"), quiet=True)
        config = online.generate.model_copy(update={"mode": "batch"})
        with pytest.raises(DistillError, match="does it have a Batch API"):  # it has not
            generate(online.model_copy(update={"generate": config}), run, quiet=True)
        sent = sorted(json.dumps(asked.body) for asked in server.asked)
    lines = [json.loads(text) for text in (run.path / "batches" / "001.input.jsonl").read_text().splitlines()]
    assert sorted(json.dumps(text["body"]) for text in lines) == sent
    assert {text["url"] for text in lines} == {"/v1/chat/completions"}
    assert {text["custom_id"] for text in lines} == {record.id for record in completions(RunDir(tmp_path / "online"))}


def test_reasoning_and_tool_calls_come_through_a_batch(run: RunDir) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    said = reply("<think>hm</think>two", finish_reason="tool_calls")
    said["choices"][0]["message"]["tool_calls"] = [call]
    tool = {"type": "function", "function": {"name": "now"}}
    with fake_batches() as fake:
        fake.outcome = lambda id_, body, batch: line(id_, body={**said, "tools": body["tools"]})
        recipe = batch_recipe(fake, 2)
        recipe = recipe.model_copy(update={"prompts": recipe.prompts.model_copy(update={"tools": [tool]})})
        generate(recipe, run, quiet=True)
    found = [(row.reasoning, row.text, row.tool_calls, row.tools) for row in completions(run)]
    assert found == [("hm", "two", [call], [tool])] * 2
    assert not any("tools" in row.sampling for row in completions(run))


def test_it_is_split_by_count_and_by_size(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_files, "MOST_REQUESTS", 4)
    with fake_batches() as fake:
        assert generate(batch_recipe(fake, 10), run, quiet=True).answered == 10
        assert [len(fake.files[batch["input_file_id"]].splitlines()) for batch in fake.batches.values()] == [4, 4, 2]
        monkeypatch.setattr(batch_files, "MOST_BYTES", 500)
        assert generate(batch_recipe(fake, 14, sampling={"seed": 1}), run, quiet=True).answered == 14
        assert all(len(data) <= 500 for name, data in fake.files.items() if b'"method"' in data and name > "file-7")


@pytest.mark.parametrize("end", ["expired", "cancelled"])
def test_what_an_ended_batch_did_is_kept_and_the_rest_asked_again(run: RunDir, end: str) -> None:
    with fake_batches(ends=[end], answered_share=0.4) as fake:
        summary = generate(batch_recipe(fake, 10), run, quiet=True)
        assert len(fake.batches) == 2
        assert sorted(fake.asked.values()) == [1] * 4 + [2] * 6
    assert summary.answered == 10
    assert sorted(record.attempts for record in completions(run)) == [1] * 4 + [2] * 6
    assert whole(run, 10)


def test_a_line_that_failed_is_a_failure_or_is_asked_again(run: RunDir) -> None:
    def outcome(custom_id: str, body: dict[str, Any], number: int) -> dict[str, Any]:
        text = body["messages"][-1]["content"]
        if text == "say 1":
            return line(custom_id, 400, {"error": {"message": "too long", "code": "context_length_exceeded"}})
        if text == "say 2" and number == 0:
            return line(custom_id, 429, {"error": {"message": "slow down"}})
        if text == "say 3":
            return line(custom_id, 500, {"error": {"message": "broken"}})
        if text == "say 4":
            return line(custom_id, 200, reply(""))
        return line(custom_id)

    with fake_batches(outcome=outcome) as fake:
        summary = generate(batch_recipe(fake, 10), run, quiet=True)
        assert len(fake.batches) == 3
    assert (summary.answered, summary.failed) == (7, 3)
    told = {failure.slots["n"]: (failure.error, failure.message, failure.attempts) for failure in failures(run)}
    assert told["1"] == ("bad_request", "too long", 1)
    assert told["3"][:2] == ("server_error", "broken")
    assert told["4"][0] == "empty_answer"
    assert whole(run, 7)


@pytest.mark.parametrize(
    ("status", "code", "told"),
    [
        (429, "insufficient_quota", r"the quota is used up \(no\); top it up"),
        (401, "invalid_api_key", r"answers 401 \(no\): \w+ is not set, or holds a key that it refuses"),
        (404, "model_not_found", r"answers 404 \(no\)"),
    ],
)
def test_lines_that_no_other_batch_heals_end_the_call_and_fail_no_request(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, status: int, code: str, told: str
) -> None:
    """Both batches of the call have such lines. All that has ended is kept, so the next call needs one batch."""
    monkeypatch.setattr(batch_files, "MOST_REQUESTS", 4)

    def outcome(custom_id: str, body: dict[str, Any], number: int) -> dict[str, Any]:
        if number < 2 and body["messages"][-1]["content"] in ("say 1", "say 6", "say 7"):
            return line(custom_id, status, {"error": {"message": "no", "code": code}})
        return line(custom_id)

    with fake_batches(outcome=outcome) as fake:
        recipe = batch_recipe(fake, 8, teacher=priced(fake))
        with pytest.raises(DistillError, match=told):
            generate(recipe, run, quiet=True)
        assert (len(completions(run)), failures(run), len(fake.batches)) == (5, [], 2)
        again = generate(recipe, run, quiet=True)
        assert (again.answered, again.failed, again.cost_usd, len(fake.batches)) == (3, 0, 8 * 6, 3)
    assert {record.attempts for record in completions(run)} == {1}


def test_a_file_by_hand_for_another_model_fails_no_request(run: RunDir, tmp_path: Path) -> None:
    recipe, output = recipe_for("http://127.0.0.1:9/v1", 2), tmp_path / "out.jsonl"
    generate(recipe, run, quiet=True, write_batches=True)
    ids = [json.loads(text)["custom_id"] for text in (run.path / "batches/001.input.jsonl").read_text().splitlines()]
    unknown = line(ids[1], 404, {"error": {"message": "The model `m` does not exist", "code": 404}})
    output.write_text("".join(json.dumps(text) + "\n" for text in (line(ids[0]), unknown)))
    with pytest.raises(DistillError, match="answers 404 "):
        generate(recipe, run, quiet=True, collect=output)
    assert (len(completions(run)), failures(run)) == (1, [])


def test_a_request_without_a_line_is_asked_up_to_max_attempts(run: RunDir) -> None:
    def outcome(custom_id: str, body: dict[str, Any], number: int) -> dict[str, Any]:
        return {**line(custom_id), **({"custom_id": "other"} if body["messages"][-1]["content"] == "say 1" else {})}

    with fake_batches(outcome=outcome) as fake:
        summary = generate(batch_recipe(fake, 3), run, quiet=True)
        assert len(fake.batches) == 3
    assert (summary.answered, summary.failed) == (2, 1)
    assert [(failure.slots["n"], failure.error, failure.attempts) for failure in failures(run)] == [
        ("1", "no_response", 3)
    ]


def test_what_the_teacher_refuses_is_learnt_from_its_error_file(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whole batches fail for a setting that a model refuses; the next is written without it."""

    def outcome(custom_id: str, body: dict[str, Any], number: int) -> dict[str, Any]:
        for name, instead in (("max_tokens", "max_completion_tokens"), ("temperature", "")):
            if name in body:
                message = f"Unsupported parameter: '{name}' is not supported with this model. Use '{instead}' instead."
                return line(custom_id, 400, {"error": {"message": message, "param": name}})
        return line(custom_id)

    with fake_batches(outcome=outcome) as fake:
        recipe = batch_recipe(fake, 5)
        assert generate(recipe, run, quiet=True).answered == 5
        assert len(fake.batches) == 3
    assert "sends max_completion_tokens instead of max_tokens" in capsys.readouterr().err
    for record in completions(run):
        assert set(record.sampling) == {"top_p", "max_completion_tokens", "seed"}
        assert record.attempts == 1
    assert not failures(run)


def test_what_was_learnt_for_the_answers_of_a_run_is_not_learnt_again(run: RunDir) -> None:
    """Each lesson takes the time of a batch: a day, at worst. The roles of messages are learnt again."""

    def outcome(custom_id: str, body: dict[str, Any], number: int) -> dict[str, Any]:
        for name in ("max_tokens", "temperature"):
            if name in body:
                message = f"Unsupported parameter: '{name}' is not supported. Use 'max_completion_tokens' instead."
                return line(custom_id, 400, {"error": {"message": message, "param": name}})
        return line(custom_id)

    with fake_batches(outcome=outcome) as fake:
        assert generate(batch_recipe(fake, 5), run, quiet=True).answered == 5
        assert len(fake.batches) == 3
        assert generate(batch_recipe(fake, 9), run, quiet=True).answered == 4
        assert len(fake.batches) == 4
    assert {frozenset(record.sampling) for record in completions(run)} == {
        frozenset({"top_p", "max_completion_tokens", "seed"})
    }


def test_a_proxy_is_not_asked_for_batches_of_a_server_on_this_machine(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with fake_batches() as fake:
        assert generate(batch_recipe(fake, 2), run, quiet=True).answered == 2


def test_lines_that_come_twice_count_once(run: RunDir) -> None:
    with fake_batches() as fake:
        recipe = batch_recipe(fake, 5)
        generate(recipe, run, quiet=True)
        output = run.path / "batches" / "001.output.jsonl"
        before = run.completions.read_bytes()
        generate(recipe_for(fake.url, 6), run, quiet=True, collect=output)
    assert run.completions.read_bytes() == before


def test_troubles_of_the_network_are_borne(run: RunDir) -> None:
    with fake_batches(failing_polls=2, cut_downloads=1, lose_reply_of_create=1) as fake:
        assert generate(batch_recipe(fake, 10), run, quiet=True).answered == 10
        assert len(fake.batches) == 1  # the one whose creation was never heard of was found
        assert set(fake.asked.values()) == {1}


@pytest.mark.parametrize("created", [False, True])
def test_batches_are_said_to_be_under_way_if_they_are(
    run: RunDir, created: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unreachable(*_: object) -> object:
        async with httpx2.AsyncClient() as client:
            try:
                return await client.get("http://127.0.0.1:9")
            except httpx2.ConnectError as error:
                raise openai.APIConnectionError(request=error.request) from error

    monkeypatch.setattr(BatchApi, "retrieve" if created else "upload", unreachable)
    with (
        fake_batches() as fake,
        pytest.raises(DistillError, match=r"/v1: All connection .* 3 times in a row") as caught,
    ):
        generate(batch_recipe(fake, 2), run, quiet=True)
    assert ("the batches are under way" in str(caught.value)) == created


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours handles it."""


STEPS = ["save", "create_file", "create_batch", "retrieve", "download", "append"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("nth", [1, 2])
def test_killed_at_any_step_nothing_is_asked_or_answered_twice(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, step: str, after: bool, nth: int
) -> None:
    """Killed before or after the n-th time of a step; the next call goes on."""
    monkeypatch.setattr(batch_files, "MOST_REQUESTS", 4)
    with fake_batches() as fake:
        with monkeypatch.context() as patch:
            _kill_at(patch, step, after, nth)
            with pytest.raises(Killed):
                generate(batch_recipe(fake, 10), run, quiet=True)
        generate(batch_recipe(fake, 10), run, quiet=True)
        assert set(fake.asked.values()) == {1}
    assert whole(run, 10)


def _kill_at(patch: pytest.MonkeyPatch, step: str, after: bool, nth: int) -> None:
    left = nth

    def dying(function: Any) -> Any:
        def sync(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0 and not after:
                raise Killed
            result = function(*args, **kwargs)
            if left == 0:
                raise Killed
            return result

        return sync

    def dying_async(function: Any) -> Any:
        async def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0 and not after:
                raise Killed
            result = await function(*args, **kwargs)
            if left == 0:
                raise Killed
            return result

        return call

    if step == "save":
        patch.setattr(batch_files.Folder, "save", dying(batch_files.Folder.save))
    elif step == "append":
        patch.setattr(Run, "record_answers", dying(Run.record_answers))
    elif step == "download":
        patch.setattr(BatchApi, "download", dying_async(BatchApi.download))
    else:
        files, batches = openai.resources.AsyncFiles, openai.resources.AsyncBatches
        kind, name = {
            "create_file": (files, "create"),
            "create_batch": (batches, "create"),
            "retrieve": (batches, "retrieve"),
        }[step]
        patch.setattr(kind, name, dying_async(getattr(kind, name)))


SECRETS = ("a-key-in-plain-words", "team-seven", "sk-proj-0123456789abcdef")


@pytest.fixture
def secret_recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A recipe whose requests carry a key and a header from the environment."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRETS[0])
    monkeypatch.setenv("TEAM", SECRETS[1])

    def recipe(fake: FakeBatches, count: int) -> Recipe:
        return batch_recipe(
            fake, count, teacher={"model": "stub", "base_url": fake.url, "headers": {"X-Team": "${TEAM}"}}
        )

    return recipe


def test_what_a_provider_echoes_is_hidden_in_every_outcome(run: RunDir, secret_recipe: Any) -> None:
    """A gateway that repeats what a request carried, and another party's key, in each kind of error."""
    echo = f"no: {' '.join(SECRETS)}"

    def outcome(custom_id: str, body: dict[str, Any], number: int) -> dict[str, Any]:
        text = body["messages"][-1]["content"]
        if text == "say 0":
            return line(custom_id, 400, {"error": {"message": echo}})
        if text == "say 1":
            return {**expired(custom_id), "error": {"code": "broken", "message": echo}}
        if text == "say 2":
            return line(custom_id, 200, {"choices": [], "note": echo})
        return line(custom_id)

    with fake_batches(outcome=outcome) as fake:
        assert generate(secret_recipe(fake, 4), run, quiet=True).failed == 3
    assert [failure.message.count("[secret]") for failure in failures(run)] == [3, 3, 3]
    written = run.failures.read_text() + run.completions.read_text()
    assert not any(secret in written for secret in SECRETS)


def test_an_error_of_the_openai_package_hides_secrets(
    run: RunDir, secret_recipe: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy = "http://user:pass-word-9@proxy.example:3128"

    async def lost(self: BatchApi, path: Path) -> str:
        said = f"cannot reach {proxy} with {SECRETS[0]}"
        raise openai.APIConnectionError(message=said, request=httpx2.Request("POST", "http://h"))

    with fake_batches() as fake:
        monkeypatch.setattr(BatchApi, "upload", lost)
        with pytest.raises(DistillError) as caught:
            generate(secret_recipe(fake, 2), run, quiet=True)
    said = str(caught.value) + capsys.readouterr().err
    assert "cannot reach http://[secret]@proxy.example:3128 with [secret], 3 times in a row" in " ".join(said.split())
    assert "pass-word-9" not in said and SECRETS[0] not in said


def test_a_wrong_key_is_one_line(run: RunDir) -> None:
    with fake_batches(unauthorized=True) as fake, pytest.raises(DistillError, match=r"401 \(Incorrect API key"):
        generate(batch_recipe(fake), run, quiet=True)


def test_a_quota_that_is_used_up_is_told_at_once(run: RunDir) -> None:
    with fake_batches(no_quota=True) as fake:
        with pytest.raises(DistillError, match=r"the quota is used up \(You exceeded your current quota\); top it up"):
            generate(batch_recipe(fake), run, quiet=True)
        assert fake.calls["upload"] == 1


def test_a_batch_that_fails_as_a_whole_ends_the_call_and_costs_nothing(run: RunDir) -> None:
    """Its requests were never at work: that is no attempt of theirs."""
    with fake_batches(unknown_model=1) as fake:
        recipe = batch_recipe(fake, 4, teacher=priced(fake))
        recipe = recipe.model_copy(update={"generate": recipe.generate.model_copy(update={"max_attempts": 1})})
        with pytest.raises(DistillError, match=r"batch batch_1 failed: model_not_found: The model `m` does not exist"):
            generate(recipe, run, quiet=True)
        assert (completions(run), failures(run)) == ([], [])
        again = generate(recipe, run, quiet=True)
        assert (again.answered, again.cost_usd, len(fake.batches)) == (4, 4 * 6, 2)


def test_a_batch_counts_as_collected_once_its_answers_are_on_disk(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    on_disk, collected, sync = dict[str, int](), list[bool](), os.fsync

    def note_sync(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").resolve()
        if path.name.startswith("state.json") and '"collected": true' in path.read_text():
            collected.append(on_disk.get(run.completions.name) == run.completions.stat().st_size)
        sync(handle)
        on_disk[path.name] = path.stat().st_size

    monkeypatch.setattr(os, "fsync", note_sync)
    with fake_batches() as fake:
        generate(batch_recipe(fake, 4), run, quiet=True)
    assert collected and all(collected)


def test_one_endpoint_only(run: RunDir) -> None:
    with pytest.raises(RecipeError, match="takes one endpoint"):
        generate(batch_recipe("http://127.0.0.1:1/v1,http://127.0.0.1:2/v1"), run, quiet=True)
