"""A chunk's answers are judged together as each would be by itself: decisions, reasons, figures and bad lines."""

import random
import unicodedata
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_filters_rules import CHAPTER_RULES, ENGLISH_STORY, INSTRUCTION, STORY, mutated, rule_set
from test_filters_run import completion

from filters.answer import as_answer, nfc
from filters.batch import NOT_PLAIN, Batch, _Line, _Row, read_batch
from filters.chunks import Chunk, read_chunk
from filters.rules import RULES
from filters.texts import Texts, doubtful_in_nfc, positions
from pipeline.records import Completion, Message, encode_line

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
    {"rule": "ending", "marks": "n🐇."},
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
    assert [bytes(line) + b"}\n" for line in batch.opened] == [encode_line(row) for row in rows]


def test_together_stories_are_dropped_for_the_same_reasons() -> None:
    rng = random.Random(0)
    texts = [mutated(rng.choice([STORY, STORY * 2, ENGLISH_STORY, "", STORY[:200]]), rng) for _ in range(600)]
    made = [row(unicodedata.normalize("NFD", text) if rng.random() < 0.1 else text) for text in texts]
    found = RULE_SET.all_reasons(batch_of(made))
    assert found == one_by_one(made)
    assert {label for reasons in found.values() for label in reasons} > {rule["rule"] for rule in CHAPTER_RULES}


def test_a_screen_spares_most_good_answers() -> None:
    batch = batch_of([row(STORY), row(STORY + "\n\n“" + STORY[:100] + "…” 🐇")])
    for rule in rule_set(*CHAPTER_RULES, {"rule": "foreign_script"}, {"rule": "finish_reason"}).rules:
        assert rule.screen is not None and not rule.screen(batch, rule.settings).any(), rule.label
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
    units = np.frombuffer(char.encode("utf-16-le"), np.uint16)
    return ord(char) >= 0x300 and not 0xAC00 <= ord(char) <= 0xD7A3 and bool(doubtful_in_nfc()[units].any())


@given(st.lists(st.text(max_size=20), max_size=6), st.text(min_size=1, max_size=3))
def test_texts_are_found_and_counted(texts: list[str], word: str) -> None:
    made = Texts([msgspec.json.encode(text) for text in texts])
    assert [made[index] for index in range(len(texts))] == texts
    for index, text in enumerate(texts):
        if not made.irregular[index]:
            assert made.sizes[index] == len(text) and made.occurrences(word)[index] >= text.count(word)
        else:
            assert "\\" in text or any(char < " " for char in text)


@given(st.lists(st.booleans(), max_size=300))
def test_positions(marks: list[bool]) -> None:
    assert positions(np.array(marks, np.bool_)).tolist() == [index for index, mark in enumerate(marks) if mark]


def test_a_line_has_the_fields_of_a_completion() -> None:
    assert set(_Line.__struct_fields__) == set(_Row.__struct_fields__)


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
    monkeypatch.setattr("filters.chunks._LIKELY_LINE", 2)
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
