"""Prompts: what a recipe asks, in which order, and what it refuses."""

import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from generate.grammar import Grammar, combination, shuffled
from generate.prompts import grammar_size, iter_prompts
from generate.run import generate
from pipeline.errors import DataError, RecipeError
from pipeline.prompts_config import PromptsConfig
from pipeline.recipe import Recipe, load_recipe
from pipeline.records import Prompt, read_jsonl
from pipeline.rundir import RunDir
from tests.servers.misbehaving_server import completions, misbehaving, recipe_for

ROOT = Path(__file__).parents[2]
MISSING = object()  # a row without the column
CHAPTER = {
    "template": "등장: {character}. 키워드: {keywords}.",
    "slots": {
        "character": ["토끼 토토", "곰 두두", "할머니", "고양이 미미"],
        "keywords": {"choose": 2, "from": ["당근", "비", "달", "친구", "엄마", "꽃"]},
    },
}


def recipe_with(**prompts: Any) -> Recipe:
    return Recipe(name="t", teacher={"model": "stub"}, prompts=prompts)


def texts(recipe: Recipe) -> list[str]:
    return [prompt.messages[-1].content for prompt in iter_prompts(recipe)]


def test_same_seed_same_prompts_everywhere() -> None:
    """Literal ids: they may differ on no machine, no Python and with no PYTHONHASHSEED."""
    prompts = list(iter_prompts(recipe_with(count=3, seed=7, **CHAPTER)))
    assert [(prompt.id, prompt.messages[0].content) for prompt in prompts] == [
        ("074f096c1532ff8d", "등장: 할머니. 키워드: 엄마, 꽃."),
        ("0b1a9f15e4ce4f75", "등장: 곰 두두. 키워드: 꽃, 당근."),
        ("685bf4b99cfe2748", "등장: 할머니. 키워드: 엄마, 비."),
    ]
    assert prompts[0].slots == {"character": "할머니", "keywords": ["엄마", "꽃"]}


def test_another_seed_another_order() -> None:
    first, second = (texts(recipe_with(count=60, seed=seed, **CHAPTER)) for seed in (0, 1))
    assert first != second
    assert set(first) == set(second)


def test_a_larger_count_begins_with_the_same_prompts() -> None:
    assert texts(recipe_with(count=100, **CHAPTER))[:20] == texts(recipe_with(count=20, **CHAPTER))


def test_the_chapters_grammar_has_60_prompts_and_repeats_only_after_them() -> None:
    recipe = recipe_with(count=150, **CHAPTER)
    assert grammar_size(recipe) == 60
    ids = [prompt.id for prompt in iter_prompts(recipe)]
    assert len(set(ids[:60])) == 60
    assert set(ids[60:120]) == set(ids[:60])  # a repeat is the same question, and has its id
    assert ids[60:120] != ids[:60]


def test_a_choose_slot_is_a_list_in_slots_and_joined_in_the_text() -> None:
    for prompt in iter_prompts(recipe_with(count=60, **CHAPTER)):
        chosen = prompt.slots["keywords"]
        assert isinstance(chosen, list)
        assert len(set(chosen)) == 2
        assert f"키워드: {', '.join(chosen)}." in prompt.messages[0].content


def test_chosen_values_come_in_either_order() -> None:
    chosen = [prompt.slots["keywords"] for prompt in iter_prompts(recipe_with(count=60, **CHAPTER))]
    order = CHAPTER["slots"]["keywords"]["from"]  # type: ignore[index]
    forward = sum(order.index(first) < order.index(second) for first, second in chosen)
    assert 15 < forward < 45


values = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=6)


