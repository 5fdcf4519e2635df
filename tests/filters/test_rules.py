"""Each rule against a table of real cases; the chapter's five against the chapter's own function."""

import copy
import random
import unicodedata
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.chapter_filter import RULES as CHAPTER_RULES
from benchmarks.chapter_filter import chapter_reason
from filters.answer import Answer, as_answer, nfc
from filters.reasons import describe
from filters.rules import RULES
from filters.ruleset import RuleSet, load_rules
from filters.scripts import SCRIPTS, count_script
from pipeline.errors import DistillError, RecipeError
from pipeline.filters_config import FiltersConfig
from pipeline.recipe import load_recipe
from pipeline.records import Completion, Message, Reason, Slots, Usage

INSTRUCTION = "3~5세 어린이용 한국어 동화 한 편. 등장: 토끼 토토. 키워드: 당근, 비. 200~400자."
STORY = (
    "옛날 옛적에 깊은 숲속 작은 집에 토끼 토토가 살았어요. 어느 날 하늘에서 비가 내리기 시작했지요. "
    "토토는 커다란 잎사귀를 우산처럼 쓰고 당근 밭으로 달려갔어요. 밭에는 젖은 아기 다람쥐가 떨고 있었답니다. "
    "“괜찮아, 우리 집으로 가자.” 토토는 다람쥐의 손을 꼭 잡았어요. 둘은 따뜻한 방에서 달콤한 수프를 나누어 먹고 "
    "창밖의 빗소리를 들으며 스르르 잠이 들었답니다. 다음 날 아침 무지개가 환하게 떠올랐어요."
)
ENGLISH_STORY = (
    "Once upon a time a small fox named Finn lived by the river. Every morning he looked for blue stones under the "
    "bridge. One day the rain came down hard, and the water carried his best stone away. Finn cried a little. Then "
    "Ella, the duck, dived deep and brought it back. They put the stone on the window, where it shone all winter."
)


def rule_set(*rules: dict[str, Any], recipe: Path = Path("recipe.yaml"), slots: set[str] | None = None) -> RuleSet:
    return load_rules(FiltersConfig.model_validate({"rules": list(rules)}), recipe, slots)


def reason(
    rule: str,
    text: str,
    *,
    instruction: str = INSTRUCTION,
    finish_reason: str = "stop",
    slots: Slots | None = None,
    **settings: Any,
) -> str | None:
    """What one rule says of one answer, in words, by the way a completion takes."""
    row = Completion(
        id="a",
        prompt_id="p",
        messages=[Message("system", "친절하게"), Message("user", instruction)],
        slots=slots or {},
        endpoint="http://127.0.0.1:8000/v1",
        sampling={},
        text=text,
        finish_reason=finish_reason,
        model="m",
        usage=Usage(),
        latency_s=0.1,
        attempts=1,
        created="2026-01-01T00:00:00Z",
    )
    return next(map(describe, rule_set({"rule": rule, **settings}).reasons(as_answer(row))), None)


def labels(rules: RuleSet, answer: Answer) -> list[str]:
    return [reason.rule for reason in rules.reasons(answer)]


@pytest.mark.parametrize(("size", "dropped"), [(0, True), (149, True), (150, False), (600, False), (601, True)])
def test_length_at_its_boundaries(size: int, dropped: bool) -> None:
    said = reason("length", "가" * size, min_chars=150, max_chars=600)
    assert (said is not None) == dropped
    if said:
        assert said.startswith(f"{size} characters")


