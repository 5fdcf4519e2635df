"""Figures of answers, of differences and of the promise, against hand calculations."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from evaluate.document import Claim, Estimate, ModelReport, Scope, exactly
from evaluate.figures.accuracy import VerifiedAnswers, by_category, verified_samples
from evaluate.figures.promise import claims, holds
from evaluate.figures.quality import (
    Quality,
    answer_figures,
    assess,
    difference,
    differences,
    failed_rules,
    groups_of,
    measure_quality,
    named_slots,
    perplexity_figures,
    probe_answers,
    split_words,
)
from evaluate.figures.statistics import Figure, Figures, distinct, draw, ratio, wilson
from evaluate.measure.probes import ProbePrompts
from evaluate.measure.results import ProbeResult, RowScore, answer_row
from evaluate.models import kv_bytes_per_token
from filters.ruleset import RuleSet, load_rules
from pipeline.prompts_config import PromptsConfig, UserConfig
from pipeline.recipe import Recipe
from pipeline.records import Kept, Message, Prompt, Reason
from pipeline.serve_config import ServeConfig
from tests.completion_fields import completion_fields

RULES = [{"rule": "length", "min_chars": 10, "max_chars": 100}]


def recipe_of(rules: list[dict[str, Any]] = RULES, **sections: Any) -> Recipe:
    prompts = {"count": 2, "template": "{who} {things}", "slots": {"who": ["a bear"], "things": ["달", "비"]}}
    given = {"prompts": prompts, "filters": {"rules": rules}, **sections}
    return Recipe(name="t", teacher={"model": "m"}, **given)


def rules_of(recipe: Recipe) -> RuleSet:
    return load_rules(recipe.filters, Path("r.yaml"))


def row_of(text: str, **changes: Any) -> Kept:
    return Kept(**completion_fields("r", text, **changes))


def test_words_are_counted_without_case_and_punctuation() -> None:
    assert split_words("The cat's hat, THE hat!") == ["the", "cat's", "hat", "the", "hat"]
    assert split_words("토끼 토토가 “당근을” 먹었어요.") == ["토끼", "토토가", "당근을", "먹었어요"]
    assert split_words("我爱AI ok") == ["我", "爱", "ai", "ok"]  # no spaces: by character
    assert split_words("किताब पढ़ना, நீங்கள் İstanbul’da") == ["किताब", "पढ़ना", "நீங்கள்", "i̇stanbul’da"]
    assert split_words("می‌روم كِتَاب") == ["می‌روم", "كِتَاب"]
    assert split_words("ແມວAI") == ["ແ", "ມ", "ວ", "ai"]


def test_distinct_n_by_hand() -> None:
    # the cat the hat | the cat sat: 7 words; the, cat, hat, sat; the-cat, cat-the, the-hat, cat-sat.
    texts = [split_words("The cat, the hat."), split_words("The cat sat.")]
    for n, different in ((1, 4), (2, 4)):
        found = distinct(texts, n, draw(range(2)))
        assert found and found.value == pytest.approx(different / 7)
    assert distinct([[], []], 1, draw(range(2))) is None
    # Ten words, three different: without the first text 2 of 2 are, without the second 1 of 8. By the jackknife the
    # second text alone has 0.3 - (0.3 - 2 / 2 - (0.3 - 1 / 8)) / 2; the first one would be as far below, which is 0.
    drawn = draw(range(2))
    found, seconds = distinct([["a"] * 8, ["b", "c"]], 1, drawn), drawn.counts[:, 1]
    assert found
    for count, figure in enumerate((0, 0.3, 0.7375)):
        assert {*found.resampled[seconds == count].round(4).tolist()} == {figure}


def test_the_interval_of_distinct_n_is_around_the_figure() -> None:
    # Twenty answers that share half of their words: a resample repeats some, which alone would put it below.
    texts = [[f"shared{i % 5}", *[f"own{i}"] * (1 + i % 2)] for i in range(20)]
    found = distinct(texts, 1, draw(range(20)))
    assert found and found.value == 25 / 50
    estimate = found.estimate()
    assert estimate.low < found.value < estimate.high and estimate.high - estimate.low < 0.3
    assert float(found.resampled.mean()) == pytest.approx(found.value, abs=0.01)
    # Without a text of two words 24 of 48 are left, of three 24 of 47: each of these ten moves the figure.
    spread = (10 / 2) ** 0.5 * (24 / 47 - 25 / 50) * 19 / 20
    assert float(found.resampled.std()) == pytest.approx(spread, rel=0.04)


def test_the_interval_of_distinct_n_knows_that_another_set_of_answers_repeats_more_or_less() -> None:
    # Half of the answers are one story: the figure is nearly the share of the others, so as wide as that share's.
    texts = [[f"{'all' if i % 2 else i} {n}" for n in range(10)] for i in range(40)]
    found = distinct(texts, 1, draw(range(40)))
    share = ratio([1.0, 0.0] * 20, [1.0] * 40, draw(range(40)))
    assert found and share and found.value == 21 / 40
    (low, high), (least, most) = ((one.estimate().low, one.estimate().high) for one in (found, share))
    assert high - low == pytest.approx(most - least, abs=0.01)
    grouped = distinct(texts, 1, draw([n // 2 for n in range(40)]))  # each of twenty groups has the story once
    assert grouped and grouped.value == found.value and grouped.prompts == 20
    assert grouped.estimate().low == pytest.approx(grouped.estimate().high)


def test_the_bootstrap_of_a_share_is_the_binomial_s() -> None:
    # 30 of 100: the normal approximation gives 0.3 ± 1.96 · sqrt(0.3 · 0.7 / 100) = 0.210 to 0.390.
    found = ratio([1.0] * 30 + [0.0] * 70, [1.0] * 100, draw(range(100)))
    assert found
    estimate = found.estimate()
    assert estimate.value == pytest.approx(0.3)
    assert (estimate.low, estimate.high) == pytest.approx((0.210, 0.390), abs=0.015)
    assert ratio([0.0], [0.0], draw(range(1))) is None


def test_one_answer_looked_at() -> None:
    recipe = recipe_of()
    rules, wanted = rules_of(recipe), named_slots(recipe, rules_of(recipe))
    found = assess(row_of("Bear saw 달님.", slots={"who": "a bear", "things": ["달", "비"]}), rules, wanted, 4)
    said = found.values
    assert said["passing"] and said["stopped"] and not said["loops"] and said["judge"] == 4
    assert said["named"] == pytest.approx(2 / 3) and said["adherence"] == 0  # the bear, and 달 with its 님; no 비
    short = assess(row_of("Bear", finish_reason="length"), rules, wanted, None)
    assert short.values["passing"] is False and list(short.dropped_by) == ["length"]
    assert not short.values["stopped"] and short.values["named"] is None
    loop = assess(row_of("It ran up the hill and fell. " * 3), rules, wanted, None)
    assert loop.values["loops"] and loop.values["passing"]  # whether or not the recipe has the rule
    off = dict.fromkeys(("duplicate_sentences", "duplicate_sentence_chars", "repeated_span"))
    own = rules_of(recipe_of([{"rule": "repetition", "top_ngrams": {}, "duplicate_ngrams": {}, **off}]))
    assert not assess(row_of("It ran up the hill and fell. " * 3), own, wanted, None).values["loops"]
    bare = recipe_of([])
    assert assess(row_of("Bear"), rules_of(bare), named_slots(bare, rules_of(bare)), None).values["passing"] is None


def test_what_adherence_asks_comes_from_the_recipe_its_rule_or_all_slots() -> None:
    rule = {"rule": "adherence", "slots": ["who"], "aliases": {"a bear": ["Dudu"]}}
    for recipe, slots in (
        (recipe_of(), ["who", "things"]),
        (recipe_of([rule]), ["who"]),
        (recipe_of([rule], evaluate={"adherence": ["things"]}), ["things"]),
    ):
        assert named_slots(recipe, rules_of(recipe)).slots == slots
    recipe = recipe_of([rule])
    rules = rules_of(recipe)
    found = assess(
        row_of("Dudu came home.", slots={"who": "a bear", "things": "달"}), rules, named_slots(recipe, rules), None
    )
    assert found.values["named"] == 1 and found.values["passing"]
    recipe = recipe_of([{"rule": "adherence", "slots": ["who"], "whole_word": False}])
    rules = rules_of(recipe)
    found = assess(row_of("Die Bären schlafen.", slots={"who": "Bär"}), rules, named_slots(recipe, rules), None)
    assert found.values["named"] == 1 and found.values["passing"]


def test_figures_are_means_over_the_answers_that_have_one() -> None:
    recipe = recipe_of()
    rules, wanted = rules_of(recipe), named_slots(recipe, rules_of(recipe))
    answers = [
        assess(row_of("A bear in the night.", slots={"who": "a bear"}), rules, wanted, 5),
        assess(row_of("No.", slots={"who": "a bear"}, finish_reason="length"), rules, wanted, None),
        assess(row_of("The end of it.", slots={}), rules, wanted, 2),
    ]
    found = {name: figure.value for name, figure in answer_figures(answers, draw(range(3))).items()}
    assert found == pytest.approx(
        {
            "passing": 2 / 3,
            "adherence": 1 / 2,  # the last one was asked for nothing
            "named": 1 / 2,
            "loops": 0,
            "stopped": 2 / 3,
            "distinct_1": 9 / 10,  # `the` comes twice
            "distinct_2": 7 / 10,
            "characters": (20 + 3 + 14) / 3,
            "judge": 3.5,
        }
    )


def test_shares_of_answers_have_wilson_s_interval_over_those_that_have_one() -> None:
    """Of 64 probes 63 pass. The bootstrap would begin at 95.3%, as for one in eight of the students of just 95%."""
    recipe = recipe_of()
    rules, wanted = rules_of(recipe), named_slots(recipe, rules_of(recipe))
    good, bad = (assess(row_of(text, slots={"who": "a bear"}), rules, wanted, 4) for text in ("A bear slept.", "No."))
    free = assess(row_of("Nothing was asked for.", slots={}), rules, wanted, 4)
    found = answer_figures([*[good] * 31, bad, *[free] * 32], draw(range(64)))
    for name, share in (("passing", wilson(63 / 64, 64)), ("adherence", wilson(31 / 32, 32)), ("loops", wilson(0, 64))):
        assert (found[name].estimate().low, found[name].estimate().high) == share
    assert found["judge"].exact is None and found["named"].exact is None  # no yes or no


def prompt(number: int) -> Prompt:
    return Prompt(id=f"p{number}", messages=[Message("user", f"q{number}")], slots={"who": "a bear", "things": ["비"]})


def result(texts: dict[int, str]) -> ProbeResult:
    answers = [answer_row("m", prompt(number), text) for number, text in texts.items()]
    return ProbeResult(answers=answers)


def test_models_are_compared_on_the_prompts_that_all_have_answered() -> None:
    recipe, prompts = recipe_of(), ProbePrompts("slots", [prompt(0), prompt(1), prompt(2)], [prompt(3)])
    good, bad = "a bear in the rain", "no"
    probed = {
        "teacher": result({0: good, 1: good, 2: good, 3: good}),
        "student_before": result({0: bad, 1: bad, 3: bad}),  # its request about 2 failed
        "student_after": result({0: good, 1: bad, 2: bad, 3: good}),
    }
    answers = probe_answers(prompts, probed)
    prompts.seen[0] = msgspec.structs.replace(prompt(0), reference="now")
    assert {key: rows["p0"].reference for key, rows in probe_answers(prompts, probed).items()} == dict.fromkeys(
        probed, "now"
    )
    quality = measure_quality(recipe, rules_of(recipe), prompts, answers, {})
    assert {part: len(ids) for part, ids in quality.prompts.items()} == {"all": 3, "seen": 2, "unseen": 1}
    assert quality.figures["all"]["student_after"]["passing"].value == pytest.approx(2 / 3)
    after = [quality.answers["student_after"][id_] for id_ in quality.prompts["all"]]
    assert failed_rules(after) == {"length": pytest.approx(1 / 3)}
    found = {(d.against, d.part): d for d in differences(quality.figures) if d.figure == "passing"}
    gain = found["student_before", "all"]
    assert gain.change.value == pytest.approx(2 / 3) and gain.better == "higher"
    assert found["student_before", "unseen"].change == Estimate(1.0, 1.0, 1.0)
    assert {one.improved for one in found.values()} == {None}  # three prompts prove nothing


@pytest.mark.parametrize(("prompts", "improved"), [(4, None), (19, None), (20, True), (60, True)])
def test_a_difference_over_few_prompts_is_not_called_one(prompts: int, improved: bool | None) -> None:
    counts = draw(range(prompts))
    figures = {
        key: ratio([right] * prompts, [1.0] * prompts, counts) for key, right in {"one": 0.0, "other": 1.0}.items()
    }
    assert figures["one"] and figures["other"]
    found = difference("passing", "other", "one", figures["other"], figures["one"], "higher", "all")
    assert found.change.low > 0 and found.improved is improved  # the interval alone would call it one
    assert difference("named", "other", "one", figures["other"], figures["one"], None, "all").improved is None
    assert difference("passing", "other", "one", figures["one"], figures["one"], "higher", "all").improved is None
    texts = [["a"], ["b"], ["c"]]
    different = distinct(texts, 1, draw(range(3)))
    assert different and different.prompts == 3


def judged(scores: dict[str, dict[int, int]]) -> tuple[Quality, Claim]:
    """64 prompts that teacher and student answer alike, with the judge's scores that could be read."""
    recipe, prompts = recipe_of(), ProbePrompts("file", [prompt(number) for number in range(64)])
    answers = probe_answers(prompts, {key: result(dict.fromkeys(range(64), "a bear")) for key in scores})
    by_id = {key: {f"p{number}": score for number, score in own.items()} for key, own in scores.items()}
    quality = measure_quality(recipe, rules_of(recipe), prompts, answers, by_id)
    found = claims(quality.figures, *models(), verified=False)
    return quality, next(claim for claim in found if claim.name == "quality_judge")


