"""Several answers to a prompt: agreement, selection, pass@k, preferences, scores of rules, and how they are written."""

import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import yaml

import filters.preferences
import filters.run
import filters.stream
from filters.__main__ import main
from filters.groups import SAMPLE, Votes, count_votes, pass_at, solved
from filters.judgements import Judgement
from filters.reasons import describe
from pipeline.errors import DistillError, RecipeError
from pipeline.recipe import load_recipe
from pipeline.records import Completion, Dropped, Kept, Message, Prompt, encode_line, read_jsonl
from pipeline.rundir import RunDir
from tests.completion_fields import completion_fields

# A verifier of the tests' own: the answer is right if its last word is the reference; longer ones score less.
VERIFIER = """
def right(answer):
    word = answer.text.split()[-1]
    return (None if word == answer.reference else f"{word} is wrong"), 1 / len(answer.text)
"""
ROOT = Path(__file__).parents[2]
RIGHT = {"rule": "function", "file": "mine.py", "name": "right"}


def answers(prompt: str, *texts: str, **more: Any) -> list[Completion]:
    """The samples of one prompt, numbered from 0; their ids are the prompt's and the number."""
    messages = [Message("user", f"{prompt}?")]
    return [
        Completion(
            **completion_fields(
                f"{prompt}{number}", text, prompt_id=prompt, messages=messages, sample=number, reference="4", **more
            )
        )
        for number, text in enumerate(texts)
    ]


class Stage:
    """One run, filtered as a test wants it."""

    def __init__(self, folder: Path) -> None:
        self.recipe, self.run = folder / "recipe.yaml", RunDir(folder / "run")
        self.run.path.mkdir()
        (folder / "mine.py").write_text(VERIFIER)

    def filter(self, rows: Iterable[Completion], *rules: dict[str, Any], **settings: Any) -> None:
        self.run.completions.write_bytes(b"".join(map(encode_line, rows)))
        prompts = {"count": 1, "template": "Hi", "test": 0.3}
        data = {
            "name": "s",
            "teacher": {"model": "m"},
            "prompts": prompts,
            "filters": {"rules": list(rules), **settings},
        }
        self.recipe.write_text(yaml.safe_dump(data))
        main([str(self.recipe), "--run", str(self.run.path)])

    def kept(self) -> dict[str, dict[str, float]]:
        return {row.id: row.scores for row in read_jsonl(self.run.kept, Kept)}

    def dropped(self) -> dict[str, str]:
        return {row.id: row.rule for row in read_jsonl(self.run.dropped, Dropped)}

    def prompts(self) -> dict[str, Any]:
        counts: dict[str, Any] = json.loads(self.run.filter_report.read_bytes())["prompts"]
        return counts


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def test_a_rule_may_be_named_like_a_field_of_the_file(stage: Stage) -> None:
    code = "def good(answer):\n    return None, 0.1\n\ndef scores(answer):\n    return None, 0.5\n"
    stage.recipe.with_name("mine.py").write_text(code)
    rules = [{**RIGHT, "name": name} for name in ("good", "scores")]
    stage.filter(answers("a", "4"), *rules, {"rule": "agrees"})
    assert stage.kept() == {"a0": {"good": 0.1, "scores": 0.5, "agrees": 1.0}}


def test_scores_of_a_rule_are_kept_and_a_wrong_return_is_named(stage: Stage) -> None:
    stage.filter(answers("a", "4", "it is 4", "5"), RIGHT)
    assert stage.kept() == {"a0": {"right": 1.0}, "a1": {"right": 1 / 7}}
    (detail,) = next(iter(read_jsonl(stage.run.dropped, Dropped))).detail
    assert (detail.rule, describe(detail)) == ("right", "5 is wrong")
    wrongs = "True", "(None, 'good')", "1.5", "(None, True)", "(None, float('nan'))", "(None, float('inf'))"
    more = "Verified(3)", "Verified(None, 0.3, 42)", "chr(0xD800)", "(None, 10**400)", "Reason(rule='r', what=3)"
    imports = "from filters.answer import Verified\nfrom pipeline.records import Reason\n"
    for wrong in (*wrongs, *more):
        code = f"{imports}def right(answer):\n    return {wrong}\n"
        stage.recipe.with_name("mine.py").write_text(code)
        with pytest.raises(DistillError, match=r"wanted a reason \(text\) or None, or a pair of that and a score"):
            stage.filter(answers("a", "4"), RIGHT)


