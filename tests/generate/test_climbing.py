"""`auto` on servers that show no queue, against small models of them."""

import random

import pytest

from generate.climbing import ByClimbing
from generate.concurrency import START


def climb(concurrency: ByClimbing, slots: int, answers: int, now: float = 0.0, seed: int = 0) -> float:
    """Answers from a server of so many slots: its rate rises with the number in flight up to them."""
    rng = random.Random(seed)
    for _ in range(answers):
        in_flight = concurrency.limit
        busy = min(in_flight, slots)
        now += rng.expovariate(busy / 10.0)  # each takes ten seconds, and what waits for a slot longer
        concurrency.answered(rng.randint(50, 150), 10.0 * in_flight / busy, in_flight, now)
    return now


@pytest.mark.parametrize("slots", [16, 100, 150, 900])
def test_without_a_queue_to_look_at_it_climbs_to_where_throughput_ends(slots: int) -> None:
    concurrency = ByClimbing(START)
    climb(concurrency, slots, 60_000)
    assert 0.8 * slots <= concurrency.limit <= max(1.4 * slots, 1.6 * START)


def test_near_the_best_number_a_tenth_more_and_a_tenth_less_are_tried_in_turn() -> None:
    """On 100 slots, round by round: doubled, and once more in doubt; then as low as throughput does not fall."""
    concurrency, now, limits = ByClimbing(START), 0.0, []
    for number in range(21):
        limits.append(limit := concurrency.limit)
        latency_s = 10.0 * max(limit / 100, 1.0)
        now += latency_s + 1.0
        for _ in range(limit // 2 if number < 4 else 1024):
            concurrency.answered(100, latency_s, limit, now)
    assert limits[:8] == [64, 128, 256, 256, 140, 154, 140, 126]
    assert limits[8:] == [126, 139, 126, 113, 113, 124, 113, 102, 102, 112, 102, 92, 102]


def test_a_number_that_was_never_in_flight_is_not_judged() -> None:
    """A rate limit that is told keeps requests back: what they bring is no sign that more would bring nothing."""
    concurrency = ByClimbing(START)
    for second in range(1000):
        concurrency.answered(100, 10.0, START // 2, float(second))
    assert concurrency.limit == START
    climb(concurrency, 10_000, 2 * START, 1000.0)  # the rate was raised
    assert concurrency.limit > START


def refused(concurrency: ByClimbing, answers: int, at: float, refusals: int = 3, *, overloaded: bool = False) -> None:
    """An episode of some ten seconds, in which so many requests are answered, then so many refused; then it goes on.

    So few are in flight that the answers say nothing about the number.
    """
    concurrency.sending(1, at)
    for _ in range(answers):
        concurrency.answered(100, 10.0, 1, at + 10.0)
    for _ in range(refusals):
        concurrency.congested(at, at + 10.0, overloaded=overloaded)
    concurrency.sending(1, at + 10.5)


@pytest.mark.parametrize(("slots", "least", "most"), [(10_000, 1000, 4096), (16, 40, 110)])
def test_a_first_refusal_is_no_ceiling(slots: int, least: int, most: int) -> None:
    """A burst was too much: it climbs on as at the start, so an endless queue that brings nothing is not filled."""
    concurrency = ByClimbing(START)
    concurrency.sending(1, 1.0)
    for _ in range(START):
        concurrency.congested(1.0, 1.1, overloaded=False)
    concurrency.sending(1, 2.0)
    assert concurrency.limit == 45  # 70% of 64, rounded up
    climb(concurrency, slots, 15 * START + 3 * 1024, 2.0)
    assert least <= concurrency.limit <= most


def test_it_goes_back_by_halves_to_what_was_refused_and_climbs_anew_beyond_it() -> None:
    concurrency = ByClimbing(100)
    refused(concurrency, 100, 1.0, overloaded=True)
    for _ in range(200):
        concurrency.answered(100, 10.0, 1, 13.0)  # they were sent before the cut
    limits, now = [concurrency.limit], 11.5
    for _ in range(9):
        now += 10.0
        for _ in range(concurrency.limit):
            concurrency.answered(100, 10.0, concurrency.limit, now)
        limits.append(concurrency.limit)
    # 70%, half of the way to 100 twice, then 5% more each round; beyond 120% nothing says that it is too much.
    assert limits == [70, 85, 93, 98, 102, 108, 113, 119, 124, 124]
    climb(concurrency, 10_000, 1000, now)
    assert concurrency.limit > 200


def test_after_a_refusal_requests_go_out_evenly() -> None:
    concurrency = ByClimbing(START)
    for _ in range(START):
        concurrency.sending(1, 1.0)
        assert concurrency.delay(1.0) == 0.0
    for _ in range(20):
        concurrency.answered(100, 10.0, START, 11.0)
    concurrency.congested(1.0, 11.0, overloaded=False)
    concurrency.sending(1, 12.0)
    gap_s = 10.0 / (1.25 * 0.7 * START)  # 44.8 in flight, each for ten seconds, and a quarter more
    concurrency.sending(1, 12.0)
    assert concurrency.delay(12.0) == pytest.approx(gap_s - 0.01)  # ten milliseconds may be made good
    concurrency.sending(4, 12.0)
    assert concurrency.delay(12.0) == pytest.approx(5 * gap_s - 0.01)  # for four answers: four times as long
    assert concurrency.delay(13.0) == 0.0


def test_refusals_of_one_episode_are_one_cut() -> None:
    """64 refusals before any answer: it fell to 1."""
    concurrency = ByClimbing(START)
    for at, least in ((1.0, 45), (2.0, 32)):  # 44.8 and 31.36, rounded up
        concurrency.sending(1, at)
        for _ in range(START):
            concurrency.congested(at, at + 0.3, overloaded=False)
        assert concurrency.limit == {45: START, 32: 45}[least]  # it moves once the next request goes out
        concurrency.sending(1, at + 0.5)
        assert concurrency.limit == least
        concurrency.congested(at, at + 0.6, overloaded=False)  # it was sent before the cut
        concurrency.sending(1, at + 0.7)
        assert concurrency.limit == least


def test_a_cut_that_cost_answers_is_undone_and_one_that_did_not_stands() -> None:
    proportional, limited = ByClimbing(100), ByClimbing(100)
    for concurrency, answers in ((proportional, (100, 70, 46)), (limited, (100, 40, 40))):
        for number, count in enumerate(answers):
            refused(concurrency, count, 1.0 + 20.0 * number, refusals=count // 2)
    # The first is no ceiling (70); the second is the number that cuts are judged by (49); the third judges.
    assert proportional.limit == 140
    assert limited.limit == 35  # 70% of 49, rounded up
    refused(proportional, 130, 61.0, refusals=65)
    assert proportional.limit == 280  # that brought more, so it rises on


def test_a_rise_that_won_nothing_is_taken_back_and_stands_unless_most_are_refused() -> None:
    concurrency = ByClimbing(100)
    limits = []
    for number, (answers, refusals) in enumerate([(100, 50), (70, 35), (46, 23), (50, 25), (30, 15), (10, 20)]):
        refused(concurrency, answers, 1.0 + 11.0 * number, refusals)
        limits.append(concurrency.limit)
    # 50 answers are no fifth more than 46, so it is at 49 again; there a third refused cut nothing, but two thirds do.
    assert limits == [70, 49, 140, 49, 49, 35]


def test_a_number_that_stands_after_a_rise_that_won_nothing_does_so_for_a_minute() -> None:
    concurrency = ByClimbing(100)
    for number, (answers, refusals) in enumerate([(100, 50), (70, 35), (46, 23), (50, 25)]):
        refused(concurrency, answers, 1.0 + 11.0 * number, refusals)
    for now, least in ((60.0, 49), (104.0, 49), (105.0, 50)):  # the rise was taken back after 44.5 s
        for _ in range(60):
            concurrency.answered(100, 10.0, 1, now)
        assert (concurrency.limit > 49) == (least > 49)


@pytest.mark.parametrize(("refusals", "then"), [(17, 58), (18, 48)])  # of 67.99 85%, and 70%
def test_where_few_are_refused_at_the_same_number_the_cut_is_small(refusals: int, then: int) -> None:
    concurrency = ByClimbing(100)
    refused(concurrency, 100, 1.0)
    refused(concurrency, 70, 21.0, refusals=35)  # at 70, so 49 are in flight
    for now, in_flight in ((50.0, 60), (60.0, 65)):
        for _ in range(concurrency.limit):
            concurrency.answered(100, 10.0, 1, now)
        assert concurrency.limit == in_flight  # 59.5 and 64.75
    refused(concurrency, 68, 70.0, refusals)  # its answers end a round: 67.99; up to a tenth of 49 + 60 + 68 are few
    assert concurrency.limit == then


def test_a_cut_is_judged_by_what_the_number_brought_when_it_was_last_refused() -> None:
    concurrency = ByClimbing(100)
    refused(concurrency, 100, 1.0)
    refused(concurrency, 70, 12.0, refusals=35)  # at 70: 6.4 answers a second
    for now in (50.0, 60.0):
        for _ in range(concurrency.limit):
            concurrency.answered(100, 10.0, 1, now)
    refused(concurrency, 68, 70.0, refusals=18)  # at 68: 3.1 a second, as the server is slower now
    assert concurrency.limit == 48
    refused(concurrency, 47, 81.0, refusals=30)  # 4.3 a second: the cut has cost none
    assert concurrency.limit == 34


@pytest.mark.parametrize(("refusals", "then"), [(70, 70), (71, 35)])
def test_a_cut_waits_for_an_answers_time_unless_most_are_refused(refusals: int, then: int) -> None:
    """Of 70 that may be in flight and 71 refused more than half are, whatever the answers will be."""
    concurrency = ByClimbing(100)
    refused(concurrency, 100, 1.0)
    assert concurrency.limit == 70
    for _ in range(refusals):
        concurrency.congested(11.5, 11.6, overloaded=False)
    concurrency.sending(1, 11.7)
    assert concurrency.limit == then


def test_rare_refusals_do_not_end_the_climb() -> None:
    """As long as more in flight bring more: each thirtieth request is refused, whatever is in flight."""
    concurrency = ByClimbing(100)
    refused(concurrency, 100, 1.0)
    assert concurrency.limit == 70
    refused(concurrency, 90, 21.0)
    assert concurrency.limit == 70


def test_it_never_falls_below_one() -> None:
    concurrency = ByClimbing(START)
    for moment in range(100):
        refused(concurrency, 0, 1000.0 * (moment + 1))
    assert concurrency.limit == 1
