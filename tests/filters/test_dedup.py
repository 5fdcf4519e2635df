"""Duplicates: what counts as one, which of two stays, other runs and evaluations, and the stage with them."""

import json
import os
import random
import subprocess
import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import filters.run
import filters.sketches
import filters.stream
from filters.__main__ import main
from filters.minhash import GLIMPSE, agreement, band_keys, fold, fold_prompt, jaccard, ngrams, shape_for, signatures
from filters.reasons import describe
from filters.sketches import joined
from pipeline.errors import DataError, RecipeError
from pipeline.records import Completion, Dropped, Kept, Message, Reason, encode_line, read_jsonl
from pipeline.rundir import RunDir, write_jsonl
from tests.completion_fields import completion_fields

ROOT = Path(__file__).parents[2]
SYLLABLES = [chr(code) for code in range(0xAC00, 0xD7A4, 11)]


def story(seed: int, words: int = 60) -> str:
    """Words that no other seed has."""
    rng = random.Random(seed)
    return " ".join("".join(rng.choices(SYLLABLES, k=rng.randint(2, 4))) for _ in range(words)) + "."


def edited(text: str, words: int, seed: int = 0) -> str:
    """So many words in a row replaced."""
    parts = text.split(" ")
    start = random.Random(seed).randrange(len(parts) - words)
    return " ".join([*parts[:start], *story(1000 + seed, words).rstrip(".").split(" "), *parts[start + words :]])


def similarity(one: str, other: str, n: int = 3) -> float:
    """The definition, character by character."""
    first, second = ({text[i : i + n] for i in range(max(1, len(text) - n + 1))} for text in (fold(one), fold(other)))
    return len(first & second) / len(first | second)


def completion(row_id: str, text: str, prompt: str = "토끼 이야기", **slots: str) -> Completion:
    messages = [Message("system", "너는 이야기꾼이야."), Message("user", prompt)]
    return Completion(**completion_fields(row_id, text, messages=messages, slots=dict(slots)))