def test_the_report_counts_what_a_function_could_not_check(stage: Stage) -> None:
    code = """
from filters.answer import Verified
from pipeline.records import Reason
def right(answer):
    return Verified(Reason(rule="unverified", note="no reference")) if "5" in answer.text else None
"""
    stage.recipe.with_name("mine.py").write_text(code)
    stage.filter(answers("a", "4", "5", "it is 5"), RIGHT)
    rules = json.loads(stage.run.filter_report.read_bytes())["rules"]
    assert {rule["rule"]: rule["dropped"] for rule in rules} == {"right": 0, "unverified": 2}
    stage.filter(answers("a", "4"), RIGHT)
    assert [rule["rule"] for rule in json.loads(stage.run.filter_report.read_bytes())["rules"]] == ["right"]


def test_the_answer_that_most_agree_on_is_kept(stage: Stage) -> None:
    rows = [
        *answers("most", "It is 4", "five", "it  is 4", "FIVE", "it is 4"),
        *answers("tie", "six", "seven"),
        *answers("few", "a", "b", "c"),
        *answers("one", "eight"),
    ]
    stage.filter(rows, {"rule": "agrees"})
    assert stage.kept() == {
        "most0": {"agrees": 0.6},
        "most2": {"agrees": 0.6},
        "most4": {"agrees": 0.6},
        "tie0": {"agrees": 0.5},  # of two as frequent, the one that came first
        "one0": {"agrees": 1.0},
    }
    assert set(stage.dropped().values()) == {"agrees"}
    said = {row.id: describe(row.detail[0]) for row in read_jsonl(stage.run.dropped, Dropped)}
    assert said["most1"] == "2 of 5 answers say the same, 3 another"
    assert said["few0"] == "1 of 3 answers agree (33%), at least 50% wanted"
    stage.filter(rows, {"rule": "agrees", "min_share": 0.3})
    assert {"few0", "tie0"} <= stage.kept().keys() and "few1" in stage.dropped()
    with pytest.raises(RecipeError, match=r"filters\.rules\[1\]: `agrees` stands twice"):
        stage.filter(rows, {"rule": "agrees"}, {"rule": "agrees"})


def test_answers_that_a_rule_drops_count_against_agreement(stage: Stage) -> None:
    """Two of four say the same and pass: the share is a half, not all."""
    stage.filter(answers("a", "4", "5", "4", "6"), RIGHT, {"rule": "agrees", "min_share": 0.6})
    assert stage.kept() == {}
    stage.filter(answers("a", "4", "5", "4", "6"), RIGHT, {"rule": "agrees"})
    assert {row: scores["agrees"] for row, scores in stage.kept().items()} == {"a0": 0.5, "a2": 0.5}


def test_a_verifiers_result_is_what_agrees(stage: Stage) -> None:
    """`choice` normalises a label: three texts, one result."""
    choice = {"rule": "choice", "labels": ["yes", "no"]}
    stage.filter(answers("a", "Yes.", "**yes**", "no", "maybe"), choice, {"rule": "agrees"})
    assert stage.kept() == {"a0": {"agrees": 0.5}, "a1": {"agrees": 0.5}}
    assert stage.dropped() == {"a2": "agrees", "a3": "choice"}


