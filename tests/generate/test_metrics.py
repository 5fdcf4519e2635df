"""What a run tells Prometheus while it goes, and the dashboard that shows it."""

import json
import re
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from generate.__main__ import describe
from generate.metrics import METRICS
from generate.progress import Counters, EndpointCounts
from generate.run import generate
from pipeline.errors import DistillError
from pipeline.rundir import RunDir
from serve.server import free_port
from tests.servers.misbehaving_server import Asked, Behaviour, answer, error, misbehaving, recipe_for

pytestmark = pytest.mark.usefixtures("quick")

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"


def scrape(port: int) -> dict[tuple[str, ...], float]:
    """Values by name and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
        families = text_string_to_metric_families(reply.read().decode())
        return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}


def test_a_run_shows_requests_tokens_retries_and_cost(run: RunDir) -> None:
    seen: list[dict[tuple[str, ...], float]] = []
    port = free_port()

    busy: set[str] = set()  # asked once, of whichever server

    def either(asked: Asked) -> Behaviour:
        if asked.text == "say 3" and not busy:
            busy.add(asked.text)
            return error(503, "busy")
        return error(400, "not this one") if asked.text == "say 4" else answer(delay_s=0.02)

    def first(asked: Asked) -> Behaviour:
        if len(server.asked) == 60:
            seen.append(scrape(port))
        return either(asked)

    with misbehaving(first) as server, misbehaving(either) as second:
        price = {"input": 1000.0, "output": 1000.0}
        teacher = {"model": "stub", "base_url": [server.url, second.url], "price": price}
        config = {"concurrency": 2, "metrics_port": port}
        summary = generate(recipe_for(server, 200, teacher=teacher, generate=config), run, quiet=True)
    (now,) = seen
    asked = {one: now["distillate_requests_total", one, "answered"] for one in (server.url, second.url)}
    assert 20 < asked[server.url] < 60
    assert now["distillate_tokens_total", second.url, "completion"] == 5 * asked[second.url]
    assert now["distillate_tokens_total", server.url, "prompt"] == 7 * asked[server.url]
    assert now["distillate_in_flight_limit", server.url] == 2
    assert now["distillate_up", second.url] == 1
    assert now["distillate_run_requests", "answered"] == sum(asked.values())
    assert now["distillate_cost_usd",] >= 12 * sum(asked.values()) / 1000
    kinds = [counts.faults | counts.retries for counts in summary.endpoints.values()]
    assert {kind for one in kinds for kind in one} == {"server_error", "bad_request"}
    assert sum(counts.retries.get("server_error", 0) for counts in summary.endpoints.values()) == 1
    assert summary.answered == sum(counts.answered for counts in summary.endpoints.values()) == 199
    lines = describe(recipe_for(server, 200), run, summary)[2:]
    assert [line.partition(": ")[0] for line in sorted(lines)] == sorted((server.url, second.url))
    with pytest.raises(OSError, match="refused"):
        scrape(port)  # the run is over
    names = {name for name, *_ in now}
    board = DASHBOARD.read_text(encoding="utf-8")
    shown = set(re.findall(r"distillate_\w+", board))
    assert {name.removesuffix("_total") for name in shown} == {f"distillate_{name}" for name, *_ in METRICS}
    assert shown - names <= {"distillate_retries_total"}  # there was none when it was asked
    assert len({panel["id"] for panel in json.loads(board)["panels"]}) == len(json.loads(board)["panels"])


def test_a_port_that_is_taken_is_one_clear_error(run: RunDir) -> None:
    with misbehaving() as server:
        port = int(server.url.rpartition(":")[2].removesuffix("/v1"))
        recipe = recipe_for(server, 5, generate={"metrics_port": port})
        with pytest.raises(DistillError, match=rf"generate\.metrics_port: 127\.0\.0\.1:{port}: .*choose another"):
            generate(recipe, run, quiet=True)
        assert server.asked == []


def test_processes_are_summed_by_endpoint() -> None:
    one, two, whole = Counters(), Counters(), Counters()
    one.endpoints = {"a": EndpointCounts(answered=3, faults={"timeout": 1}, limit=4), "b": EndpointCounts(answered=1)}
    two.endpoints = {"a": EndpointCounts(answered=2, faults={"timeout": 1, "reset": 1}, limit=4, up=False)}
    for _ in range(2):  # each snapshot replaces the one before
        whole.gather([json.loads(json.dumps(part.snapshot())) for part in (one, two)])
    found = whole.by_endpoint()
    assert found["a"] == EndpointCounts(answered=5, faults={"timeout": 2, "reset": 1}, limit=8, up=False)
    assert found["b"].answered == 1


@pytest.mark.parametrize("others", [(True, True), (True, False), (False, False)])
def test_an_endpoint_is_up_where_it_is_so_for_all_who_still_ask_it(others: tuple[bool, bool]) -> None:
    whole, gone = Counters(), EndpointCounts(answered=3, up=False)
    asking = [EndpointCounts(answered=1, limit=4, up=up) for up in others]
    for order in ([gone, *asking], [*asking, gone]):
        whole.gather([Counters(endpoints={"a": one}).snapshot() for one in order])
        assert whole.by_endpoint()["a"] == EndpointCounts(answered=5, limit=8, up=all(others))
    whole.gather([Counters(endpoints={"a": gone}).snapshot() for _ in range(2)])
    assert whole.by_endpoint()["a"] == EndpointCounts(answered=6, up=False)


@pytest.fixture
def run(quick: None, tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")