class Stage:
    """Runs in a folder of their own; the recipe is the same for all but its `dedup`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.recipe, self.run = folder, folder / "recipe.yaml", RunDir(folder / "run")

    def filter(self, rows: Iterable[Completion], run: str = "run", rules: Iterable[Any] = (), **dedup: Any) -> None:
        self.run = RunDir(self.folder / run)
        self.run.path.mkdir(exist_ok=True)
        self.run.completions.write_bytes(b"".join(map(encode_line, rows)))
        data = {
            "name": "small",
            "teacher": {"model": "teacher"},
            "prompts": {"count": 1, "template": "이야기"},
            "filters": {"rules": list(rules), "dedup": dedup},
        }
        self.recipe.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")
        main([str(self.recipe), "--run", str(self.run.path)])

    def kept(self) -> list[str]:
        return [row.id for row in read_jsonl(self.run.kept, Kept)]

    def dropped(self) -> dict[str, Reason]:
        """The reason of each row that is dropped; here they have one each."""
        rows = list(read_jsonl(self.run.dropped, Dropped))
        assert all([reason.rule for reason in row.detail] == [row.rule] for row in rows)
        return {row.id: row.detail[0] for row in rows}


def like(rule: str, of: str, similarity: float | None = None, **more: Any) -> Reason:
    return Reason(rule=rule, **{"what": "answer", "of": of, "similarity": similarity, **more})


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("토끼가 갔어요.", "토끼가   갔어요!"),
        ("토끼가 갔어요.", " “토끼가” 갔어요…\n"),
        ("가", "\u1100\u1161"),  # the same syllable, as two jamo
        ("The Rabbit", "the rabbit"),
        ("토끼☀️ 안녕", "토끼 안녕"),
        ("snake_case", "snake case"),
        ("토\u00ad끼", "토끼"),  # a soft hyphen
    ],
)
def test_texts_that_fold_to_the_same(one: str, other: str) -> None:
    assert fold(one) == fold(other)


@pytest.mark.parametrize(
    ("one", "other"), [("토끼", "토 끼"), ("हिन्दी", "हन्द"), ("1 마리", "2 마리"), ("café", "cafe")]
)
def test_texts_that_do_not(one: str, other: str) -> None:
    assert fold(one) != fold(other)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("What is 12 + 7?", " what is  12 + 7", True),
        ("Then, who came?", "then who came…", True),
        ("u\u0308ber (alles).", "\u00fcber (alles)", True),
        ("Wie hoch sind die Kosten?", "Wie hoch sind die Kosten ?", True),
        ("Combien ? Merci.", "combien? merci", True),
        ("送料はいくら？", "\ufeff送料\u200bはいくら", True),
        ("ما هي عاصمة فرنسا؟", "ما هي عاصمة فرنسا", True),
        ("Hola, ¿dónde está mi pedido?", "Hola, dónde está mi pedido?", True),
        ("ပစ္စည်းဘယ်မှာလဲ။", "ပစ္စည်းဘယ်မှာလဲ", True),
        ("የት ነው።", "የት ነው", True),
        ("यह क्या है।", "यह क्या है", True),
        ("What is 12 + 7?", "What is 12 - 7?", False),
        ("What is -5?", "What is 5?", False),
        ("What is 1.5?", "What is 1 5?", False),
        ("What is 5!?", "What is 5?", False),
        ("50%", "50", False),
        ("Write it in C++.", "Write it in C#.", False),
        ("👍", "👎", False),
        ("What does ? match", "What does . match", False),
    ],
)
def test_prompts_that_are_the_same(one: str, other: str, same: bool) -> None:
    assert (fold_prompt(one) == fold_prompt(other)) == same


@given(st.text(st.sampled_from("가힣각Aaß1²_ .\t\n“…—~\u0301\u1100\u1161\u00adİ漢й½"), max_size=12))
def test_folding_is_that_of_the_definition(text: str) -> None:
    """Letters, marks and digits stay, format characters go, each run of anything else is one space."""
    lower = unicodedata.normalize("NFC", text.casefold())
    seen = [char for char in lower if unicodedata.category(char) != "Cf"]
    assert fold(text) == " ".join(
        "".join(char if unicodedata.category(char)[0] in "LMN" else " " for char in seen).split()
    )


def calling(row_id: str, text: str = "", **arguments: Any) -> Completion:
    call = {"id": row_id, "type": "function", "function": {"name": "weather", "arguments": json.dumps(arguments)}}
    return Completion(**completion_fields(row_id, text, tool_calls=[call]))


def test_answers_of_tool_calls_are_compared_by_what_they_call(stage: Stage) -> None:
    stage.filter([calling("c0", city="Berlin")], run="other", exact=True)
    rows = [calling("c1", city="Bonn"), calling("c2", city="Bonn"), calling("c3", city="Berlin")]
    words = "I will look the weather up for you."
    rows += [calling("c4", words, city="Köln"), calling("c5", words, city="Essen"), completion("c6", words)]
    stage.filter(rows, exact=True, near=None, against=[str(stage.folder / "other")])
    assert stage.kept() == ["c1", "c4", "c5", "c6"]
    other = str(stage.folder / "other")
    assert stage.dropped() == {"c2": like("exact_duplicate", "c1"), "c3": like("exact_duplicate", "c0", source=other)}


def test_reasoning_makes_no_other_answer(stage: Stage) -> None:
    rows = [Completion(**completion_fields(f"r{n}", "Four.", reasoning=f"Thought {n}")) for n in range(2)]
    stage.filter(rows, exact=True)
    assert stage.dropped() == {"r1": like("exact_duplicate", "r0")}


@pytest.mark.parametrize("seed", range(3))
def test_agreement_counts_equal_bytes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 2, (50, GLIMPSE), dtype=np.uint8)
    rows[:2] = rows[2]  # all 64 agree
    rows[3] = 1 - rows[2]
    counted = [sum(int(a == b) for a, b in zip(row, rows[2], strict=True)) for row in rows]
    assert agreement(rows, rows[2]).tolist() == counted
    assert (counted[0], counted[3]) == (64, 0)


@given(st.text(max_size=40), st.text(max_size=40), st.integers(1, 6))
def test_jaccard_is_that_of_the_definition(one: str, other: str, n: int) -> None:
    sets = [{text.ljust(n)[i : i + n] for i in range(max(1, len(text) - n + 1))} for text in (fold(one), fold(other))]
    assert jaccard(ngrams(fold(one), n), ngrams(fold(other), n)) == len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@pytest.mark.parametrize("near", [0.5, 0.6, 0.7, 0.8, 0.9, 0.95])
def test_pairs_as_similar_as_the_threshold_share_a_band_and_strangers_do_not(near: float) -> None:
    shape = shape_for(near)
    assert shape[0] * shape[1] <= 120
    words = range(1, 30)
    texts = [fold(story(seed, 60)) for seed in range(600)]
    pairs = [(text, fold(edited(text, words[index % 29], index))) for index, text in enumerate(texts)]
    alike = [pair for pair in pairs if similarity(*pair) >= near]
    ours, theirs = (band_keys(signatures([pair[side] for pair in alike], 3), shape) for side in (0, 1))
    assert len(alike) > 20
    assert (ours == theirs).any(axis=1).mean() >= 0.98
    others = band_keys(signatures(texts, 3), shape)
    assert (others[1:] == others[:-1]).any(axis=1).sum() == 0


def test_the_same_and_nearly_the_same_are_dropped_and_name_the_row_that_stays(stage: Stage) -> None:
    first, second = story(1), story(2)
    near, far = edited(first, 4), edited(second, 20)
    assert similarity(first, near) > 0.8 > similarity(second, far)
    rows = [
        completion("a", first),
        completion("b", "  " + first.replace(".", "!!")),
        completion("c", near),
        completion("d", second),
        completion("e", far),
    ]
    stage.filter(rows)
    assert stage.kept() == ["a", "d", "e"]
    dropped = stage.dropped()
    assert dropped == {
        "b": like("exact_duplicate", "a"),
        "c": like("near_duplicate", "a", similarity(first, near)),
    }
    assert describe(dropped["b"]) == "the same answer as a"
    assert describe(dropped["c"]) == f"answer {similarity(first, near):.2f} similar to a"


def test_what_stays_does_not_depend_on_the_order_of_the_file(stage: Stage) -> None:
    texts = [story(seed) for seed in range(40)]
    rows = [completion(f"{number:02}{copy}", edited(text, 3, copy) if copy else text)
            for number, text in enumerate(texts) for copy in range(3)]  # fmt: skip
    results = []
    for seed in range(3):
        random.Random(seed).shuffle(rows)
        stage.filter(rows)
        results.append((sorted(stage.kept()), stage.dropped()))
    assert results[0] == results[1] == results[2]
    assert results[0][0] == [f"{number:02}0" for number in range(40)]


def test_every_dropped_row_is_like_one_that_stayed(stage: Stage) -> None:
    """A chain, each like the next only: a, b, c, … must not all hang on the first."""
    chain = [story(7, 80)]
    for step in range(1, 9):
        words = chain[-1].split(" ")
        words[step * 8 : step * 8 + 6] = story(500 + step, 6).rstrip(".").split(" ")
        chain.append(" ".join(words))
    assert similarity(chain[0], chain[1]) > 0.8 > similarity(chain[0], chain[2])
    stage.filter([completion(f"c{number}", text) for number, text in enumerate(chain)])
    texts = {f"c{number}": text for number, text in enumerate(chain)}
    assert stage.kept() == ["c0", "c2", "c4", "c6", "c8"]
    for row_id, reason in stage.dropped().items():
        assert reason.of in stage.kept()
        assert similarity(texts[row_id], texts[reason.of]) == reason.similarity >= 0.8


def test_the_judges_verdicts_say_which_of_two_is_better(stage: Stage) -> None:
    text = story(3)
    rows = [completion("a", text), completion("b", text), completion("c", edited(text, 3)), completion("d", text)]
    verdicts = [{"id": "a", "score": 3}, {"id": "b", "score": None}, {"id": "c", "score": 5}, {"id": "d", "score": 4}]
    stage.run.path.mkdir()
    lines = (json.dumps({**verdict, "version": "v", "attempts": 1}) + "\n" for verdict in verdicts)
    stage.run.judgements.write_text("".join(lines))
    stage.filter(rows)
    assert stage.kept() == ["c"]
    assert {row: (reason.rule, reason.of) for row, reason in stage.dropped().items()} == dict.fromkeys(
        "abd", ("near_duplicate", "c")
    )


def test_only_what_the_rules_let_pass_is_compared(stage: Stage) -> None:
    text = story(4)
    rows = [completion("a", "AI " + text), completion("b", text), completion("c", text)]
    stage.filter(rows, rules=[{"rule": "banned_words", "words": ["AI"]}])
    assert stage.kept() == ["b"]
    assert stage.dropped() == {"a": Reason(rule="banned_words", found="AI"), "c": like("exact_duplicate", "b")}


def test_what_is_turned_off_is_not_dropped(stage: Stage) -> None:
    text = story(5)
    rows = [completion("a", text), completion("b", text), completion("c", edited(text, 3))]
    stage.filter(rows, near=None)
    assert stage.kept() == ["a", "c"]
    stage.filter(rows, near=None, exact=False)
    assert stage.kept() == ["a", "b", "c"]
    with pytest.raises(RecipeError, match=r"recipe\.yaml: filters\.dedup `exact: false` needs `near: null`"):
        stage.filter(rows, exact=False)


def test_answers_like_those_of_another_run_are_dropped(stage: Stage) -> None:
    first, second = story(6), story(7)
    stage.filter([completion("x", first), completion("y", story(8))], run="first")
    other = stage.run.path
    rows = [completion("a", edited(first, 3)), completion("b", first), completion("c", second)]
    stage.filter(rows, against=[str(other)])
    assert stage.kept() == ["c"]
    assert stage.dropped() == {
        "b": like("exact_duplicate", "x", source=str(other)),
        "a": like("near_duplicate", "x", similarity(first, rows[0].text), source=str(other)),
    }
    assert describe(stage.dropped()["b"]) == f"the same answer as x in {other}"
    assert [row.id for row in read_jsonl(RunDir(other).kept, Kept)] == ["x", "y"]


def test_another_run_that_is_filtered_meanwhile_is_read_as_it_was(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = story(6)
    stage.filter([completion("x", story(8)), completion("y", first)], run="first")
    other = stage.run

    def filtered_meanwhile(*arguments: Any) -> Any:
        write_jsonl(other.kept, list(read_jsonl(other.kept, Kept))[1:])
        return joined(*arguments)

    monkeypatch.setattr(filters.run, "joined", filtered_meanwhile)
    row = completion("a", edited(first, 3))
    stage.filter([row], against=[str(other.path)])
    similar = similarity(first, row.text)
    assert stage.dropped() == {"a": like("near_duplicate", "y", similar, source=str(other.path))}


def test_nothing_that_an_evaluation_asks_or_expects_is_kept(stage: Stage, tmp_path: Path) -> None:
    answer, prompts = story(9), tmp_path / "prompts.jsonl"
    stage.filter([completion("h", answer, "곰 이야기"), completion("v", story(8), "사자 이야기")], run="evaluated")
    other, (test, validation) = stage.run.path, stage.run.kept.read_bytes().splitlines(keepends=True)
    stage.run.test.write_bytes(test)
    stage.run.validation.write_bytes(validation)
    prompts.write_text(
        '{"prompt": "여우 이야기"}\n{"messages": [{"role": "user", "content": "늑대 이야기"}]}\n'
        '{"id": 7, "prompt": "양 이야기"}\n',
        encoding="utf-8-sig",  # with a byte order mark
    )
    rows = [
        completion("a", story(10), "곰  이야기."),
        completion("b", edited(answer, 3)),
        completion("c", story(11), "여우  이야기"),
        completion("d", story(12), "늑대 이야기"),
        completion("e", story(13), "토끼 이야기"),
        completion("f", story(14), "토끼 이야기"),
        completion("g", story(15), "사자 이야기"),
        completion("i", story(16), "양 이야기"),
    ]
    stage.filter(rows, contamination=[str(other), str(prompts)])
    assert stage.kept() == ["e", "f"]
    reasons = stage.dropped()
    assert {reason.rule for reason in reasons.values()} == {"contamination"}
    assert reasons["a"] == like("contamination", "h", source=str(other), what="prompt")
    assert reasons["b"].similarity and describe(reasons["b"]).endswith(f"similar to h in {other}")
    assert describe(reasons["g"]) == f"the same prompt as v in {other}"
    assert describe(reasons["c"]) == f"the same prompt as row 1 in {prompts}"
    assert describe(reasons["d"]) == f"the same prompt as row 2 in {prompts}"
    assert describe(reasons["i"]) == f"the same prompt as 7 in {prompts}"


def test_what_is_like_a_test_row_and_more_like_another_row_is_contaminated(stage: Stage, tmp_path: Path) -> None:
    """The other row stays, as it is less like the test row."""
    both = "lamp river stone cloud paper green violet bridge winter candle silver yonder"
    test, other = both.replace("silver", "zebra"), f"x{both}xx"
    assert similarity(test, other) < 0.81 < similarity(both, test) < similarity(both, other)
    evaluated = tmp_path / "evaluated.jsonl"
    evaluated.write_text(json.dumps({"id": "t", "prompt": "test", "text": test}))
    contaminated = like("contamination", "t", similarity(both, test), source=str(evaluated))
    stage.filter([completion("a", other), completion("b", both)], near=0.81, contamination=[str(evaluated)])
    assert (stage.kept(), stage.dropped()) == (["a"], {"b": contaminated})
    main([str(stage.recipe), "--run", str(stage.run.path), "--sweep", "100"])
    assert [row.id for row in read_jsonl(stage.run.path / "sweep" / "100" / "kept.jsonl", Kept)] == ["a"]
    settings = {"near": 0.81, "contamination": [str(evaluated)], "against": [str(stage.run.path)]}
    stage.filter([completion("b", both)], run="later", **settings)
    assert stage.dropped() == {"b": contaminated}


def test_answers_to_prompts_that_are_alike(stage: Stage) -> None:
    prompt = "3~5세 어린이용 한국어 동화 한 편을 써 주세요. 등장: 토끼 토토. 키워드: 당근, 비. 장소: 숲속. 200~400자."
    near = prompt.replace("숲속", "바닷가")
    assert 0.8 < similarity(prompt, near) < 1
    rows = [
        completion("a", story(15), prompt),
        completion("b", story(16), prompt),
        completion("c", story(17), near),
        completion("d", story(18), "곰 이야기"),
    ]
    stage.filter(rows)
    assert stage.kept() == ["a", "b", "c", "d"]
    stage.filter(rows, prompts=1)
    assert stage.kept() == ["a", "c", "d"]
    stage.filter(rows, prompts=0.8)
    assert stage.kept() == ["a", "d"]
    assert stage.dropped() == {
        "b": like("similar_prompt", "a", what="prompt"),
        "c": like("similar_prompt", "a", similarity(prompt, near), what="prompt"),
    }


def test_signs_make_another_prompt(stage: Stage, tmp_path: Path) -> None:
    evaluated = tmp_path / "evaluated.jsonl"
    evaluated.write_text('{"prompt": "What is 12 / 7?"}\n{"prompt": "What is 9 - 9?"}\n')
    rows = [completion(sign, "It is 0.", f"What is 9 {sign} 9") for sign in "+-*"]
    rows += [completion("again", "It is 0.", "what is 9 + 9?"), completion("12", "It is 84.", "What is 12 * 7?")]
    stage.filter(rows, of="row", near=None, contamination=[str(evaluated)])
    assert stage.kept() == ["+", "*", "12"]
    assert {row: reason.rule for row, reason in stage.dropped().items()} == {
        "-": "contamination",
        "again": "exact_duplicate",
    }
    stage.filter(rows, exact=False, near=None, prompts=1)
    assert stage.kept() == ["+", "-", "*", "12"]


def test_the_report_counts_duplicates_as_dropped(stage: Stage) -> None:
    text = story(19)
    rows = [completion("a", text, hero="토토"), completion("b", text, hero="두두"), completion("c", edited(text, 3))]
    stage.filter(rows)
    report = json.loads(stage.run.filter_report.read_bytes())
    assert (report["rows"], report["kept"], report["dropped"]) == (3, 1, 2)
    assert {rule["rule"]: (rule["dropped"], rule["alone"], rule["together"]) for rule in report["rules"]} == {
        "exact_duplicate": (1, 1, 0),
        "near_duplicate": (1, 1, 0),
    }
    assert report["rules"][1]["settings"] == {"near": 0.8, "ngram": 3}
    assert report["rules"][0]["examples"][0]["reason"] == "the same answer as a"
    assert report["slots"]["hero"]["두두"] == {"rows": 1, "kept": 0, "keep_rate": 0.0}
    bars = report["lengths"].values()
    assert (sum(bar["kept"] for bar in bars), sum(bar["dropped"] for bar in bars)) == (1, 2)
    lineage = json.loads(stage.run.lineage.read_bytes())["filters"]
    assert lineage["dedup"]["near"] == 0.8
    assert {"numpy", "rensa"} <= lineage["versions"].keys()


def test_a_dry_run_leaves_duplicates_dropped(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    stage.filter([completion("a", story(20)), completion("b", story(20))])
    capsys.readouterr()
    main([str(stage.recipe), "--run", str(stage.run.path), "--dry-run"])
    assert "2 answers: 1 kept (50.0%), with these rules 1 (50.0%)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("dedup", "message"),
    [
        ({"against": ["nowhere"]}, r"filters\.dedup\.against\[0\]: nowhere/kept\.jsonl: no such file"),
        ({"contamination": ["nowhere.jsonl"]}, r"filters\.dedup\.contamination\[0\]: nowhere\.jsonl: no such file"),
        ({"against": ["{run}"]}, r"filters\.dedup\.against\[0\]: .*run is this run itself"),
        ({"contamination": ["{run}/test.jsonl"]}, r"filters\.dedup\.contamination\[0\]: .* is this run itself"),
        ({"near": 0.2}, r"filters\.dedup\.near should be greater than or equal to 0\.5, got 0\.2"),
    ],
)
def test_wrong_settings(stage: Stage, dedup: dict[str, Any], message: str) -> None:
    filled = {
        key: [path.format(run=stage.run.path) for path in value] if isinstance(value, list) else value
        for key, value in dedup.items()
    }
    stage.run.path.mkdir()
    stage.run.test.write_bytes(b"")
    with pytest.raises(RecipeError, match=message):
        stage.filter([completion("a", story(21))], **filled)
    assert not stage.run.kept.exists()


def test_a_bad_line_of_another_file_is_named_and_nothing_is_replaced(stage: Stage, tmp_path: Path) -> None:
    rows = [completion("a", story(22))]
    stage.filter(rows)
    before = stage.run.kept.read_bytes()
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "곰"}\n\n{"question": "?"}\n')
    with pytest.raises(DataError, match=r"prompts\.jsonl:3: neither `messages` nor `prompt`"):
        stage.filter(rows, contamination=[str(prompts)])
    prompts.write_text('{"prompt": "곰", "a": ' + "[" * 100_000)
    with pytest.raises(DataError, match=r"prompts\.jsonl:1: "):
        stage.filter(rows, contamination=[str(prompts)])
    assert stage.run.kept.read_bytes() == before
    assert not list(stage.run.path.glob("*.tmp"))


def test_another_run_is_read_in_batches(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.filter([completion(f"old{n}", story(n)) for n in range(7)], run="old")
    other = str(stage.run.path)
    monkeypatch.setattr(filters.sketches, "BATCH", 3)
    stage.filter([completion(f"new{n}", edited(story(n), 2)) for n in range(8)], against=[other])
    assert {row: why.of for row, why in stage.dropped().items()} == {f"new{n}": f"old{n}" for n in range(7)}
    assert {why.source for why in stage.dropped().values()} == {other}
    with (stage.folder / "old" / "kept.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(DataError, match=r"kept\.jsonl:8: no `text`"):
        stage.filter([completion("a", story(1))], against=[other])


def test_an_interrupted_run_leaves_the_old_files(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [completion("a", story(23)), completion("b", story(23))]
    stage.filter(rows)
    before = {path.name: path.read_bytes() for path in stage.run.path.iterdir()}

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(filters.run, "find_duplicates", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stage.filter(rows)
    assert {path.name: path.read_bytes() for path in stage.run.path.iterdir()} == before


def test_several_processes_find_the_same(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also that processes may hash after this one has: rensa's threads would not survive the fork."""
    texts = [story(seed, 40) for seed in range(300)]
    rows = [completion(f"{number:03}{copy}", edited(text, 2, copy) if copy else text)
            for number, text in enumerate(texts) for copy in range(3)]  # fmt: skip
    random.Random(1).shuffle(rows)
    stage.filter(rows)
    alone = (stage.kept(), stage.dropped(), stage.run.filter_report.read_bytes())
    monkeypatch.setattr(filters.stream, "BLOCK", 1 << 18)
    monkeypatch.setattr(filters.stream, "PARALLEL_FROM", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    stage.filter(rows)
    assert len(alone[0]) == 300
    assert (stage.kept(), stage.dropped(), stage.run.filter_report.read_bytes()) == alone


def test_the_benchmark_runs() -> None:
    command = [sys.executable, "-m", "benchmarks.near_duplicates", "--stories", "2000"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if line.startswith("| filters "))
    precision, recall = (float(cell) for cell in row.split("|")[3:5])
    assert precision >= 0.95
    assert recall >= 0.95
