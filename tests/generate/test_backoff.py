"""What trouble costs, in simulated seconds: backoff, `auto`, and the choice between endpoints."""

import random
from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest

from generate.concurrency import BACK_OFF, ByQueue
from generate.reply import Answer, Fault
from generate.verdict import QUIET_S
from pipeline.errors import DistillError
from pipeline.records import Failure, read_jsonl
from tests.generate.simulation import GOOD, Model, Server, simulate

URL = "http://first/v1"
REFUSED = Fault("rate_limited", "slow down", 429)
REFUSED_1_S = Fault("rate_limited", "slow down", 429, retry_after_s=1.0)
BROKEN = Fault("server_error", "bad gateway", 502)
Seconds = Callable[..., float]


@pytest.fixture
def seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Seconds:
    """Simulated seconds of a run in which every request is answered."""
    runs = iter(range(99))

    def run(serve: Server, count: int, concurrency: int | str, slots: int | None = None, **headers: str) -> float:
        told = {name.replace("_", "-"): value for name, value in headers.items()}
        models, config = {URL: Model(serve, slots, told)}, {"concurrency": concurrency, "max_attempts": 12}
        taken, outcome, counters = simulate(models, tmp_path / str(next(runs)), monkeypatch, count, generate=config)
        assert (outcome, counters.answered, counters.failed) == (None, count, 0)
        return taken

    return run


@pytest.mark.parametrize("fault", [REFUSED, BROKEN], ids=["429", "502"])
@pytest.mark.parametrize("concurrency", [64, "auto"])
def test_a_blip_is_one_step_of_backoff(seconds: Seconds, fault: Fault, concurrency: int | str) -> None:
    """64 requests in flight fail together for 0.3 s: each was a step once, and the run stood for 30 s."""

    def run(ends: float) -> float:
        return seconds(lambda number, now: (0.05, fault if now < ends else GOOD), 640, concurrency)

    assert run(ends=0.3) - run(ends=0.0) < 2.0


def test_an_endpoint_that_stays_down_is_probed_ever_more_seldom(seconds: Seconds) -> None:
    """One step per probe: 0.5, 1, 2, … s; a recovery is seen in time, and the load until then is small."""
    model = Model(lambda number, now: (0.05, BROKEN if now < 10 else GOOD))
    taken = seconds(lambda number, now: model._serve(number, now), 64, 64)
    assert 10 < taken < 20


def test_auto_is_as_fast_as_the_best_number_on_an_endpoint_without_a_queue(seconds: Seconds) -> None:
    """A server of 128 slots that answers after 50 ms: answers come in bursts, which are not its throughput."""
    best = min(seconds(lambda number, now: (0.05, GOOD), 3000, number, slots=128) for number in (64, 128, 256))
    assert seconds(lambda number, now: (0.05, GOOD), 3000, "auto", slots=128) <= best / 0.9


def test_auto_is_nearly_as_fast_where_answers_take_differently_long(seconds: Seconds) -> None:
    """256 slots and 25 to 75 ms: it waits for half a round before it doubles, not for the slowest answers of one."""

    def varied() -> Server:
        rng = random.Random(1)
        return lambda number, now: (0.05 * rng.uniform(0.5, 1.5), GOOD)

    best = seconds(varied(), 3000, 256, slots=256)
    assert seconds(varied(), 3000, "auto", slots=256) <= best / 0.88


@pytest.mark.parametrize("paused", [70, 130])
def test_one_pause_of_a_machine_does_not_end_the_climb(seconds: Seconds, paused: int) -> None:
    """A busy machine: 0.4 ms of work per request, and once 0.1 s of something else."""

    def busy() -> Server:
        free_at = 0.0

        def serve(number: int, now: float) -> tuple[float, Answer | Fault]:
            nonlocal free_at
            free_at = max(now, free_at) + (0.1 if number == paused else 0.0004)
            return 0.05 + free_at - now, GOOD

        return serve

    assert seconds(busy(), 3000, "auto") <= seconds(busy(), 3000, 256) / 0.9


def third_refused(number: int, now: float) -> tuple[float, object]:
    return 0.05, REFUSED_1_S if number % 3 == 0 else GOOD


def test_refusals_that_have_nothing_to_do_with_the_number_do_not_lower_it(seconds: Seconds) -> None:
    best = min(seconds(third_refused, 3000, number) for number in (64, 512))
    assert seconds(third_refused, 3000, "auto") <= best / 0.8
    assert seconds(third_refused, 300, "auto") < 12.0  # one cut per refusal took 14.5 s


def test_a_rate_limit_without_headers_is_kept_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    granted: deque[float] = deque()

    def serve(number: int, now: float) -> tuple[float, object]:
        while granted and granted[0] <= now - 1.0:
            granted.popleft()
        if len(granted) >= 40:
            return 0.05, Fault("rate_limited", "slow down", 429, retry_after_s=0.25)
        granted.append(now)
        return 0.05, GOOD

    model = Model(serve)
    taken, _, counters = simulate({URL: model}, tmp_path, monkeypatch, 600, generate={"concurrency": "auto"})
    assert counters.failed == 0
    assert taken < 1.25 * 600 / 40
    assert model.asked < 1.5 * 600


