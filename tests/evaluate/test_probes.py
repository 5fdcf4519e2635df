"""Which prompts a report asks: none that the run has asked, and values that are really new."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from evaluate.measure.probes import choose_probes, choose_questions
from generate.prompts import iter_prompts
from pipeline.errors import DataError, RecipeError, UsageError
from pipeline.recipe import Recipe, load_recipe
from pipeline.records import Kept, Message, Prompt, encode_line
from pipeline.rundir import RunDir
from tests.completion_fields import completion_fields

SLOTS = {"who": ["Toby", "Mimi", "Finn"], "things": {"choose": 2, "from": ["a carrot", "rain", "snow", "a boat"]}}
COMBINATIONS = 3 * 6


def recipe_of(count: int = 6, **evaluate: Any) -> Recipe:
    prompts = {"count": count, "system": "Be kind.", "template": "About {who}, with {things}.", "slots": SLOTS}
    return Recipe(name="t", teacher={"model": "m"}, prompts=prompts, evaluate=evaluate)


def with_prompts(recipe: Recipe, **changes: Any) -> Recipe:
    return recipe.model_copy(update={"prompts": recipe.prompts.model_copy(update=changes)})


def run_of(path: Path, recipe: Recipe) -> RunDir:
    run = RunDir(path)
    run.prompts.write_bytes(b"".join(map(encode_line, iter_prompts(recipe))))
    return run


def rows_of(prompts: list[Prompt]) -> list[Kept]:
    return [Kept(**completion_fields(p.id, "x", prompt_id=p.id, messages=p.messages, slots=p.slots)) for p in prompts]


def combination(prompt: Prompt) -> tuple[Any, ...]:
    return prompt.slots["who"], frozenset(prompt.slots["things"])


def test_probes_are_combinations_that_no_prompt_had(tmp_path: Path) -> None:
    recipe = recipe_of(6, probes=8)
    run = run_of(tmp_path, recipe)
    chosen = choose_probes(recipe, run, [])
    asked, probed = (
        {combination(p) for p in iter_prompts(recipe)},
        {combination(p) for p in chosen.seen},
    )
    assert chosen.source == "slots" and len(probed) == 8 and not probed & asked
    assert chosen.seen[0].messages[0] == Message("system", "Be kind.")
    assert choose_probes(recipe, run, []).seen == chosen.seen
    assert choose_probes(recipe_of(6, probes=8, seed=1), run, []).seen != chosen.seen


def test_the_values_in_another_order_or_template_are_no_new_combination(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    everything = list(iter_prompts(recipe_of(COMBINATIONS)))
    left, *others = everything
    turned = [
        Prompt(id=p.id, messages=[Message("user", "other words")], slots={**p.slots, "things": p.slots["things"][::-1]})
        for p in others
    ]
    run.prompts.write_bytes(b"".join(map(encode_line, turned)))
    chosen = choose_probes(recipe_of(probes=8), run, [])
    assert [combination(p) for p in chosen.seen] == [combination(left)]
    assert chosen.note == "Only 1 combinations of the slots were left for probes, of 8 wanted."
    # A test row of an earlier run counts as asked too.
    assert choose_probes(recipe_of(probes=8), run, rows_of([left])).source == "test"


def test_after_prompts_count_falls_no_probe_is_what_the_student_learned(tmp_path: Path) -> None:
    """prompts.jsonl has fewer then, kept.jsonl still has all."""
    run = run_of(tmp_path, recipe_of(6))
    kept = list(iter_prompts(recipe_of(12)))
    run.kept.write_bytes(b"".join(map(encode_line, rows_of(kept))))
    probed = {combination(probe) for probe in choose_probes(recipe_of(6, probes=6), run, []).seen}
    assert len(probed) == 6 and not probed & {combination(prompt) for prompt in kept}


def test_where_every_combination_was_asked_the_test_prompts_are_the_probes(tmp_path: Path) -> None:
    recipe = recipe_of(COMBINATIONS, probes=3)
    run = run_of(tmp_path, recipe)
    own = list(iter_prompts(recipe))[:5]
    chosen = choose_probes(recipe, run, rows_of(own + own))
    assert chosen.source == "test" and "Every combination" in chosen.note
    assert len({p.id for p in chosen.seen}) == 3 and {p.id for p in chosen.seen} <= {p.id for p in own}


def test_test_prompts_whose_answers_were_dropped_are_probes_too(tmp_path: Path) -> None:
    recipe = with_prompts(recipe_of(COMBINATIONS, probes=99), test=0.5)
    run, everything = run_of(tmp_path, recipe), list(iter_prompts(recipe))
    of_test = [prompt for prompt in everything if recipe.prompts.part_of(prompt) == "test"]
    chosen = choose_probes(recipe, run, rows_of(of_test[:2]))
    assert chosen.source == "test" and len(of_test) > 2
    assert {prompt.id for prompt in chosen.seen} == {prompt.id for prompt in of_test}
    rows_elsewhere = recipe.model_copy(update={"train": recipe.train.model_copy(update={"test_rows": Path("x.jsonl")})})
    assert {p.id for p in choose_probes(rows_elsewhere, run, rows_of(of_test[:2])).seen} == {p.id for p in of_test[:2]}


def test_test_prompts_as_probes_keep_all_that_rules_and_models_are_told(tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "messages": [Message("user", "2+2?")],
        "reference": "4",
        "columns": {"unit": "m"},
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
    }
    row = Kept(**completion_fields("a", "4", prompt_id="p", slots={"n": "2"}, **fields))
    recipe = Recipe(name="t", teacher={"model": "m"}, prompts={"file": "prompts.jsonl"})
    [probe] = choose_probes(recipe, RunDir(tmp_path), [row]).seen
    assert probe == Prompt(id="p", slots={"n": "2"}, **fields)


def test_unseen_probes_hold_a_new_value_each(tmp_path: Path) -> None:
    recipe = recipe_of(probes=2, unseen={"who": ["Leo"], "things": ["a drum"]}, unseen_probes=3)
    chosen = choose_probes(recipe, run_of(tmp_path, recipe), [])
    assert len(chosen.seen) == 2
    assert len({combination(p) for p in chosen.unseen}) == 3
    assert all(p.slots["who"] == "Leo" and "a drum" in p.slots["things"] for p in chosen.unseen)
    assert all("a drum" in p.messages[-1].content for p in chosen.unseen)
    only = recipe_of(probes=0, unseen={"things": ["a drum", "a kite"]}, unseen_probes=99)
    chosen = choose_probes(only, RunDir(tmp_path), [])
    # One new of two with one old of four, or both new: (2 · 4 + 1) · 3 characters.
    assert chosen.seen == [] and len(chosen.unseen) == 27 and len(chosen.all) == 27


@pytest.mark.parametrize(
    ("unseen", "message"),
    [
        ({"who": ["Leo", " toby"]}, "evaluate.unseen.who holds ' toby', which prompts.slots.who has too"),
        ({"things": ["snow"]}, "evaluate.unseen.things holds 'snow'"),
        ({"who": []}, "evaluate.unseen.who is empty"),
        ({"where": ["a farm"]}, "evaluate.unseen: prompts.slots has no 'where'; there are who, things"),
    ],
)
def test_values_that_are_not_unseen_are_refused(tmp_path: Path, unseen: dict[str, list[str]], message: str) -> None:
    path = tmp_path / "r.yaml"
    data = recipe_of().model_dump(mode="json")
    path.write_text(yaml.safe_dump({**data, "evaluate": {"unseen": unseen}}, sort_keys=False))
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: evaluate.") and "\n" not in str(caught.value)


def test_a_value_that_the_run_had_in_an_earlier_recipe_is_refused(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    earlier = Prompt(id="1", messages=[Message("user", "q")], slots={"who": "Leo"})
    run.prompts.write_bytes(encode_line(earlier))
    with pytest.raises(UsageError, match=r"evaluate\.unseen\.who: prompts of this run have 'Leo'"):
        choose_probes(recipe_of(unseen={"who": ["Leo"]}), run, [])


def test_probes_come_from_a_file_and_none_of_them_was_asked(tmp_path: Path) -> None:
    path = tmp_path / "probes.jsonl"
    path.write_text('{"prompt": "one"}\n{"prompt": "two"}\n{"prompt": " One"}\n{"prompt": "three"}\n')
    recipe = recipe_of(probes_file=str(path), probes=2)
    run = run_of(tmp_path, recipe)
    chosen = choose_probes(recipe, run, [])
    assert chosen.source == "file" and len(chosen.seen) == 2
    assert chosen.seen[0].messages[0] == Message("system", "Be kind.")
    words = next(iter_prompts(recipe)).messages[-1].content
    with path.open("a") as file:
        file.write(f'{{"prompt": "{words.upper()}"}}\n')
    with pytest.raises(DataError, match="1 of its 4 prompts are prompts of this run"):
        choose_probes(recipe, run, [])
    path.unlink()
    with pytest.raises(DataError, match=r"^evaluate\.probes_file .*/probes\.jsonl: No such file"):
        choose_probes(recipe, run, [])


def test_what_is_verified_are_all_test_prompts_and_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "unseen.jsonl"
    path.write_text('{"prompt": "one", "reference": 1}\n{"prompt": "two"}\n')
    rule = {"rule": "length", "min_chars": 1, "max_chars": 9}
    recipe = with_prompts(recipe_of(16, verify=[rule], probes_file=str(path), verify_count=3), test=0.5)
    run = run_of(tmp_path, recipe)
    with pytest.raises(DataError, match="no test prompts for evaluate"):
        choose_questions(with_prompts(recipe, test=1e-9), run)
    parts = {p.id: recipe.prompts.part_of(p) for p in iter_prompts(recipe)}
    own = [msgspec.structs.replace(p, part=parts[p.id]) for p in iter_prompts(recipe)]
    run.prompts.write_bytes(b"".join(map(encode_line, [*own, *own])))
    chosen = choose_questions(recipe, run)
    assert len({p.id for p in chosen.seen}) == 3 and all(p.part == "test" for p in chosen.seen)
    assert {p.reference for p in chosen.unseen} == {1, None}
    more = choose_questions(with_prompts(recipe_of(16, verify=[rule], verify_count=99), test=0.5), run)
    assert {p.id for p in more.seen} == {id_ for id_, part in parts.items() if part == "test"} and more.unseen == []
    assert {p.id for p in chosen.seen} < {p.id for p in more.seen} < set(parts)
    assert choose_questions(recipe_of(16), run).all == []
    with pytest.raises(DataError, match="no test prompt has a value under 'kind'; there are who, things"):
        choose_questions(with_prompts(recipe_of(16, verify=[rule], category="kind"), test=0.5), run)
    labelled = [msgspec.structs.replace(prompt, reference="billing") for prompt in own]
    run.prompts.write_bytes(b"".join(map(encode_line, labelled)))
    by_label = with_prompts(recipe_of(16, verify=[rule], category="label"), test=0.5, columns={"reference": "label"})
    assert {by_label.prompts.category_of(p, "label") for p in choose_questions(by_label, run).seen} == {"billing"}


def test_ids_of_a_file_of_probes_may_be_those_of_the_run(tmp_path: Path) -> None:
    """Row numbers, say: with two prompts of one id, neither could be asked."""
    for name, words in (("rows", "asked"), ("probes", "unseen")):
        lines = [f'{{"id": {number}, "prompt": "{words} {number}"}}\n' for number in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    evaluate = {"verify": [{"rule": "length", "min_chars": 1}], "probes_file": str(tmp_path / "probes.jsonl")}
    prompts = {"file": tmp_path / "rows.jsonl", "test": 0.5}
    recipe = Recipe(name="t", teacher={"model": "m"}, prompts=prompts, evaluate=evaluate)
    questions = choose_questions(recipe, run_of(tmp_path, recipe))
    assert questions.seen and len(questions.unseen) == 20
    assert len({prompt.id for prompt in questions.all}) == len(questions.all)


@pytest.mark.parametrize("change", [{"test": 0.2}, {"seed": 7}])
def test_prompts_whose_parts_have_changed_since_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    """Training parts the rows by the recipe, so what the file calls a test prompt may have been trained on."""
    recipe = with_prompts(recipe_of(COMBINATIONS, verify=[{"rule": "matches"}]), test=0.4)
    run, part_of = RunDir(tmp_path), recipe.prompts.part_of
    made = [msgspec.structs.replace(p, part=part_of(p)) for p in iter_prompts(recipe)]
    run.prompts.write_bytes(b"".join(map(encode_line, made)))
    assert {p.part for p in choose_questions(recipe, run).seen} == {"test"}
    with pytest.raises(DataError, match="the parts of the prompts have changed since generate"):
        choose_questions(with_prompts(recipe, **change), run)


def test_after_the_groups_of_trained_rows_have_changed_nothing_is_verified(tmp_path: Path) -> None:
    """What is a test prompt by the new values may have been trained on."""
    recipe = with_prompts(recipe_of(COMBINATIONS, verify=[{"rule": "matches"}]), test=0.4, group="customer")
    run, made = RunDir(tmp_path), list(iter_prompts(recipe))
    of_customer = [msgspec.structs.replace(p, columns={"customer": number}) for number, p in enumerate(made)]
    run.prompts.write_bytes(b"".join(map(encode_line, of_customer)))
    tested = rows_of([p for p in of_customer if recipe.prompts.part_of(p) == "test"])
    assert len(choose_questions(recipe, run, tested).seen) == len(tested) > 3
    corrected = [msgspec.structs.replace(p, columns={"customer": f"c{number}"}) for number, p in enumerate(made)]
    run.prompts.write_bytes(b"".join(map(encode_line, corrected)))
    with pytest.raises(DataError, match=r"values of 'customer' \(prompts\.group\) have changed since training"):
        choose_questions(recipe, run, tested)
    by_file = recipe.train.model_copy(update={"test_rows": Path("mine.jsonl")})
    assert choose_questions(recipe.model_copy(update={"train": by_file}), run, tested).seen


def test_a_prompt_without_a_reference_is_not_verified_where_others_have_one(tmp_path: Path) -> None:
    recipe = with_prompts(recipe_of(16, verify=[{"rule": "length", "min_chars": 1, "max_chars": 9}]), test=1.0)
    run = run_of(tmp_path, recipe)
    of_test = [msgspec.structs.replace(p, part="test") for p in iter_prompts(recipe)]
    half = [msgspec.structs.replace(p, reference=i if i % 2 else None) for i, p in enumerate(of_test)]
    for prompts, verified in ((of_test, 16), (half, 8)):
        run.prompts.write_bytes(b"".join(map(encode_line, prompts)))
        assert len(choose_questions(recipe, run).seen) == verified
