"""Rate limits: what may go out when, what headers teach, and what a duration means."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from generate.limits import Limits, TokenBucket, seconds_of


def test_a_bucket_lets_a_second_s_worth_go_and_then_the_rate() -> None:
    bucket = TokenBucket(61 * 60, now=0.0)  # 60 a second, and 60 at once
    for _ in range(60):
        assert bucket.delay(1, 0.0) == 0
        bucket.take(1, 0.0)
    assert bucket.delay(1, 0.0) == pytest.approx(1 / 60)
    assert bucket.delay(1, 0.5) == 0
    for _ in range(60):
        bucket.take(1, 99.0)
    assert bucket.delay(1, 99.0) == pytest.approx(1 / 60)  # no more was saved up in the meantime


def test_a_slow_bucket_lets_one_go_at_once() -> None:
    bucket = TokenBucket(3, now=0.0)
    bucket.take(1, 0.0)
    assert bucket.delay(1, 0.0) == pytest.approx(61 / 3)


def test_a_request_larger_than_the_bucket_goes_and_leaves_a_debt() -> None:
    bucket = TokenBucket(61 * 10, now=0.0)  # 10 a second
    assert bucket.delay(100, 0.0) == 0
    bucket.take(100, 0.0)
    assert bucket.delay(1, 0.0) == pytest.approx(9.1)  # 90 of debt and the one
    bucket.take(-50, 0.0)  # it used half
    assert bucket.delay(1, 0.0) == pytest.approx(4.1)


def test_what_an_answer_took_counts_in_place_of_the_estimate() -> None:
    limits = Limits(None, 6100, 0.0)  # 100 a second
    limits.take(300, 0.0)
    assert limits.delay(100, 0.0) == pytest.approx(3.0)
    limits.settle(300, 100, 0.0)
    assert limits.delay(100, 0.0) == pytest.approx(1.0)
    limits.settle(100, 250, 0.0)
    assert limits.delay(100, 0.0) == pytest.approx(2.5)


@given(
    per_minute=st.integers(1, 3000),
    asked=st.lists(st.floats(0, 3, allow_nan=False), min_size=1, max_size=300),
)
def test_no_minute_sees_more_than_the_rate(per_minute: int, asked: list[float]) -> None:
    """However requests come, idle times included: each waits as it is told."""
    bucket, now, sent = TokenBucket(per_minute, now=0.0), 0.0, []
    for pause in asked:
        now += pause
        while (wait := bucket.delay(1, now)) > 0:
            now += wait + 1e-9
        bucket.take(1, now)
        sent.append(now)
    for first in sent:
        assert sum(first <= moment < first + 60 for moment in sent) <= per_minute


HEADERS = {
    "x-ratelimit-limit-requests": "600",
    "x-ratelimit-remaining-requests": "599",
    "x-ratelimit-reset-requests": "100ms",
    "x-ratelimit-limit-tokens": "6100",
    "x-ratelimit-remaining-tokens": "6000",
    "x-ratelimit-reset-tokens": "1s",
}


def test_headers_teach_what_the_recipe_does_not_say() -> None:
    limits = Limits(None, None, 0.0)
    limits.take(10**6, 0.0)
    assert limits.delay(10**6, 0.0) == 0
    assert limits.learn(HEADERS, 0.0) == "allows 600 requests per minute; allows 6,100 tokens per minute"
    assert limits.learn(HEADERS, 0.0) is None  # it is no news the second time
    limits.take(200, 0.0)
    assert limits.delay(100, 0.0) == pytest.approx(2.0)  # 100 a second, 100 of debt and a full second wanted


@pytest.mark.parametrize(("name", "said"), [("requests", "1"), ("tokens", "1")])
def test_one_header_teaches_its_own_limit(name: str, said: str) -> None:
    headers = {f"x-ratelimit-limit-{name}": said, f"x-ratelimit-reset-{name}": "1m0s"}
    assert Limits(None, None, 0.0).learn(headers, 0.0) == f"allows {said} {name} per minute"


def test_a_lower_limit_of_the_recipe_stands_and_a_higher_one_does_not() -> None:
    lower, higher = Limits(60, None, 0.0), Limits(6000, None, 0.0)
    assert lower.learn({"x-ratelimit-limit-requests": "600"}, 0.0) is None
    assert higher.learn({"x-ratelimit-limit-requests": "600"}, 0.0) == "allows 600 requests per minute"


@pytest.mark.parametrize("declared", [None, 30.0])
def test_a_limit_that_resets_after_more_than_a_minute_is_none_per_minute(declared: float | None) -> None:
    """Groq's header of requests is of a day, that of tokens of a minute (console.groq.com/docs/rate-limits)."""
    limits = Limits(declared, None, 0.0)
    told = {"x-ratelimit-limit-requests": "14400", "x-ratelimit-remaining-requests": "14396"}
    told |= {"x-ratelimit-reset-requests": "24s", "x-ratelimit-limit-tokens": "18000"}
    limits.learn(told, 0.0)
    told |= {"x-ratelimit-remaining-requests": "14370", "x-ratelimit-reset-requests": "2m59.56s"}
    assert limits.learn(told, 1.0) == (None if declared else "allows 14,400 requests in more than a minute")
    assert limits.learn(told, 1.0) is None
    for _ in range(1000):
        limits.take(0, 1.0)
    assert (limits.delay(0, 1.0) > 0.0) == (declared is not None)


