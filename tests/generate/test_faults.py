"""The client against real local servers that limit, refuse, hang, die and come back."""

import asyncio
import json
import os
import threading
import time
from collections import deque
from itertools import pairwise
from pathlib import Path

import pytest
from aiohttp import web
from tenacity import wait_fixed

from generate import loop
from generate.endpoint import Endpoint
from generate.jobs import WHOLE, Partition
from generate.reply import Fault
from generate.run import generate
from generate.targets import Target
from pipeline.errors import BudgetReached, DistillError, RecipeError
from pipeline.lineage import read_lineage
from pipeline.rundir import RunDir
from tests.servers.misbehaving_server import (
    Asked,
    Behaviour,
    answer,
    completions,
    error,
    failures,
    held_until,
    misbehaving,
    one_bad,
    raw,
    recipe_for,
    reply,
)


@pytest.fixture(autouse=True)
def _quick(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("generate.verdict.PROBE_WAIT", wait_fixed(0.05))
    monkeypatch.setattr("generate.verdict.REFUSED_WAIT", wait_fixed(0.02))


class Window:
    """A rate limit as a provider keeps it: so many requests in any window, 429 beyond."""

    def __init__(self, most: int, window_s: float) -> None:
        self.most, self.window_s = most, window_s
        self.granted: deque[float] = deque()
        self.refused = 0

    def __call__(self, asked: Asked) -> Behaviour:
        now = time.monotonic()
        while self.granted and self.granted[0] < now - self.window_s:
            self.granted.popleft()
        if len(self.granted) >= self.most:
            self.refused += 1
            return error(429, "slow down", "rate_limit_exceeded", retry_after=f"{self.window_s / 4}")
        self.granted.append(now)
        return answer()


def test_rate_limits_that_move_lose_nothing(run: RunDir) -> None:
    window = Window(40, 0.2)

    def script(asked: Asked) -> Behaviour:
        window.most = 10 if len(server.asked) % 120 > 60 else 40
        return window(asked)

    with misbehaving(script) as server:
        summary = generate(
            recipe_for(server, 300, generate={"concurrency": "auto", "max_attempts": 20}), run, quiet=True
        )
    assert (summary.answered, summary.failed) == (300, 0)
    assert window.refused < 3 * 300  # it holds back: some 210 here; with the pauses left out 3,000, at a fixed 64 1,200


@pytest.mark.parametrize("header", [{"retry_after": "1"}, {"retry_after_ms": "600"}])
def test_retry_after_holds_the_whole_endpoint_back(run: RunDir, header: dict[str, str]) -> None:
    moments: list[float] = []

    def script(asked: Asked) -> Behaviour:
        moments.append(time.monotonic())
        return error(429, **header) if asked.text == "say 3" and asked.attempt == 1 else answer(delay_s=0.05)

    with misbehaving(script) as server:
        assert generate(recipe_for(server, 40, generate={"concurrency": 4}), run, quiet=True).answered == 40
    assert max(after - before for before, after in pairwise(moments)) >= 0.5


def test_declared_limits_are_kept(run: RunDir) -> None:
    with misbehaving() as server:
        started = time.monotonic()
        config = {"concurrency": 8, "requests_per_minute": 600}
        assert generate(recipe_for(server, 20, generate=config), run, quiet=True).answered == 20
    assert time.monotonic() - started > 0.9  # ten at once, then a tenth of a second each


def test_limits_in_headers_are_learnt(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    limited = raw(json.dumps(reply("yes")).encode(), x_ratelimit_limit_requests="6000")
    with misbehaving(lambda asked: limited) as server:
        assert generate(recipe_for(server, 20), run, quiet=True).answered == 20
    assert "allows 6,000 requests per minute" in capsys.readouterr().err


def test_one_request_stuck_for_ever_ends_as_a_failure_and_holds_nobody_up(run: RunDir) -> None:
    stuck = answer(delay_s=600)
    with misbehaving(lambda asked: stuck if asked.text == "say 3" else answer()) as server:
        config = {"concurrency": 4, "request_timeout_s": 2.0, "deadline_s": 5.9, "max_attempts": 99}
        summary = generate(recipe_for(server, 100, generate=config), run, quiet=True)
    assert (summary.answered, summary.failed) == (99, 1)
    (failure,) = failures(run)
    assert (failure.error, failure.slots, failure.attempts) == ("timeout", {"n": "3"}, 3)  # 2.0 + 2.0 + the 1.9 left


@pytest.mark.parametrize(
    ("first", "attempts"), [(answer(delay_s=0.5), 1), (answer(delay_s=600), 2)], ids=["answered", "not answered"]
)
def test_a_pause_of_this_process_costs_no_answer_and_no_more_than_one_attempt(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, first: Behaviour, attempts: int
) -> None:
    """Of 3 s, in which the requests in flight pass their timeout and their deadline."""
    counted, pauses = Endpoint.count, iter([3.0])

    def count_late(endpoint: Endpoint) -> None:
        time.sleep(next(pauses, 0.0))
        counted(endpoint)

    monkeypatch.setattr(Endpoint, "count", count_late)
    config = {"concurrency": 12, "request_timeout_s": 1.0, "deadline_s": 2.6}
    with misbehaving(lambda asked: first if asked.attempt == 1 else answer()) as server:
        summary = generate(recipe_for(server, 12, generate=config), run, quiet=True)
    assert (summary.answered, summary.failed) == (12, 0)
    assert len(server.asked) == 12 * attempts


@pytest.mark.parametrize(
    ("config", "spent_s", "allowed_s"),
    [
        ({"request_timeout_s": 1.0, "deadline_s": 2.6}, 0.0, 1.0),
        ({"request_timeout_s": 1.0, "deadline_s": 2.6}, 2.0, 0.6),  # what is left
        ({"request_timeout_s": 1.0, "deadline_s": 2.6}, 2.5, 0.1),
        ({"request_timeout_s": 1.0, "deadline_s": 2.6}, 2.599, 0.0),  # a clock that is a millisecond early
        ({"request_timeout_s": 1.0, "deadline_s": 2.6}, 2.7, 0.0),
        ({"request_timeout_s": 100.0, "deadline_s": 5.0}, 0.0, 5.0),  # the first attempt always has its time
        ({"request_timeout_s": 100.0, "deadline_s": 5.0}, 4.4, 0.6),
        ({"request_timeout_s": 100.0, "deadline_s": 5.0}, 4.6, 0.0),
    ],
)
def test_an_attempt_without_time_to_be_answered_is_not_made(
    config: dict[str, float], spent_s: float, allowed_s: float
) -> None:
    async def asked() -> float:
        url = "http://127.0.0.1:1/v1"
        endpoint = Endpoint(recipe_for(url, generate=config), Target(url), WHOLE, print)
        async with endpoint.client:
            return endpoint.timeout_s(spent_s)

    assert asyncio.run(asked()) == pytest.approx(allowed_s)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (reply("half an ans", finish_reason="content_filter"), "content_filter"),
        ({"choices": [{"message": {"content": None, "refusal": "I cannot."}, "finish_reason": "stop"}]}, "refusal"),
        ({"error": {"message": "filtered", "code": "content_filter"}}, "content_filter"),
    ],
)
def test_what_a_provider_withholds_is_a_failure(run: RunDir, body: dict[str, object], kind: str) -> None:
    status = 400 if "error" in body else 200
    with misbehaving(one_bad(raw(json.dumps(body).encode(), status))) as server:
        assert generate(recipe_for(server), run, quiet=True).failed == 1
    assert [failure.error for failure in failures(run)] == [kind]