@pytest.mark.parametrize(
    ("text", "settings", "found"),
    [
        ("옛날에 로봇이 살았어요", {}, "로봇"),
        ("꼬마로봇", {}, "로봇"),
        ("꼬마로봇", {"whole_word": True}, None),
        ("로봇에게도 친구가", {"whole_word": True}, "로봇에게도"),
        ("그는 AI가 되었다", {"whole_word": True}, "AI가"),
        ("PAIN AND RAIN", {}, "AI"),  # a substring, as the chapter has it
        ("PAIN AND RAIN", {"whole_word": True}, None),
        ("he said ai", {}, None),  # case matters
        ("he said ai", {"ignore_case": True}, "ai"),
        ("a supermodel walks", {}, "model"),
        ("a supermodel walks", {"whole_word": True}, None),
        (unicodedata.normalize("NFD", "로봇이"), {}, "로봇"),
        ("토끼 토토", {}, None),
    ],
)
def test_banned_words(text: str, settings: dict[str, Any], found: str | None) -> None:
    said = reason("banned_words", text, words=["AI", "GPT", "model", "로봇", "인공지능"], **settings)
    assert said == (f"contains `{found}`" if found else None)


@pytest.mark.parametrize(
    ("text", "word", "dropped"),
    [
        ("रामायण पढ़ो।", "राम", False),
        ("राम घर गया।", "राम", True),
        ("வீடுகள்", "வீட", False),
        ("हिन्दीभाषी", "हिन्दी", False),
        ("हिन्दी।", "हिन्दी", True),
        ("كتابٌ", "كتاب", True),  # points of Arabic make no other word
    ],
)
def test_a_vowel_sign_is_part_of_a_word(text: str, word: str, dropped: bool) -> None:
    assert (reason("banned_words", text, words=[word], whole_word=True) is not None) == dropped


def test_banned_words_are_taken_literally() -> None:
    assert reason("banned_words", "a+b", words=["a.b"]) is None
    assert reason("banned_words", "C++ is here", words=["C++"], whole_word=True) == "contains `C++`"


@pytest.mark.parametrize(("count", "dropped"), [(0, False), (5, False), (6, True)])
def test_repeated_word(count: int, dropped: bool) -> None:
    assert (reason("repeated_word", "같은 " * count, word="같은", max_count=5) is not None) == dropped


def test_repeated_word_counts_without_overlap() -> None:
    assert reason("repeated_word", "하하하하하", word="하하", max_count=2) is None
    assert reason("repeated_word", "하하하하하하", word="하하", max_count=2) is not None


@pytest.mark.parametrize(
    ("text", "dropped"),
    [
        (INSTRUCTION[:20], True),
        ("네! " + INSTRUCTION + STORY, True),
        (INSTRUCTION[:19] + "!", False),
        (unicodedata.normalize("NFD", INSTRUCTION), True),
        (STORY, False),
    ],
)
def test_prompt_echo(text: str, dropped: bool) -> None:
    assert (reason("prompt_echo", text, chars=20) is not None) == dropped


def test_prompt_echo_looks_at_the_last_user_message() -> None:
    row = Completion(
        id="a", prompt_id="p", endpoint="", sampling={}, text="second question", finish_reason="stop", model="m",
        messages=[Message("user", "first"), Message("assistant", "yes"), Message("user", "second question")],
        usage=Usage(), latency_s=0, attempts=1, created="",
    )  # fmt: skip
    assert as_answer(row).instruction == "second question"
    tool = msgspec.structs.replace(row, messages=[*row.messages, Message("assistant", ""), Message("tool", "on")])
    assert as_answer(tool).instruction == "second question"


