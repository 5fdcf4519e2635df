"""Concurrency that finds itself, against small models of servers."""

from dataclasses import dataclass

import pytest

from generate.concurrency import START, ByQueue, Load, read_load


@dataclass
class Server:
    """So many slots; the rest waits. Every request takes a second."""

    slots: int
    lag: int = 0  # requests sent that its numbers do not show yet

    def load(self, in_flight: int) -> Load:
        seen = in_flight - self.lag
        return Load(running=min(seen, self.slots), waiting=max(0, seen - self.slots))


@pytest.mark.parametrize("slots", [4, 64, 256, 2048])
@pytest.mark.parametrize("start", [1, 256, 4000])
def test_the_queue_is_kept_short_and_the_batch_full(slots: int, start: int) -> None:
    server, concurrency = Server(slots), ByQueue(start)
    in_flight = 0
    for _ in range(60):
        # Those over the limit end by and by; there is always another request to send.
        in_flight = max(concurrency.limit, in_flight - slots // 2 - 1)
        concurrency.observed(server.load(in_flight), in_flight)
    assert slots < concurrency.limit <= slots + max(8, 0.17 * slots)


def test_what_the_server_does_not_show_yet_is_no_reason_for_more() -> None:
    concurrency = ByQueue(100)
    concurrency.observed(Server(1000, lag=50).load(100), 100)
    assert concurrency.limit == 100


def test_it_does_not_double_while_requests_still_arrive() -> None:
    """Else it doubles just before the queue shows, and as many again pile up there."""
    concurrency = ByQueue(276)
    for seen in (100, 240, 256):
        concurrency.observed(Load(running=seen, waiting=0), 276)
        assert concurrency.limit == 276
    concurrency.observed(Load(running=256, waiting=20), 276)
    assert concurrency.limit == 276
    idle = ByQueue(276)
    idle.observed(Load(running=276, waiting=0), 276)
    assert idle.limit >= 2 * 276


@pytest.mark.parametrize(("fraction", "limit"), [(1.0, 111), (0.5, 55)])
def test_a_queue_that_is_too_short_is_made_good_and_no_more(fraction: float, limit: int) -> None:
    """7.8 should wait, 2 do: 6 more than the 105 that run and wait at most, or this process's half of it."""
    concurrency = ByQueue(int(100 * fraction), fraction)
    concurrency.observed(Load(running=98, waiting=2), int(100 * fraction))
    assert concurrency.limit == limit


def test_requests_that_run_out_are_no_reason_for_more() -> None:
    concurrency = ByQueue(100)
    concurrency.observed(Server(1000).load(40), 40)
    assert concurrency.limit == 100


def test_a_full_cache_stops_the_climb_and_preemption_turns_it() -> None:
    concurrency = ByQueue(100)
    concurrency.observed(Load(running=100, waiting=0, kv_used=0.99), 100)
    assert concurrency.limit == 100
    concurrency.observed(Load(running=80, waiting=20, kv_used=1.0, preempted=3), 100)
    concurrency.observed(Load(running=80, waiting=20, kv_used=1.0, preempted=9), 100)
    assert concurrency.limit < 100
    climbing = ByQueue(100)
    climbing.observed(Load(running=100, waiting=0, preempted=3), 100)
    assert climbing.limit == 216
    climbing.observed(Load(running=216, waiting=0, preempted=9), 216)
    assert climbing.limit == 233  # what runs, and its queue: it doubles no more


def test_a_queue_of_a_moment_closes_no_slot() -> None:
    """Before the first step all of them wait; where 64 answers end in one step, 64 others wait for the next."""
    concurrency = ByQueue(256)
    concurrency.observed(Load(running=3, waiting=253), 256)
    concurrency.observed(Load(running=64, waiting=192), 256)
    assert 64 <= concurrency.limit <= 72
    concurrency.observed(Load(running=2, waiting=62), 64)
    assert 64 <= concurrency.limit <= 72


def test_what_refuses_requests_is_not_asked_for_as_many_again() -> None:
    concurrency = ByQueue(100)
    concurrency.observed(Load(running=92, waiting=8), 100)
    concurrency.congested(sent=0.0, now=0.0, overloaded=True)
    concurrency.observed(Load(running=92, waiting=8), 100)
    assert concurrency.limit == 70
    concurrency.observed(Load(running=70, waiting=0), 70)
    assert concurrency.limit == 87  # a quarter more: it doubles no more


def test_processes_that_share_a_server_divide_what_is_missing() -> None:
    first, second, server = ByQueue(50, 0.5), ByQueue(50, 0.5), Server(512)
    for _ in range(60):
        in_flight = first.limit + second.limit
        for concurrency in (first, second):
            concurrency.observed(server.load(in_flight), concurrency.limit)
    assert 512 < first.limit + second.limit <= 512 * 1.17


def test_another_number_of_processes_divides_the_limit_anew() -> None:
    concurrency = ByQueue(100, 0.5)
    concurrency.share(0.25)
    assert concurrency.limit == 50
    concurrency.observed(Load(running=60, waiting=44), 50)
    assert concurrency.limit == 40  # 4.8 should wait, and a quarter of the other 39.2 is its own
    concurrency.share(1.0)
    assert concurrency.limit == 160
    concurrency.share(0.001)
    assert concurrency.limit == 1


def test_the_lowest_number_rises_again() -> None:
    concurrency = ByQueue(2)
    concurrency.congested(sent=0.0, now=1.0, overloaded=True)
    assert concurrency.limit == 1
    concurrency.observed(Load(running=1, waiting=0), 1)
    assert concurrency.limit == 2


def test_looks_are_as_quick_as_the_queue_moves_and_seldom_once_it_is_steady() -> None:
    concurrency = ByQueue(64)
    assert concurrency.look_s == 0.03  # it doubles, and every look costs an idle engine its time
    concurrency.observed(Load(running=64, waiting=40), 104)
    assert concurrency.look_s == 0.1
    for _ in range(100):
        concurrency.answered(48, 12.0, 64, 0.0)  # a slow server: half of its queue (8%) drains in 4% of 12 s
    assert concurrency.look_s == pytest.approx(0.48, rel=0.01)
    for _ in range(20):
        concurrency.observed(Load(running=64, waiting=6), 70)
    assert concurrency.look_s == 5.0
    concurrency.observed(Load(running=100, waiting=0), 100)  # there is room for more
    assert concurrency.look_s < 0.5
    for _ in range(2000):  # some hours
        concurrency.observed(None, 100)  # it says nothing
    assert concurrency.look_s == 5.0


def test_it_never_falls_below_one() -> None:
    concurrency = ByQueue(START)
    for moment in range(100):
        concurrency.congested(1000.0 * moment, 1000.0 * moment, overloaded=False)
    assert concurrency.limit == 1


METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 12.0
vllm:num_requests_running{engine="1",model_name="m"} 3.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 5.0
vllm:num_requests_waiting{engine="1",model_name="m"} 0.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 5.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 1e-1
vllm:num_preemptions_total{engine="0",model_name="m"} 2.0
"""


def test_a_load_is_summed_over_engines_and_a_clogged_one_told_apart() -> None:
    assert read_load(METRICS) == Load(running=15, waiting=5, kv_used=0.1, preempted=2, engines=2, clogged=5)


def ranks(*running_waiting_kv: tuple[int, int, float]) -> Load:
    names = "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"
    lines = [
        f'vllm:{name}{{engine="{rank}"}} {value}'
        for rank, values in enumerate(running_waiting_kv)
        for name, value in zip(names, values, strict=True)
    ]
    load = read_load("\n".join(lines))
    assert load
    return load


@pytest.mark.parametrize("others", [1, 7])
def test_a_clogged_rank_does_not_stop_the_growth_of_the_others(others: int) -> None:
    """vllm#48808: one rank had a long queue and a full cache, while the others had room."""
    concurrency = ByQueue(200 + 32 * others)
    load = ranks((32, 168, 1.0), *[(32, 0, 0.2)] * others)
    concurrency.observed(load, 200 + 32 * others)
    assert concurrency.limit > 200 + 32 * others
    full = ByQueue(800)
    full.observed(ranks(*[(60, 40, 0.5)] * 8), 800)
    assert full.limit < 800  # all of them have a queue


@pytest.mark.parametrize("text", ["", "<html>", "up 1", "vllm:num_requests_running 3", "vllm:num_requests_waiting 3"])
def test_a_server_that_shows_no_queue(text: str) -> None:
    assert read_load(text) is None