def test_limits_that_move_give_nothing_back() -> None:
    bucket = TokenBucket(6100, 0.0)  # 100 a second
    for number in range(1000):
        bucket.change(6100 if number % 2 else 12_200, 0.0)
        bucket.take(1, 0.0)
    assert bucket.delay(1, 0.0) > 4  # 1,000 were taken where 200 may go at once


def test_a_limit_that_rises_saves_up_nothing_at_its_new_rate() -> None:
    bucket = TokenBucket(61, 0.0)  # one a second
    bucket.take(1, 0.0)
    bucket.change(3660, 10.0)  # 60 a second
    assert bucket.delay(60, 10.0) == pytest.approx(59 / 60)


def test_a_request_is_one_of_the_requests_whatever_its_tokens() -> None:
    limits = Limits(3660, 366_000, 0.0)  # 60 requests and 6,000 tokens a second
    for _ in range(59):
        limits.take(10, 0.0)
    assert limits.delay(1000, 0.0) == 0
    limits.take(1000, 0.0)
    assert limits.delay(10, 0.0) == pytest.approx(1 / 60)


def test_limits_that_move_are_told_once_each() -> None:
    limits = Limits(None, None, 0.0)
    told = [limits.learn({"x-ratelimit-limit-requests": str(500 + 500 * (n % 2))}, 0.0) for n in range(6)]
    assert told == ["allows 500 requests per minute", "allows 1,000 requests per minute", None, None, None, None]


def test_nothing_left_pauses_until_the_reset() -> None:
    limits = Limits(None, None, 0.0)
    told = limits.learn({**HEADERS, "x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "6m0s"}, 0.0)
    assert told == "has no requests left for 360 s; allows 6,100 tokens per minute"
    assert limits.delay(1, 10.0) == pytest.approx(350)


def test_a_pause_is_news_if_it_is_long_and_longer_than_before() -> None:
    limits = Limits(None, None, 0.0)
    news = [limits.pause(seconds, 0.0) for seconds in (30.0, 40.0, 40.5, 20.0, 60.0)]
    assert news == [False, True, False, False, True]
    assert limits.paused_s(10.0) == 50.0
    assert limits.paused_s(61.0) == 0.0


def test_a_refusal_at_the_rate_that_is_told_is_none_of_the_number_in_flight() -> None:
    limits = Limits(None, None, now=0.0)
    limits.learn({"date": "Tue, 01 Dec 2026 04:00:00 GMT"}, now=1.0)
    assert not limits.paced(sent=0.0, now=5.0)  # nothing is known
    limits.learn({"x-ratelimit-limit-requests": "3000"}, now=5.0)  # 49 may go at once
    assert limits.paced(sent=4.9, now=5.0)  # it went out before the rate was known
    assert not limits.paced(sent=5.0, now=5.0)
    for _ in range(30):
        limits.take(1, now=5.0)
    assert limits.paced(sent=5.0, now=5.0)  # they went out as fast as they may
    assert not limits.paced(sent=5.0, now=6.0)
    limits.learn({"x-ratelimit-limit-requests": "3000"}, now=7.0)
    assert not limits.paced(sent=6.5, now=8.0)  # it was known before


def test_a_slow_rate_is_kept_to_until_the_next_request_may_go() -> None:
    limits = Limits(30, None, 0.0)
    assert not limits.paced(sent=0.0, now=0.0)
    limits.take(1, 0.0)
    assert limits.paced(sent=0.0, now=1.5)
    assert not limits.paced(sent=0.0, now=2.1)


def test_a_process_takes_its_part() -> None:
    limits = Limits(None, None, 0.0, fraction=0.5)
    limits.learn({"x-ratelimit-limit-requests": "2"}, 0.0)
    limits.take(1, 0.0)
    assert limits.delay(1, 0.0) == pytest.approx(61)  # one a minute, not two


def test_headers_that_say_nothing_change_nothing() -> None:
    limits = Limits(None, None, 0.0)
    for said in ("", "many", "100, 100;w=60", "-1", "0", "0.001", "1e308", "inf", "nan"):
        assert limits.learn({"x-ratelimit-limit-requests": said}, 0.0) is None
    limits.take(10**6, 0.0)
    assert limits.delay(10**6, 0.0) == 0


@pytest.mark.parametrize(
    ("said", "seconds"),
    [("1s", 1), ("6m0s", 360), ("120ms", 0.12), ("1h2m3.5s", 3723.5), ("7.66", 7.66), ("2d", 172_800)]
    + [(nonsense, 0) for nonsense in ("", "soon", "5x", "1s!", "1764000000000", "-3")],
)
def test_durations(said: str, seconds: float) -> None:
    assert seconds_of(said) == pytest.approx(seconds)