@pytest.mark.parametrize(
    ("text", "settings", "dropped"),
    [
        ("가" * 50 + "a" * 50, {}, False),  # exactly half
        ("가" * 50 + "a" * 51, {}, True),
        ("힣" * 50 + "ힰ" * 50, {}, False),  # the last syllable counts, the jamo behind it does not
        ("힣" * 49 + "ힰ" * 51, {}, True),
        ("ㅋ" * 100, {}, True),
        (unicodedata.normalize("NFD", "토끼토토" * 20), {}, False),
        ("", {}, True),
        ("토끼 🐇🐇🐇", {"min_share": 0.4}, True),
        ("The quick brown fox.", {"script": "latin"}, False),
        ("Füchse über — “ß”", {"script": "latin", "min_share": 0.6}, False),
        ("1234 5678 a", {"script": "latin"}, True),
        ("漢字𠮷野家", {"script": "han", "min_share": 1.0}, False),
        ("東京都内の小学校で全校児童が防災訓練に参加した", {"script": "kana"}, True),
        ("東京都内の小学校で全校児童が防災訓練に参加した", {"script": ["kana", "han"], "min_share": 0.9}, False),
        ("kana 漢字", {"script": ["kana", "han"]}, True),
        ("漢字 kana", {"script": ["han", "han"]}, True),
        ("আমি রোজ ভাত খাই।", {"script": "bengali", "min_share": 0.7}, False),
        ("ਮੈਂ ਪਾਣੀ ਪੀਂਦਾ ਹਾਂ।", {"script": "gurmukhi", "min_share": 0.7}, False),
        ("હું પાણી પીઉં છું.", {"script": "gujarati", "min_share": 0.7}, False),
        ("ମୁଁ ଭଲ ପାଣି ପିଏ।", {"script": "oriya", "min_share": 0.7}, False),
        ("நான் தண்ணீர் குடிக்கிறேன்.", {"script": "tamil", "min_share": 0.7}, False),
        ("నేను నీళ్ళు తాగుతాను.", {"script": "telugu", "min_share": 0.7}, False),
        ("ನಾನು ನೀರು ಕುಡಿಯುತ್ತೇನೆ.", {"script": "kannada", "min_share": 0.7}, False),
        ("ഞാൻ വെള്ളം കുടിക്കുന്നു.", {"script": "malayalam", "min_share": 0.7}, False),
        ("මම වතුර බොනවා.", {"script": "sinhala", "min_share": 0.7}, False),
        ("Ես միշտ ջուր եմ խմում։", {"script": "armenian", "min_share": 0.7}, False),
        ("მე წყალს ვსვამ.", {"script": "georgian", "min_share": 0.7}, False),
        ("ሁልጊዜ ውሃ እጠጣለሁ።", {"script": "ethiopic", "min_share": 0.7}, False),
        ("ང་ཆུ་འཐུང་གི་ཡོད།", {"script": "tibetan", "min_share": 0.7}, False),
        ("ຂ້ອຍດື່ມນ້ຳທຸກມື້", {"script": "lao", "min_share": 0.9}, False),
        ("ខ្ញុំផឹកទឹករាល់ថ្ងៃ។", {"script": "khmer", "min_share": 0.9}, False),
        ("နေ့တိုင်း ရေသောက်တယ်။", {"script": "myanmar", "min_share": 0.8}, False),
    ],
)
def test_script_ratio(text: str, settings: dict[str, Any], dropped: bool) -> None:
    said = reason("script_ratio", text, **{"script": "hangul", "min_share": 0.5, **settings})
    assert (said is not None) == dropped, said


@given(st.sampled_from(sorted(SCRIPTS)), st.text())
def test_a_scripts_count_is_exact_for_any_text(script: str, text: str) -> None:
    inside = sum(any(first <= ord(char) <= last for first, last in SCRIPTS[script]) for char in text)
    assert count_script(text, script) == inside


@given(st.sampled_from(sorted(SCRIPTS)), st.data())
def test_a_scripts_edges_are_counted(script: str, data: st.DataObject) -> None:
    edges = [code for first, last in SCRIPTS[script] for code in (first - 1, first, last, last + 1)]
    characters = [chr(code) for code in edges if not 0xD800 <= code < 0xE000]
    text = data.draw(st.text(st.sampled_from(characters), min_size=1))
    inside = sum(any(first <= ord(char) <= last for first, last in SCRIPTS[script]) for char in text)
    assert count_script(text, script) == inside


