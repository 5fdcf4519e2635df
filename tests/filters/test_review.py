"""Human review: the sample, verdicts on disk, agreement, and the page in a real browser."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from playwright.sync_api import Page, sync_playwright
from rich.console import Console

from filters.review.__main__ import main
from filters.review.agreement import Case, agreement, precision_and_recall, print_agreement, weighted_kappa
from filters.review.session import KEPT, Sample, Session, draw, load_sample, read_reviews
from pipeline.errors import DataError, UsageError
from pipeline.recipe import load_recipe
from pipeline.records import Dropped, Kept, Message, Reason, encode_line
from pipeline.rundir import RunDir
from tests.completion_fields import completion_fields
from tests.full_disk import without_locks

ROOT = Path(__file__).parents[2]
CHROMIUM = "/usr/bin/chromium"
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync", "--no-first-run"]
NASTY = '<img src=x onerror="document.title=\'stolen\'"><script>document.title="stolen"</script> & 끝.'


def fields(row_id: str, text: str) -> dict[str, Any]:
    turns = [Message("system", "너는 이야기꾼이야."), Message("user", f"{row_id} 이야기를 써 줘.")]
    return completion_fields(row_id, text, messages=turns, slots={"hero": "토끼", "things": ["달", "비"]})


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """60 kept answers; 30 dropped by `length`, 3 by `judge`."""
    made = RunDir(tmp_path / "run")
    made.path.mkdir()
    made.kept.write_bytes(b"".join(encode_line(Kept(**fields(f"k{n}", f"{NASTY} {n}"))) for n in range(60)))
    dropped = [("length", f"l{n}") for n in range(30)] + [("judge", f"j{n}") for n in range(3)]
    made.dropped.write_bytes(
        b"".join(
            encode_line(Dropped(**fields(name, NASTY), rule=rule, detail=[Reason(rule=rule)])) for rule, name in dropped
        )
    )
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(
            {
                "name": "reviewed",
                "teacher": {"model": "m"},
                "prompts": {"template": "Hi", "count": 1},
                "filters": {"judge": {"model": "judge", "rubric": {"fluency": "natural"}}},
            }
        )
    )
    return made


def recipe_path(run: RunDir) -> Path:
    return run.path.with_name("recipe.yaml")


def test_half_of_a_sample_is_kept_and_every_rule_has_its_turn(run: RunDir) -> None:
    sample = draw(run, 20, seed=0)
    assert sample.population == {KEPT: 60, "length": 30, "judge": 3}
    assert Counter(item.stratum for item in sample.items) == {KEPT: 10, "length": 7, "judge": 3}
    assert len({item.id for item in sample.items}) == 20
    assert [item.stratum for item in sample.items[:10]] != [KEPT] * 10  # mixed
    assert draw(run, 20, seed=0) == sample != draw(run, 20, seed=1)


def test_where_one_side_is_short_the_other_fills_up(run: RunDir) -> None:
    assert Counter(item.stratum == KEPT for item in draw(run, 80, seed=0).items) == {True: 47, False: 33}
    assert len(draw(run, 1000, seed=0).items) == 93


def test_every_turn_has_its_role_and_its_tool_calls(run: RunDir) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "lamp", "arguments": '{"room": "kitchen"}'}}
    turns = [
        Message("developer", "Be kind."),
        Message("user", "Is it on?"),
        Message("assistant", "I look.", [call]),
        Message("tool", "on", [], "c1"),
        Message("user", "Sure?"),
    ]
    rows = [Kept(**{**fields(name, "It is on."), "messages": turns[:count]}) for name, count in (("k1", 2), ("k5", 5))]
    run.dropped.write_bytes(b"")
    run.kept.write_bytes(b"".join(map(encode_line, rows)))
    first, last = sorted(draw(run, 2, seed=0).items, key=lambda item: item.id)
    assert first.system == last.system == "Be kind."
    assert first.question == "Is it on?"  # one turn needs no role
    assert last.question == (
        'user: Is it on?\n\nassistant: I look.\nlamp {"room": "kitchen"}\n\ntool: on\n\nuser: Sure?'
    )


def test_nothing_to_review_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="run the filters first"):
        draw(RunDir(tmp_path), 10, seed=0)


def test_every_answer_has_the_same_chance(run: RunDir) -> None:
    """10 of 60 kept ones: over 600 samples each is drawn 100 times, give or take five standard deviations (46)."""
    drawn = Counter(item.id for seed in range(600) for item in draw(run, 20, seed).items if item.stratum == KEPT)
    assert len(drawn) == 60
    assert all(54 <= count <= 146 for count in drawn.values())


def test_a_verdict_is_on_disk_at_once_and_a_review_goes_on_where_it_was(run: RunDir) -> None:
    with Session(run, size=20, seed=0) as session:
        ids = [item.id for item in session.sample.items]
        session.record("accept")
        session.record("skip", score=2)
        assert {id_: (r.verdict, r.score) for id_, r in read_reviews(run).items()} == {
            ids[0]: ("accept", None),
            ids[1]: ("reject", 2),
        }
    with run.reviews.open("ab") as file:
        file.write(b'{"id":"half a li')  # killed while it wrote
    with Session(run, size=50, seed=9) as session:
        assert session.done == 2
        assert session.current and session.current.id == ids[2]
        session.undo()
        assert session.current.id == ids[1]
        session.record("skip", score=3)
        session.record("skip")
    assert [(id_, r.verdict) for id_, r in read_reviews(run).items()] == [
        (ids[0], "accept"),
        (ids[1], "accept"),
        (ids[2], "skip"),
    ]
    assert len(run.reviews.read_text().splitlines()) == 5


def test_a_full_disk_takes_no_verdict_and_loses_none(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Session(run, size=20, seed=0) as session:
        session.record("accept")
        first, second = [item.id for item in session.sample.items][:2]
        before = run.reviews.read_bytes()
        monkeypatch.setattr("os.fsync", full)
        for write in (lambda: session.record("reject"), session.undo):
            with pytest.raises(OSError, match="No space") as caught:
                write()
            assert caught.value.filename == str(run.reviews) and run.reviews.read_bytes() == before
            assert [*session.verdicts] == [first] and session.current and session.current.id == second
        monkeypatch.undo()
        session.record("skip")
    assert [*read_reviews(run)] == [first, second]


def test_a_file_system_without_locks_names_the_reviews(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcntl.flock", without_locks)
    with pytest.raises(OSError, match="No locks available") as caught:
        Session(run, size=20, seed=0)
    assert caught.value.filename == str(run.reviews)


def test_the_page_says_that_the_disk_is_full(run: RunDir, browser_page: Page) -> None:
    with Session(run, size=5, seed=0):
        pass  # it draws the sample
    full = "def full(_): raise OSError(28, 'No space left on device')"
    script = f"import os, runpy\n{full}\nos.fsync = full\nrunpy.run_module('filters.review', run_name='__main__')"
    with serving(run, errors=subprocess.PIPE, script=script) as (url, process):
        browser_page.goto(url)
        browser_page.wait_for_selector("#text[data-id]")
        browser_page.keyboard.press("4")
        browser_page.wait_for_selector("#problem:not([hidden])")
        assert browser_page.inner_text("#problem") == f"{run.reviews}: No space left on device"
        process.send_signal(signal.SIGINT)
        said = process.communicate()[1]
    assert said.splitlines()[0] == f"error: {run.reviews}: No space left on device" and "Traceback" not in said


def test_two_do_not_review_a_run_at_once(run: RunDir) -> None:
    with Session(run, size=5, seed=0) as session:
        session.record("accept")
        with pytest.raises(UsageError, match=r"reviews\.jsonl: another review of this run is open"):
            Session(run, size=5, seed=0)
        session.record("reject")
    with Session(run, size=5, seed=0) as session:
        assert session.done == 2


def test_a_second_review_that_is_refused_leaves_the_sample_of_the_first(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw_beside_another_review(*asked: Any) -> Sample:
        monkeypatch.undo()
        with pytest.raises(UsageError, match="another review of this run is open"):
            Session(run, size=20, seed=7)
        return draw(*asked)

    monkeypatch.setattr("filters.review.session.draw", draw_beside_another_review)
    with Session(run, size=5, seed=0) as session:
        assert load_sample(run) == session.sample == draw(run, 5, seed=0)


def test_a_file_system_without_locks_is_not_another_review(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with pytest.raises(OSError, match="No locks available"):
        Session(run, size=5, seed=0)


def test_a_wrong_line_is_named(run: RunDir) -> None:
    run.reviews.write_text('{"id":"k1","verdict":"maybe","created":"x"}\n')
    with pytest.raises(DataError, match=r"reviews\.jsonl:1: Invalid enum value 'maybe'"):
        Session(run, size=5, seed=0)


def test_precision_and_recall_are_those_of_the_run() -> None:
    """Of 900 kept 8 of 10 seen are accepted (720); of 100 dropped 5 of 10 (50): 720 / 900 and 720 / 770."""
    cases = [Case(KEPT, True, n < 8) for n in range(10)] + [Case("length", False, n < 5) for n in range(10)]
    precision, recall = precision_and_recall(cases, {KEPT: 900, "length": 100})
    assert precision and recall
    assert precision.value == pytest.approx(0.8)
    # Jeffreys' interval of 8 of 10: the 2.5% and 97.5% quantiles of Beta(8.5, 2.5)
    assert (precision.low, precision.high) == (pytest.approx(0.496, abs=0.01), pytest.approx(0.957, abs=0.01))
    assert recall.value == pytest.approx(720 / 770)
    assert recall.low < 720 / 770 < recall.high


def test_the_recall_does_not_depend_on_how_many_rules_drop_the_same_answers() -> None:
    """48 of 320 dropped answers are reviewed, and none is accepted: by one rule, or six by each of eight."""
    kept = [Case(KEPT, True, n < 46) for n in range(50)]
    eight = [Case(f"rule {n % 8}", False, False) for n in range(48)]
    one = [case._replace(stratum="rule") for case in eight]
    _, of_one = precision_and_recall([*kept, *one], {KEPT: 680, "rule": 320})
    _, of_eight = precision_and_recall([*kept, *eight], {KEPT: 680} | {f"rule {n}": 40 for n in range(8)})
    assert of_one and of_eight
    assert str(of_one) == "1.00 (0.97-1.00)"
    assert of_eight == pytest.approx(of_one, abs=0.002)


def test_without_an_accepted_answer_there_is_no_recall() -> None:
    precision, recall = precision_and_recall([Case(KEPT, True, False)], {KEPT: 5})
    assert precision and precision.value == 0 and recall is None


def test_the_weighted_kappa_of_a_worked_example() -> None:
    """Scores (1,1) (2,3) (3,3) (5,4): observed mean squared difference 2/4; by chance, over all 16 pairs, 54/16:
    1 with 1,3,3,4: 0+4+4+9; 2: 1+1+1+4; 3: 4+0+0+1; 5: 16+4+4+1; in all 17+7+5+25 = 54. So 1 - 0.5 / (54/16).
    """
    pairs = Counter([(1, 1), (2, 3), (3, 3), (5, 4)])
    assert weighted_kappa(pairs) == pytest.approx(1 - 0.5 / (54 / 16))
    assert weighted_kappa(Counter({(4, 4): 10})) is None
    assert weighted_kappa(Counter({(1, 1): 3, (5, 5): 2})) == 1


def test_what_no_answer_is_reviewed_of_is_named(run: RunDir) -> None:
    with Session(run, size=20, seed=0) as session:
        while item := session.current:
            session.record("skip" if item.stratum == "length" else "accept")
    found = agreement(load_recipe(recipe_path(run)), run)
    assert found and found.unseen == {"length": 30}
    console = Console(record=True, width=100)
    print_agreement(found, console)
    assert "leave out what no answer is reviewed of yet: length (30)" in console.export_text()


def test_answers_that_came_after_the_sample_are_counted_apart(run: RunDir) -> None:
    with Session(run, size=93, seed=0) as session:
        session.record("accept")
    recipe, console = load_recipe(recipe_path(run)), Console(record=True, width=200)
    before = agreement(recipe, run)
    assert before and before.later == 0
    with run.dropped.open("ab") as file:
        file.writelines(encode_line(Dropped(**fields(f"m{n}", "x"), rule="new", detail=[])) for n in range(1200))
    after = agreement(recipe, run)
    assert after == before._replace(later=1200)
    print_agreement(after, console)
    said = (
        "the figures leave out 1,200 answers that came after the sample was drawn; for another one move review_sample"
    )
    assert said in console.export_text()


@pytest.mark.parametrize(
    ("flags", "goes_on"),
    [
        ([], False),
        (["--sample", "20"], False),
        (["--sample", "20", "--seed", "3"], False),
        (["--sample", "30"], True),
        (["--seed", "0"], True),
    ],
)
def test_a_sample_that_is_there_stays_and_another_one_that_was_asked_for_is_told(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str], goes_on: bool
) -> None:
    monkeypatch.setattr("filters.review.__main__.serve_page", lambda *_, before, **__: print(before))
    command = [str(recipe_path(run)), "--run", str(run.path)]
    main([*command, "--sample", "20", "--seed", "3"])
    main([*command, *flags])
    said = "this review goes on with the sample of 20 answers with seed 3; for another one move review_sample.json and"
    assert (said in capsys.readouterr().out) == goes_on


def test_a_sample_whose_answers_the_run_has_no_more_is_told_before_it_is_reviewed(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("filters.review.__main__.serve_page", lambda *_, **__: None)
    command = [str(recipe_path(run)), "--run", str(run.path)]
    for _ in range(2):
        main([*command, "--sample", "93"])
    assert "no longer in the run" not in capsys.readouterr().out
    run.kept.write_bytes(b"".join(encode_line(Kept(**fields(f"new{n}", NASTY))) for n in range(60)))  # asked anew
    main(command)
    said = "warning: 60 of these 93 answers are no longer in the run, and count for nothing; for another sample move"
    assert said in capsys.readouterr().out


def test_all_answers_of_a_run_are_as_many_as_were_asked_for(run: RunDir) -> None:
    assert draw(run, 100, seed=0).is_as_asked(100, None) and not draw(run, 100, seed=0).is_as_asked(92, None)


def test_agreement_is_with_what_the_filters_say_now(run: RunDir) -> None:
    with Session(run, size=93, seed=0) as session:
        while item := session.current:
            session.record("accept" if item.stratum == KEPT else "reject", score=4 if item.stratum == KEPT else 2)
    judgements = [{"id": f"k{n}", "score": 4} for n in range(60)] + [{"id": f"j{n}", "score": 2} for n in range(3)]
    judgements.append({"id": "l0", "score": None})
    lines = (json.dumps({**line, "version": "v", "attempts": 1}) + "\n" for line in judgements)
    run.judgements.write_text("".join(lines))
    recipe = load_recipe(recipe_path(run), [])
    found = agreement(recipe, run)
    assert found and (found.reviewed, found.skipped, found.gone) == (93, 0, 0)
    values = {row.decider: (row.cases, row.precision and row.precision.value) for row in found.agreements}
    assert values == {
        "filters": (93, 1.0),
        "rules alone": (93, pytest.approx(60 / 63)),
        "judge alone": (63, 1.0),
    }
    assert found.scores == {(4, 4): 60, (2, 2): 3}
    run.kept.write_bytes(b"".join(run.kept.read_bytes().splitlines(keepends=True)[:50]))  # filtered anew: ten are gone
    found = agreement(recipe, run)
    assert found and found.gone == 10 and found.agreements[0].cases == 83
    console = Console(record=True, width=100)
    print_agreement(found, console)
    said = console.export_text()
    assert "10 no longer in the run" in said and "weighted kappa (quadratic) 1.00, of 53 scores" in said
    assert re.search(r"filters +│ +83 +│ 1\.00 \(\S+\) +│ 1\.00 \(", said)
    assert re.search(r"4 +│ +│ +│ +│ 50", said), said


def test_the_rules_alone_pass_what_only_select_or_duplicates_left_out(run: RunDir) -> None:
    left_out = [("select", f"s{n}") for n in range(4)] + [("near_duplicate", "d0"), ("exact_duplicate", "d1")]
    rows = [Dropped(**fields(name, NASTY), rule=rule, detail=[Reason(rule=rule)]) for rule, name in left_out]
    with run.dropped.open("ab") as file:
        file.write(b"".join(map(encode_line, rows)))
    with Session(run, size=99, seed=0) as session:
        while item := session.current:
            session.record("reject" if item.stratum in ("length", "judge") else "accept")
    run.judgements.write_text('{"id": "k0", "score": 4, "version": "v", "attempts": 1}\n')
    found = agreement(load_recipe(recipe_path(run), []), run)
    assert found
    recall = {row.decider: row.recall and row.recall.value for row in found.agreements}
    assert recall == {"filters": pytest.approx(60 / 66), "rules alone": 1.0, "judge alone": 1.0}


@contextmanager
def serving(
    run: RunDir, *flags: str, errors: int | None = None, script: str = ""
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The real command; yields its address."""
    start = ["-c", script] if script else ["-m", "filters.review"]
    command = [sys.executable, *start, str(recipe_path(run)), "--run", str(run.path), *flags]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # under nohup it is ignored
    )
    assert process.stdout
    try:
        for line in process.stdout:
            if found := re.match(r"(http://\S+)", line):
                yield found[1], process
                return
        pytest.fail(f"it ended with {process.wait()}")
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def browser_page() -> Iterator[Page]:
    assert Path(CHROMIUM).exists(), "the page is tested in a real browser: install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser.new_context(locale="en-US").new_page()
        browser.close()