@given(one=values, two=values, three=values, k=st.integers(1, 6), seed=st.integers())
def test_count_is_exact_and_every_prompt_comes_once(
    one: list[str], two: list[str], three: list[str], k: int, seed: int
) -> None:
    k = min(k, len(set(three)))
    config = PromptsConfig(
        template="{x}|{y}|{z}", count=1, slots={"x": one, "y": two, "z": {"choose": k, "from": three}}
    )
    grammar = Grammar(config)
    wanted = {(x, y, frozenset(z)) for x in one for y in two for z in itertools.combinations(sorted(set(three)), k)}
    drawn = [slots for _, slots in grammar.draw(grammar.size, seed)]
    assert grammar.size == len(wanted) == len(drawn)
    assert {(slots["x"], slots["y"], frozenset(slots["z"])) for slots in drawn} == wanted


@given(size=st.integers(1, 400), key=st.text())
def test_shuffled_is_a_permutation(size: int, key: str) -> None:
    assert sorted(shuffled(i, size, key) for i in range(size)) == list(range(size))


def test_shuffled_is_even() -> None:
    """Each place is as likely first as any other: chi-square of 6,000 keys over 60 places, 99.9% bound for 59."""
    seen = [0] * 60
    for key in range(6000):
        seen[shuffled(0, 60, str(key))] += 1
    assert sum((n - 100) ** 2 / 100 for n in seen) < 98.3


def test_combinations_are_all_different() -> None:
    ranked = [tuple(combination(rank, 7, 3)) for rank in range(35)]
    assert sorted(ranked) == list(itertools.combinations(range(7), 3))


@pytest.mark.timeout(20)
def test_a_combination_is_found_without_going_through_all_values() -> None:
    many = 10**12
    assert combination(7, many, 1) == [7]
    assert combination(math.comb(many - 1, 2) + 5, many, 2) == [5, many - 1]
    assert combination(5, many, 2) == [2, 3]


def test_a_grammar_far_too_large_to_list() -> None:
    slots = {f"s{i}": {"choose": 5, "from": [f"v{n}" for n in range(100)]} for i in range(40)}
    recipe = recipe_with(count=200, template=" ".join(f"{{{name}}}" for name in slots), slots=slots)
    assert (grammar_size(recipe) or 0) > 10**300
    assert len({prompt.id for prompt in iter_prompts(recipe)}) == 200


def test_braces_a_slot_used_twice_and_a_system_prompt() -> None:
    recipe = recipe_with(count=1, system="짧게", template="{a} {{x}} {a}", slots={"a": ["b"]})
    (prompt,) = list(iter_prompts(recipe))
    assert [(message.role, message.content) for message in prompt.messages] == [("system", "짧게"), ("user", "b {x} b")]


@pytest.mark.parametrize(
    ("template", "slots", "named"),
    [
        ("{a} {b} {c}", {"a": ["x"]}, ["`b`, `c`", "there are: a"]),
        ("{a}", {"a": ["x"], "zz": ["y"]}, ["`zz`", "does not name"]),
        ("{a", {"a": ["x"]}, ["prompts.template", "{{"]),
        ("a}", {}, ["prompts.template"]),
        ("{}", {}, ["{} is not a slot"]),
        ("{0}", {}, ["{0} is not a slot"]),
        ("{a.b}", {"a": ["x"]}, ["{a.b} is not a slot"]),
        ("{a!r:>3}", {"a": ["x"]}, ["{a!r:>3} is not a slot"]),
        ("  ", {}, ["prompt is empty"]),
    ],
)
def test_a_template_that_does_not_fit_is_refused(template: str, slots: Any, named: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        list(iter_prompts(recipe_with(count=1, template=template, slots=slots)))
    for words in named:
        assert words in str(caught.value)


def test_prompts_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    rows = [
        {"prompt": "하나", "id": "mine", "slots": {"k": ["a", "b"]}, "whatever": 3},
        {"messages": [{"role": "system", "content": "own"}, {"role": "user", "content": "둘"}]},
    ]
    path.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(json.dumps(row) for row in rows).encode())
    first, second = list(iter_prompts(recipe_with(file=path, system="from the recipe")))
    assert (first.id, first.slots) == ("mine", {"k": ["a", "b"]})
    assert [message.content for message in first.messages] == ["from the recipe", "하나"]
    assert [message.content for message in second.messages] == ["own", "둘"]  # its own system prompt stays