@pytest.mark.parametrize(
    ("finish", "allowed", "dropped"),
    [
        ("stop", "stop", False),
        ("length", "stop", True),
        ("content_filter", "stop", True),
        ("tool_calls", "stop", False),
        ("tool_calls", "tool_calls", False),
        ("stop", "tool_calls", True),
    ],
)
def test_finish_reason(finish: str, allowed: str, dropped: bool) -> None:
    assert (reason("finish_reason", STORY, finish_reason=finish, allowed=[allowed]) is not None) == dropped


def mutated(text: str, rng: random.Random) -> str:
    """A text as it may come out of a teacher on a bad day."""
    pieces = [
        "같은 ",
        "AI",
        "model",
        "로봇",
        INSTRUCTION[:20],
        "a" * 40,
        "ㅋㅋㅋ",
        "漢字",
        "🐇",
        "\n\n",
        "힣",
        "ힰ",
        "휀",
        "é",
    ]
    for _ in range(rng.randrange(6)):
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(pieces) * rng.choice([1, 1, 5, 6]) + text[at:]
    return text[: rng.choice([149, 150, 151, 300, 600, 601, 2000])] * rng.choice([1, 1, 1, 2])


def test_the_flagships_five_rules_are_the_chapters() -> None:
    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / "korean_stories.yaml")
    flagship = [rule.label for rule in load_rules(recipe.filters, Path("r.yaml")).rules]
    further = ["finish_reason", "adherence", "meta_talk", "foreign_script", "repetition"]
    assert flagship == [*(rule["rule"] for rule in CHAPTER_RULES), *further]
    ours = rule_set(*CHAPTER_RULES).rules
    assert [rule.described() for rule in load_rules(recipe.filters, Path("r.yaml")).rules[:5]] == [
        rule.described() for rule in ours
    ]


@pytest.mark.parametrize(
    ("rule", "text"),
    [  # answers of Qwen2.5 1.5B, or the parts of them that tell, which the chapter's five rules let pass
        ("adherence", "간단한 어린이용 한국어 동화를 작성할 수 있습니다. 주변을 적절히 표현하면 됩니다."),
        ("adherence", "고양이는 꽃밭에 들어왔습니다. 비가 그치자 당근을 보았습니다."),
        ("meta_talk", "물론, 다음과 같은 한국어 동화를 작성해드릴게요: 토토는 비를 맞으며 당근을 먹었어요."),
        ("meta_talk", "토끼 토토는 비를 보았어요. 당근 하나가 있었어요. 저는 동화를 쓰는 캐릭터인 Qwen입니다."),
        ("meta_talk", "그저 토끼 토토를 보고 있네요. 키워드는 당근, 비. 분위기는 신남."),
        ("meta_talk", "토끼 토토. 당근과 비. 교훈: 정직. 토토는 잠이 들었어요."),
        ("meta_talk", "**등장인물**: 토끼 토토\n\n토토는 비를 맞으며 당근을 먹었어요."),
        ("meta_talk", "토토는 비를 맞으며 당근을 먹었어요.\n\n**교훈**: 나눔"),
        ("meta_talk", "<p>토토는 비를 맞으며 당근을 먹었어요.</p>"),
        ("meta_talk", "토토는 따\ufffd한 비를 맞으며 당근을 먹었어요."),
        ("foreign_script", "토끼 토토는 森林에서 당근을 먹었어요. 비가 왔어요."),
        ("foreign_script", "토끼 토토는 อบอุ่น 당근을 먹었어요. 비가 왔어요."),
        ("foreign_script", "토끼 토토는 دافئ 당근을 먹었어요. 비가 왔어요."),
        ("repetition", "비가 와요. " + "토끼 토토는 바람이 부는 날이라 당근을 줄여주는 것은 정직한 일이다. " * 3),
        ("", STORY),
        ("", "옛날에 토토가 살았어요. 소나기가 내리자 토토는 당근을 품에 안고 달렸답니다."),
    ],
)
def test_the_flagships_further_rules_drop_what_its_teacher_does_wrong(rule: str, text: str) -> None:
    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / "korean_stories.yaml")
    config = recipe.filters.model_copy(update={"rules": recipe.filters.rules[5:]})
    slots: Slots = {"character": "토끼 토토", "keywords": ["당근", "비"]}
    rules = load_rules(config, Path("r.yaml"), set(recipe.prompts.slots))
    assert next(iter(labels(rules, Answer(text, INSTRUCTION, "stop", slots))), "") == rule


