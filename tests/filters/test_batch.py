"""A chunk's answers are judged together as each would be by itself: decisions, reasons, figures and bad lines."""

import random
import re
import unicodedata
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.answer import as_answer, nfc
from filters.batch import NOT_PLAIN, Batch, read_batch
from filters.lines import count_lines
from filters.rules import RULES
from filters.scripts import SCRIPTS, character_class
from filters.stream import Chunk, read_chunk
from filters.texts import Texts, doubtful_in_nfc
from pipeline.records import Completion, Message, encode_line
from tests.filters.test_rules import CHAPTER_RULES, ENGLISH_STORY, INSTRUCTION, STORY, mutated, rule_set
from tests.filters.test_run import completion

EVERY_RULE: list[dict[str, Any]] = [
    *CHAPTER_RULES,
    {"rule": "length", "min_chars": 3, "max_chars": 9},
    {"rule": "banned_words", "words": ["a\n", 'c"', "\\", "🐇", "\x01", "n가"]},
    {"rule": "banned_words", "words": ["AI", "비"], "whole_word": True},
    {"rule": "banned_words", "words": ["ai"], "ignore_case": True},
    {"rule": "repeated_word", "word": "nn", "max_count": 1},
    {"rule": "repeated_word", "word": "가나", "max_count": 0},
    {"rule": "prompt_echo", "chars": 2},
    {"rule": "script_ratio", "script": "latin", "min_share": 0.4},
    {"rule": "script_ratio", "script": "han", "min_share": 0.2},
    {"rule": "finish_reason"},
    {"rule": "foreign_script"},
    {"rule": "foreign_script", "scripts": ["latin", "han"], "max_count": 2},
    {"rule": "ending"},
    {"rule": "ending", "marks": 'n🐇."'},
    {"rule": "repetition"},
    {"rule": "meta_talk"},
    {"rule": "adherence", "slots": ["things"], "max_missing": 1},
]
RULE_SET = rule_set(*EVERY_RULE)
ODD = '가나힣ힰ같은AIGPT모nab"\\/\n\t\r\b\x01\x7f .!漢𠮷あ🐇é\u0301\u3099\u1161\u11a8\u1100\uac00\u2126\ud7a3\u200d\ufe0f'


def batch_of(rows: list[Completion]) -> Batch:
    return Batch(b"".join(map(encode_line, rows)))


def row(text: str, instruction: str = INSTRUCTION, finish_reason: str = "stop") -> Completion:
    made = completion(1, text, finish_reason=finish_reason, things=["당근", "비"])
    return msgspec.structs.replace(made, messages=[Message("user", instruction)])


def one_by_one(rows: list[Completion]) -> dict[int, dict[str, str]]:
    found = {index: RULE_SET.reasons(as_answer(row)) for index, row in enumerate(rows)}
    return {index: reasons for index, reasons in found.items() if reasons}


rows = st.builds(
    row,
    st.text(st.sampled_from(ODD) | st.characters(exclude_categories=["Cs"]), max_size=30),
    st.text(st.sampled_from(ODD), max_size=4),
    st.sampled_from(["stop", "length"]),
)


@given(st.lists(rows, max_size=5))
def test_together_answers_are_dropped_for_the_same_reasons(rows: list[Completion]) -> None:
    batch = batch_of(rows)
    assert RULE_SET.all_reasons(batch) == one_by_one(rows)
    assert [batch.answer(index) for index in range(len(rows))] == [as_answer(row) for row in rows]
    assert batch.lengths().tolist() == [len(nfc(row.text)) for row in rows]
    tails = [b"" if index % 2 else b"," * index for index in range(len(rows))]
    wanted = b"".join(encode_line(row)[:-2] + tail for row, tail in zip(rows, tails, strict=True))
    assert batch.written(np.arange(len(rows)), tails) == wanted


def test_together_stories_are_dropped_for_the_same_reasons() -> None:
    rng = random.Random(0)
    texts = [mutated(rng.choice([STORY, STORY * 2, ENGLISH_STORY, "", STORY[:200]]), rng) for _ in range(600)]
    made = [row(unicodedata.normalize("NFD", text) if rng.random() < 0.1 else text) for text in texts]
    found = RULE_SET.all_reasons(batch_of(made))
    assert found == one_by_one(made)
    assert {label for reasons in found.values() for label in reasons} > {rule["rule"] for rule in CHAPTER_RULES}


