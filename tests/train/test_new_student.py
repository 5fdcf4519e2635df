"""A student that is made for its run: `new:<size>` with a tokenizer of its own, and a chat template where one lacks."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.errors import RecipeError
from pipeline.recipe import Recipe, load_recipe
from pipeline.rundir import RunDir
from tests.tiny_student import kept_row, log_of, make_recipe, make_run, story_rows, tiny_model
from train.new_student import PAD, Shape, apply_template, shape_of, train_tokenizer, vocabulary_of
from train.run import train_run
from train.student import initial_student

MILLION = 10**6
ANY_TEXT = "The cat sat.\n\n  Café 2026 — 고양이가 앉았다. 🐈 \t<p>{}</p>"


def new_recipe(student: dict[str, Any] | None = None, **train: Any) -> Recipe:
    made = make_recipe("new:1m", **train).model_dump(mode="json")
    return Recipe(**made | {"student": {"model": "new:1m"} | (student or {})})


@pytest.mark.parametrize("millions", [1, 2, 3, 5, 10, 20, 30, 50, 100, 135, 200, 360, 600, 1000, 2000])
def test_a_new_student_has_about_the_size_that_was_asked_for(millions: int) -> None:
    vocabulary = vocabulary_of(millions * MILLION)
    shape = shape_of(millions * MILLION, vocabulary)
    assert shape.parameters(vocabulary) == pytest.approx(millions * MILLION, rel=0.06)
    assert 10 < shape.width / shape.layers < 50


def test_shapes_are_those_of_mobilellm_with_its_vocabulary() -> None:
    assert shape_of(345 * MILLION, 32_000) == Shape(width=960, layers=32)
    assert shape_of(603 * MILLION, 32_000) == Shape(width=1152, layers=40)
    known = Shape(width=576, layers=30)  # MobileLLM-125M and SmolLM2-135M
    assert (known.heads, known.key_heads, known.inner) == (9, 3, 1536)
    assert known.parameters(49_152) == 134_515_008  # as SmolLM2-135M has


def test_a_vocabulary_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"1,000,000 parameters are too few for a vocabulary of 49,152 tokens"):
        shape_of(MILLION, 49_152)


def test_a_new_tokenizer_writes_any_text_and_knows_the_words_it_was_trained_on() -> None:
    tokenizer = train_tokenizer(["The cat sat. 고양이가 앉았다."] * 10, 1024)
    ids = tokenizer.encode(ANY_TEXT, add_special_tokens=False)
    assert tokenizer.decode(ids) == ANY_TEXT
    assert len(tokenizer.encode(" cat 고양이가", add_special_tokens=False)) == 2
    assert len(tokenizer.encode("2026", add_special_tokens=False)) == 4
    assert (tokenizer.pad_token, tokenizer.eos_token) == (PAD, "<|im_end|>")
    assert 259 < len(tokenizer) < 1024  # no token of what is rare


def test_a_new_student_depends_on_seed_and_rows_alone(tmp_path: Path) -> None:
    rows, folders = story_rows(12), {}
    others = [kept_row(n, f"Tale {n}?", "A dog ran home.") for n in range(12)]
    runs = {"one": (0, rows), "same": (0, rows), "seed": (1, rows), "rows": (0, others)}
    for name, (seed, own) in runs.items():
        folder = Path(initial_student(new_recipe(seed=seed), make_run(tmp_path / name, own), own))
        folders[name] = [(folder / file).read_bytes() for file in ("model.safetensors", "tokenizer.json")]
    assert folders["same"] == folders["one"]
    assert folders["seed"][0] != folders["one"][0] and folders["seed"][1] == folders["one"][1]
    assert folders["rows"][1] != folders["one"][1]


def test_a_new_student_is_made_once_and_again_for_other_rows(tmp_path: Path) -> None:
    run, rows = make_run(tmp_path, []), story_rows(8)
    mark = run.student_init / "built.json"
    initial_student(new_recipe(), run, rows)
    first = mark.stat().st_ino
    initial_student(new_recipe(), run, rows)
    assert mark.stat().st_ino == first
    initial_student(new_recipe(), run, rows[1:])
    assert mark.stat().st_ino != first
    config = json.loads(Path(initial_student(new_recipe(max_length=4096), run, rows[1:]), "config.json").read_bytes())
    assert config["max_position_embeddings"] == 4096


def test_a_new_student_learns_and_its_folder_is_whole(tmp_path: Path) -> None:
    run = make_run(tmp_path, story_rows(24))
    train_run(new_recipe(epochs=3, learning_rate=None, batch_size=4), run)
    section = json.loads(run.lineage.read_bytes())["train"]
    built, log = section["built"], log_of(run)
    model, before = (AutoModelForCausalLM.from_pretrained(folder) for folder in (run.student, run.student_init))
    assert built["parameters"] == model.num_parameters() == before.num_parameters()
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert (built["seed"], built["model"], section["initialised_from"]) == (0, "new:1m", None)
    assert section["hyperparameters"]["learning_rate"] == 1e-3
    assert section["learning_rate_default"] == log["learning_rate_default"] == "all weights of a new or pruned student"
    assert log["eval"][-1]["loss"] < log["loss"][0]["loss"] - 1
    tokenizer = AutoTokenizer.from_pretrained(run.student)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == (
        "<|im_start|>user\nHi<|im_end|>\n"
    )
    card = (run.student / "README.md").read_text()
    assert f"a new model of {built['parameters']:,} parameters, random at first" in card
    assert "base_model" not in card


def test_a_new_student_may_use_anothers_tokenizer_and_template(tmp_path: Path) -> None:
    other = tiny_model(tmp_path / "other")
    run = make_run(tmp_path / "run", [])
    folder = initial_student(new_recipe({"tokenizer": str(other)}), run)
    tokenizer, given = (AutoTokenizer.from_pretrained(path) for path in (folder, other))
    assert tokenizer.get_vocab() == given.get_vocab()
    assert tokenizer.chat_template == given.chat_template
    assert AutoModelForCausalLM.from_pretrained(folder).config.eos_token_id == tokenizer.eos_token_id


def test_a_student_without_a_chat_template_gets_one_that_is_saved_with_it(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    recipe = make_recipe(str(base), method="lora").model_dump(mode="json")
    run = make_run(tmp_path / "run", story_rows(8))
    train_run(Recipe(**recipe | {"student": {"model": str(base), "chat_template": "chatml"}}), run)
    for folder in (run.student_init, run.student):
        template = AutoTokenizer.from_pretrained(folder).chat_template
        assert "<|im_start|>" in template and "'<|im_end|>'" in template
    adapter = json.loads((run.student / "adapter_config.json").read_bytes())
    assert adapter["base_model_name_or_path"] == str(run.student_init.resolve())
    assert json.loads(run.lineage.read_bytes())["train"]["initialised_from"] == str(base)


def test_chatml_ends_turns_with_the_eos_of_a_tokenizer_that_has_no_token_for_it() -> None:
    tokenizer = train_tokenizer(["The cat sat."], 300)
    plain = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token=PAD)
    plain.get_vocab = lambda: {PAD: 0}
    apply_template(plain, "chatml")
    text = plain.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert text == f"<|im_start|>user\nHi{PAD}\n<|im_start|>assistant\n"
    plain.eos_token = None
    with pytest.raises(RecipeError, match=r"chatml: the tokenizer has no EOS to end a turn with"):
        apply_template(plain, "chatml")


@pytest.mark.parametrize(
    ("student", "train", "reason"),
    [
        ({"model": "new:30"}, {}, "model new:30: give a size from 1m to 2b, as in new:30m"),
        ({"model": "new:100k"}, {}, "as in new:30m"),
        ({"model": "new:0.5m"}, {}, "give a size from 1m to 2b"),
        ({"model": "x/y", "tokenizer": "a/b"}, {}, "tokenizer is for a new student .* x/y has its own"),
        ({"model": "new:1m", "chat_template": "no/such.jinja"}, {}, "No such file.*: give chatml, or a file"),
        ({"model": "new:1m"}, {"method": "lora"}, "random weights, .*; set train.method: full, got 'lora'"),
        ({"model": "new:1m"}, {"method": "kd"}, "set train.kd.weights: full, got 'lora'"),
    ],
)
def test_what_a_new_student_cannot_be_is_said(student: dict[str, Any], train: dict[str, Any], reason: str) -> None:
    recipe = make_recipe("x/y").model_dump(mode="json")
    with pytest.raises(ValidationError, match=reason):
        Recipe(**recipe | {"student": student, "train": recipe["train"] | train})


def test_a_template_file_is_relative_to_the_recipe_and_its_text_is_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("<s>{{ messages[0]['content'] }}{{ eos_token }}")
    path = tmp_path / "recipe.yaml"
    recipe = make_recipe("new:1m").model_dump(mode="json")
    path.write_text(yaml.safe_dump(recipe | {"student": {"model": "new:1m", "chat_template": "mine.jinja"}}))
    loaded = load_recipe(path)
    assert loaded.student and loaded.student.chat_template == (tmp_path / "mine.jinja").read_text()
    RunDir(tmp_path).save_recipe(loaded)
    assert load_recipe(tmp_path / "recipe.yaml") == loaded


def test_texts_that_spell_a_control_token_are_refused_for_a_new_student_too(tmp_path: Path) -> None:
    rows = [*story_rows(8), kept_row(99, "Say it?", "It is <|im_start|> here.")]
    with pytest.raises(Exception, match=r"check markup: 1 of 9 rows spell a control token"):
        train_run(new_recipe(), make_run(tmp_path, rows))