def test_the_five_rules_decide_as_the_chapters_function() -> None:
    rng = random.Random(0)
    rules = rule_set(*CHAPTER_RULES)
    seen = set()
    for _ in range(3000):
        text = nfc(mutated(rng.choice([STORY, STORY * 2, ENGLISH_STORY, "", STORY[:200]]), rng))
        dropped = next(iter(labels(rules, Answer(text, INSTRUCTION, "stop", {}))), None)
        assert dropped == chapter_reason(INSTRUCTION, text), text
        seen.add(dropped)
    assert seen == {None, *(rule["rule"] for rule in CHAPTER_RULES)}


@given(st.text(st.sampled_from("가나힣ힰ같은AIGPT model로봇인공지능.!漢 ㅋ\n🐇é"), max_size=700), st.text(max_size=30))
def test_the_five_rules_decide_as_the_chapters_function_on_any_text(text: str, instruction: str) -> None:
    text, instruction = nfc(text), nfc(instruction)
    dropped = next(iter(labels(rule_set(*CHAPTER_RULES), Answer(text, instruction, "stop", {}))), None)
    assert dropped == chapter_reason(instruction, text)


def test_decomposed_korean_is_judged_as_composed() -> None:
    rules = rule_set(*CHAPTER_RULES, {"rule": "adherence", "slots": ["character"]})
    row = Completion(
        id="a", prompt_id="p", messages=[Message("user", INSTRUCTION)], slots={"character": "토끼 토토"}, endpoint="",
        sampling={}, text=unicodedata.normalize("NFD", STORY), finish_reason="stop", model="m", usage=Usage(),
        latency_s=0, attempts=1, created="",
    )  # fmt: skip
    assert len(row.text) > len(STORY) and rules.reasons(as_answer(row)) == []


def test_all_rules_run_and_the_same_rule_may_stand_twice() -> None:
    rules = rule_set(
        {"rule": "length", "min_chars": 150},
        {"rule": "repeated_word", "word": "비", "max_count": 1},
        {"rule": "repeated_word", "word": "달", "max_count": 1},
    )
    assert labels(rules, Answer("비 비 달 달", "", "stop", {})) == ["length", "repeated_word", "repeated_word#2"]


def test_a_rule_of_the_text_may_look_at_the_reasoning() -> None:
    of: dict[str, Any] = {"of": "reasoning"}
    rules = rule_set(
        {"rule": "length", "max_chars": 20},
        {"rule": "length", "max_chars": 20, **of},
        {"rule": "length", "max_chars": 30, **of},
        {"rule": "banned_words", "words": ["wait"], **of},
        {"rule": "repetition", **of},
        {"rule": "foreign_script", **of},
    )
    thought = "wait, is it 4? " * 3 + "그래 森林"
    answer = Answer("It is 4.", "", "stop", {}, reasoning=thought)
    wanted = ["length#reasoning", "length#reasoning#2", "banned_words#reasoning", "repetition#reasoning"]
    assert labels(rules, answer) == [*wanted, "foreign_script#reasoning"]
    assert describe(rules.reasons(answer)[0]) == "50 characters, at most 20 wanted"
    assert labels(rules, Answer(thought, "", "stop", {}, reasoning="It is 4.")) == ["length"]


