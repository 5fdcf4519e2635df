"""What the student is asked and what it learns: its own system prompt, reasoning, every turn, tools."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import trl
from msgspec.structs import replace
from rich.console import Console
from transformers import AutoTokenizer

from chat.conversation import system_of
from pipeline.errors import DataError, RecipeError, UsageError
from pipeline.instructions import shared_system, system_of_student
from pipeline.reasoning import reasoning_form
from pipeline.recipe import Recipe
from pipeline.records import Kept, Message, read_jsonl
from tests.tiny_student import CHATML, kept_row, log_of, make_recipe, make_run, tiny_model
from train.checks.before import check_student
from train.checks.data import row_checks
from train.checks.pair import thoughts_check, told_only, tools_check
from train.publish.export import export_dataset, export_gguf
from train.rows import Parts, to_examples
from train.run import _of_teacher, train_run
from train.setting import Setting
from train.tokens import MASKED
from train.trainer import prepare

TEMPLATES = Path(trl.__file__).parent / "chat_templates"  # as the makers of well-known models publish them
QWEN3, QWEN25, LLAMA31 = ((TEMPLATES / f"{name}.jinja").read_text() for name in ("qwen3", "qwen2_5", "llama3_1"))
# As TRL's training templates: the assistant's words are marked.
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As DeepSeek-R1's: what stands before the last closing tag is not rendered.
DROPPING = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
# As Mistral-7B-Instruct-v0.3's: the system message is in the last turn, if that is the user's.
LAST_TURN = (
    "{% set system = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}"
    "{% for message in messages if message['role'] != 'system' %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + (system if loop.last else '') + message['content'] + '[/INST]' }}{% else %}"
    "{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
LAMP = {"type": "function", "function": {"name": "lamp", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A tiny student with a chat template of the test's choice."""
    plain = tiny_model(tmp_path_factory.mktemp("models") / "plain", context=2048)

    def build(template: str) -> str:
        folder = tmp_path_factory.mktemp("model") / "student"
        shutil.copytree(plain, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        return str(folder)

    return build


def shown(model: str, rows: list[Kept], tmp_path: Path, **train: Any) -> list[tuple[str, str]]:
    """Of each row, the whole text as the trainer has it, and the part with loss."""
    config, tokenizer = make_recipe(model, **{"max_length": 2048, **train}).train, AutoTokenizer.from_pretrained(model)
    examples = to_examples(rows, None, reasoning_form(config, tokenizer))
    prepared = prepare(
        model, {"train": examples, "validation": examples}, Setting(config, tmp_path, Console(quiet=True))
    )
    assert prepared.faults == {} and prepared.differing == 0
    found = []
    for row in prepared.trainer.train_dataset:
        learned = [token for token in row["labels"] if token != MASKED]
        found.append((tokenizer.decode(row["input_ids"]), tokenizer.decode(learned)))
    assert prepared.lengths["train"] == [len(row["input_ids"]) for row in prepared.trainer.train_dataset]
    return found


def test_a_template_that_moves_the_system_message_would_teach_the_question(
    student: Callable[[str], str], tmp_path: Path
) -> None:
    model, bare = student(LAST_TURN), kept_row(1, "Why?", "So.")
    assert shown(model, [bare], tmp_path / "bare") == [("[INST] Why?[/INST] So.<|im_end|>", " So.<|im_end|>")]
    system = Message("system", "Be brief.")
    rows = [kept_row(n, "", "So.", messages=[system, Message("user", f"Why {n}?")]) for n in range(6)]
    wanted = r"labels: 0 of 5 rows .*: loss falls on the prompt too: on 'Why \d\?\[/'; the chat template renders an"
    with pytest.raises(DataError, match=wanted):
        train_run(make_recipe(model, accept=["filters", "context"]), make_run(tmp_path / "run", rows))


NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
NO_END = CHATML.replace("<|im_end|>", "")  # as GLM-4.5's
OPEN_THOUGHT = CHATML.replace("assistant\n", "assistant\n<think>\n")  # as DeepSeek-R1's


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (NO_SYSTEM, r"check templates: .* cannot render a prompt: no system role; set student\.system: \"\" if"),
        (OPEN_THOUGHT, r"check context: 1 of 1 training prompts .*, or train\.accept: \[context\]; nothing was asked"),
        (NO_END, r"check eos: 0 of 1 rows .*; nothing was asked"),
        (LAST_TURN, r"check labels: .*: on 'Hi\[/INST.*; nothing was asked"),
    ],
)
def test_a_template_that_would_stop_the_training_is_told_before_anything_is_asked(
    student: Callable[[str], str], template: str, told: str
) -> None:
    asked = make_recipe(student(template)).model_dump()
    asked["prompts"]["system"] = "Be brief."
    with pytest.raises(UsageError, match=told):
        check_student(Recipe.model_validate(asked))
    asked["student"]["system"], asked["train"]["accept"] = "", ["context"]
    if template != NO_END:
        check_student(Recipe.model_validate(asked))