def press(page: Page, key: str) -> None:
    """A key, and the answer after it."""
    before = page.inner_text("#count")
    page.keyboard.press(key)
    page.wait_for_function("before => document.querySelector('#count').textContent !== before", arg=before)


def test_twenty_are_reviewed_over_a_kill(run: RunDir, browser_page: Page) -> None:
    page, keys = browser_page, ["1", "2", "3", "4", "5", "a", "r", "s"]
    with serving(run, "--sample", "20") as (url, process):
        page.goto(url)
        page.wait_for_selector("#text[data-id]")
        for number in range(11):
            shown = page.get_attribute("#text", "data-id")
            press(page, keys[number % len(keys)])
            assert list(read_reviews(run))[-1] == shown
        process.send_signal(signal.SIGKILL)
        process.wait()
        page.keyboard.press("5")  # nobody hears it
        page.wait_for_selector("#problem:not([hidden])")
        assert page.inner_text("#count") == "11 / 20"
    with serving(run, "--sample", "20") as (url, process):
        page.goto(url)
        page.wait_for_selector("#text[data-id]")
        assert page.inner_text("#count") == "11 / 20"
        press(page, "u")
        assert page.inner_text("#count") == "10 / 20"
        for _ in range(10):
            press(page, "4")
        page.wait_for_selector("#end:not([hidden])")
        assert page.is_disabled("[data-score='4']")
        process.send_signal(signal.SIGINT)
        assert process.stdout
        assert "agreement with the person" in process.stdout.read()
        assert process.wait() == 0
    reviews = read_reviews(run)
    assert len(reviews) == 20
    expected = Counter(reject=5, accept=4, skip=1) + Counter(accept=10)
    assert Counter(review.verdict for review in reviews.values()) == expected


