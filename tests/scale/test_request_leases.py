"""The table of leases, with a clock that the test moves: requests, money and shares of limits."""

from collections.abc import Iterator

import msgspec

from generate.budget import Spend
from generate.idset import IdSet
from scale.request_leases import Claim, Item, Leases, LeaseState

MOST = Spend(100, 1000)


def items(count: int) -> Iterator[Item]:
    return (Item(str(number), b"{}", MOST) for number in range(count))


def table(count: int = 10, *, tokens: int | None = None, state: LeaseState | None = None, before: int = 0) -> Leases:
    """A table for requests of at most 100 tokens; a lease runs out after 10 s."""
    return Leases(items(count), state or LeaseState(), IdSet(), tokens=tokens, before=Spend(before), lease_s=10)


def ids(leased: list[Item]) -> list[str]:
    return [item.id for item in leased]


def test_each_request_is_leased_once_and_again_when_its_worker_is_silent() -> None:
    leases = table(6)
    leases.join("a", ["u"], 0)
    leases.join("b", ["u"], 0)
    assert leases.any_left()  # to look takes none away
    assert ids(leases.lease("a", 4)) == ["0", "1", "2", "3"]
    assert ids(leases.lease("b", 4)) == ["4", "5"]
    assert leases.answered("a", "1", Spend(10))
    leases.heard("b", {}, 8)
    assert [leases.silent(now) for now in (4, 8, 10)] == [[], [], []]
    assert leases.silent(10.1) == ["a"]
    leases.leave("a", lost=True)
    assert leases.asked_again == 3
    assert ids(leases.lease("b", 10)) == ["0", "2", "3"]
    assert not leases.any_left()


def test_a_driver_that_slept_does_not_take_that_for_silence() -> None:
    leases = table()
    leases.join("a", ["u"], 0)
    assert leases.silent(1) == []
    assert leases.silent(100) == []
    assert [leases.silent(now) for now in (104, 108, 110)] == [[], [], ["a"]]


def test_a_late_answer_counts_if_it_is_the_first_and_a_late_failure_never_does() -> None:
    leases = table(3)
    leases.join("zombie", ["u"], 0)
    leases.lease("zombie", 3)
    leases.leave("zombie", lost=True)
    leases.join("b", ["u"], 0)
    assert leases.answered("zombie", "0", Spend(10))  # nobody has begun it: it needs nothing more
    assert ids(leases.lease("b", 3)) == ["1", "2"]
    assert not leases.failed("zombie", "1")
    assert leases.answered("zombie", "1", Spend(10))
    assert not leases.answered("b", "1", Spend(10))
    assert leases.failed("b", "2")
    assert not leases.answered("zombie", "2", Spend(10))  # the run has it as failed for good
    assert (leases.leased, leases.any_left()) == (0, False)


def test_leases_stop_where_the_budget_could_be_passed_and_go_on_when_an_account_gives_back() -> None:
    leases = table(10, tokens=550, before=100)
    leases.join("a", ["u"], 0)
    assert len(leases.lease("a", 9)) == 4
    assert leases.refused and leases.refused.id == "4"
    leases.answered("a", "0", Spend(10))
    assert leases.lease("a", 9) == []  # an answer alone gives nothing back: its worker may have spent more
    leases.claimed("a", Claim(Spend(10 + 300), Spend(400)))
    assert ids(leases.lease("a", 9)) == ["4"]  # 100 + 310, and 100 for this one
    leases.claimed("a", Claim(Spend(20 + 200), Spend(400)))
    assert ids(leases.lease("a", 9)) == ["5"]
    assert leases.spent.tokens == 100 + 220 + 200


def test_an_account_written_before_a_lease_does_not_give_that_lease_back() -> None:
    leases = table(10, tokens=1000)
    leases.join("a", ["u"], 0)
    leases.lease("a", 3)
    written = Claim(Spend(3 * 20, 600), Spend(300, 3000))
    leases.lease("a", 2)
    leases.claimed("a", written)
    assert leases.spent == Spend(60 + 200, 600 + 2000)


def test_what_a_lost_worker_was_charged_stays_charged_until_its_account_comes() -> None:
    leases = table(10, tokens=1000)
    leases.join("a", ["u"], 0)
    leases.lease("a", 6)
    leases.leave("a", lost=True)
    leases.join("b", ["u"], 0)
    assert len(leases.lease("b", 9)) == 4
    leases.claimed("a", Claim(Spend(60), Spend(600)))  # it was frozen only
    assert len(leases.lease("b", 9)) == 5