def test_one_column_may_be_two_parts(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"text": "a", "label": "x"}\n')
    columns = {"prompt": "text", "reference": "label", "id": "label"}
    (prompt,) = iter_prompts(recipe_with(file=path, columns=columns))
    assert (prompt.id, prompt.reference, prompt.columns) == ("x", "x", {})


def test_a_files_count_takes_the_first_rows_and_no_row_twice(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(f'{{"prompt": "{name}"}}\n' for name in "abc"))
    assert texts(recipe_with(file=path, count=2)) == ["a", "b"]
    assert texts(recipe_with(file=path, count=7)) == list("abc")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "truncated"),
        ("[]", "Expected `object`"),
        ("{}", "either `messages` or `prompt`"),
        ('{"prompt": "a", "messages": []}', "either `messages` or `prompt`"),
        ('{"messages": []}', "`messages` is empty"),
        ('{"messages": [{"from": "human", "value": "Hi"}]}', "a turn has from, value; it must have role "),
        ('{"prompt": " "}', "the prompt is empty"),
        ('{"prompt": 3}', "$.prompt`; `prompt`, each `content` and each slot are text"),
        ('{"prompt": "a", "id": 1.5}', "$.id`; `prompt`, each"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}', "assistant turn"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "role 'robot'"),
        ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "(no images, no lists of parts)"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]}', "result of a call"),
        ('{"prompt": "a", "tools": [{"name": "f"}]}', "tools must be a list of"),
        ('{"prompt": "a", "slots": {"n": 1}}', "$.slots"),
        ('{"prompt": "\\ud83d"}', "half of a surrogate pair, which UTF-8 cannot write; remove it"),
        ('{"prompt": "a \\udc00 b"}', "half of a surrogate pair"),
        ('{"prompt": "a", "reference": NaN}', ":2: NaN, which JSON does not have; write null"),
        ('{"prompt": "a", "reference": [-Infinity]}', ":2: -Infinity, which JSON does not have; write null"),
        ('{"prompt": "\\ud83d', "truncated"),
        pytest.param(
            '{"prompt": "a", "image": "%s"}' % ("x" * (16 << 20)),
            "the row has 16.0 MiB, at most 15 are taken",
            id="a row over 16 MiB",
        ),
        pytest.param(
            '{"prompt": "a", "reference": %s}' % ("[" * 100_000 + "]" * 100_000),
            "nested too deeply",
            id="deep reference",
        ),
        pytest.param(
            '{"messages": %s}' % ('{"a":' * 100_000 + "1" + "}" * 100_000), "nested too deeply", id="deep messages"
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "good"}\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        list(iter_prompts(recipe_with(file=path)))
    assert str(caught.value).startswith(f"{path}:2: ")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[{"prompt": "a"}]', "p.jsonl:1: Expected `object`, got `array`"),
        ('\ufeff[\n  {"prompt": "a"}\n]', "p.jsonl:1: Expected `object`, got `array`"),
        ("prompt,id\nhello,1\n", "p.jsonl:1: JSON is malformed"),
        (b"PAR1\x15\x04", "p.jsonl:1: JSON is malformed"),
        ('{"prompt": "a"}'.encode("utf-16"), "p.jsonl:1: JSON is malformed"),
        ('{"prompt": "a"}\n{"prompt": "caf\u00e9"}\n'.encode("latin-1"), "p.jsonl:2: 'utf-8' codec can't decode"),
    ],
)
def test_another_format_is_one_error_that_names_the_accepted_ones(
    tmp_path: Path, content: str | bytes, said: str
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError) as caught:
        list(iter_prompts(recipe_with(file=path)))
    assert said in str(caught.value)
    assert "accepted are JSONL in UTF-8" in str(caught.value)
    assert "a folder saved by `datasets`" in str(caught.value)
    assert "\n" not in str(caught.value)


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
NOW = {"type": "function", "function": {"name": "now"}}
CALL = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Bonn"}'}}


