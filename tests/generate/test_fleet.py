"""Which endpoint a request goes to, and servers that come and go while requests go out."""

import asyncio
import random
import threading
from collections import Counter
from contextlib import ExitStack
from math import inf
from pathlib import Path
from socket import AF_INET, AF_INET6

import pytest
from tenacity import wait_fixed

from generate.context import opened_run
from generate.endpoint import Endpoint
from generate.fleet import FEW, Fleet
from generate.jobs import WHOLE, Partition
from generate.progress import Counters
from generate.run import generate
from generate.servers import opened_loop
from generate.targets import Target, read_urls
from pipeline.errors import DistillError, RecipeError
from pipeline.rundir import RunDir
from tests.servers.misbehaving_server import (
    MODEL,
    Asked,
    Behaviour,
    answer,
    completions,
    error,
    misbehaving,
    recipe_for,
)


class Place:
    """An endpoint with so much room."""

    def __init__(self, limit: int) -> None:
        self.limit, self.in_flight, self.looks, self.wait_s = limit, 0, 0, 0.0
        self.down_since: float | None = None
        self.most, self.weight = 0, 1.0

    def ready_in(self, tokens: int, choices: int, now: float) -> float:
        self.looks += 1
        return inf if self.in_flight >= self.limit else self.wait_s


def fleet_of(*places: Place) -> Fleet:
    return Fleet(places)  # type: ignore[arg-type]


def test_of_a_few_the_least_full_one_gets_the_request() -> None:
    large, small = Place(100), Place(10)
    large.in_flight, small.in_flight = 30, 4
    assert fleet_of(small, large).pick(1, 0.0)[0] is large
    large.in_flight = 50
    assert fleet_of(small, large).pick(1, 0.0)[0] is small


@pytest.mark.parametrize("count", [2, 512])
def test_all_are_filled_and_the_looks_for_a_request_stay_few(count: int) -> None:
    random.seed(1)  # one draw in 300 is less even
    places = [Place(16) for _ in range(count)]
    fleet = fleet_of(*places)
    picks = 16 * count
    for number in range(picks):
        place, _ = fleet.pick(1, 0.0)
        assert place
        place.in_flight += 1
        if number == picks // 2:
            used = [one.in_flight for one in places]
            assert max(used) - min(used) <= 8
    assert fleet.pick(1, 0.0) == (None, inf)
    assert all(place.in_flight == 16 for place in places)
    assert sum(place.looks for place in places) <= (FEW + 1) * picks / (4 if count > FEW else 1)
    looks = sum(place.looks for place in places)
    for place in places:  # a reply makes room at one of them: nobody looks at the others
        place.in_flight -= 1
        fleet.reopen(place)  # type: ignore[arg-type]
        assert fleet.pick(1, 0.0)[0] is place
        place.in_flight += 1
        assert fleet.pick(1, 0.0) == (None, inf)
    assert sum(place.looks for place in places) - looks <= 2 * count


def test_an_endpoint_that_must_wait_is_back_when_its_time_has_come() -> None:
    slow, slower = Place(8), Place(8)
    slow.wait_s, slower.wait_s = 2.0, 5.0
    fleet = fleet_of(slow, slower)
    assert fleet.pick(1, 10.0) == (None, 2.0)
    assert fleet.pick(1, 11.0) == (None, 1.0)
    slow.wait_s = 0.0
    assert fleet.pick(1, 12.0)[0] is slow
    fleet.remove(slow)  # type: ignore[arg-type]
    fleet.reopen(slow)  # type: ignore[arg-type]
    assert fleet.pick(1, 12.0) == (None, 3.0)


def test_of_many_each_gets_its_share_of_the_requests_by_its_limit_and_of_the_connections_by_its_weight() -> None:
    heavy, light = [Place(400) for _ in range(8)], [Place(50) for _ in range(56)]
    for place in heavy:
        place.weight = 8.0
    fleet = Fleet([*heavy, *light], most=1200)  # type: ignore[arg-type]
    assert ({place.most for place in heavy}, {place.most for place in light}) == ({80}, {10})
    for _ in range(3000):  # half of their room
        place, _ = fleet.pick(1, 0.0)
        assert place
        place.in_flight += 1
    assert sum(place.in_flight for place in heavy) == pytest.approx(3000 * 64 / 120, rel=0.05)
    assert max(place.in_flight for place in light) <= 35


