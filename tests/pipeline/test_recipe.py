"""Recipes: what overrides what, and what a wrong one says."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RecipeError
from pipeline.prompts_config import slot_values
from pipeline.recipe import Recipe, load_recipe

GOOD = """
name: tiny
teacher: {model: some/teacher}
prompts: {count: 3, template: "{a}", slots: {a: [x, y]}}
sampling: {top_p: 0.7}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(GOOD)
    return file


def test_flags_override_the_environment_which_overrides_the_yaml(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_recipe(path).sampling.top_p == 0.7
    monkeypatch.setenv("DISTILL_SAMPLING__TOP_P", "0.6")
    assert load_recipe(path).sampling.top_p == 0.6
    assert load_recipe(path, ["--sampling.top_p", "0.5"]).sampling.top_p == 0.5


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("train.seed", "-1", "greater than or equal to 0, got '-1'"),
        ("train.seed", str(1 << 32), "less than 4294967296, got '4294967296'"),
        ("train.epochs", "inf", "a finite number, got 'inf'"),
        ("generate.give_up_s", "nan", "a finite number, got 'nan'"),
        ("budget.usd", "1e300", "less than or equal to 1000000000, got '1e300'"),
        ("teacher.price.input", "1e300", "less than or equal to 1000000000, got '1e300'"),
    ],
)
def test_numbers_that_no_stage_can_use_are_refused(path: Path, key: str, value: str, error: str) -> None:
    with pytest.raises(RecipeError, match=f"--{key}: {key} should be {error}"):
        load_recipe(path, [f"--{key}", value])


def test_what_is_not_overridden_stays(path: Path) -> None:
    recipe = load_recipe(path, ["--teacher.base_url", "https://example.org/v1/", "--prompts.system", "null"])
    assert recipe.teacher.model == "some/teacher"
    assert recipe.teacher.base_url == "https://example.org/v1"
    assert recipe.prompts.system is None


def test_a_recipe_built_in_python_reads_neither_variables_nor_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILL_SAMPLING__TOP_P", "0.6")
    monkeypatch.setenv("DISTILL_NAME", "other")
    monkeypatch.setattr("sys.argv", ["python", "--sampling.top_p", "0.5", "--nonsense"])
    recipe = Recipe(name="mine", teacher={"model": "m"}, prompts={"count": 1, "template": "x"})
    assert (recipe.name, recipe.sampling.top_p) == ("mine", 0.9)


def test_a_loaded_recipe_is_the_same_type_and_value_as_one_built_in_python(path: Path) -> None:
    built = Recipe(
        name="tiny",
        teacher={"model": "some/teacher"},
        prompts={"count": 3, "template": "{a}", "slots": {"a": ["x", "y"]}},
        sampling={"top_p": 0.7},
    )
    assert load_recipe(path) == built


def test_letters_of_a_name_may_have_marks(path: Path) -> None:
    for name in ("นิทาน", "कहानी_१", "ngữ-liệu", "物語"):
        assert load_recipe(path, ["--name", name]).name == name
    with pytest.raises(RecipeError, match="names a folder"):
        load_recipe(path, ["--name", "\u0e34"])  # a mark without a letter