def test_tools_of_a_row_come_before_those_of_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "q"}, {"prompt": "q", "tools": [NOW]}, {"prompt": "q", "tools": json.dumps([NOW])}]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "q", "tools": []}]))
    prompts = list(iter_prompts(recipe_with(file=path, tools=[WEATHER])))
    assert [prompt.tools for prompt in prompts] == [[WEATHER], [NOW], [NOW], []]
    assert [len({prompt.id for prompt in prompts}), prompts[1].id == prompts[2].id] == [3, True]
    assert [prompt.tools for prompt in iter_prompts(recipe_with(count=1, tools=[WEATHER], **CHAPTER))] == [[WEATHER]]


def test_tools_of_a_recipe_may_be_in_a_file_beside_it(tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_text(json.dumps([WEATHER]))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: t\nteacher: {model: m}\nprompts: {template: hi, count: 1, tools: tools.json}\n")
    assert load_recipe(recipe).prompts.tools == [WEATHER]
    (tmp_path / "tools.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"prompts\.tools must be a list of .*Expected `array`"):
        load_recipe(recipe)
    (tmp_path / "tools.json").unlink()
    with pytest.raises(RecipeError, match=r"prompts\.tools No such file"):
        load_recipe(recipe)


def test_a_conversation_with_tools_is_asked_and_recorded_whole(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    turns = [
        {"role": "user", "content": "What is the weather in Bonn?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "a", "content": ""},
    ]
    path.write_text(json.dumps({"messages": turns}))
    run = RunDir(tmp_path / "run")
    with misbehaving() as server:
        sampling = {"extra": {"tool_choice": "auto"}}
        recipe = recipe_for(server, prompts={"file": path, "tools": [WEATHER]}, sampling=sampling)
        generate(recipe, run, quiet=True)
        assert generate(recipe, run, quiet=True).resumed == 1
    sent = server.asked[0].body
    assert sent["messages"] == [turns[0], {**turns[1], "content": ""}, turns[2]]
    assert (sent["tools"], sent["tool_choice"], len(server.asked)) == ([WEATHER], "auto", 1)
    (row,) = completions(run)
    assert (row.tools, row.messages[1].tool_calls, row.messages[2].tool_call_id) == ([WEATHER], [CALL], "a")
    assert "tools" not in row.sampling


@pytest.mark.parametrize(("first", "again"), [("y", "y"), (7, 7), (7, "7")])
def test_two_rows_with_one_id_and_different_prompts_are_named(
    first: str | int, again: str | int, tmp_path: Path
) -> None:
    path = tmp_path / "p.jsonl"
    rows = [("x", "a"), (first, "b"), ("x", "a"), (again, "c")]  # the third is the first again, which is no error
    path.write_text("".join(json.dumps({"id": id_, "prompt": text}) + "\n" for id_, text in rows))
    assert texts(recipe_with(file=path, count=3)) == ["a", "b", "a"]
    with pytest.raises(DataError) as caught:
        list(iter_prompts(recipe_with(file=path)))
    assert str(caught.value) == f"{path}:4: id '{first}' is that of {path}:2, which is another prompt"
    assert len(list(iter_prompts(recipe_with(file=path, count=3)))) == 3


def test_prompts_of_one_group_are_of_one_part(tmp_path: Path) -> None:
    """As prompts.jsonl says; the summary of a second call finds nothing changed."""
    path = tmp_path / "p.jsonl"
    rows = [{"prompt": f"{ask} f{n}", "function": n} for ask in ("Write", "Do") for n in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = RunDir(tmp_path / "run")
    with misbehaving() as server:
        recipe = recipe_for(server, prompts={"file": path, "group": "function", "test": 0.4})
        generate(recipe, run, quiet=True)
    parts: dict[int, set[str | None]] = {}
    for prompt in read_jsonl(run.prompts, Prompt):
        parts.setdefault(prompt.columns["function"], set()).add(prompt.part)
    assert len(parts) == 30 and all(len(own) == 1 for own in parts.values())
    assert Counter(part for own in parts.values() for part in own)["test"] > 5


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ([("a", 1), ("b", MISSING)], r"p\.jsonl:2: no column 'f', which prompts\.group names; there are none \(a row"),
        ([("a", 1), (" A ", 2)], r":2: another row has the same question and another 'f', so the question would be in"),
        ([("a", 1), ("a", None)], r":2: another row has the same question and another 'f'"),
        ([("a", 1), ("a", 1), ("b", None), ("c", 1)], None),
    ],
)
def test_a_row_that_fits_no_group_is_named(rows: list[Any], error: str | None, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    given = [{"prompt": text} | ({} if group is MISSING else {"f": group}) for text, group in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    recipe = recipe_with(file=path, group="f")
    if error is None:
        assert len(list(iter_prompts(recipe))) == len(rows)
        return
    with pytest.raises(DataError, match=error):
        list(iter_prompts(recipe))


def test_nothing_is_asked_when_a_row_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_text('{"prompt": "good"}\n' + json.dumps({"messages": turns}) + "\n")
    with misbehaving() as server:
        recipe = recipe_for(server, prompts={"file": str(path)})
        with pytest.raises(DataError, match=r"p\.jsonl:2: the prompt ends with an assistant turn"):
            generate(recipe, RunDir(tmp_path / "run"), quiet=True)
        assert server.asked == []


def test_a_file_that_is_empty_or_missing(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no prompts in it"):
        list(iter_prompts(recipe_with(file=tmp_path / "empty.jsonl", count=3)))
    with pytest.raises(DataError, match=r"missing\.jsonl: No such file"):
        list(iter_prompts(recipe_with(file=tmp_path / "missing.jsonl")))


def test_slots_do_not_go_with_a_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"prompts\.slots is for a template"):
        iter_prompts(recipe_with(file=tmp_path, slots={"a": ["b"]}))


def test_prompts_from_a_datasets_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": "a", "slots": {"k": "x", "l": None}}, {"prompt": "b", "slots": {"k": None, "l": ["y"]}}]
    del rows[0]["slots"]["l"], rows[1]["slots"]["k"]  # type: ignore[attr-defined]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "rows"))
    prompts = list(iter_prompts(recipe_with(file=tmp_path / "rows")))
    assert [(prompt.messages[0].content, prompt.slots) for prompt in prompts] == [
        ("a", {"k": "x"}),
        ("b", {"l": ["y"]}),
    ]


def test_a_datasets_folder_that_cannot_serve(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    good = datasets.Dataset.from_dict({"prompt": ["a"]})
    datasets.DatasetDict({"train": good, "test": good}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(DataError, match="splits train, test"):
        list(iter_prompts(recipe_with(file=tmp_path / "splits")))
    datasets.Dataset.from_dict({"prompt": ["a", "b", ""]}).save_to_disk(str(tmp_path / "rows"))
    with pytest.raises(DataError, match="rows: row 2: the prompt is empty"):
        list(iter_prompts(recipe_with(file=tmp_path / "rows")))
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match=r"other: .*; give a folder that `datasets` saved"):
        list(iter_prompts(recipe_with(file=tmp_path / "other")))


def test_the_flagship_recipe() -> None:
    recipe = load_recipe(ROOT / "recipes" / "korean_stories.yaml")
    prompts = list(iter_prompts(recipe))
    assert (grammar_size(recipe) or 0) >= 20_000
    assert len({prompt.id for prompt in prompts}) == 5000
    assert {"토끼 토토", "곰 두두", "할머니", "고양이 미미"} <= {str(prompt.slots["character"]) for prompt in prompts}
    keywords = {word for prompt in prompts for word in prompt.slots["keywords"]}
    assert {"당근", "비", "달", "친구", "엄마", "꽃"} <= keywords
    for prompt in prompts:
        text = prompt.messages[0].content
        assert text.startswith(f"3~5세 어린이용 한국어 동화 한 편. 등장: {prompt.slots['character']}. 키워드: ")
        assert text.endswith("200~400자.")