@pytest.fixture
def run(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setattr("generate.servers.FOLLOW_S", 0.05)
    monkeypatch.setattr("generate.verdict.PROBE_WAIT", wait_fixed(0.05))
    return RunDir(tmp_path / "run")


def test_a_file_of_servers_is_followed_while_the_run_goes(run: RunDir, tmp_path: Path) -> None:
    """The first server goes away and another one comes, at another address; nothing is lost."""
    urls, moved = tmp_path / "servers.txt", threading.Event()

    def leaving(asked: Asked) -> Behaviour:
        if len(first.asked) == 20:
            urls.write_text(f"# started again elsewhere\n{second.url}/\n")
            moved.set()
        return answer(delay_s=0.02)

    with misbehaving(leaving) as first, misbehaving(lambda asked: answer(delay_s=0.02)) as second:
        urls.write_text(first.url + "\n")
        teacher = {"model": "stub", "base_url": "http://cluster/v1", "urls_file": urls}
        summary = generate(recipe_for(first, 400, teacher=teacher), run, quiet=True)
    assert moved.is_set()
    assert (summary.answered, summary.failed) == (400, 0)
    asked = Counter(record.endpoint for record in completions(run))
    assert asked[first.url] + asked[second.url] == 400
    assert asked[second.url] > 200
    moved_recipe = recipe_for("http://cluster/v1", 400, teacher={"model": "stub", "base_url": "http://cluster/v1"})
    urls.unlink()
    assert generate(moved_recipe, run, quiet=True).resumed == 400  # base_url is the name in the ids


def test_a_file_that_cannot_be_read_is_an_error_first_and_a_warning_later(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    urls = tmp_path / "servers.txt"
    recipe = recipe_for("x", 40, teacher={"model": "stub", "urls_file": urls})
    for words, said in ((None, "No such file"), ("\n# none\n", "holds no URL"), ("gpu-7:8000", "is no URL")):
        if words is not None:
            urls.write_text(words)
        with pytest.raises(RecipeError, match=rf"teacher\.urls_file .*servers\.txt.*{said}"):
            generate(recipe, run, quiet=True)

    def script(asked: Asked) -> Behaviour:
        urls.write_text("")  # as somebody who does not replace it as a whole
        return answer(delay_s=0.1)

    with misbehaving(script) as server:
        urls.write_text(server.url)
        assert generate(recipe, run, quiet=True).answered == 40
    assert capsys.readouterr().err.count("holds no URL") == 1


def test_a_private_name_with_several_addresses_is_several_endpoints(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a headless service: the second server comes later, under the same name."""
    addresses = ["127.0.0.2", "127.0.0.9"]  # nobody answers at the second

    def look_up(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        found = [(AF_INET, 1, 6, "", (address, port)) for address in addresses]
        return [(AF_INET6, 1, 6, "", ("::1", port, 0, 0)), *found]

    monkeypatch.setattr("generate.targets.getaddrinfo", look_up)
    hosts = set[str]()

    def script(asked: Asked) -> Behaviour:
        hosts.add(asked.headers["Host"])
        addresses[1] = "127.0.0.3"
        return answer(delay_s=0.02)

    with misbehaving(script, host="127.0.0.2") as first:
        port = int(first.url.rpartition(":")[2].removesuffix("/v1"))
        with misbehaving(script, host="127.0.0.3", port=port) as second:
            url = f"http://teacher.internal:{port}/v1"
            recipe = recipe_for(url, 400, generate={"concurrency": 4})
            summary = generate(recipe, run, quiet=True)
    assert summary.answered == 400
    assert min(len(first.asked), len(second.asked)) > 50
    assert max(first.most_at_once, second.most_at_once) <= 4
    assert hosts == {f"teacher.internal:{port}"}
    assert {record.endpoint for record in completions(run)} == {url}


@pytest.mark.parametrize("address", ["93.184.216.34", "127.0.0.9"])
async def test_a_public_name_stays_one_endpoint(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from generate.targets import Target, find_targets

    found = [(AF_INET, 1, 6, "", (one, 80)) for one in (address, "127.0.0.8")]
    monkeypatch.setattr("generate.targets.getaddrinfo", lambda host, port, **_: found)
    teacher = recipe_for("http://api.example.com/v1").teacher
    expected = [None] if address.startswith("93") else ["127.0.0.8", "127.0.0.9"]
    assert await find_targets(teacher) == [Target(teacher.url, one) for one in expected]


@pytest.mark.parametrize("concurrency", [4, "auto"])
def test_requests_follow_the_weights_of_the_servers(concurrency: int | str, run: RunDir) -> None:
    """Of `auto`, what it begins with: nobody has answered when the last request goes out."""
    count, slow = (700, 0.02) if concurrency == 4 else (210, 1.0)
    with ExitStack() as stack:
        servers = [stack.enter_context(misbehaving(lambda asked: answer(delay_s=slow))) for _ in range(3)]
        weighted = [f"{server.url} {weight}" for server, weight in zip(servers, (4, 2.0, 1), strict=True)]
        teacher = {"model": "stub", "base_url": weighted}
        recipe = recipe_for("x", count, teacher=teacher, generate={"concurrency": concurrency})
        assert recipe.teacher.urls == [server.url for server in servers]
        assert generate(recipe, run, quiet=True).answered == count
        shares = [len(server.asked) / count for server in servers]
        assert shares == pytest.approx([4 / 7, 2 / 7, 1 / 7], abs=0.07)
        if concurrency == 4:
            assert all(server.most_at_once <= most for server, most in zip(servers, (16, 8, 4), strict=True))
        alike = recipe_for("x", count, teacher={**teacher, "base_url": [server.url for server in servers]})
        assert generate(alike, run, quiet=True).resumed == count  # weights are no part of an id


async def test_a_weight_multiplies_what_the_recipe_allows_an_endpoint() -> None:
    limits = {"concurrency": 10, "requests_per_minute": 60.0, "tokens_per_minute": 6000.0}
    target = Target("http://a/v1", weight=2.5)
    half = Endpoint(recipe_for(target.url, generate=limits), target, Partition(0, 2), print)
    assert half.limit == 13  # 25, over two processes
    assert [bucket.per_minute for bucket in half.limits._buckets.values()] == [75.0, 7500.0]
    half.share(2)
    assert half.limit == 13  # as before
    half.share(5)
    assert half.limit == 5
    assert [bucket.per_minute for bucket in half.limits._buckets.values()] == [30.0, 3000.0]
    half.share(1)
    assert half.limit == 25
    assert [bucket.per_minute for bucket in half.limits._buckets.values()] == [150.0, 15_000.0]
    await half.client.__aexit__()
    last = Endpoint(recipe_for(target.url, generate={"concurrency": 2}), Target("http://a/v1"), Partition(3, 4), print)
    assert last.limit == 1  # else it would wait for ever
    await last.client.__aexit__()


async def test_as_many_answers_are_in_flight_as_the_number_says() -> None:
    url = "http://127.0.0.1:1/v1"
    endpoint = Endpoint(recipe_for(url, generate={"concurrency": 4}), Target(url), WHOLE, print)
    assert endpoint.ready_in(1, 9, 0.0) == 0  # a request for more goes out alone
    for _ in range(3):
        endpoint.begin(1, 1, 0.0)
    assert [endpoint.ready_in(1, choices, 0.0) for choices in (1, 2)] == [0, inf]
    endpoint.begin(1, 1, 0.0)
    assert endpoint.ready_in(1, 1, 0.0) == inf
    endpoint.ended(2, 0.0)
    assert [endpoint.ready_in(1, choices, 0.0) for choices in (2, 3)] == [0, inf]
    await endpoint.client.__aexit__()


def test_the_file_of_servers_has_weights_and_another_one_is_followed(run: RunDir, tmp_path: Path) -> None:
    urls = tmp_path / "servers.txt"

    def turned(asked: Asked) -> Behaviour:
        if len(first.asked) + len(second.asked) == 100:
            urls.write_text(f"{first.url}\n{second.url} 9\n")
        return answer(delay_s=0.02)

    with misbehaving(turned) as first, misbehaving(turned) as second:
        urls.write_text(f"{first.url}\t9\n{second.url}/\n")
        teacher = {"model": "stub", "urls_file": urls}
        assert generate(recipe_for("x", 600, teacher=teacher, generate={"concurrency": 2}), run, quiet=True).answered
        order = [record.endpoint for record in completions(run)]
    assert order[:80].count(first.url) > 60
    assert order[-200:].count(second.url) > 150


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "8000", "4 more", "four"])
def test_a_weight_that_is_none_is_named_with_its_server(weight: str, tmp_path: Path) -> None:
    urls = tmp_path / "servers.txt"
    urls.write_text(f"http://10.0.0.1/v1\nhttp://10.0.0.2/v1 {weight}\n")
    with pytest.raises(RecipeError, match=rf"urls_file .*servers\.txt: http://10\.0\.0\.2/v1: .* not '{weight}'"):
        read_urls(urls)


def test_a_server_has_one_weight(tmp_path: Path) -> None:
    urls = tmp_path / "servers.txt"
    urls.write_text("http://10.0.0.1/v1 2\nhttp://10.0.0.1/v1/ 2\n", encoding="utf-8-sig")  # a byte order mark
    assert read_urls(urls) == {"http://10.0.0.1/v1": 2.0}
    urls.write_text("http://10.0.0.1/v1 2\nhttp://10.0.0.1/v1\n")
    with pytest.raises(RecipeError, match="has two weights, 2 and 1"):
        read_urls(urls)


async def test_servers_that_are_taken_away_while_they_are_opened_are_not_asked(run: RunDir) -> None:
    """As a worker on a cluster is led."""
    run.path.mkdir()
    with (
        misbehaving() as first,
        misbehaving() as second,
        misbehaving() as third,
        opened_run(recipe_for(first), run, Counters(), say=print, show=lambda: None) as call,
    ):
        async with opened_loop(call, iter(())) as (_, servers):
            opening = asyncio.create_task(servers.change([Target(first.url), Target(second.url)]))
            await asyncio.sleep(0)
            servers.lead_to({third.url: 1.0}, {third.url: 2})
            await opening
            assert servers.fleet.endpoints == []
            following = asyncio.create_task(servers.follow())
            while not servers.fleet.endpoints:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            assert [(one.url, one.limit) for one in servers.fleet.endpoints] == [(third.url, 4)]
            following.cancel()


async def test_the_queues_of_the_servers_there_are_now_are_followed(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ended = list[str](), list[str]()

    async def watch(endpoint: Endpoint, changed: object) -> None:
        begun.append(endpoint.url)
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(endpoint.url)

    monkeypatch.setattr(Endpoint, "watch", watch)
    run.path.mkdir()
    with (
        misbehaving() as first,
        misbehaving() as second,
        opened_run(recipe_for(first), run, Counters(), say=print, show=lambda: None) as call,
    ):
        async with opened_loop(call, iter(())) as (_, servers):
            watching = asyncio.create_task(servers.watch())
            await servers.change([Target(first.url), Target(second.url)])
            await servers.change([Target(second.url)])
            await asyncio.sleep(0)
            assert (begun, ended) == ([first.url, second.url], [first.url])
            watching.cancel()


def test_a_look_at_a_queue_that_breaks_ends_the_run(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    async def watch(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Endpoint, "watch", watch)
    with misbehaving(lambda _: answer(delay_s=3600)) as server, pytest.raises(ExceptionGroup, match="unhandled"):
        generate(recipe_for(server, 5), run, quiet=True)


@pytest.mark.parametrize("status", [401, 404, 302])
def test_one_endpoint_that_is_set_up_anew_is_probed_while_the_others_answer(
    status: int, run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run ends only when all of them answer like that."""
    monkeypatch.setattr("generate.verdict.PROBE_WAIT", wait_fixed(0.01))
    asked = list[Asked]()

    def anew(request: Asked) -> Behaviour:
        asked.append(request)
        return error(status, "not here") if 5 <= len(asked) < 30 else answer(delay_s=0.02)

    with misbehaving(anew) as first, misbehaving(lambda _: answer(delay_s=0.02)) as second:
        recipe = recipe_for(first, 300, teacher={"model": MODEL, "base_url": [first.url, second.url]})
        summary = generate(recipe, run, quiet=False)
        told = capsys.readouterr().err
    assert (summary.answered, summary.failed) == (300, 0)
    assert "is down (" in told and "answers again" in told
    with misbehaving(lambda _: error(status)) as first, misbehaving(lambda _: error(status)) as second:
        recipe = recipe_for(first, 20, teacher={"model": MODEL, "base_url": [first.url, second.url]})
        with pytest.raises(DistillError, match=str(status) if status != 302 else "redirects"):
            generate(recipe, RunDir(run.path / "other"), quiet=True)