def test_a_key_is_its_letter_and_where_it_types_no_latin_one_its_place(run: RunDir, browser_page: Page) -> None:
    """Colemak's R, AZERTY's A, the Hangul key of S, Colemak's P, AZERTY's 4."""
    typed = [("r", "KeyS"), ("A", "KeyQ"), ("ㄴ", "KeyS"), ("p", "KeyR"), ("'", "Digit4")]
    with serving(run) as (url, _):
        browser_page.goto(url)
        browser_page.wait_for_selector("#text[data-id]")
        for key, place in typed:
            before = browser_page.inner_text("#count")
            browser_page.dispatch_event("body", "keydown", {"key": key, "code": place})
            if key != "p":  # no key of the page, though it is where R is on other layouts
                browser_page.wait_for_function("old => document.querySelector('#count').innerText !== old", arg=before)
    assert [review.verdict for review in read_reviews(run).values()] == ["reject", "accept", "skip", "accept"]


def test_after_a_click_the_space_bar_judges_nothing(run: RunDir, browser_page: Page) -> None:
    with serving(run) as (url, _):
        browser_page.goto(url)
        browser_page.wait_for_selector("#text[data-id]")
        browser_page.click("[data-verdict='accept']")
        browser_page.wait_for_function("() => document.querySelector('#count').textContent.startsWith('1 ')")
        browser_page.keyboard.press("Space")
        press(browser_page, "r")
    assert [review.verdict for review in read_reviews(run).values()] == ["accept", "reject"]