@pytest.mark.parametrize("asked", ["", "나", "나나 이야기", "e\u0301", "e", "같은 "])
def test_an_echo_is_found_among_many_instructions(asked: str) -> None:
    rng = random.Random(0)
    instructions = [f"{asked}{''.join(rng.choices(ODD[:12], k=3))}" for _ in range(60)]
    texts = [f"{STORY[:20]}{nfc(rng.choice(instructions))[: rng.randint(0, 4)]}" for _ in instructions]
    for some in (8, 60):  # few are looked for each by itself, many by what they have in common
        made = [row(text, instruction) for text, instruction in zip(texts[:some], instructions[:some], strict=True)]
        assert RULE_SET.all_reasons(batch_of(made)) == one_by_one(made)


def test_a_screen_spares_most_good_answers() -> None:
    batch = batch_of([row(STORY), row(STORY + "\n\n“" + STORY[:100] + "…” 🐇")])
    for label, rule, settings in rule_set(*CHAPTER_RULES, {"rule": "foreign_script"}, {"rule": "finish_reason"}).rules:
        assert rule.screen is not None and not rule.screen(batch, settings).any(), label
    assert not batch.unsure.any()
    assert batch_of([row(unicodedata.normalize("NFD", STORY)), row("a\\b")]).unsure.all()


def test_every_character_that_nfc_may_change_is_doubted() -> None:
    """By the standard's own definition: it is no NFC alone, or something before it may change it, or it."""
    plain = [chr(code) for code in range(0x300) if chr(code) not in '"\\' and code >= 0x20]
    for code in range(0x300, 0x110000):
        char = chr(code)
        if not 0xD800 <= code < 0xE000 and not _doubted(char):
            assert unicodedata.is_normalized("NFC", char) and unicodedata.combining(char) == 0, hex(code)
    composed = [unicodedata.decomposition(chr(code)).split() for code in range(0x110000)]
    second = {chr(int(parts[1], 16)) for parts in composed if len(parts) == 2 and parts[0][0] != "<"}
    assert all(_doubted(char) for char in second) and not any(map(_doubted, plain))
    assert all(_doubted(chr(code)) for code in (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3)))


def _doubted(char: str) -> bool:
    doubtful = doubtful_in_nfc()
    return bool(doubtful[ord(char)])


def texts_of(strings: Iterable[bytes]) -> Texts:
    """Texts of JSON strings; behind each is a byte that begins a syllable."""
    strings = list(strings)
    sizes = np.array(list(map(len, strings)), np.int64)
    ends = np.cumsum(sizes + 1) - 1
    starts = ends - sizes
    return Texts(b"".join(string + b"\xea" for string in strings), starts, ends)


@given(st.lists(st.text(max_size=20), max_size=6), st.lists(st.text(min_size=1, max_size=3), min_size=1, max_size=3))
def test_texts_are_found_and_counted(texts: list[str], words: list[str]) -> None:
    made = texts_of(msgspec.json.encode(text) for text in texts)
    assert made.decoded(range(len(texts))) == texts
    for index, text in enumerate(texts):
        if not made.irregular[index]:
            assert made.sizes[index] == len(text)
            assert made.occurrences(*words)[index] >= sum(map(text.count, words))
        else:
            assert "\\" in text or any(char < " " for char in text)


@given(st.lists(st.text("가각같긱", max_size=100), max_size=3), st.text("가각같긱", min_size=1, max_size=3))
def test_a_word_is_counted_wherever_it_stands(texts: list[str], word: str) -> None:
    found = [len(re.findall(f"(?={word})", text)) for text in texts]
    assert texts_of(msgspec.json.encode(text) for text in texts).occurrences(word).tolist() == found


PATTERNS = {script: re.compile(f"[{character_class(script)}]") for script in SCRIPTS}


@given(st.lists(st.text(st.sampled_from(ODD) | st.characters(exclude_categories=["Cs"]), max_size=20), max_size=6))
def test_characters_are_counted_by_script_and_seen_at_the_end(texts: list[str]) -> None:
    made = texts_of(msgspec.json.encode(text) for text in texts)
    for script, pattern in PATTERNS.items():
        counts = [len(pattern.findall(text)) for text in texts]
        assert np.where(made.irregular, counts, made.count(SCRIPTS[script])).tolist() == counts, script
    for mark in 'n."\n가힣漢🐇é':
        ends = [text.endswith(mark) for text in texts]
        assert np.where(made.irregular, ends, made.ends_with(mark)).tolist() == ends, mark