def brute_agreement(samples: list[tuple[int, int, bool, int]]) -> list[tuple[int, int, int, bool]]:
    found = []
    for prompt, _, passed, result in samples:
        if passed:
            of = [row for row in samples if row[0] == prompt]
            counts = {r: [row[1] for row in of if row[2] and row[3] == r] for r in {row[3] for row in of if row[2]}}
            chosen = min(counts, key=lambda r: (-len(counts[r]), min(counts[r])))
            found.append((len(counts[result]), len(of), len(counts[chosen]), result == chosen))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_agreement_is_that_of_the_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [(int(p), n, bool(rng.random() < 0.8), int(rng.integers(3))) for p in range(6) for n in range(4)]
    rng.shuffle(order := list(range(len(rows))))
    rows = [rows[at] for at in order]
    samples = np.zeros(len(rows), SAMPLE)
    for name, column in zip(("prompt", "sample", "passed", "result"), zip(*rows, strict=True), strict=True):
        samples[name] = column
    found = count_votes(samples)
    columns = (found.same, found.total, found.most, found.chosen)
    assert list(zip(*(one.tolist() for one in columns), strict=True)) == brute_agreement(rows)


@pytest.mark.parametrize(
    ("select", "kept"),
    [
        ("all", ["a0", "a1", "a2", "a4", "b1"]),
        ("first", ["a0", "b1"]),
        ("shortest", ["a1", "b1"]),
        ("best", ["a1", "b1"]),  # the verifier scores short answers higher
        ("agreed", ["a2", "b1"]),
    ],
)
def test_one_of_a_prompts_answers_stays(stage: Stage, select: str, kept: list[str]) -> None:
    rows = [*answers("a", "well, 4", "4", "it is 4", "5", "it is  4"), *answers("b", "5", "4")]
    stage.filter(rows, RIGHT, select=select)
    assert sorted(stage.kept()) == kept
    assert {id_ for id_, rule in stage.dropped().items() if rule == "select"} == {"a0", "a1", "a2", "a4"} - {*kept}
    if select == "first":
        said = {row.id: describe(row.detail[0]) for row in read_jsonl(stage.run.dropped, Dropped)}
        assert said["a1"] == "answer 0 to this prompt stays (first)"
        rules = json.loads(stage.run.filter_report.read_bytes())["rules"]
        assert {key: rules[-1][key] for key in ("rule", "dropped")} == {"rule": "select", "dropped": 3}
        assert json.loads(stage.run.lineage.read_bytes())["filters"]["prompts"] == 2


def test_the_best_is_that_of_the_highest_mean_and_no_score_is_the_lowest(stage: Stage) -> None:
    code = """
def first(answer, place=0):
    score = answer.text.split()[place]
    return None if score == "none" else (None, float(score))

def second(answer):
    return first(answer, 1)
"""
    stage.recipe.with_name("mine.py").write_text(code)
    rules = [{**RIGHT, "name": name} for name in ("first", "second")]
    stage.filter(answers("a", "none none", "0.2 0.6", "0.5 none", "0.4 0.5"), *rules, select="best")
    assert stage.kept() == {"a2": {"first": 0.5}}


def test_of_two_answers_with_one_number_the_newest_stays(stage: Stage) -> None:
    old, new = answers("a", "4", "is 4"), answers("a", "it is 4", "now it is 4", created="2026-01-02T00:00:00Z")
    strange = answers("b", "4", created="yesterday")
    new = [msgspec.structs.replace(row, id=f"new {row.id}") for row in new]
    stage.filter([*new, *old, *strange], RIGHT, select="first")
    assert [*stage.kept()] == ["new a0", "b0"]
    stage.filter(
        [*new, *old], {"rule": "length", "min_chars": 1}, {"rule": "agrees", "min_share": 0.1}, select="agreed"
    )
    assert [*stage.kept()] == ["new a0"]