def test_models_are_judged_on_the_prompts_that_all_have_a_score_for() -> None:
    full = {number: 5 if number < 32 else 2 for number in range(64)}
    easy = {number: score for number, score in full.items() if score == 5}
    quality, claim = judged({"teacher": full, "student_after": easy})  # its hard ones could not be read
    assert quality.judged == 32 and claim.value == Estimate(1.0, 1.0, 1.0)
    assert {key: own["judge"].value for key, own in quality.figures["all"].items()} == {
        "teacher": 5,
        "student_after": 5,
    }
    assert [d.change.value for d in differences(quality.figures) if d.figure == "judge"] == [0, 0]  # all, seen
    three = {0: 5, 1: 5, 2: 5}
    quality, claim = judged({"teacher": three, "student_after": three})
    assert quality.judged == 3 and claim.value == Estimate(1.0, 1.0, 1.0) and claim.verdict == "not shown"
    assert judged({"teacher": full, "student_after": {}})[1].verdict == "not measured"


def test_groups_are_drawn_whole_and_counted_once() -> None:
    """Twenty prompts of five groups, all alike in a group: as wide as five prompts."""
    grouped = ratio([1.0] * 8 + [0.0] * 12, [1.0] * 20, draw([n // 4 for n in range(20)]))
    few = ratio([1.0] * 2 + [0.0] * 3, [1.0] * 5, draw(range(5)))
    assert grouped and few
    assert (grouped.value, grouped.prompts) == (0.4, 5) and (grouped.resampled == few.resampled).all()
    some = ratio([1.0] * 4 + [0.0] * 16, [1.0] * 8 + [0.0] * 12, draw([n // 4 for n in range(20)]))
    assert some and some.prompts == 2  # the other groups have no value
    drawn = draw(["a", "b", "a"])
    assert (drawn.counts[:, 0] == drawn.counts[:, 2]).all() and set(drawn.counts[:, 1]) == {0, 1, 2}


def test_a_difference_is_paired() -> None:
    # Prompts differ a lot, the models always by 0.1: paired, the interval has no width.
    values = np.arange(50) / 50
    counts = draw(range(50))
    ours, theirs = ratio(list(values + 0.1), [1.0] * 50, counts), ratio(list(values), [1.0] * 50, counts)
    assert ours and theirs
    change = ours.minus(theirs)
    assert (change.low, change.high) == pytest.approx((0.1, 0.1))


def test_kv_bytes_of_smollm2_by_hand(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    sizes = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
    (tmp_path / "config.json").write_text(json.dumps({**sizes, "dtype": "bfloat16"}))
    save_file({"w": np.zeros(1, dtype=np.float32)}, tmp_path / "model.safetensors")
    # Keys and values of 30 layers, 3 heads of 64: 2 · 30 · 3 · 64 = 11,520 numbers.
    assert kv_bytes_per_token(tmp_path, ServeConfig(device="cpu", dtype="bfloat16")) == 23_040
    assert kv_bytes_per_token(tmp_path, ServeConfig(device="cpu", dtype="float32")) == 46_080


def figure(value: float, width: float = 0.0) -> Figure:
    return Figure(value, np.linspace(value - width, value + width, 101))


def models(**student: Any) -> tuple[ModelReport, ModelReport]:
    teacher = {"parameters": exactly(1500), "tokens_per_s": Estimate(10.0, 9.9, 10.1), "weights_mib": exactly(3000)}
    fields = {"parameters": exactly(500), "tokens_per_s": Estimate(35.0, 34.0, 36.0), "weights_mib": exactly(1000)}
    after = {name: value for name, value in {**fields, **student}.items() if value}
    return (
        ModelReport(key="teacher", label="teacher", reference="t", figures={"engine": teacher}),
        ModelReport(key="student_after", label="student after", reference="s", figures={"engine": after}),
    )


def promise(
    bits: tuple[Figure, Figure], passing: tuple[Figure, Figure], prompts: int = 60, **student: Any
) -> dict[str, Claim]:
    parts: dict[Scope, Figures] = {
        part: {"teacher": {name: pair[0]}, "student_after": {name: replace(pair[1], prompts=prompts)}}
        for part, name, pair in (("test", "bits_per_character", bits), ("all", "passing", passing))
    }
    found = claims(parts, *models(**student), verified=False)
    return {claim.name: claim for claim in found}


def test_a_promise_that_is_kept_in_every_part() -> None:
    found = promise((figure(0.5), figure(0.5)), (figure(0.9), figure(0.9)))
    assert {name: claim.verdict for name, claim in found.items()} == {
        "quality_bits": "yes",
        "quality_probes": "yes",
        "quality_judge": "not measured",  # no judge
        "size": "yes",
        "speed": "yes",
        "memory": "yes",
    }
    assert holds(list(found.values())) is True
    assert found["size"].value == Estimate(3.0, 3.0, 3.0)
    speed = found["speed"].value
    assert speed and (speed.value, speed.low, speed.high) == pytest.approx((3.5, 34 / 10.1, 36 / 9.9))


def test_a_miss_is_never_a_hit() -> None:
    # Just under: 89.99% of the quality, 2.99 times smaller.
    found = promise((figure(0.8999), figure(1.0)), (figure(0.9), figure(0.9)), parameters=exactly(501))
    assert found["quality_bits"].verdict == "no" and found["size"].verdict == "no"
    assert holds(list(found.values())) is False
    assert found["quality_judge"].verdict == "not measured" and found["quality_judge"].value is None


def test_what_chance_may_explain_is_not_shown() -> None:
    # 92%, but between 87% and 97%: the promise of 90% lies within.
    found = promise((figure(0.92, 0.05), figure(1.0)), (figure(0.9), figure(0.9)))
    assert found["quality_bits"].verdict == "not shown"
    assert holds(list(found.values())) is None


def test_few_prompts_show_no_quality() -> None:
    found = promise((figure(0.5), figure(0.5)), (figure(1.0), figure(1.0)), prompts=59)
    assert found["quality_probes"].value == Estimate(1.0, 1.0, 1.0) and found["quality_probes"].verdict == "not shown"
    assert found["quality_probes"].why == "under 60 prompts" and found["size"].why == ""
    assert holds(list(found.values())) is None
    missed = promise((figure(0.5), figure(0.9)), (figure(1.0), figure(1.0)), prompts=20)
    assert missed["quality_bits"].verdict == "no" and holds(list(missed.values())) is False
    one = promise((figure(0.5), figure(0.9)), (figure(1.0), figure(1.0)), prompts=19)  # nor is it missed
    assert one["quality_bits"].verdict == "not shown" and one["quality_bits"].why == "under 20 prompts"
    assert holds(list(one.values())) is None


@pytest.mark.parametrize(("prompts", "wrong", "verdict"), [(30, 1, "not shown"), (50, 2, "not shown"), (64, 2, "yes")])
def test_one_wrong_answer_of_thirty_does_not_show_nine_tenths(prompts: int, wrong: int, verdict: str) -> None:
    """In the first two the bootstrap's interval begins at 0.9, which a student of just 0.9 reaches in 18% and 11%."""
    drawn = draw(range(prompts))
    shares = [ratio([0.0] * bad + [1.0] * (prompts - bad), [1.0] * prompts, drawn) for bad in (0, wrong)]
    right = {key: {"accuracy": share} for key, share in zip(("teacher", "student_after"), shares, strict=True) if share}
    claim, *_ = claims({"verified": right}, *models(), verified=True)
    assert claim.value and claim.value.low >= 0.9 and claim.verdict == verdict


@pytest.mark.parametrize(
    ("right", "student", "verdict", "why"),
    [(9, 9, "not shown", "under 30 of the teacher's"), (30, 30, "yes", ""), (9, 0, "no", "")],
)
def test_a_teacher_that_is_seldom_right_shows_no_quality(right: int, student: int, verdict: str, why: str) -> None:
    """Of 60. A student that is right in just 90% of the teacher's 9 is right in all of them in 0.9 ** 9 = 39%."""
    drawn = draw(range(60))
    shares = [ratio([1.0] * count + [0.0] * (60 - count), [1.0] * 60, drawn) for count in (right, student)]
    found = {key: {"accuracy": share} for key, share in zip(("teacher", "student_after"), shares, strict=True) if share}
    claim, *_ = claims({"verified": found}, *models(), verified=True)
    assert claim.value and claim.value.value == student / right and (claim.verdict, claim.why) == (verdict, why)


@pytest.mark.parametrize("rate", [10.0, 35.0])
def test_one_timing_shows_no_speed_and_misses_none(rate: float) -> None:
    teacher, after = models(tokens_per_s=exactly(rate))
    teacher.figures["engine"]["tokens_per_s"] = exactly(10.0)
    claim = next(claim for claim in claims({}, teacher, after, verified=False, timings=1) if claim.axis == "speed")
    assert claim.value == exactly(rate / 10) and (claim.verdict, claim.why) == ("not shown", "timed once")


def test_an_axis_without_a_figure_leaves_the_promise_open() -> None:
    found = promise((figure(0.5), figure(0.5)), (figure(0.9), figure(0.9)), tokens_per_s=None)
    assert found["speed"].verdict == "not measured" and holds(list(found.values())) is None
    unknown = promise((figure(0.5), figure(0.5)), (figure(0.9), figure(0.9)), parameters=None, weights_mib=None)
    assert [unknown[name].verdict for name in ("size", "speed", "memory")] == ["not measured", "yes", "not measured"]
    nothing = promise((figure(0.5), figure(0.5)), (figure(0.0), figure(0.4)))  # the teacher passes nothing
    assert nothing["quality_probes"].value is None and nothing["quality_probes"].verdict == "not measured"


def test_few_bits_per_character_are_no_few_right_answers() -> None:
    bits = replace(figure(0.3), prompts=60)
    assert promise((bits, bits), (figure(0.9), figure(0.9)))["quality_bits"].verdict == "yes"


def test_a_judge_s_quality_counts_from_the_least_score() -> None:
    # 2 of 1 to 5 is a quarter of the way, 3 is half: half of the teacher's, not two thirds.
    probes = {"teacher": {"judge": figure(3.0)}, "student_after": {"judge": figure(2.0)}}
    found = claims({"all": probes}, *models(), verified=False)
    claim = next(claim for claim in found if claim.name == "quality_judge")
    assert claim.value and claim.value.value == pytest.approx(0.5) and claim.verdict == "no"
    assert math.isclose(claim.value.low, claim.value.high)


def test_where_answers_are_verified_they_are_the_quality_and_their_rate_the_speed() -> None:
    right = {"teacher": {"accuracy": figure(0.8)}, "student_after": {"accuracy": figure(0.76, 0.01)}}
    bits = {"teacher": {"bits_per_character": figure(0.1)}, "student_after": {"bits_per_character": figure(9.0)}}
    rates = {"answers_per_s": Estimate(40.0, 39.0, 41.0)}  # the teacher's is not measured
    found = claims({"verified": right, "test": bits}, *models(**rates), verified=True)
    assert [claim.name for claim in found] == ["quality_accuracy", "size", "speed", "memory"]
    assert found[0].value and found[0].value.value == pytest.approx(0.95) and found[0].verdict == "yes"
    assert "answers/s" in found[2].text and found[2].value is None and holds(found) is None
    right["student_after"]["accuracy"] = replace(right["student_after"]["accuracy"], prompts=59)
    few = claims({"verified": right}, *models(), verified=True)
    assert few[0].verdict == "not shown"


def test_wilson_s_interval_by_hand() -> None:
    """Newcombe 1998, table I: 81 of 263 and 15 of 148; 0 of 20 has 1 - 1 / (1 + z² / 20)."""
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(15 / 148, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4) and wilson(1.0, 20)[1] == 1
    assert wilson(0.0, 135)[0] == 0


def test_wrong_answers_to_unseen_prompts_stand_apart() -> None:
    test = [Prompt(id=f"t{n}", messages=[]) for n in range(8)]
    unseen = [Prompt(id=f"u{n}", messages=[]) for n in range(2)]
    reasons = {prompt.id: [Reason(rule="sql", what="error")] for prompt in unseen} | {p.id: [] for p in test}
    reasons["t0"] = [Reason(rule="sql", what="result")]
    parts: dict[Scope, list[Prompt]] = {"verified": test, "verified_unseen": unseen}
    found = VerifiedAnswers({}, {"student_after": reasons, "teacher": {id_: [] for id_ in reasons}}, parts, {})
    assert found.wrong() == {"student_after": {"sql: result": 0.125, "sql: error, unseen": 1.0}, "teacher": {}}


def test_categories_and_samples_tell_unseen_prompts_apart() -> None:
    test, unseen = (
        [Prompt(id=f"{name}{n}", messages=[], columns={"kind": "sum"}) for n in range(count)]
        for name, count in (("t", 30), ("u", 10))
    )
    ids = [prompt.id for prompt in (*test, *unseen)]
    reasons = {id_: [Reason(rule="mine", what="rows")] if id_ in ("t0", "u0") else [] for id_ in ids}
    answers = {"student_after": {id_: row_of("SELECT 1") for id_ in ids}}
    parts: dict[Scope, list[Prompt]] = {"verified": test, "verified_unseen": unseen}
    found = VerifiedAnswers(answers, {"student_after": reasons}, parts, {id_: id_ for id_ in ids})
    shares = by_category(found, PromptsConfig(file=Path("x.jsonl")), "kind")
    assert {name: own["student_after"].value for name, own in shares.items()} == {
        "sum": pytest.approx(29 / 30),
        "sum, unseen": 0.9,
    }
    samples = verified_samples(found, {"student_after": "student"})
    assert [sample.part for sample in samples] == ["verified"] * 14 + ["verified_unseen"] * 6
    shown = [sample.answers[0] for sample in samples[:2]]
    assert [(one.right, one.dropped_by) for one in shown] == [(False, {"mine": "rows"}), (True, {})]


def test_a_sample_shows_who_said_what() -> None:
    turns = [Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "Ok")]
    for messages, shown in ((turns, "user: Hi\n\nassistant: Hello\n\nuser: Ok"), (turns[:1], "Hi")):
        prompt = Prompt(id="p", messages=messages)
        found = VerifiedAnswers(
            {"student_after": {"p": row_of("x")}}, {"student_after": {"p": []}}, {"verified": [prompt]}, {}
        )
        assert [sample.prompt for sample in verified_samples(found, {"student_after": "student"})] == [shown]


def test_the_share_of_right_answers_to_groups_is_less_sure() -> None:
    """Sixty prompts of twenty groups: its interval is that of the groups, and as wide as that of twenty at no fault."""
    prompts = [Prompt(id=f"p{n}", messages=[Message("user", f"q{n}")], columns={"of": n // 3}) for n in range(60)]
    wrong = {f"p{n}": [Reason(rule="math")] for n in range(30)}

    def shares(group: str | None) -> dict[str, Figure]:
        config = PromptsConfig(file=Path("x.jsonl"), group=group)
        groups = groups_of(prompts, config)
        reasons = {"half": {p.id: wrong.get(p.id, []) for p in prompts}, "all": {p.id: [] for p in prompts}}
        return VerifiedAnswers({}, reasons, {"verified": prompts}, groups).shares(prompts)

    alone, grouped = shares(None), shares("of")
    assert [share.prompts for share in (*alone.values(), *grouped.values())] == [60, 60, 20, 20]
    assert alone["half"].exact == wilson(0.5, 60) and grouped["half"].exact == pytest.approx(wilson(0.5, 19), abs=0.004)
    assert grouped["all"].exact == wilson(1.0, 20)
    one, other = (share["half"].estimate() for share in (alone, grouped))
    assert 1.5 < (other.high - other.low) / (one.high - one.low) < 2  # the square root of 3


def test_the_share_of_groups_that_are_nearly_all_right_is_not_sure_to_be_so_high() -> None:
    """One of twenty groups is wrong in all five. Of resamples 36% have it nowhere, and the bootstrap ends at 85%."""
    prompts = [Prompt(id=f"p{n}", messages=[]) for n in range(100)]
    reasons = {f"p{n}": [Reason(rule="math")] * (n < 5) for n in range(100)}
    groups = {f"p{n}": n // 5 for n in range(100)}
    share = VerifiedAnswers({}, {"teacher": reasons}, {"verified": prompts}, groups).shares(prompts)["teacher"]
    estimate = share.estimate()
    assert (estimate.low, estimate.high) == pytest.approx(wilson(0.95, 19), abs=0.02)
    assert estimate.low < 0.79 and estimate.high < 1


@pytest.mark.parametrize(("groups", "wrong", "interval"), [(1, 1, (0.1444, 0.9933)), (3, 3, (0.1253, 0.8747))])
def test_a_share_of_groups_that_are_all_alike_has_an_interval(
    groups: int, wrong: int, interval: tuple[float, float]
) -> None:
    """Six answers of one group, five of them right; six of three groups, half of each right: no resample differs."""
    prompts = [Prompt(id=f"p{n}", messages=[Message("user", f"q{n}")], columns={"of": n % groups}) for n in range(6)]
    reasons = {f"p{n}": [Reason(rule="math")] * (n < wrong) for n in range(6)}
    own = groups_of(prompts, PromptsConfig(file=Path("x.jsonl"), group="of"))
    share = VerifiedAnswers({}, {"teacher": reasons}, {"verified": prompts}, own).shares(prompts)["teacher"].estimate()
    assert (share.low, share.high) == pytest.approx(interval, abs=1e-4)  # Wilson's of as many as there are groups


def test_conversations_that_began_with_one_question_are_one_group() -> None:
    """Two samples of each of 20 questions: twenty pieces of evidence. A probe is one of its own."""
    config = PromptsConfig(file=Path("x.jsonl"), user=UserConfig(turns=1))
    talks = [
        Prompt(
            id=f"p{n}.{sample}",
            messages=[Message("user", f"Q{n}"), Message("assistant", "A."), Message("user", f"And {sample}?")],
        )
        for n in range(20)
        for sample in range(2)
    ]
    probes = [Prompt(id=f"new {n}", messages=[Message("user", f"Probe {n}")]) for n in range(3)]
    groups = groups_of([*talks, *probes], config)
    scores = [RowScore(talk.id, talk.id, 3.0, 3, 9) for talk in talks]
    figures = perplexity_figures({"teacher": scores}, groups)["teacher"]
    assert (figures["perplexity"].prompts, len(set(groups.values()))) == (20, 23)