def by_the_second(most: int) -> Server:
    """A server that takes so many requests a second, and answers each after 5 to 15 s."""
    granted: deque[float] = deque()
    rng = random.Random(1)

    def serve(number: int, now: float) -> tuple[float, Answer | Fault]:
        while granted and granted[0] <= now - 1.0:
            granted.popleft()
        if len(granted) >= most:
            return 0.05, REFUSED_1_S
        granted.append(now)
        return rng.uniform(5, 15), GOOD

    return serve


def test_a_first_burst_that_is_refused_does_not_keep_the_number_low(seconds: Seconds) -> None:
    """50 requests a second, and answers take some 10 s: 64 at once are too many, 500 in flight are not."""
    assert seconds(by_the_second(50), 3000, "auto") < 200  # 44 in flight, and by halves, took 252 s


def test_a_rate_that_no_header_tells_is_used(seconds: Seconds) -> None:
    """One request each 0.2 s, and answers take 2 to 6 s: 20 in flight. Two that went out at once were one too many."""
    rng, last = random.Random(1), float("-inf")

    def serve(number: int, now: float) -> tuple[float, Answer | Fault]:
        nonlocal last
        if now - last < 0.2:
            return 0.05, REFUSED
        last = now
        return rng.uniform(2, 6), GOOD

    assert seconds(serve, 1000, "auto") < 400  # one or two in flight took 3990 s


def test_an_api_that_tells_its_rate_is_used_in_full_though_it_refused_the_first_burst(seconds: Seconds) -> None:
    """OpenAI meters by the second: fewer in flight would not help, as the rate is kept to once it is told."""
    took = seconds(by_the_second(50), 3000, "auto", x_ratelimit_limit_requests="3000")
    assert took < 3000 / 50 + 60  # a minute to find that 500 must be in flight, with the last answers; it took 278 s


def full_queue(slots: int, queue: int) -> Server:
    """A server that works on so many at once, a second each, and refuses what its queue has no place for."""
    ends: deque[float] = deque()

    def serve(number: int, now: float) -> tuple[float, Answer | Fault]:
        while ends and ends[0] <= now:
            ends.popleft()
        if len(ends) >= slots + queue:
            return 0.01, Fault("server_error", "the queue is full", 503)
        ends.append(max(now, ends[-slots] if len(ends) >= slots else now) + 1.0)
        return ends[-1] - now, GOOD

    return serve


@pytest.mark.parametrize("concurrency", [64, "auto"])
def test_a_full_queue_fails_no_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, concurrency: int | str) -> None:
    """Ollama, Ray Serve and Envoy answer 503 then. What is sent is what fits, and each request's turn comes."""
    model = Model(full_queue(slots=4, queue=16))
    taken, _, counters = simulate(
        {URL: model}, tmp_path, monkeypatch, 600, generate={"concurrency": concurrency, "max_attempts": 3}
    )
    assert (counters.answered, counters.failed) == (600, 0)
    assert taken < 600 / 4 / 0.9
    if concurrency == "auto":
        assert model.asked < 1.5 * 600


def test_a_tenth_answered_with_503_is_no_full_queue(seconds: Seconds) -> None:
    """Eight fail before the first answer comes, whatever is in flight. 200 slots need 90 s; it took 198 s."""
    rng = random.Random(1)
    busy = Fault("server_error", "busy", 503)
    assert seconds(lambda number, now: (0.1, busy) if rng.random() < 0.1 else (9.0, GOOD), 2000, "auto", 200) < 130


def test_refusals_of_one_episode_are_one_cut() -> None:
    """Or 30 timeouts at once: it fell to 1."""
    concurrency = ByQueue(276)
    for number in range(64):
        concurrency.congested(sent=0.001 * number, now=0.3 + 0.001 * number, overloaded=True)
    assert concurrency.limit == int(276 * BACK_OFF)
    concurrency.congested(sent=1.0, now=2.0, overloaded=True)  # sent after the cut: another episode
    assert concurrency.limit == int(int(276 * BACK_OFF) * BACK_OFF)