def test_answers_to_another_question_that_had_the_id_before_are_another_prompts(stage: Stage) -> None:
    """Ids that number the rows of a file move when a row is put in."""
    system = Message("system", "Be brief.")
    italy, spain = ([system, Message("user", f"capital of {land}?")] for land in ("Italy", "Spain"))
    turns = [[*spain, Message("assistant", text), Message("user", f"{text}?")] for text in ("Madrid", "Sevilla")]
    old = [msgspec.structs.replace(row, id=f"old {row.id}", messages=italy) for row in answers("0", "4", "4")]
    new = [msgspec.structs.replace(row, messages=turn) for row, turn in zip(answers("0", "4", "5"), turns, strict=True)]
    stage.filter([*old, *new], RIGHT, select="first", preferences=2)
    assert [*stage.kept()] == ["old 00", "00"]
    assert (stage.prompts()["prompts"], stage.prompts()["kept"]) == (2, 2)
    pairs = [json.loads(line)["id"] for line in (stage.run.path / "preferences.jsonl").read_bytes().splitlines()]
    assert pairs == []  # of two conversations that go on otherwise
    stage.filter([*old, *(msgspec.structs.replace(row, messages=spain) for row in new)], RIGHT, preferences=2)
    pairs = [json.loads(line)["id"] for line in (stage.run.path / "preferences.jsonl").read_bytes().splitlines()]
    assert pairs == ["00:01"]
    stage.filter([*old, msgspec.structs.replace(new[1], messages=spain)], RIGHT)
    assert stage.prompts()["unsolved_ids"] == ["0"]


def test_what_is_gone_is_not_selected_and_counts_for_no_prompt(stage: Stage) -> None:
    rows = [*answers("a", "five", "4", "4", "5"), *answers("b", "6", "7", "8")]
    stage.filter(rows, {"rule": "agrees"}, select="first")
    assert [*stage.kept()] == ["a1"]
    assert stage.dropped() == {
        "a0": "agrees",
        "a2": "select",
        "a3": "agrees",
        **dict.fromkeys(("b0", "b1", "b2"), "agrees"),
    }
    assert (stage.prompts()["kept"], stage.prompts()["unsolved"]) == (1, 0)  # rules let all pass


@pytest.mark.parametrize(
    ("rules", "select", "counted"),
    [([], "all", 0), ([], "shortest", 0), ([], "agreed", 3), ([{"rule": "agrees"}], "all", 3)],
)
def test_votes_are_counted_only_where_results_are_compared(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, rules: list[dict[str, Any]], select: str, counted: int
) -> None:
    asked = list[int]()

    def counting(samples: Any) -> Votes:
        asked.append(len(samples))
        return count_votes(samples)

    monkeypatch.setattr(filters.run, "count_votes", counting)
    stage.filter(answers("a", "4", "4", "5"), *rules, select=select)
    assert asked == [counted] and "a0" in stage.kept()