def test_a_long_word_among_the_slots_is_broken(run: RunDir, browser_page: Page) -> None:
    run.kept.write_bytes(encode_line(Kept(**{**fields("k0", "끝."), "slots": {"url": "x" * 120}})))
    run.dropped.write_bytes(b"")
    with serving(run) as (url, _):
        browser_page.set_viewport_size({"width": 320, "height": 700})
        browser_page.goto(url)
        browser_page.wait_for_selector("#text[data-id]")
        assert browser_page.evaluate("document.documentElement.scrollWidth") == 320


@pytest.mark.parametrize("signals", [[signal.SIGINT, signal.SIGINT], [signal.SIGHUP]], ids=["Ctrl-C twice", "hangup"])
def test_however_it_is_ended_it_says_no_traceback(run: RunDir, signals: list[signal.Signals]) -> None:
    for _ in range(4):
        with serving(run, errors=subprocess.PIPE) as (url, process):
            urllib.request.urlopen(f"{url}state").read()
            for number in signals:
                process.send_signal(number)
            _, said = process.communicate()
            assert (process.returncode, said) == (0, "")


def test_texts_are_text_and_the_page_speaks_korean(run: RunDir, browser_page: Page) -> None:
    page = browser_page
    with serving(run) as (url, _):
        page.goto(url)
        page.wait_for_selector("#text[data-id]")
        assert page.inner_text("#text").startswith(NASTY)
        assert page.query_selector("#text img, #text script") is None
        assert page.title() == "Review"
        page.click("#language")
        assert page.title() == "검토" and "건너뛰기" in page.inner_text("footer")
        assert not re.search("kept|length|judge", page.inner_text("body"))  # blind
        assert page.inner_text("#slots").split("\n") == ["hero: 토끼", "things: 달, 비"]
        page.set_viewport_size({"width": 360, "height": 740})
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        if folder := os.environ.get("SCREENSHOTS"):
            page.screenshot(path=f"{folder}/review-ko.png")