def test_every_character_is_counted_and_doubted_as_what_it_is() -> None:
    codes = np.array([code for code in range(0x80, 0x110000) if not 0xD800 <= code < 0xE000]).reshape(-1, 16)
    made = texts_of(b'"' + "".join(map(chr, some)).encode() + b'"' for some in codes.tolist())
    for script, ranges in SCRIPTS.items():
        inside = sum((first <= codes) & (codes <= last) for first, last in ranges)
        assert (made.count(ranges) == np.sum(inside, axis=1)).all(), script
    doubtful = doubtful_in_nfc()
    assert (made.maybe_not_nfc == doubtful[codes].any(axis=1)).all()
    assert (made.sizes == 16).all()


EDGES = bytes.fromhex("808f909d9e9fa0a3a4afb0bfc0c1c2dfe0e1e4e5e9eaebecedeeeff0f1f4f5ff")  # of what a byte may mean


def test_what_is_no_utf8_is_refused() -> None:
    for first, second in product(EDGES, EDGES):
        for later in range(4):
            check_utf8(bytes([first, second]) + b"\x80" * later)


@given(st.lists(st.sampled_from(EDGES) | st.sampled_from(list("aé가힣漢🐇".encode())), max_size=8).map(bytes))
def test_what_is_no_utf8_is_refused_among_other_characters(text: bytes) -> None:
    check_utf8(text)
    check_utf8("가".encode() + text + "가".encode())


def check_utf8(text: bytes) -> None:
    try:
        text.decode()
    except UnicodeDecodeError:
        lines = -1
    else:
        lines = 1
    for before in (0, 1, 2, 3, 200):  # the first bytes of all are looked at by themselves
        data = b"a" * before + text + b"\n"
        assert count_lines(np.frombuffer(data, np.uint8)) == lines, data


LINE = encode_line(row(STORY))


@pytest.mark.parametrize(
    ("data", "good"),
    [
        (LINE + LINE, 2),
        (b"", 0),
        (LINE.replace(b'{"id"', b' {"id"'), 1),
        (LINE.replace(b"\n", b" \r\n"), 1),
        (LINE.replace(b'"text":"', rb'"text":"\ud83d\udc07\/'), 1),
        (LINE + b"\n \n" + LINE, 2),
        (LINE[:-1] + LINE, 0),  # two in a line
        (LINE.replace(b'"slots":', b'"slots":\n'), 0),  # one over two lines
        (LINE[:-1] + LINE.replace(b',"text"', b',\n"text"'), 0),  # as many lines as objects
        (LINE[:-1] + LINE + LINE.replace(b'},"endpoint"', b'}\n,"endpoint"'), 0),  # the same, each ending in a brace
        (LINE.replace(b'"text":"', b'"text":["').replace(b'","finish', b'"],"finish'), 0),
        (LINE.replace(b'"text":"', b'"text":"\xed\xa0\x80'), 0),
        (LINE.replace(b'"text":"', rb'"text":"\udc07'), 0),
        (LINE.replace("당근".encode(), b"\xff"), 0),
        (LINE.replace(b'"things":[', b'"things":[1,'), 0),
        (LINE.replace(b'"role":"user"', b'"role":1'), 0),
        (LINE.replace(b'"seed":1', b'"seed":1e999'), 0),
        (LINE.replace(b'"usage":{', b'"usage":{"prompt_tokens":"3",').replace(b'"prompt_tokens":3', b'"x":3'), 0),
    ],
)
def test_a_line_is_checked_in_full(data: bytes, good: int) -> None:
    lines = read_batch(Chunk(data))
    assert len(lines.batch) == good
    assert (len(lines.bad) > 0) == (good == 0 and data != b"")
    if data.count(b"\n") == 1 and not good:
        with pytest.raises(NOT_PLAIN):
            Batch(data)


@pytest.mark.parametrize("size", range(1, 12))
def test_every_line_is_in_one_chunk(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("filters.stream._LIKELY_LINE", 2)
    data = b"a\n\nbcdefghijkl\nm\n\n\nno\np"
    (tmp_path / "f").write_bytes(data)
    with (tmp_path / "f").open("rb") as file:
        chunks = [read_chunk(file, start, min(start + size, len(data))) for start in range(0, len(data), size)]
    assert b"".join(chunk.data for chunk in chunks) == data
    assert [line for chunk in chunks for line in chunk.lines] == data.split(b"\n")
    assert [chunk.torn for chunk in chunks if chunk.data][-1]


def test_which_rules_have_no_screen() -> None:
    assert [name for name, rule in RULES.items() if rule.screen is None] == [
        "repetition", "meta_talk", "adherence", "language",
    ]  # fmt: skip