def test_the_next_driver_knows_all_charges_and_an_ended_worker_costs_what_it_spent() -> None:
    leases = table(10, tokens=2000)
    for name in "ab":
        leases.join(name, ["u"], 0)
        leases.lease(name, 4)
        leases.answered(name, "0", Spend(10))  # the second is dropped, and costs all the same
    leases.claimed("a", Claim(Spend(50), Spend(400)))
    leases.leave("a", lost=False)
    leases.close("a")
    state = msgspec.json.decode(msgspec.json.encode(leases.state), type=LeaseState)
    assert (list(state.accounts), state.unsaid.tokens) == (["b"], 40 + 400)
    # The journal has the 10 of the first answer, and the spend file says the rest.
    again = table(10, tokens=2000, state=state, before=10 + state.unsaid.tokens - state.charged.tokens)
    assert again.spent.tokens == leases.spent.tokens == 450


def test_an_answer_that_a_killed_driver_had_recorded_is_counted_once() -> None:
    leases = table(10, tokens=2000)
    leases.join("a", ["u"], 0)
    leases.lease("a", 4)
    state = msgspec.json.decode(msgspec.json.encode(leases.state), type=LeaseState)
    # The driver reads an answer of 10 into the journal, and is killed: the next one finds it there.
    again = table(10, tokens=2000, state=state, before=10)
    again._finished.add("0")
    assert again.spent.tokens == 10 + 400
    assert not again.answered("a", "0", Spend(10), recorded=True)
    assert again.spent.tokens == 400
    again.claimed("a", Claim(Spend(40), Spend(400)))
    again.close("a")
    assert again.spent.tokens == 40 == 10 + again.state.unsaid.tokens


def test_shares_of_a_limit_never_add_up_to_more_than_the_whole() -> None:
    leases = table()
    leases.join("a", ["u", "v"], 0)
    askers = leases.askers("a")
    assert askers == {"u": 1, "v": 1}
    leases.offer("a", askers)
    leases.heard("a", askers, 1)
    leases.join("b", ["u"], 1)
    assert leases.askers("b") == {}  # the other still has the whole
    halves = leases.askers("a")
    assert halves == {"u": 2, "v": 1}
    leases.offer("a", halves)
    assert leases.askers("b") == {}  # it may not have heard yet
    leases.heard("a", halves, 2)
    assert leases.askers("b") == {"u": 2}
    leases.offer("b", {"u": 2})
    leases.leave("a", lost=True)
    assert leases.askers("b") == {"u": 1}


def test_urls_are_dealt_so_that_each_has_a_worker() -> None:
    leases, weights = table(), dict.fromkeys(["1", "2", "3", "4", "5"], 1.0)
    for number in range(2):
        leases.join(f"w{number}", leases.deal(weights, 2 - number), 0)
    assert [worker.urls for worker in leases.workers.values()] == [["1", "3", "5"], ["2", "4"]]
    assert leases.deal(weights, 1) == ["1"]
    assert leases.deal({**weights, "4": 2.0}, 1) == ["4"]
    leases.leave("w1", lost=True)
    assert leases.deal(weights, 1) == ["2", "4"]


def led(leases: Leases, *urls: str) -> list[list[str]]:
    """The workers' URLs once these are all there are."""
    leases.lead_to(dict.fromkeys(urls, 1.0))
    return [worker.urls for worker in leases.workers.values()]


def test_urls_that_come_and_go_keep_a_worker_each_and_every_worker_one() -> None:
    leases = table()
    leases.lead_to({"1": 1.0})  # nobody is there yet
    for name in "abc":
        leases.join(name, ["1"], 0)
    assert led(leases, "1") == [["1"], ["1"], ["1"]]
    assert led(leases, "1", "2") == [["2"], ["1"], ["1"]]
    assert led(leases, "1", "2", "3", "4") == [["2"], ["3"], ["1", "4"]]
    assert led(leases, "2", "3", "4") == [["2"], ["3"], ["4"]]
    leases.leave("b", lost=True)
    assert led(leases, "2", "3", "4") == [["2", "3"], ["4"]]


def test_a_url_that_moves_is_asked_by_its_new_worker_once_the_old_one_has_heard() -> None:
    leases = table()
    leases.join("a", ["u"], 0)
    leases.join("b", ["v"], 0)
    for name, url in (("a", "u"), ("b", "v")):
        leases.offer(name, {url: 1})
        leases.heard(name, {url: 1}, 1)
    leases.workers["a"].urls, leases.workers["b"].urls = ["v"], ["u"]
    for name in "ab":
        assert leases.askers(name) == {}
        leases.offer(name, {})
    assert leases.askers("a") == {}  # the other may not have heard yet
    leases.heard("b", {}, 2)
    assert leases.askers("a") == {"v": 1}
    assert leases.askers("b") == {}
    leases.heard("a", {}, 2)
    assert leases.askers("b") == {"u": 1}


def test_a_part_of_the_limits_that_was_offered_counts_before_its_worker_is_heard() -> None:
    leases = table()
    leases.join("a", ["u"], 0)
    leases.offer("a", leases.askers("a"))
    leases.join("b", ["u"], 0)
    assert leases.askers("b") == {}
    leases.heard("a", {"u": 2}, 0)
    assert leases.askers("b") == {"u": 2}