def test_files_that_the_recipe_names_are_relative_to_it(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = "prompts: {file: data/p.jsonl}\nevaluate: {probes_file: probes.jsonl}\n"
    files += "train: {test_rows: test.jsonl}\n"
    path.write_text(f"name: tiny\nteacher: {{model: m}}\n{files}")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for recipe in (load_recipe(path), load_recipe(Path("../tiny.yaml"))):
        assert recipe.prompts.file is not None and recipe.evaluate.probes_file is not None
        assert recipe.prompts.file.resolve() == tmp_path / "data/p.jsonl"
        assert recipe.evaluate.probes_file.resolve() == tmp_path / "probes.jsonl"
        assert recipe.train.test_rows is not None and recipe.train.test_rows.resolve() == tmp_path / "test.jsonl"
        assert recipe.prompts.file.is_absolute()  # so that the saved recipe.yaml means the same file
    path.write_text("name: tiny\nteacher: {model: m}\nprompts: {file: ~no-such-user/p.jsonl}\n")
    assert load_recipe(path).prompts.file == tmp_path / "~no-such-user/p.jsonl"
    flag = load_recipe(path, ["--prompts.file", "p.jsonl"])
    assert flag.prompts.file == Path("p.jsonl")  # a flag is relative to where the command is given


@pytest.mark.parametrize("section", ["prompts: 3", "filters: {rules: 3}", "filters: {rules: [3]}", "evaluate: []"])
def test_a_section_of_the_wrong_shape_is_an_error_and_no_crash(path: Path, section: str) -> None:
    lines = [line for line in GOOD.splitlines() if not line.startswith(section.split(":")[0])]
    path.write_text("\n".join([*lines, section]))
    with pytest.raises(RecipeError, match=r"tiny\.yaml"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("change", "flags", "said"),
    [
        ("sampling: {top_p: 1.3}", [], "{path}: sampling.top_p should be less than or equal to 1, got 1.3"),
        (
            "sampling: {topp: 1}",
            [],
            "{path}: sampling.topp: no such key; there are temperature, top_p, max_tokens, seed",
        ),
        ("samplin: {}", [], "{path}: samplin: no such key; there are name, teacher, "),
        ("sampling: {}", ["--sampling.top_p", "2"], "--sampling.top_p: sampling.top_p should be"),
        ("train: {}", ["--train.kd.top_k=x"], "--train.kd.top_k: train.kd.top_k should be a valid integer"),
        ("filters: {}", ["--filters.rules", '[{"min": 3}]'], "--filters.rules: filters.rules[0].rule is missing"),
        ("sampling: {}", ["--sampling.topp", "2"], "unrecognized arguments: --sampling.topp"),
        ("sampling: {}", ["--budget", "x"], "--budget: its value is no JSON; give JSON, in single quotes"),
        (
            "serve: {}",
            ["--serve.args", '["--hf-overrides={\\"a\\": 1}"]'],
            "--serve.args: no JSON that a flag can hold; check it, or give it in the recipe or as DISTILL_SERVE__…",
        ),
        (
            "sampling: {}",
            ["--teacher.headers", "3"],
            "--teacher.headers: its value is no JSON; give JSON, in single quotes",
        ),
        ("teacher: {model: m, base_url: localhost}", [], "{path}: teacher.base_url"),
        (
            "teacher: {model: m, base_url: [http://a/v1, http://b/v1 many]}",
            [],
            "{path}: teacher.base_url http://b/v1: its weight must be a number above 0, at most 1000, not 'many'",
        ),
        (
            "prompts: {count: 1, template: x, user: {base_url: localhost}}",
            [],
            "{path}: prompts.user.base_url",
        ),
        (
            "prompts: {count: 1, template: x, user: {base_url: 'http://a/v1 many'}}",
            [],
            "{path}: prompts.user.base_url http://a/v1: its weight must be a number above 0, at most 1000, not 'many'",
        ),
        ("filters: {judge: {base_url: localhost}}", [], "{path}: filters.judge.base_url"),
        ("name: a", ["--teacher.price", "{{input: 1, output: 2}}"], """; give JSON: '{{"input": …, "output": …}}'"""),
        ("prompts: {template: x}", [], "{path}: prompts a template needs `count`"),
        ("prompts: {}", [], "{path}: prompts give either `template`"),
        ("prompts: {count: 1, template: x, columns: {prompt: q}}", [], "`json_columns` and `answers` are for `file`"),
        ("prompts: {file: a.csv, reference: b}", [], "{path}: prompts reference is for a template"),
        ("prompts: {count: 1, template: x, slots: {a: []}}", [], "{path}: prompts slot `a` is empty"),
        ("prompts: {count: 1, template: x, validation: 0.5, test: 0.5}", [], "leave no prompt to train on"),
        ("prompts: {count: 1, template: x, samples: 2}", ["--sampling.temperature", "0"], "all of them are the same"),
        ("teacher: {model: m, base_url: []}", [], "{path}: teacher.base_url needs at least one URL"),
        ("evaluate: {adherence: [b]}", [], "evaluate.adherence: prompts.slots has no 'b'; there are a"),
        ("student: {model: 'new:30m'}", [], "has random weights, which adapters would leave as they are; set"),
        (
            "prompts: {count: 1, template: x, slots: {a: {choose: 3, from: [b, c]}}}",
            [],
            "choose is 3, but `from` has only 2 different values",
        ),
        ("name: my tickets", [], "{path}: name names a folder: letters, digits, -, _, and dots between them"),
        ("name: ..", [], "{path}: name names a folder: "),
        (
            "prompts: {count: 1, template: x, slots: {a: kids}}",
            [],
            "{path}: prompts.slots.a takes a list of values, or `{{choose: k, from: […]}}`, got 'kids'",
        ),
        (
            "prompts: {count: 1, template: x, slots: {a: [b, ~]}}",
            [],
            "{path}: prompts.slots.a[1] should be a valid string",
        ),
        (
            "prompts: {count: 1, template: x, slots: {a: {choose: 1, from: b}}}",
            [],
            "{path}: prompts.slots.a.from should be a valid list, got 'b'",
        ),
        (
            "sampling: {}",
            ["--prompts.slots", '{"a": [7]}'],
            "--prompts.slots: prompts.slots.a[0] should be a valid string, got 7; put it in quotes",
        ),
        (
            "prompts: {count: 1, template: x, system: no}",
            [],
            "{path}: prompts.system should be a valid string, got False (as YAML reads yes, no, on and off); put it in",
        ),
        (
            "filters: {rules: [choice]}",
            [],
            "{path}: filters.rules[0] takes the rule's name and its settings, as in `{{rule: length, "
            "min_chars: 10}}`, got 'choice'",
        ),
        ("budget: 5", [], "{path}: budget takes keys (usd, tokens), got 5"),
        (
            "generate: {concurrency: x}",
            [],
            "{path}: generate.concurrency should be 'auto', or should be a valid integer, unable to parse",
        ),
        (
            "teacher: {model: m, base_url: 5}",
            [],
            "{path}: teacher.base_url should be a valid string, or should be a valid list, got 5; put it in quotes",
        ),
        ("sampling: {}", ["--train.compile", "x"], "--train.compile: train.compile should be 'auto', or should be a"),
        ("teacher: {model: m, headers: 3}", [], "{path}: teacher.headers takes a mapping, `{{key: value}}`"),
        (
            "teacher: {model: m, examples: [{prompt: p, answer: {x: 1}}]}",
            [],
            "examples[0].answer should be a valid string (as YAML reads {{…}}); put it in quotes",
        ),
        ("sampling:", [], ", got None; it is empty: remove its line, or fill it"),
        (
            "sampling: {extra: {chat_template_kwargs: {on: 1}}}",
            [],
            "sampling.extra.chat_template_kwargs has the key True, as YAML reads it; put it in quotes",
        ),
        ("sampling: {extra: {stop: [.nan]}}", [], "sampling.extra.stop holds nan, which JSON does not have"),
        ("sampling: {extra: {stop: &a [*a]}}", [], "sampling.extra.stop is nested over 100 levels deep"),
        ("prompts: {count: 1, template: x, reference: {no: 1}}", [], "prompts.reference has the key False"),
        (f"prompts: {{count: 1, template: x, reference: {'[' * 300}1{']' * 300}}}", [], "nested over 100 levels deep"),
        (f"prompts: {{count: 1, template: x, reference: {'[' * 3000}1{']' * 3000}}}", [], "; a value is nested too"),
        (
            "prompts: {count: 1, template: x, tools: [{type: function, function: {name: f, parameters: {on: 1}}}]}",
            [],
            "prompts.tools has the key True, as YAML reads it; put it in quotes",
        ),
        ("sampling: {temperature: 0,5}", [], ", got 5; a comma ends a value: write decimals with a point, as in 0.5"),
        (
            "prompts: {file: a.csv, columns: {prompt: question, answer: answer}}",
            [],
            "got 'answer'; these map to your names, and the other columns travel along unnamed",
        ),
        (
            'teacher: {model: m, system: "Be kind \\ud83d\\ude00"}',  # as JSON escapes it
            [],
            "{path}: teacher.system holds '\\ud83d', half of a surrogate pair, which UTF-8 cannot write; write the",
        ),
        ('sampling: {extra: {stop: ["\\ud800"]}}', [], "{path}: sampling.extra holds '\\ud800', half of a surrogate"),
        ("name: a", ["--teacher.system", "\udcff"], "--teacher.system: teacher.system holds '\\udcff', half of a"),
        ('prompts: {file: "a\\0.csv"}', [], "{path}: prompts.file holds NUL, which no file name can; remove it"),
        (f"budget: {{tokens: {'9' * 5000}}}", [], "{path}: not YAML: Exceeds the limit"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(path: Path, change: str, flags: list[str], said: str) -> None:
    key = change.split(":")[0]
    lines = [line for line in GOOD.splitlines() if not line.startswith(f"{key}:")]
    path.write_text("\n".join([*lines, change]))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, flags)
    assert said.format(path=path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "variables", "extra"),
    [
        ([], {}, {"top_k": 5, "stop": ["END"]}),
        (["--sampling.extra", "{}"], {}, {}),
        (["--sampling.extra", '{"top_k": 7}'], {"SAMPLING__EXTRA": '{"min_p": 1}'}, {"top_k": 7}),
        ([], {"SAMPLING__EXTRA": "{}"}, {}),
        ([], {"SAMPLING": '{"extra": {"min_p": 1}}'}, {"min_p": 1}),
        (["--sampling.max_tokens", "9"], {"SAMPLING__TOP_P": "0.5"}, {"top_k": 5, "stop": ["END"]}),
    ],
)
def test_a_mapping_is_replaced_as_one_value_and_the_rest_of_its_section_stays(
    path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], variables: dict[str, str], extra: dict[str, Any]
) -> None:
    path.write_text(GOOD.replace("{top_p: 0.7}", "{temperature: 0.3, extra: {top_k: 5, stop: [END]}}"))
    for name, value in variables.items():
        monkeypatch.setenv(f"DISTILL_{name}", value)
    sampling = load_recipe(path, flags).sampling
    assert (sampling.extra, sampling.temperature) == (extra, 0.3)


def test_values_of_slots_are_texts_as_they_are_written(path: Path) -> None:
    written = ["7", "007", "1.0", "1_000", "12:30", "0x10", "2024-01-01", "yes", "No", "true", "a b"]
    values = f"[{', '.join(written)}, 'quoted']"
    slots = f"{{a: {values}, b: {{choose: 2, from: {values}}}}}"
    path.write_text(
        f"name: t\nteacher: {{model: m}}\nprompts: {{count: 3, template: '{{a}}{{b}}', slots: {slots}}}\n"
        "evaluate: {unseen: {a: [8, off]}}\n"
    )
    recipe = load_recipe(path)
    assert recipe.prompts.slots["a"] == [*written, "quoted"]
    assert slot_values(recipe.prompts.slots["b"]) == [*written, "quoted"]
    assert recipe.evaluate.unseen == {"a": ["8", "off"]}


def test_a_number_is_what_people_read(path: Path) -> None:
    """YAML 1.1 has octal numbers, and those to the base 60."""
    head = "name: tiny\nteacher: {model: m}\nprompts: {template: x, count: "
    path.write_text(head + "010}\nsampling: {max_tokens: 1_000}\n")
    recipe = load_recipe(path)
    assert (recipe.prompts.count, recipe.sampling.max_tokens) == (10, 1000)
    path.write_text(head + "1:30}\n")
    with pytest.raises(RecipeError, match=r"prompts\.count should be a valid integer, .*, got '1:30'"):
        load_recipe(path)


def test_dates_are_texts_as_they_are_written(path: Path) -> None:
    path.write_text(
        "name: 2026-01-01\nteacher: {model: m, query: {api-version: 2024-10-21}}\n"
        "prompts: {count: 1, template: x, reference: 2026-01-01 10:00:00}\n"
        "sampling: {extra: {metadata: {day: 2026-01-01}}}\n"
    )
    recipe = load_recipe(path)
    assert (recipe.name, recipe.teacher.query) == ("2026-01-01", {"api-version": "2024-10-21"})
    assert (recipe.prompts.reference, recipe.sampling.extra["metadata"]["day"]) == ("2026-01-01 10:00:00", "2026-01-01")


def test_the_user_and_the_judge_have_urls_as_the_teacher_has(path: Path) -> None:
    """So `http://…/v1/` is the teacher's URL, whose key they then have."""
    path.write_text(GOOD)
    flags = ["--teacher.base_url", "https://a/v1", "--prompts.user.base_url", "https://a/v1/"]
    recipe = load_recipe(path, [*flags, "--filters.judge.base_url", "https://a/v1/, https://b/v1 2"])
    assert recipe.prompts.user is not None and recipe.prompts.user.base_url == recipe.teacher.base_url
    assert recipe.filters.judge is not None
    assert recipe.teacher.another(recipe.filters.judge, "judge").url_weights == {"https://a/v1": 1, "https://b/v1": 2}


def test_urls_are_those_between_commas_in_a_list_too(path: Path) -> None:
    path.write_text(GOOD.replace("some/teacher", "some/teacher, base_url: ['http://a/v1,http://b/v1 2', http://c/v1]"))
    assert load_recipe(path).teacher.url_weights == {"http://a/v1": 1, "http://b/v1": 2, "http://c/v1": 1}


@pytest.mark.parametrize(("name", "value"), [("DISTILL_SAMPLING__TOP_P", "9"), ("DISTILL_SAMPLING", '{"top_p": 9}')])
def test_a_wrong_variable_is_named(path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=rf"^{name}: sampling\.top_p should be less"):
        load_recipe(path)


@pytest.mark.parametrize("name", ["DISTILL_SAMPLNG__TOP_P", "DISTILL_SAMPLING_TOP_P", "distill_budgt__usd"])
def test_a_mistyped_variable_is_refused_and_its_value_not_shown(
    path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("DISTILL_CACHE", "cache")  # the project's own
    monkeypatch.setenv("DISTILL_API_KEY", "a key")  # named in a recipe
    load_recipe(path)
    monkeypatch.setenv(name, "0.123")
    with pytest.raises(RecipeError, match=rf"^{name}: no such key: \w+; there are name, teacher, ") as caught:
        load_recipe(path)
    assert "0.123" not in str(caught.value)


@pytest.mark.parametrize("key", ["TEACHER__HEADERS__X_TEAM", "SAMPLING__EXTRA__TOP_K", "PROMPTS__SLOTS__A"])
def test_a_variable_for_a_key_within_a_mapping_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """It would be the header `x_team`, or the text `5`, and take the place of all other keys."""
    monkeypatch.setenv(f"DISTILL_{key}", "5")
    whole = key.rpartition("__")[0]
    named = whole.replace("__", ".").lower()
    said = f"DISTILL_{key}: {named} is one value, .*; give all of it as JSON in DISTILL_{whole}$"
    with pytest.raises(RecipeError, match=said):
        load_recipe(path)


def test_a_list_in_a_variable_is_json(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILL_SERVE__ARGS", '["--a", "b"]')
    assert load_recipe(path).serve.args == ["--a", "b"]
    for name, value in (("SERVE__ARGS", "--a b"), ("TEACHER__HEADERS", "X-Key: b"), ("SAMPLING", '{"seed": b')):
        monkeypatch.setenv(f"DISTILL_{name}", value)
        key = name.lower().replace("__", ".")
        with pytest.raises(RecipeError, match=rf"DISTILL_{name}: {key} (should be|takes) .*; give JSON$") as caught:
            load_recipe(path)
        assert value not in str(caught.value)
        monkeypatch.delenv(f"DISTILL_{name}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("filters: {rules: []}\nfilters: {select: first}\n", "7: filters is given twice (see line 6)"),
        ("budget:\n  usd: 5\n  usd: 1\n", "8: usd is given twice (see line 7)"),
    ],
)
def test_a_key_given_twice_is_refused(path: Path, text: str, said: str) -> None:
    path.write_text(GOOD + text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value) == f"{path}:{said}; keep one"


def test_a_merged_mapping_may_be_overridden(path: Path) -> None:
    path.write_text(GOOD + "budget: &b {usd: 5, tokens: 9}\nfilters: {judge: {budget: {<<: *b, usd: 1}}}\n")
    recipe = load_recipe(path)
    assert recipe.filters.judge is not None
    assert (recipe.filters.judge.budget.usd, recipe.filters.judge.budget.tokens) == (1, 9)


@pytest.mark.parametrize("key", ["teacher", "prompts.user", "filters.judge"])
@pytest.mark.parametrize("pasted", ["sk-proj-very-secret", '["sk-proj-very-secret"]'])
def test_a_key_in_place_of_its_variables_name_is_refused_and_not_shown(
    path: Path, monkeypatch: pytest.MonkeyPatch, key: str, pasted: str
) -> None:
    assert load_recipe(path, [f"--{key}.api_key_env", "MY_KEY_2"])
    monkeypatch.setenv(f"DISTILL_{key.replace('.', '__').upper()}__API_KEY_ENV", pasted)
    with pytest.raises(RecipeError, match=rf"{key}\.api_key_env must be the name of an env") as caught:
        load_recipe(path)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "", "\x00"])