def test_a_template_of_ones_own_is_tried_too_before_anything_is_asked(student: Callable[[str], str]) -> None:
    given = make_recipe(student("")).model_dump()
    given["student"]["chat_template"] = NO_END
    with pytest.raises(UsageError, match=r"check eos: 0 of 1 rows"):
        check_student(Recipe.model_validate(given))
    given["student"]["chat_template"] = "chatml"
    check_student(Recipe.model_validate(given))


def test_a_student_of_another_kind_is_told_before_anything_is_asked(student: Callable[[str], str]) -> None:
    folder = Path(student(CHATML))
    (folder / "config.json").write_text('{"model_type": "mistral3"}')
    with pytest.raises(RecipeError, match=r"is of the kind mistral3, which transformers does not load as a language"):
        check_student(make_recipe(str(folder)))


def told(student: str, own: str | None, **teacher: Any) -> Recipe:
    """A recipe whose teacher is told more than its student."""
    recipe = make_recipe(student).model_dump()
    recipe["teacher"] |= teacher
    recipe["student"]["system"] = own
    return Recipe.model_validate(recipe)


def test_a_teacher_that_was_told_nothing_is_not_said_to_have_been_told_a_system_message() -> None:
    teacher = "the teacher was asked the prompts as they are"
    student = "the student is asked the prompts with a system message of its own"
    assert told_only(told("student", "Be short.")) == f"{teacher}; {student}"
    assert told_only(told("student", None)) == ""