def test_an_endpoint_is_chosen_at_the_size_of_the_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two endpoints, the first at its token limit: it has room for one token, and none for a request."""
    first, second = (Model(lambda number, now: (0.05, GOOD)) for _ in range(2))

    def limited(self: object, tokens: int, now: float) -> float:
        return 0.0 if tokens <= 1 or self is not at_limit[0] else 60.0

    at_limit: list[object] = []
    from generate import endpoint

    class Limits(endpoint.Limits):
        def __init__(self, *given: object) -> None:
            super().__init__(*given)  # type: ignore[arg-type]
            at_limit.append(self)

        delay = limited

    monkeypatch.setattr(endpoint, "Limits", Limits)
    models = {URL: first, "http://second/v1": second}
    taken, _, counters = simulate(models, tmp_path, monkeypatch, 100, generate={"concurrency": 10})
    assert (counters.answered, first.asked, second.asked) == (100, 0, 100)
    assert taken < 1.0


def test_a_request_that_is_refused_each_time_fails_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its attempts count from two minutes without any answer on: 15 pauses of 10 s, then three more attempts."""
    model = Model(lambda number, now: (0.0, Fault("rate_limited", "no", 429, retry_after_s=10.0)))
    taken, _, _ = simulate({URL: model}, tmp_path, monkeypatch, 1, generate={"concurrency": 1, "max_attempts": 4})
    (failure,) = read_jsonl(tmp_path / "run" / "failures.jsonl", Failure)
    assert (failure.error, failure.attempts) == ("rate_limited", 4)
    assert QUIET_S + 3 * 10.0 <= taken < QUIET_S + 5 * 10.5


@pytest.mark.parametrize("concurrency", [64, "auto"])
def test_a_limit_of_a_day_ends_the_run_and_fails_no_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, concurrency: int | str
) -> None:
    """OpenRouter's free models: 50 a day, a 429 without Retry-After from then on. All 250 others failed for good."""
    used_up = Fault("rate_limited", "Rate limit exceeded: free-models-per-day", 429)
    model = Model(lambda number, now: (1.0, GOOD) if number <= 50 else (0.1, used_up))
    generate = {"concurrency": concurrency}
    taken, outcome, counters = simulate({URL: model}, tmp_path, monkeypatch, 300, generate=generate)
    assert isinstance(outcome, DistillError)
    assert "has answered nothing but 429 for" in str(outcome)
    assert "free-models-per-day" in str(outcome)
    assert (counters.answered, counters.failed) == (50, 0)
    assert not list(read_jsonl(tmp_path / "run" / "failures.jsonl", Failure))
    assert 600 <= taken < 700


def test_a_bad_request_within_a_limit_of_a_day_is_the_only_one_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says nothing of the others: all that had been refused for five minutes failed with it."""
    bad = Fault("bad_request", "too long", 400)
    model = Model(lambda number, now: (1.0, GOOD) if number <= 50 else (0.1, REFUSED if number % 97 else bad))
    _, outcome, counters = simulate({URL: model}, tmp_path, monkeypatch, 300, generate={"concurrency": 64})
    assert isinstance(outcome, DistillError)
    assert counters.answered == 50
    assert {failure.error for failure in read_jsonl(tmp_path / "run" / "failures.jsonl", Failure)} == {"bad_request"}


def test_the_only_request_that_is_left_and_always_refused_does_not_end_each_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is larger than the limit, say: it fails after all its attempts, however long the pauses are."""
    no = Fault("rate_limited", "no", 429, retry_after_s=120.0)
    model = Model(lambda number, now: (1.0, GOOD if number < 10 else no))
    _, outcome, counters = simulate({URL: model}, tmp_path, monkeypatch, 10, generate={"concurrency": 1})
    assert (outcome, counters.answered, counters.failed) == (None, 9, 1)


@pytest.mark.parametrize("pause_s", [0.0, 120.0])
def test_a_limit_of_a_day_ends_the_run_of_one_request_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pause_s: float
) -> None:
    no = Fault("rate_limited", "no", 429, retry_after_s=pause_s)
    model = Model(lambda number, now: (1.0, GOOD if number < 10 else no))
    taken, outcome, counters = simulate({URL: model}, tmp_path, monkeypatch, 20, generate={"concurrency": 1})
    assert isinstance(outcome, DistillError)
    assert (counters.answered, counters.failed) == (9, 0)
    assert taken < 1000


def test_one_429_to_requests_that_are_sent_seldom_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request in a quarter of an hour: between an answer and the next reply there is more than `give_up_s`."""
    model = Model(lambda number, now: (1.0, REFUSED if number == 3 else GOOD))
    generate = {"concurrency": 1, "requests_per_minute": 1 / 15}
    taken, outcome, counters = simulate({URL: model}, tmp_path, monkeypatch, 6, generate=generate)
    assert (outcome, counters.answered, counters.failed) == (None, 6, 0)
    assert taken > 6 * 900


@pytest.mark.parametrize("concurrency", [64, "auto"])
def test_a_limit_that_no_header_tells_costs_no_request(seconds: Seconds, concurrency: int | str) -> None:
    """One request a second, whatever is in flight: each waits for its turn, and none fails."""
    last = float("-inf")

    def serve(number: int, now: float) -> tuple[float, Answer | Fault]:
        nonlocal last
        if now - last < 1.0:
            return 0.02, REFUSED
        last = now
        return 0.02, GOOD

    assert 200 <= seconds(serve, 200, concurrency) < 600