def test_a_file_that_is_no_recipe_is_one_line(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the recipe is empty"),
        ("# name: x\n", "the recipe is empty"),
        ("a: b: c\n", "; put a text with `: ` in it in quotes"),
        ("a:\n\tb: c\n", "; indent with spaces, not with tabs"),
        ("a: {b} c\n", "; put a text that begins with `{`"),
        ("a: @b\n", "; put a text that begins with `{`"),
        ("a: *b\n", "; put a text that begins with `{`"),
        ("a: {{b}}\n", "; put a text that begins with `{`"),
    ],
)
def test_a_slip_in_yaml_is_told_with_its_fix(path: Path, text: str, said: str) -> None:
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert said in str(caught.value)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_the_key_comes_from_the_environment_and_never_shows(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    recipe = load_recipe(path)
    key = recipe.teacher.api_key()
    assert key is not None and key.get_secret_value() == "sk-very-secret"
    assert "sk-very-secret" not in repr(recipe) + recipe.model_dump_json() + repr(key)


@pytest.mark.parametrize("recipe", sorted(Path("recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_that_ships_is_valid(recipe: Path) -> None:
    assert load_recipe(recipe).name == recipe.stem


def test_tools_and_a_chat_template_may_begin_with_a_byte_order_mark(path: Path, tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_text('[{"type": "function", "function": {"name": "f"}}]', encoding="utf-8-sig")
    (tmp_path / "chat.jinja").write_text("{{ messages }}", encoding="utf-8-sig")
    path.write_text(
        GOOD.replace("count: 3", "tools: tools.json, count: 3") + "student: {model: s, chat_template: chat.jinja}"
    )
    recipe = load_recipe(path)
    assert recipe.prompts.tools[0]["function"] == {"name": "f"}
    assert recipe.student is not None and recipe.student.chat_template == "{{ messages }}"


def test_tools_and_examples_come_from_the_files_of_flags_and_variables(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tools, examples = [{"type": "function", "function": {"name": "f"}}], [{"prompt": "p", "answer": "a"}]
    Path("tools.json").write_text(json.dumps(tools))
    Path("shown.jsonl").write_text(json.dumps(examples[0]))
    files = {"prompts.tools": "tools.json", "teacher.examples": "shown.jsonl"}
    by_file = load_recipe(path, [part for key, name in files.items() for part in (f"--{key}", name)])
    values = ["--prompts.tools", json.dumps(tools), "--teacher.examples", json.dumps(examples)]
    assert by_file == load_recipe(path, values)
    assert by_file.prompts.tools == tools and by_file.teacher.examples[0].answer == "a"
    for key, name in files.items():
        monkeypatch.setenv(f"DISTILL_{key.replace('.', '__').upper()}", name)
    assert load_recipe(path) == by_file


def test_examples_for_the_teacher_come_from_the_recipe_or_a_file_beside_it(path: Path, tmp_path: Path) -> None:
    lines = '{"prompt": "p", "answer": "a"}\n\n{"prompt": "q", "answer": "b"}\n'
    (tmp_path / "shown.jsonl").write_text(lines, encoding="utf-8-sig")  # with a byte order mark
    path.write_text(GOOD.replace("{model: some/teacher}", "{model: some/teacher, examples: shown.jsonl}"))
    teacher = load_recipe(path).teacher
    assert [(shown.prompt, shown.answer) for shown in teacher.examples] == [("p", "a"), ("q", "b")]
    for content, said in (
        ('{"prompt": "p"}\n', r"examples\[0\].answer is missing"),
        ("a,b\n", "JSONL file of {prompt, answer}"),
        ("[" * 100_000, "teacher.examples .*: give a list or a JSONL file"),
    ):
        (tmp_path / "shown.jsonl").write_text(content)
        with pytest.raises(RecipeError, match=said):
            load_recipe(path)
    path.write_text(GOOD.replace("{model: some/teacher}", "{model: some/teacher, examples: gone.jsonl}"))
    with pytest.raises(RecipeError, match=r"teacher\.examples.*No such file"):
        load_recipe(path)