def test_reasoning_can_be_required() -> None:
    rules = rule_set({"rule": "length", "of": "reasoning"})
    assert labels(rules, Answer("It is 4.", "", "stop", {})) == ["length#reasoning"]
    assert labels(rules, Answer("It is 4.", "", "stop", {}, reasoning="2 + 2")) == []


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"rule": "length", "of": "thought"}, "filters.rules[0].of should be 'text' or 'reasoning', got 'thought'"),
        ({"rule": "finish_reason", "of": "text"}, "the rule `finish_reason` has no such setting"),
        ({"rule": "lenght"}, "filters.rules[0]: no rule named `lenght`; there are length, banned_words,"),
        ({"rule": "length", "min_char": 3}, "filters.rules[0].min_char: the rule `length` has no such setting, got 3"),
        ({"rule": "length", "min_chars": "few"}, "filters.rules[0].min_chars"),
        ({"rule": "length", "min_chars": -1}, "got -1"),
        ({"rule": "length", "min_chars": 9, "max_chars": 3}, "min_chars 9 is over max_chars 3"),
        ({"rule": "banned_words"}, "filters.rules[0].words is missing"),
        ({"rule": "banned_words", "words": ["a", ""]}, "empty word"),
        (
            {"rule": "banned_words", "words": ["a", 7]},
            "filters.rules[0].words[1] should be a valid string, got 7; put it in quotes",
        ),
        ({"rule": "banned_words", "words": [True]}, "got True (as YAML reads yes, no, on and off); put it in quotes"),
        ({"rule": "script_ratio", "script": "korean"}, "there are hangul, latin"),
        ({"rule": "script_ratio", "script": ["han", "korean"]}, "there are hangul, latin"),
        ({"rule": "script_ratio", "script": []}, "filters.rules[0].script names no script"),
        ({"rule": "script_ratio", "script": "hangul", "min_share": 50}, "got 50"),
        ({"rule": "foreign_script", "scripts": ["elvish"]}, "filters.rules[0].scripts[0] is not a script"),
        ({"rule": "repetition", "top_ngrams": {2: 3}}, "filters.rules[0].top_ngrams"),
        ({"rule": "language", "allowed": ["en", "english"]}, "allowed: no language english; there are ace, af, am, "),
        ({"rule": "meta_talk", "patterns": ["("]}, "is not a regular expression"),
        ({"rule": "adherence", "slots": ["hero"]}, "the prompts have no slot `hero`; there are character"),
        ({"rule": "function", "file": "nowhere.py", "name": "f"}, "nowhere.py: no such file"),
        ({"rule": "function", "file": "a.py", "name": "select"}, ".name: the filters use the name `select` themselves"),
        ({"rule": "function", "file": "a.py", "name": "judge"}, ".name: the filters use the name `judge` themselves"),
        ({"rule": "matches", "form": "json"}, "no such setting, got 'json'; there are field, pattern, seconds, as"),
        ({"rule": "sql", "database": "nowhere.db"}, "nowhere.db: no such file"),
        ({"rule": "choice"}, "names neither labels nor `reference: true`"),
    ],
)
def test_a_wrong_rule_is_named(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        rule_set(rule, recipe=Path("recipes/mine.yaml"), slots={"character"})
    assert str(error.value).startswith("recipes/mine.yaml: filters.rules[0]") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_every_rule_has_a_line_of_documentation() -> None:
    docs = Path(__file__).parents[2] / "docs"
    page = "".join((docs / name).read_text(encoding="utf-8") for name in ("filters.md", "verifiers.md"))
    for name, rule in RULES.items():
        assert f"`{name}`" in page, name
        for setting, field in rule.settings.model_fields.items():
            assert f"`{field.alias or setting}`" in page, f"{name}.{setting}"


def test_a_users_own_rule(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def no_digits(answer, most=0):\n"
        "    digits = sum(c.isdigit() for c in answer.text)\n"
        "    return f'{digits} digits' if digits > most else None\n"
        "def number(answer): return 3\n"
        "def broken(answer): return 1 / 0\n"
        "def ends(answer): raise SystemExit(0)\n"
        "from filters.answer import Verified\n"
        "from pipeline.records import Reason\n"
        "def whole(answer): return Verified(Reason(rule='any', note='no'), 0.5, 'one')\n"
        "def in_words(answer): return Verified('no', 0.5, 'one')\n"
    )
    recipe = tmp_path / "recipe.yaml"
    own = {"rule": "function", "file": "mine.py", "name": "no_digits"}
    answer = Answer("1 and 2", "", "stop", {})
    assert rule_set(own, recipe=recipe).reasons(answer) == [Reason(rule="no_digits", note="2 digits")]
    assert rule_set({**own, "most": 2}, recipe=recipe).reasons(answer) == []
    with pytest.raises(RecipeError, match="unexpected keyword argument 'least'"):
        rule_set({**own, "least": 2}, recipe=recipe)
    with pytest.raises(RecipeError, match="has no function `nothing`"):
        rule_set({**own, "name": "nothing"}, recipe=recipe)
    with pytest.raises(DistillError, match=r"mine\.py: number returned 3"):
        rule_set({**own, "name": "number"}, recipe=recipe).reasons(answer)
    assert rule_set({**own, "name": "in_words"}, recipe=recipe).reasons(answer) == [Reason(rule="in_words", note="no")]
    checked = rule_set({**own, "name": "whole"}, recipe=recipe).check(answer)
    assert (checked.reasons, checked.scores, checked.result) == (
        [Reason(rule="whole", note="no")],
        {"whole": 0.5},
        "one",
    )
    with pytest.raises(DistillError, match=r"mine\.py: broken raised ZeroDivisionError"):
        rule_set({**own, "name": "broken"}, recipe=recipe).reasons(answer)
    with pytest.raises(DistillError, match=r"mine\.py: ends raised SystemExit: 0"):
        rule_set({**own, "name": "ends"}, recipe=recipe).reasons(answer)
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Limit:\n"
        "    most: int\n"
        "def no_digits(answer): return None if Limit(3).most == 3 else 'no'\n"
        "def change(answer): answer.text = ''\n"
    )
    assert rule_set(own, recipe=recipe).reasons(answer) == []
    with pytest.raises(DistillError, match="change raised AttributeError"):  # what later rules see is not its to change
        rule_set({**own, "name": "change"}, recipe=recipe).reasons(answer)
    (tmp_path / "mine.py").write_text("def no_digits(answer:\n")
    with pytest.raises(RecipeError, match="SyntaxError"):
        rule_set(own, recipe=recipe)
    (tmp_path / "mine.py").write_text("def no_digits(answer): return None\nraise SystemExit(0)\n")  # as a script ends
    with pytest.raises(RecipeError, match=r"mine\.py: it ends the program .*SystemExit: 0.*__main__"):
        rule_set(own, recipe=recipe)


def test_what_a_users_rule_does_to_an_answer_is_its_own(tmp_path: Path) -> None:
    """The next rule, and the report, see the row as it is."""
    (tmp_path / "mine.py").write_text(
        "def take(answer):\n"
        "    answer.reference.append(answer.text)\n"
        "    answer.columns.pop('tags').clear()\n"
        "    answer.slots.clear()\n"
        "    answer.tools[0].clear()\n"
        "    answer.tool_calls.clear()\n"
    )
    values = {"reference": ["2"], "columns": {"tags": ["a"]}, "tools": [{"type": "x"}], "tool_calls": [{"id": "1"}]}
    answer, before = (Answer("1", "", "stop", {"n": "1"}, **copy.deepcopy(values)) for _ in range(2))
    rules = rule_set(
        {"rule": "function", "file": "mine.py", "name": "take"}, {"rule": "matches"}, recipe=tmp_path / "recipe.yaml"
    )
    assert [reason.rule for reason in rules.reasons(answer)] == ["matches"]
    assert answer == before