@pytest.mark.parametrize(
    ("system", "own", "words"),
    [
        (None, [Message("system", "Of the prompt.")], "the student is asked the prompts as they are"),
        ("", [], "the student is asked the prompts without a system message"),
        ("Be short.", [Message("system", "Be short.")], "the prompts with a system message of its own"),
    ],
)
def test_the_student_is_asked_with_its_own_system_prompt_in_training_and_export(
    student: Callable[[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    system: str | None,
    own: list[Message],
    words: str,
) -> None:
    bare = [kept_row(n, "", f"Yes {n}.", messages=[Message("system", "Of the prompt."), Message("user", f"{n}?")])
            for n in range(6)]  # fmt: skip
    run = make_run(tmp_path / "run", bare)
    recipe = told(student(CHATML), system, system="SECRET", examples=[{"prompt": "Hi?", "answer": "Ho."}] * 3)
    train_run(recipe, run)
    assert next(read_jsonl(run.test, Kept)).messages in [row.messages for row in bare]
    checks = {check["name"]: check for check in json.loads(run.checks.read_bytes())["checks"]}
    assert checks["templates"]["status"] == "note"
    assert "only the teacher was told a system prompt and 3 examples; " in checks["templates"]["finding"]
    assert words in checks["templates"]["finding"]
    card = (run.student / "README.md").read_text()
    assert words in card and "SECRET" not in card and ("Be short." in card) == (system == "Be short.")
    assert "| system message | Of the prompt. |" in card
    example = [*({"role": turn.role, "content": turn.content} for turn in own), {"role": "user", "content": "Hi"}]
    assert f"messages = {json.dumps(example)}\n" in card
    assert system_of(recipe, run) == [Message("system", "Of the prompt.")]  # in a chat, for the teacher too
    written = "train.publish.export.write_gguf"
    monkeypatch.setattr(written, lambda asked, *_, **__: system_of_student(asked) or "no message")
    export_gguf(recipe, run, "f16")
    assert f"-m {own[0].content if own else 'no message'!r}" in (run.path / "export" / "gguf" / "README.md").read_text()
    rows = datasets.load_dataset(str(export_dataset(recipe, run)), cache_dir=str(tmp_path / "cache"))
    for row in (row for part in rows.values() for row in part):
        assert row["prompt"][:-1] == [{"role": turn.role, "content": turn.content} for turn in own]
        assert row["prompt"][-1]["role"] == "user"


@pytest.mark.parametrize(
    ("systems", "shared"), [(["A", "A"], "A"), (["A", "B"], None), (["A", None], None), ([None, "A"], None), ([], None)]
)
def test_a_system_message_is_that_of_all_rows_or_none(systems: list[str | None], shared: str | None) -> None:
    begins = [[Message("system", system)] if system else [] for system in systems]
    assert shared_system([[*begin, Message("user", "Hi")] for begin in begins]) == shared


def test_reasoning_is_left_out_unless_the_recipe_keeps_it(student: Callable[[str], str], tmp_path: Path) -> None:
    rows = [kept_row(n, f"{n}?", "Four.", reasoning="Two and two.") for n in range(2)]
    plain, thinking = student(CHATML), student(QWEN3)
    for model, empty in ((plain, ""), (thinking, "<think>\n\n</think>\n\n")):
        assert shown(model, rows, tmp_path)[0][1] == f"{empty}Four.<|im_end|>\n"
        assert shown(model, rows, tmp_path, reasoning="keep")[0][1] == (
            "<think>\nTwo and two.\n</think>\n\nFour.<|im_end|>\n"
        )
        without = [kept_row(n, f"{n}?", "Four.") for n in range(2)]  # thoughts that are not there
        assert shown(model, without, tmp_path, reasoning="keep")[0][1] == f"{empty}Four.<|im_end|>\n"
    keep = make_recipe(plain, reasoning="keep").train
    forms = [reasoning_form(keep, AutoTokenizer.from_pretrained(model)) for model in (plain, thinking)]
    assert forms == ["content", "reasoning_content"]
    exported = to_examples(rows, None, forms[1])[0]["completion"]
    assert exported == [{"role": "assistant", "content": "Four.", "reasoning_content": "Two and two."}]


def test_a_template_that_drops_the_reasoning_stops_a_training_that_keeps_it(student: Callable[[str], str]) -> None:
    keep = make_recipe("x", reasoning="keep").train
    found = [thoughts_check(AutoTokenizer.from_pretrained(student(one)), keep) for one in (CHATML, QWEN3, DROPPING)]
    assert [check.status for check in found] == ["pass", "pass", "fail"]
    assert "student.chat_template" in found[2].fix
    with pytest.raises(UsageError, match=r"^check thoughts: .*; nothing was asked$"):  # before answers are paid
        check_student(make_recipe(student(DROPPING), reasoning="keep"))


@pytest.mark.parametrize(("thoughts", "status"), [(0, "warn"), (2, "note"), (3, "pass")])
def test_reasoning_that_is_not_there_is_said(thoughts: int, status: str) -> None:
    rows = [kept_row(n, f"{n}?", "Four.", reasoning="Hm." if n < thoughts else "") for n in range(3)]
    recipe = make_recipe("x", reasoning="keep")
    checks = {check.name: check for check in row_checks(Parts(rows[:1], rows[1:2], rows[2:]), {}, recipe)}
    assert (checks["reasoning"].status, checks["reasoning"].value) == (status, thoughts)


@pytest.mark.parametrize(
    ("settings", "thoughts", "status"),
    [
        ({"method": "kd"}, 0, None),
        ({"method": "kd"}, 1, "warn"),
        ({"method": "gold"}, 1, "warn"),
        ({"method": "kd", "kd": {"teacher": "served"}}, 1, "warn"),
        ({"method": "kd", "kd": {"teacher": "stored"}}, 1, None),  # its tokens are compared
        ({"method": "kd", "reasoning": "keep"}, 3, "pass"),
        ({"method": "full"}, 1, None),
    ],
)
def test_a_teacher_that_is_read_without_its_thoughts_is_told(
    settings: dict[str, Any], thoughts: int, status: str | None
) -> None:
    rows = [kept_row(n, f"{n}?", "Four.", reasoning="Hm." if n < thoughts else "") for n in range(3)]
    found = row_checks(Parts(rows[:1], rows[1:2], rows[2:]), {}, make_recipe("x", **settings))
    check = {check.name: check for check in found}.get("reasoning")
    assert (check and check.status) == status
    assert status != "warn" or (check and "train.reasoning: keep" in check.fix)


CONVERSATION = [Message("user", "One?"), Message("assistant", "First."), Message("user", "Two?")]


@pytest.mark.parametrize(
    ("template", "loss_on", "learned"),
    [
        (MARKED, "last", "Second.<|im_end|>\n"),
        (MARKED, "all", "First.<|im_end|>Second.<|im_end|>"),
        (QWEN25, "all", "First.<|im_end|>\nSecond.<|im_end|>\n"),  # TRL's version marks the newline before them too
    ],
)
def test_loss_falls_on_the_last_turn_or_on_every_turn_of_the_assistant(
    student: Callable[[str], str], tmp_path: Path, template: str, loss_on: str, learned: str
) -> None:
    rows = [kept_row(n, "", "Second.", messages=CONVERSATION) for n in range(2)]
    assert [part for _, part in shown(student(template), rows, tmp_path, loss_on=loss_on)] == [learned] * 2


@pytest.mark.parametrize(("loss_on", "told"), [("last", 3), ("all", 1)])
def test_the_teacher_is_told_what_comes_before_the_first_turn_with_loss(loss_on: str, told: int) -> None:
    """What comes after it, it reads as the student does."""
    recipe = make_recipe("student", method="kd", loss_on=loss_on)
    teacher = recipe.teacher.model_copy(update={"system": "Be kind."})
    row = kept_row(1, "", "Second.", messages=CONVERSATION)
    own = _of_teacher(row, recipe.model_copy(update={"teacher": teacher}))["told"]
    turns = [{"role": turn.role, "content": turn.content} for turn in CONVERSATION]
    assert [{name: turn[name] for name in ("role", "content")} for turn in own] == [
        {"role": "system", "content": "Be kind."},
        *turns[:told],
    ]


@pytest.mark.parametrize("template", [CHATML, MARKED.replace("+ '<|im_end|>' }}{% endg", "}}{% endg")])
def test_a_template_that_marks_no_turns_or_not_their_end_is_refused(
    student: Callable[[str], str], tmp_path: Path, template: str
) -> None:
    rows = [kept_row(n, "", "Second.", messages=CONVERSATION) for n in range(2)]
    with pytest.raises(RecipeError, match="loss_on all: the student's chat template does not mark"):
        shown(student(template), rows, tmp_path, loss_on="all")


def tool_rows() -> list[Kept]:
    """Calls whose arguments have different names, with and without a result that was answered."""
    rows = []
    for n, name in enumerate(["room", "state", "level"] * 2):
        call = {"id": f"c{n}", "type": "function", "function": {"name": "lamp", "arguments": f'{{"{name}": {n}}}'}}
        if n % 2:
            turns = [Message("user", f"{n}?"), Message("assistant", "", [call]), Message("tool", "on", [], f"c{n}")]
            rows.append(kept_row(n, "", f"It is on {n}.", messages=turns, tools=[LAMP]))
        else:
            rows.append(kept_row(n, f"{n}?", "", tool_calls=[call], tools=[LAMP], finish_reason="tool_calls"))
    return rows


def test_an_answer_of_tool_calls_is_trained_on_and_exported_with_its_tools(
    student: Callable[[str], str], tmp_path: Path
) -> None:
    rows, model = tool_rows(), student(QWEN25)
    found = shown(model, rows, tmp_path)
    assert found[0][1] == '<tool_call>\n{"name": "lamp", "arguments": {"room": 0}}\n</tool_call><|im_end|>\n'
    assert found[1][1] == "It is on 1.<|im_end|>\n" and '"arguments": {"state": 1}}' in found[1][0]
    assert all('"name": "lamp", "parameters"' in text for text, _ in found)
    run = make_run(tmp_path / "run", rows)
    train_run(make_recipe(model, max_length=2048), run)
    checks = {check["name"]: check["status"] for check in json.loads(run.checks.read_bytes())["checks"]}
    assert (checks["tools"], checks["cut_off"], checks["context"]) == ("pass", "pass", "pass")
    exported = datasets.load_dataset(str(export_dataset(make_recipe(model), run)), cache_dir=str(tmp_path / "cache"))
    by_id = {row["id"]: row for part in exported.values() for row in part}
    assert by_id["r0"]["completion"][0]["tool_calls"][0]["function"] == {"name": "lamp", "arguments": {"room": 0}}
    assert by_id["r3"]["prompt"][1]["tool_calls"][0]["function"]["arguments"] == {"room": 3}
    assert json.loads(by_id["r0"]["tools"]) == [LAMP]


def test_a_template_without_tools_is_refused(student: Callable[[str], str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"check tools: the student's chat template does not render tool calls"):
        train_run(make_recipe(student(CHATML)), make_run(tmp_path / "run", tool_rows()))


def test_a_template_that_takes_one_call_at_a_time_is_refused_for_rows_with_two(
    student: Callable[[str], str], tmp_path: Path
) -> None:
    rows, model = tool_rows(), student(LLAMA31)
    two = [{**call, "id": f"call_{n}"} for n, call in enumerate(2 * rows[0].tool_calls)]
    with pytest.raises(DataError, match="check tools: the student's chat template refuses a turn with 2 tool calls"):
        train_run(make_recipe(model), make_run(tmp_path / "run", [*rows[1:], replace(rows[0], tool_calls=two)]))
    assert tools_check(AutoTokenizer.from_pretrained(model), rows).status == "pass"


def test_samples_of_a_prompt_are_no_repeated_prompts() -> None:
    rows = [kept_row(n, f"{n // 4}?", f"Yes {n}.", sample=n % 4) for n in range(12)]
    parts = Parts(rows[:4], rows[4:8], rows[8:])
    checks = {check.name: check for check in row_checks(parts, {}, make_recipe("x"))}
    assert (checks["prompts"].status, checks["prompts"].value) == ("pass", 1)


@pytest.mark.parametrize("loss_on", ["last", "all"])
def test_a_teacher_that_is_the_student_has_nothing_to_teach(
    student: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss_on: str
) -> None:
    """It reads the student's own prompts: the divergence of a model from itself is 0."""
    monkeypatch.setattr("pipeline.resources.native_bf16", lambda: False)  # both in float32
    model = student(QWEN25)
    rows = [kept_row(n, "", "Second.", messages=[Message("user", f"{n}?"), *CONVERSATION[1:]]) for n in range(6)]
    run, accept = make_run(tmp_path / "run", rows), ["filters", "size_ratio"]
    train_run(
        make_recipe(model, model, method="kd", kd={"weights": "full", "alpha": 1}, loss_on=loss_on, accept=accept), run
    )
    log = log_of(run)
    assert log["loss"][0]["loss"] == pytest.approx(0, abs=1e-6)