def test_the_judge_says_which_is_best_by_the_mean_of_its_scores(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {"a0": (3, 5), "a1": (4, 4), "a2": (4, 5)}

    def judged(_: object, run: object, rows: Iterable[Completion]) -> dict[str, Judgement]:
        return {
            row.id: Judgement(
                id=row.id, score=scores[row.id][0], criteria={"fluency": scores[row.id][1]}, version="v", attempts=1
            )
            for row in rows
        }

    monkeypatch.setattr("filters.judge.judge_rows", judged)
    stage.filter(answers("a", "4", "so 4", "thus 4"), RIGHT, select="best", judge={"model": "j"})
    assert stage.kept() == {"a2": {"right": 1 / 6, "judge": 4, "fluency": 5}}


def test_the_same_answer_to_another_prompt_is_a_duplicate_only_without_a_verifier(stage: Stage) -> None:
    rows = [*answers("a", "yes", "Yes!"), *answers("b", "yes")]
    dedup, choice = {"near": None}, {"rule": "choice", "labels": ["yes", "no"]}
    stage.filter(rows, dedup=dedup)
    assert [*stage.kept()] == ["a0"]
    stage.filter(rows, choice, dedup=dedup)
    assert [*stage.kept()] == ["a0", "b0"] and stage.dropped() == {"a1": "exact_duplicate"}
    stage.filter(rows, choice, dedup={**dedup, "of": "answer"})
    assert [*stage.kept()] == ["a0"]
    stage.filter(rows, dedup={"near": 0.9, "of": "row"})
    assert [*stage.kept()] == ["a0", "b0"]


def test_what_most_answers_do_not_say_makes_no_other_one_a_duplicate(stage: Stage) -> None:
    steps = "First I count the cats on the wall, then those in the house, and I add the two numbers: "
    rows = answers("a", *(f"{steps}{number}" for number in (5, 4, 4)))
    stage.filter(rows, {"rule": "agrees"}, dedup={"near": 0.8})
    assert [*stage.kept()] == ["a1"] and stage.dropped() == {"a0": "agrees", "a2": "exact_duplicate"}


def test_pass_at_k_is_the_share_of_draws_with_a_right_answer() -> None:
    for n, c, k in ((5, 2, 1), (5, 2, 3), (6, 0, 2), (4, 4, 4), (7, 1, 7)):
        draws = [*itertools.combinations(range(n), k)]
        assert pass_at(n, c, k) == pytest.approx(sum(min(draw) < c for draw in draws) / len(draws))


def test_prompts_are_counted_apart_from_answers(stage: Stage) -> None:
    rows = [*answers("a", "4", "5", "4", "6"), *answers("b", "5", "6", "7", "8"), *answers("c", "3", "4")]
    stage.filter(rows, RIGHT, select="first")
    counts = stage.prompts()
    assert {key: counts[key] for key in ("prompts", "kept", "answers", "unsolved", "unsolved_ids")} == {
        "prompts": 3,
        "kept": 2,
        "answers": 4,
        "unsolved": 1,
        "unsolved_ids": ["b"],
    }
    assert counts["keep_rate"] == pytest.approx(2 / 3)
    assert counts["pass_at"] == {
        "1": pytest.approx((0.5 + 0 + 0.5) / 3),
        "2": pytest.approx((5 / 6 + 0 + 1) / 3),
        "4": pytest.approx((1 + 0) / 2),  # c has two answers only
    }


def test_the_terminal_says_it_where_prompts_have_several_answers(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.filter(answers("a", "4"), RIGHT)
    assert "prompts" not in capsys.readouterr().out
    stage.filter([*answers("a", "4", "5"), *answers("b", "5", "6")], RIGHT)
    said = "2 prompts, 1 with a kept answer (50.0%); pass@1 25.0%, pass@2 50.0%; 1 with no answer that passes"
    assert said in " ".join(capsys.readouterr().out.split())


def test_where_one_answer_stays_the_keep_rate_is_that_of_prompts(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*answers("a", "4", "so 4", "5"), *answers("b", "5", "4", "6")]
    stage.filter(rows, RIGHT, select="first", min_keep_rate=0.9)  # 2 of 6 answers, but all prompts
    assert capsys.readouterr().err == ""
    more = answers("c", "5", *(f"so {number}" for number in range(10, 20)))
    stage.filter([*rows, *answers("a", *["4"] * 15), *more], RIGHT, select="first", warn_keep_rate=0.7)
    assert list(stage.dropped().values()).count("select") > list(stage.dropped().values()).count("right")
    assert (
        "warning: keep rate by prompt 66.7% is under 70% (filters.warn_keep_rate); right drops"
        in capsys.readouterr().err
    )


def test_keep_rates_are_told_by_column(stage: Stage) -> None:
    rows = [*answers("a", "4", "5", columns={"kind": "sum", "n": 2}), *answers("b", "4", columns={"kind": "loop"})]
    stage.filter(rows, RIGHT)
    slots = json.loads(stage.run.filter_report.read_bytes())["slots"]
    assert {value: count["keep_rate"] for value, count in slots["kind"].items()} == {"sum": 0.5, "loop": 1.0}
    assert "n" not in slots


def test_pairs_of_a_kept_and_a_failed_answer_become_preferences(stage: Stage) -> None:
    rows = [row for name in "abcdefghij" for row in answers(name, "4", "5", "so 4", "6", "7")]
    rows += [*answers("right", "4", "4"), *answers("wrong", "5")]
    stage.filter(rows, RIGHT, preferences=2)
    pairs = [json.loads(line) for line in stage.run.preferences.read_bytes().splitlines()]
    part_of = load_recipe(stage.recipe).prompts.part_of
    wanted = {
        name for name in "abcdefghij" if part_of(Prompt(id=name, messages=[Message("user", f"{name}?")])) != "test"
    }
    assert 0 < len(wanted) < 10
    assert sorted(pair["id"] for pair in pairs) == sorted(
        id_ for name in wanted for id_ in (f"{name}0:{name}1", f"{name}2:{name}3")
    )
    name = min(wanted)
    assert next(pair for pair in pairs if pair["id"] == f"{name}2:{name}3") == {
        "id": f"{name}2:{name}3",
        "prompt": [{"role": "user", "content": f"{name}?"}],
        "chosen": [{"role": "assistant", "content": "so 4"}],
        "rejected": [{"role": "assistant", "content": "6"}],
    }
    stage.filter(rows, RIGHT)  # not wanted any more
    assert not stage.run.preferences.exists()


def test_the_answers_of_all_prompts_are_looked_up_at_once(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look-up reads the prompts of all answers, so one for each prompt would make the time quadratic."""
    search, calls, counts = np.searchsorted, list[object](), list[int]()

    def counted(*given: Any) -> Any:
        calls.append(given)
        return search(*given)

    monkeypatch.setattr(np, "searchsorted", counted)
    for names in ("abcde", "abcdefghijklmnopqrst"):
        calls.clear()
        stage.filter([row for name in names for row in answers(name, "4", "5")], RIGHT, preferences=1)
        counts.append(len(calls))
    assert stage.run.preferences.read_bytes().count(b"\n") > 5
    assert counts[0] == counts[1]


def test_an_answer_that_could_not_be_checked_is_no_wrong_one(stage: Stage) -> None:
    """A choice without a reference to hold it against is `unverified`; what another rule drops, too, is wrong."""
    rows = answers("a", "4", "5", "6", "much longer")
    rows[2:] = [msgspec.structs.replace(row, reference=None) for row in rows[2:]]
    stage.filter(rows, {"rule": "choice", "reference": True}, {"rule": "length", "max_chars": 5}, preferences=9)
    assert stage.dropped() == {"a1": "choice", "a2": "unverified", "a3": "unverified"}
    pairs = [json.loads(line)["id"] for line in stage.run.preferences.read_bytes().splitlines()]
    assert pairs == ["a0:a1", "a0:a3"]


def test_an_interrupted_run_leaves_the_old_preferences_too(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.filter([*answers("a", "4", "5"), *answers("c", "4", "5")], RIGHT, preferences=1)
    before = {path.name: path.read_bytes() for path in stage.run.path.iterdir() if path.suffix != ".lock"}
    assert before["preferences.jsonl"]

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(filters.run, "write_preferences", interrupted)
    rows = answers("b", "4", "5")
    with pytest.raises(KeyboardInterrupt):
        stage.filter(rows, RIGHT, preferences=1)
    monkeypatch.setattr(filters.run, "make_report", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stage.filter(rows, RIGHT)
    before["completions.jsonl"] = b"".join(map(encode_line, rows))
    assert {path.name: path.read_bytes() for path in stage.run.path.iterdir()} == before


def test_a_small_file_is_shared_out_where_a_rule_may_be_slow(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    (stage.recipe.with_name("mine.py")).write_text("import os\ndef right(answer):\n    return str(os.getpid())\n")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    stage.filter([row for number in range(100) for row in answers(f"p{number}", "4", "5", "6")], RIGHT)
    notes = [row.detail[0].note for row in read_jsonl(stage.run.dropped, Dropped)]
    assert len(notes) == 300 and len(set(notes)) == 3


def test_blocks_that_take_longer_hold_up_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block ends when a later one has begun; results come in order all the same."""
    path, seen = tmp_path / "f", tmp_path / "seen"
    path.write_bytes(b"a\nb\nc\nd\n")
    monkeypatch.setattr(filters.stream, "SMALLEST_BLOCK", 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})

    def work(lines: Iterable[tuple[int, bytes | None]]) -> bytes | None:
        ((_, line),) = lines
        if line == b"d\n":
            seen.touch()
        while line == b"a\n" and not seen.exists():
            pass
        return line

    assert list(filters.stream.in_blocks(path, work, slow=True)) == [b"a\n", b"b\n", b"c\n", b"d\n"]


def test_solved_prompts_of_no_passing_answer() -> None:
    samples = np.zeros(3, SAMPLE)
    samples["prompt"] = [1, 1, 2]
    samples["passed"] = [False, True, False]
    unsolved, passes = solved(samples)
    assert (unsolved.tolist(), passes) == ([2], {1: pytest.approx(0.25), 2: 1.0})


def test_a_killed_run_leaves_the_old_files_and_the_next_one_writes_all(stage: Stage) -> None:
    stage.filter([*answers("a", "4", "5"), *answers("c", "4", "5")], RIGHT, preferences=1)
    outputs = (stage.run.kept, stage.run.dropped, stage.run.filter_report, stage.run.preferences)
    before = [path.read_bytes() for path in outputs]
    function = stage.recipe.with_name("mine.py")
    function.write_text("import os\ndef right(answer):\n    if answer.text == '6': os.kill(os.getpid(), 9)\n")
    rows = [*answers("a", "4", "5"), *answers("b", "6")]
    stage.run.completions.write_bytes(b"".join(map(encode_line, rows)))
    command = [sys.executable, "-m", "filters", str(stage.recipe), "--run", str(stage.run.path)]
    assert subprocess.run(command, capture_output=True, cwd=ROOT).returncode == -signal.SIGKILL
    assert [path.read_bytes() for path in outputs] == before
    function.write_text(VERIFIER)
    stage.filter(rows, RIGHT, preferences=1)
    assert [*stage.kept()] == ["a0"] and len(list(read_jsonl(stage.run.dropped, Dropped))) == 2
    assert not list(stage.run.path.glob("*.tmp"))


def test_two_answers_that_say_the_same_are_no_pair(stage: Stage) -> None:
    """A rule of the reasoning drops one of two answers with one text: the pair with another one is taken instead."""
    rows = [
        msgspec.structs.replace(row, reasoning="so I count to four" if row.id[1] == "2" else "ok")
        for row in [*answers("a", "4", "5", "4"), *answers("b", "4", "4", "4")]
    ]
    stage.filter(rows, {"rule": "length", "of": "reasoning", "min_chars": 5}, preferences=1)
    pairs = [json.loads(line)["id"] for line in stage.run.preferences.read_bytes().splitlines()]
    assert pairs == ["a2:a1"]


def test_a_dry_run_names_what_it_does_not_ask_and_leaves_out(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    rows = answers("a", "4", "4", "5")

    def notice(*rules: dict[str, Any], **settings: Any) -> str:
        stage.filter(rows, *rules, **settings)
        capsys.readouterr()
        with stage.run.completions.open("ab") as file:
            file.writelines(map(encode_line, answers("b", *"4" * len(rules))))
        main([str(stage.recipe), "--run", str(stage.run.path), "--dry-run"])
        return capsys.readouterr().err

    assert notice() == ""
    assert "in these figures: select (they come after" in notice(select="first")
    said = notice({"rule": "length"}, {"rule": "agrees"}, dedup={}, select="first")
    assert "agrees, duplicates, select (they" in said and "and 2 answers that came since the run was filtered" in said
    assert said.count("\n") == 1
    data = yaml.safe_load(stage.recipe.read_text())
    stage.recipe.write_text(yaml.safe_dump(data | {"filters": {}}))
    main([str(stage.recipe), "--run", str(stage.run.path), "--dry-run"])
    assert "in these figures: agrees, duplicates (they" in capsys.readouterr().err  # each dropped one then