def refusing(asked: Asked) -> Behaviour:
    """A reasoning model behind OpenAI's API."""
    body = asked.body
    if "max_tokens" in body:
        words = (
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
        )
        return error(400, words, "unsupported_parameter")
    for name in ("temperature", "top_p"):
        if name in body:
            return error(400, f"Unsupported value: '{name}' does not support {body[name]} with this model.")
    if body["messages"][0]["role"] == "system":
        return error(400, "Unsupported value: 'messages[0].role' does not support 'system' with this model.")
    return answer()


def test_the_teacher_swap(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    with misbehaving(refusing) as server:
        recipe = recipe_for(server, 50)
        recipe = recipe.model_copy(update={"prompts": recipe.prompts.model_copy(update={"system": "Be kind."})})
        summary = generate(recipe, run, quiet=True)
        refused = len(server.asked) - 50
    assert (summary.answered, summary.failed) == (50, 0)
    assert refused <= 4 * 8  # what was in flight at each lesson
    told = " ".join(capsys.readouterr().err.split())
    for words in ("max_completion_tokens instead of max_tokens", "leaves out temperature", "in the role developer"):
        assert told.count(words) == 1
    for record in completions(run):
        assert set(record.sampling) == {"max_completion_tokens", "seed"}
        assert record.attempts == 1
    assert generate(recipe, run, quiet=True).resumed == 50


def test_headers_query_and_the_key_s_own_header(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-one")
    monkeypatch.setenv("TENANT", "blue")
    queries = []

    async def behave(request: web.Request, asked: Asked) -> web.StreamResponse:
        queries.append(dict(request.query))
        assert request.headers["api-key"] == "sk-one"
        assert "Authorization" not in request.headers
        assert request.headers["X-Tenant"] == "team blue"
        return web.json_response(reply("yes"))

    with misbehaving(lambda asked: behave) as server:
        teacher = {
            "model": "stub",
            "base_url": server.url,
            "api_key_env": "MY_KEY",
            "api_key_header": "api-key",
            "headers": {"X-Tenant": "team ${TENANT}"},
            "query": {"api-version": "2024-10-21"},
        }
        assert generate(recipe_for(server, teacher=teacher), run, quiet=True).answered == 10
        monkeypatch.delenv("TENANT")
        with pytest.raises(RecipeError, match=r"teacher\.headers\.X-Tenant: the variable TENANT is not set"):
            generate(recipe_for(server, teacher=teacher), run, quiet=True)
    assert queries == [{"api-version": "2024-10-21"}] * 10
    assert b"blue" not in b"".join(path.read_bytes() for path in run.path.iterdir() if path.is_file())


def test_further_fields_of_a_request_are_sent_and_recorded(run: RunDir) -> None:
    with misbehaving() as server:
        generate(recipe_for(server, sampling={"extra": {"top_k": 20, "seed_of": None}}), run, quiet=True)
    assert {asked.body["top_k"] for asked in server.asked} == {20}
    assert {record.sampling["top_k"] for record in completions(run)} == {20}
    for field in ("model", "max_completion_tokens"):  # the second would let answers pass max_tokens, and the budget
        with pytest.raises(ValueError, match=f"cannot hold {field}"):
            recipe_for(server, sampling={"extra": {field: 9}})


def test_a_date_in_a_further_field_is_sent_and_the_run_ends_well(run: RunDir, tmp_path: Path) -> None:
    file = tmp_path / "dated.yaml"
    with misbehaving() as server:
        file.write_text(
            f"name: t\nteacher: {{model: stub, base_url: '{server.url}'}}\nprompts: {{count: 1, template: hi}}\n"
            "sampling: {extra: {metadata: {day: 2026-01-01}}}\n"
        )
        assert generate(file, run, quiet=True).answered == 1
    assert server.asked[0].body["metadata"] == {"day": "2026-01-01"}
    assert read_lineage(run)["generate"]["sampling"]["metadata"] == {"day": "2026-01-01"}


def test_an_endpoint_that_is_down_for_a_while_costs_no_request(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    broken = threading.Event()
    asked_while_down = 0

    def script(asked: Asked) -> Behaviour:
        nonlocal asked_while_down
        if len(server.asked) == 60:
            broken.set()
            threading.Timer(1.0, broken.clear).start()
        asked_while_down += broken.is_set()
        return error(503, "loading") if broken.is_set() else answer(delay_s=0.005)

    with misbehaving(script) as server:
        summary = generate(recipe_for(server, 400), run, quiet=True)
    assert (summary.answered, summary.failed) == (400, 0)
    told = capsys.readouterr().err
    assert "is down (loading)" in told
    assert "answers again" in told
    assert asked_while_down < 60  # probes, not the whole run


def test_an_endpoint_that_stays_down_ends_the_run_in_time(run: RunDir) -> None:
    with misbehaving(lambda asked: error(500, "out of order")) as server:
        recipe = recipe_for(server, 100, generate={"concurrency": 16, "give_up_s": 0.4})
        with pytest.raises(DistillError, match=r"has not answered for \d+ s \(out of order\)") as caught:
            generate(recipe, run, quiet=True)
    assert caught.value.exit_code == 1
    assert len(failures(run)) < 16


def test_several_endpoints_share_the_work_and_a_dead_one_is_left_out(run: RunDir) -> None:
    with misbehaving(lambda asked: answer(delay_s=0.01)) as first, misbehaving() as second:

        def dying(asked: Asked) -> Behaviour:
            if len(third.asked) > 20:
                third.die()
            return answer(delay_s=0.01)

        with misbehaving(dying) as third:
            teacher = {"model": "stub", "base_url": [first.url, second.url, third.url]}
            config = {"concurrency": 4, "request_timeout_s": 1}
            summary = generate(recipe_for(first, 300, teacher=teacher, generate=config), run, quiet=True)
    assert (summary.answered, summary.failed) == (300, 0)
    by_endpoint = [record.endpoint for record in completions(run)]
    assert min(by_endpoint.count(url) for url in (first.url, second.url)) > 20
    assert 0 < by_endpoint.count(third.url) <= 30
    assert max(first.most_at_once, second.most_at_once) <= 4
    recipe = recipe_for(first, 300, teacher={"model": "stub", "base_url": first.url})
    assert generate(recipe, run, quiet=True).resumed == 300  # the first endpoint is in the identity, not the others


def test_an_endpoint_that_comes_back_gets_work_again(run: RunDir) -> None:
    broken = threading.Event()
    broken.set()

    def script(asked: Asked) -> Behaviour:
        if len(second.asked) > 4:
            broken.clear()
        return error(500) if broken.is_set() else answer(delay_s=0.02)

    with misbehaving(lambda asked: answer(delay_s=0.02)) as first, misbehaving(script) as second:
        teacher = {"model": "stub", "base_url": f"{first.url},{second.url}"}
        summary = generate(recipe_for(first, 300, teacher=teacher, generate={"concurrency": 4}), run, quiet=True)
    assert (summary.answered, summary.failed) == (300, 0)
    assert sum(record.endpoint == second.url for record in completions(run)) > 50


def test_auto_follows_the_queue_that_a_server_shows(run: RunDir) -> None:
    slots = asyncio.Semaphore(100)  # 500 answers a second, which a busy machine can ask for, too

    async def behave(request: web.Request, asked: Asked) -> web.StreamResponse:
        async with slots:
            await asyncio.sleep(0.2)
        return web.json_response(reply("yes"))

    with misbehaving(lambda asked: behave, metrics=lambda now: (min(now, 100), max(0, now - 100))) as server:
        summary = generate(recipe_for(server, 1500, generate={"concurrency": "auto"}), run, quiet=True)
    assert summary.answered == 1500
    assert 100 < server.most_at_once <= 400  # it looked for the end of it, and found it


def test_auto_begins_with_a_batch_for_every_engine_behind_the_endpoint() -> None:
    """As vLLM shows them behind its data-parallel balancer; a process begins with its part."""

    async def begun(partition: Partition, weight: float = 1.0) -> int:
        with misbehaving(metrics=lambda at_once: (0, 0), engines=4) as server:
            recipe = recipe_for(server, generate={"concurrency": "auto"})
            endpoint = Endpoint(recipe, Target(server.url, weight=weight), partition, print)
            async with endpoint.client:
                assert await endpoint.prepare() is None
                limit = endpoint.limit
                endpoint.share(1)  # the others have ended
                assert endpoint.limit == limit * partition.of
                return limit

    assert asyncio.run(begun(WHOLE)) == 4 * 276
    assert asyncio.run(begun(Partition(0, 2))) == 2 * 276
    assert [asyncio.run(begun(WHOLE, weight)) for weight in (2, 8)] == [4 * 276, 8 * 276]


@pytest.mark.parametrize(("running", "waiting", "limit"), [(276, 0, 596), (100, 176, 108)])
async def test_auto_moves_with_the_queue_and_says_where_there_is_more_room(
    running: int, waiting: int, limit: int
) -> None:
    changed, looks = asyncio.Event(), asyncio.Event()

    def shown(at_once: int) -> tuple[int, int]:
        at.call_soon_threadsafe(looks.set)
        return running, waiting

    at = asyncio.get_running_loop()
    with misbehaving(metrics=shown) as server:
        endpoint = Endpoint(recipe_for(server, generate={"concurrency": "auto"}), Target(server.url), WHOLE, print)
        async with endpoint.client:
            assert endpoint.timeout_s(0.0) == 300
            await endpoint.prepare()
            assert (endpoint.limit, endpoint.timeout_s(0.0)) == (276, 3600)  # what it works on is seen
            endpoint.in_flight = 276
            watching = asyncio.create_task(endpoint.watch(changed.set))
            async with asyncio.timeout(10):
                while endpoint.limit == 276:
                    looks.clear()
                    await looks.wait()
            watching.cancel()
            assert (endpoint.limit, changed.is_set()) == (limit, limit > 276)
            endpoint.share(2)
            assert endpoint.limit == limit // 2


@pytest.mark.parametrize(
    ("fault", "down", "limit"),
    [
        (Fault("server_error", "full", 503), False, 32),  # nothing is answered
        (Fault("server_error", "full", 503), True, 64),  # its probes say nothing of the number
        (Fault("server_error", "broken", 500), False, 64),
        (Fault("timeout", "no whole answer"), False, 32),
        (Fault("rate_limited", "slow down", 429), False, 45),
        (Fault("bad_request", "too long", 400), False, 64),
    ],
)
async def test_what_lowers_the_number_in_flight_and_what_says_that_an_endpoint_is_down(
    fault: Fault, down: bool, limit: int
) -> None:
    url = "http://127.0.0.1:1/v1"
    endpoint = Endpoint(recipe_for(url, generate={"concurrency": "auto"}), Target(url), WHOLE, print)
    endpoint.down_since = 1.0 if down else None
    endpoint.begin(1, 1, 1.0)
    for number in range(20):
        endpoint.failed(str(number), fault, 1.0, 2.0)
    endpoint.begin(1, 1, 3.0)
    assert endpoint.limit == limit
    assert endpoint.failing_with("another") == (1 if fault.error in ("rate_limited", "bad_request") else 21)
    await endpoint.client.__aexit__()


def test_a_budget_ends_the_run_and_a_higher_one_goes_on(run: RunDir) -> None:
    price = {"input": 1_000_000, "output": 1_000_000}  # a dollar a token: an answer costs 12
    with misbehaving(lambda asked: answer(delay_s=0.01)) as server:
        teacher = {"model": "stub", "base_url": server.url, "price": price}
        sections = {"teacher": teacher, "sampling": {"max_tokens": 10}}
        with pytest.raises(BudgetReached) as caught:
            generate(recipe_for(server, 100, budget={"usd": 700.0}, **sections), run, quiet=True)
        assert caught.value.exit_code == 3
        first = len(server.asked)
        assert 0 < 12 * first <= 700
        summary = generate(recipe_for(server, 100, budget={"usd": 2000.0}, **sections), run, quiet=True)
    assert (summary.completed, summary.answered, summary.cost_usd) == (100, 100 - first, 1200.0)
    assert json.loads(run.lineage.read_text())["generate"]["spent"] == {"tokens": 1200, "usd": 1200.0}


def test_a_token_budget_counts_what_a_lost_answer_may_have_cost(run: RunDir) -> None:
    with misbehaving(one_bad(raw(b"<html>", 200), times=1)) as server:
        summary = generate(recipe_for(server, budget={"tokens": 10**6}), run, quiet=True)
    assert summary.answered == 10
    spent = json.loads(run.lineage.read_text())["generate"]["spent"]["tokens"]
    assert spent > 10 * 12 + 500  # the answers, and one reservation in full


def test_a_budget_needs_a_price(run: RunDir) -> None:
    with pytest.raises(RecipeError, match=r"budget.usd is 5, but the price of stub is not known: set teacher.price"):
        generate(recipe_for("http://127.0.0.1:1/v1", budget={"usd": 5}), run, quiet=True)


@pytest.mark.parametrize("internal", [False, True])
def test_failures_of_an_internal_run_are_left_to_its_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], internal: bool
) -> None:
    """A judge's, for one: the stage tells of them with the keys that the user's recipe has."""
    with misbehaving(one_bad(error(400, "too long"))) as server:
        generate(recipe_for(server), RunDir(tmp_path / "run", internal=internal), quiet=True)
    assert ("too long" in capsys.readouterr().err) != internal


def test_answers_are_on_disk_while_the_run_goes_on(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut costs at most the last interval: the second answer waits until the first is on disk."""
    on_disk, sync = threading.Event(), os.fsync

    def note_sync(handle: int) -> None:
        sync(handle)
        if run.completions.stat().st_size and os.path.samestat(os.fstat(handle), run.completions.stat()):
            on_disk.set()

    monkeypatch.setattr(loop, "SYNC_INTERVAL_S", 0.01)
    monkeypatch.setattr(os, "fsync", note_sync)
    with misbehaving(lambda asked: answer() if asked.text == "say 0" else held_until(on_disk)) as server:
        assert generate(recipe_for(server, 2), run, quiet=True).answered == 2


@pytest.mark.timeout(20)
def test_tokens_that_an_answer_did_not_take_are_free_for_the_next(run: RunDir) -> None:
    """Estimates of 30,000 tokens, of which 12 are used; by the estimates the second request waits for five minutes."""
    config = {"tokens_per_minute": 6100, "concurrency": 1}
    with misbehaving() as server:
        recipe = recipe_for(server, 3, sampling={"max_tokens": 30_000}, generate=config)
        assert generate(recipe, run, quiet=True).answered == 3