def status(url: str, data: dict[str, Any] | None = None, **headers: str) -> tuple[int, dict[str, Any]]:
    body = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, {}


def test_only_its_token_and_its_own_name_open_it(run: RunDir) -> None:
    with serving(run) as (url, _):
        assert url.startswith("http://127.0.0.1:")
        code, state = status(url + "state")
        assert code == 200 and "stratum" not in state["item"]
        base = url.rsplit("/", 2)[0]
        assert status(f"{base}/guess/state")[0] == 404
        assert status(f"{base}/")[0] == status(f"{base}/docs")[0] == status(f"{base}/openapi.json")[0] == 404
        assert status(url + "state", Host="evil.example")[0] == 400
        assert status(url + "verdict", {"id": state["item"]["id"], "score": 6})[0] == 422
        assert read_reviews(run) == {}
        first = {"id": state["item"]["id"], "score": 5}
        assert status(url + "verdict", first)[1]["done"] == 1
        assert status(url + "verdict", first)[1]["done"] == 1  # another window, or the key pressed twice


def test_a_page_whose_address_nobody_would_see_is_not_served(run: RunDir) -> None:
    command = [sys.executable, "-m", "filters.review", str(run.path.parent / "recipe.yaml"), "--run", str(run.path)]
    closed = ["sh", "-c", '"$@" >&-', "sh", *command]
    done = subprocess.run(closed, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "error: standard output is closed, and the page's address is written there: leave it open\n"


def test_a_port_that_is_taken_is_said_in_one_line(run: RunDir) -> None:
    with serving(run) as (url, _):
        port = url.split(":")[2].split("/")[0]
        other = shutil.copytree(run.path, run.path.with_name("other"))
        command = [sys.executable, "-m", "filters.review", str(recipe_path(run)), "--run", str(other)]
        done = subprocess.run([*command, "--port", port], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 2
        assert (
            done.stderr == f"error: --port {port}: Address already in use; name another, or none for any that is free\n"
        )
    done = subprocess.run([*command, "--port", "70000"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--port 70000: bind(): port must be 0-65535" in done.stderr
