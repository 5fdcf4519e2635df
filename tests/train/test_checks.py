"""Checks before training: each finding's number and status, and that a training stops where it should."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from tokenizers import AddedToken

from pipeline.checks import Check
from pipeline.errors import DataError, UsageError
from pipeline.lineage import taught_by
from pipeline.models import resolve_model
from pipeline.prompts_config import PromptsConfig
from pipeline.records import Kept, Message, encode_line
from pipeline.rundir import RunDir
from pipeline.train_config import TrainConfig
from tests.tiny_student import CHATML, kept_row, make_recipe, make_run, story_rows, tiny_model, tiny_tokenizer
from train.checks.data import label_checks, parts_check, row_checks, token_checks
from train.checks.pair import chain_check, markup_check, size_check, template_check
from train.checks.run import settle
from train.rows import Parts, part_rows
from train.run import train_run
from train.setting import Setting
from train.teacher import Card, known_files, parameters_of, read_card

DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}"


def of_rows(rows: list[Kept], lineage: dict[str, Any] | None = None) -> dict[str, Check]:
    parts = Parts(train=rows, validation=[], test=[])
    return {check.name: check for check in row_checks(parts, lineage or {}, make_recipe("x"))}


def filtered(kept: int, rows: int = 100, rules: int = 1) -> dict[str, Any]:
    return {"filters": {"rules": [{"rule": "length"}] * rules, "rows": rows, "keep_rate": kept / rows}}


def finding(check: Check) -> tuple[str, float | None]:
    return check.status, check.value


@pytest.mark.parametrize(
    ("completed", "bad_lines", "status"),
    [(0, 0, "pass"), (99, 0, "pass"), (100, 0, "pass"), (101, 0, "warn"), (101, 1, "pass"), (1600, 0, "warn")],
)
def test_answers_that_came_after_the_filters_warn(completed: int, bad_lines: int, status: str) -> None:
    lineage = filtered(80)
    lineage["filters"]["bad_lines"] = bad_lines
    lineage["generate"] = {"completed": completed}
    check = of_rows(story_rows(3), lineage)["filters"]
    assert check.status == status
    behind = f"1 rules judged 100 answers, and the run has {completed:,}", "run `python -m filters` again"
    assert (check.finding, check.fix) == (behind if status == "warn" else ("1 rules judged 100 answers", ""))


@pytest.mark.parametrize(
    ("section", "change", "status"),
    [
        ("rules", [{"rule": "length", "min_chars": 6}], "warn"),
        ("dedup", None, "warn"),
        ("select", "first", "warn"),
        ("judge", None, "warn"),
        ("judge", {"model": "m", "min_score": 4}, "warn"),
        ("judge", {"model": "m", "rubric": {"fit": "for a child"}}, "warn"),
        ("judge", {"model": "another"}, "warn"),
        ("judge", {"model": "m", "base_url": "http://b/v1", "attempts": 5, "budget": {"usd": 1}}, "pass"),
    ],
)
def test_filters_that_were_edited_since_they_ran_warn(section: str, change: Any, status: str) -> None:
    recipe = make_recipe("x")
    given = {"rules": [{"rule": "length", "min_chars": 5}], "dedup": {}, "judge": {"model": "m"}}
    before = recipe.filters.model_validate(given)
    now = before.model_validate(before.model_dump() | {section: change})
    lineage = filtered(80)
    lineage["filters"] |= {"rules_digest": before.rules_digest}
    lineage["filters"] |= before.model_dump(mode="json", include={"dedup", "judge", "select"})
    for filters, wanted in ((before, "pass"), (now, status)):
        told = recipe.model_copy(update={"filters": filters})
        found = {check.name: check for check in row_checks(Parts(story_rows(3), [], []), lineage, told)}["filters"]
        assert (found.status, f"filters.{section} was" in found.finding) == (wanted, wanted == "warn")


@pytest.mark.parametrize(("count", "status"), [(4999, "note"), (5000, "pass"), (50000, "pass"), (50001, "note")])
def test_the_number_of_rows_is_advice(count: int, status: str) -> None:
    assert finding(of_rows([kept_row(0, "Hi?", "Yes.")] * count)["rows"]) == (status, count)


@pytest.mark.parametrize(("prompts", "status"), [(10, "pass"), (5, "pass"), (4, "warn")])
def test_rows_of_few_prompts_warn(prompts: int, status: str) -> None:
    rows = [kept_row(n, f"Question {n % prompts}", "Yes.") for n in range(10)]
    assert finding(of_rows(rows)["prompts"]) == (status, prompts / 10)
    assert of_rows(rows)["prompts"].finding.startswith(f"{10 - prompts} of 10 rows ask what another row asks")


@pytest.mark.parametrize(("samples", "expected"), [(2, ("warn", 0.25)), (4, ("pass", 0.5)), (8, ("pass", 1.0))])
def test_samples_are_no_repeats_but_a_question_asked_again_is(samples: int, expected: tuple[str, float]) -> None:
    rows = [kept_row(n, "The only one", "Yes.", sample=n) for n in range(8)]  # its second time, the numbers go on
    prompts = {"samples": samples, "asked": 8 // samples, "distinct": 1}
    assert finding(of_rows(rows, {"generate": {"prompts": prompts}})["prompts"]) == expected


def test_samples_of_an_earlier_call_that_had_more_are_no_repeats() -> None:
    rows = [kept_row(n, f"Question {n // 8}", "Yes.", sample=n % 8) for n in range(80)]
    prompts = {"samples": 2, "asked": 10, "distinct": 10}
    assert finding(of_rows(rows, {"generate": {"prompts": prompts}})["prompts"]) == ("pass", 1.0)


@pytest.mark.parametrize(
    ("lineage", "filters", "keep_rate"),
    [
        ({}, ("warn", 0), None),
        (filtered(80, rules=0), ("warn", 0), ("pass", 0.8)),
        (filtered(50), ("pass", 1), ("pass", 0.5)),
        (filtered(49, rules=3), ("pass", 3), ("warn", 0.49)),
    ],
)
def test_rows_that_nobody_filtered_or_few_that_passed_warn(
    lineage: dict[str, Any], filters: tuple[str, float], keep_rate: tuple[str, float] | None
) -> None:
    checks = of_rows(story_rows(3), lineage | {"generate": {"prompts": {"distinct": 100}}})
    assert finding(checks["filters"]) == filters
    assert (finding(checks["keep_rate"]) if "keep_rate" in checks else None) == keep_rate


@pytest.mark.parametrize(
    ("asked", "answered", "expected"),
    [
        (4, None, ("pass", 0.75)),
        (12, 12, ("warn", 0.25)),
        (12, 10, ("warn", 0.25)),  # two requests failed for good
        (4, 12, ("warn", 0.25)),  # the last call asked for fewer prompts than one before it
    ],
)
def test_of_several_answers_of_which_one_stays_the_prompts_are_counted(
    asked: int, answered: int | None, expected: tuple[str, float]
) -> None:
    lineage = filtered(20)
    lineage["filters"] |= {"select": "first", "prompts": answered}
    lineage["generate"] = {"prompts": {"distinct": asked}}
    check = of_rows(story_rows(3), lineage)["keep_rate"]
    assert finding(check) == expected
    assert "of the prompts have an answer that was kept" in check.finding


def test_one_question_under_several_ids_is_several_prompts() -> None:
    lineage = filtered(3, rows=3)
    lineage["filters"] |= {"select": "first", "prompts": 3}
    lineage["generate"] = {"prompts": {"distinct": 1}}
    rows = [kept_row(number, "The same?", "Yes.") for number in range(3)]
    assert finding(of_rows(rows, lineage)["keep_rate"]) == ("pass", 1.0)


def test_answers_that_were_cut_off_are_counted() -> None:
    rows = [*story_rows(3), kept_row(3, "Hi?", "And th", finish_reason="length")]
    assert finding(of_rows(rows)["cut_off"]) == ("note", 1)


@pytest.mark.parametrize("twin", ["Story 0?", " story  0? ", "STORY 0?\n"])
def test_a_question_in_two_parts_fails_in_any_spacing_or_case(twin: str) -> None:
    rows, other = story_rows(4), kept_row(9, twin, "Another answer.")
    for shared in (
        Parts([*rows[1:], other], rows[:1], []),
        Parts([*rows[1:], other], [], rows[:1]),
        Parts(rows[1:], rows[:1], [other]),
    ):
        check = parts_check(shared)
        assert finding(check) == ("fail", 1)
        assert "r9" in check.finding or "r0" in check.finding
    assert finding(parts_check(Parts(rows[2:], rows[:1], rows[1:2]))) == ("pass", 0)


def test_questions_alike_but_for_spacing_or_case_stay_in_one_part() -> None:
    rows = [kept_row(n * 2 + twin, text, "Yes.") for n in range(30) for twin, text in enumerate((f"Q{n}?", f" q{n}? "))]
    for seed in range(5):
        parts = part_rows(rows, PromptsConfig(template="x", count=1, validation=0.2, test=0.3, seed=seed))
        assert parts_check(parts).status == "pass"
        assert len(parts.all) == 60 and not len(parts.test) % 2 and not len(parts.validation) % 2


def test_a_contaminated_part_is_refused(student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = story_rows(6)
    monkeypatch.setattr("train.run.read_parts", lambda *_: Parts(train=rows, validation=rows[:2], test=rows[5:]))
    run = make_run(tmp_path / "run", rows)
    with pytest.raises(DataError, match=r"check parts: 3 prompts are in two of the parts .*nothing was trained"):
        train_run(make_recipe(student), run, force=True)
    assert not run.student.exists() and not run.validation.exists() and not run.test.exists()


def test_label_faults_fail_with_their_number_and_first_row() -> None:
    faults = {"eos": ["row 4: why", "row 6: why"], "masked": ["row 7: why"]}
    checks = {check.name: check for check in label_checks(faults, 9)}
    assert {name: finding(check) for name, check in checks.items()} == {
        "vocabulary": ("pass", 0), "eos": ("fail", 2), "masked": ("fail", 1), "labels": ("pass", 0),
    }  # fmt: skip
    assert checks["eos"].finding == "7 of 9 rows end with a stop token; row 4: why"


class Figures:
    """What `prepare` gives, as far as the checks look at it."""

    def __init__(self, train: list[int], validation: list[int], limit: int, context: int = sys.maxsize) -> None:
        self.lengths = {"train": train, "validation": validation}
        self.rows = {
            part: [index for index, length in enumerate(of) if length <= limit] for part, of in self.lengths.items()
        }
        self.context, self.longest_prompt = context, 5
        self.faults: dict[str, list[str]] = {}
        self.differing = 0


@pytest.mark.parametrize(
    ("train", "validation", "too_long", "expected"),
    [
        ([9, 8, 7], [10], "refuse", ("pass", 0)),
        ([9, 8, 12], [10], "refuse", ("fail", 0.25)),
        ([9, 8, 12], [10], "drop", ("warn", 0.25)),
        ([9] * 18 + [12], [10], "drop", ("note", 0.05)),
        ([9] * 18, [12], "drop", ("fail", 1 / 19)),  # none left to choose a checkpoint by
    ],
)
def test_long_rows_are_a_share_that_the_recipe_decides_on(
    train: list[int], validation: list[int], too_long: str, expected: tuple[str, float]
) -> None:
    rows = story_rows(len(train) + len(validation))
    config = TrainConfig.model_validate({"max_length": 10, "too_long": too_long})
    figures: Any = Figures(train, validation, 10)
    checks = {check.name: check for check in token_checks(figures, [row.id for row in rows], config)}
    assert finding(checks["length"]) == pytest.approx(expected)
    config, figures.context = config.model_copy(update={"max_length": 1024}), 10
    length = next(token_checks(figures, [row.id for row in rows], config))
    assert finding(length) == pytest.approx(expected)
    longest = max(*train, *validation)
    assert "longer than the 10 tokens that the student reads at once (the longest, r" in length.finding
    assert f"has {longest} tokens)" in length.finding
    assert length.status == "pass" or "take a student that reads more" in length.fix


@pytest.mark.parametrize(("new", "status", "fix"), [(11, "pass", ""), (12, "fail", "max_new_tokens to 11")])
def test_a_sample_fits_in_what_the_student_reads_at_once(new: int, status: str, fix: str) -> None:
    config = TrainConfig.model_validate({"method": "on_policy", "on_policy": {"max_new_tokens": new}})
    figures: Any = Figures([9], [9], 10, context=16)
    checks = {check.name: check for check in token_checks(figures, ["a", "b"], config)}
    assert finding(checks["sample_length"]) == (status, 5 + new)
    assert fix in checks["sample_length"].fix


@pytest.mark.parametrize(
    ("teacher", "student", "status", "ratio"),
    [
        (1_500_000_000, 500_000_000, "pass", 3),
        (5_000_000_000, 500_000_000, "pass", 10),
        (100_000_000_000, 500_000_000, "warn", 200),
        (900_000_000, 500_000_000, "note", 1.8),
        (500_000_000, 500_000_000, "note", 1),
        (400_000_000, 500_000_000, "fail", 0.8),
        (None, 500_000_000, "note", None),
    ],
)
def test_the_teacher_is_three_to_ten_times_larger(
    teacher: int | None, student: int, status: str, ratio: float | None
) -> None:
    assert finding(size_check(teacher, student)) == (status, ratio)


def test_a_teacher_too_far_is_said_in_words() -> None:
    assert "a 100B teacher is too far for a 500M student" in size_check(100_000_000_000, 500_000_000).fix


def test_parameters_are_counted_without_weights_and_ties_once(student: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(student)
    assert parameters_of(Path(student), student) == model.num_parameters()
    embedded = resolve_model("embedded:smollm2-135m")
    assert parameters_of(Path(embedded), embedded) == 134_515_008  # its embeddings are tied


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("meta-llama/Llama-3.1-70B-Instruct", 70_000_000_000),
        ("Qwen2.5-0.5B", 500_000_000),
        ("SmolLM2-135M", 135_000_000),
        ("gpt-4.1", None),
        ("gpt-4o-mini", None),
    ],
)
def test_an_apis_model_has_the_size_that_its_name_says(name: str, size: int | None) -> None:
    assert parameters_of(None, name) == size


def with_template(template: str) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def other_family(template: str, *tokens: str) -> Any:
    tokenizer = with_template(template)
    tokenizer.add_special_tokens({"additional_special_tokens": [*tokens] or ["<|turn|>", "<|over|>"]})
    return tokenizer


OTHER = CHATML.replace("<|im_start|>", "<|turn|>").replace("<|im_end|>", "<|over|>")


@pytest.mark.parametrize(
    ("teacher", "expected"),
    [
        (tiny_tokenizer(), ("pass", 1.0)),
        (None, ("note", None)),
        (with_template(DEFAULT_SYSTEM + CHATML), ("fail", 0.0)),  # the same tokens, a message that the student lacks
        (with_template(CHATML.replace("<|im_end|>", "")), ("fail", 0.0)),  # the same tokens in another order
        (other_family(OTHER), ("note", 0.0)),
        (other_family(OTHER.replace("<|turn|>", "@").replace("<|over|>", "@end"), "@", "@end"), ("note", 0.0)),
        (other_family(DEFAULT_SYSTEM + OTHER), ("warn", 0.0)),
    ],
)
def test_chat_templates_that_say_something_else_are_found(teacher: Any, expected: tuple[str, float | None]) -> None:
    assert finding(template_check(tiny_tokenizer(), teacher, story_rows(3))) == expected


def test_a_system_message_of_ones_own_takes_the_place_of_a_default() -> None:
    rows = [kept_row(0, "", "Yes.", messages=[Message("system", "Be brief."), Message("user", "Hi?")])]
    default = with_template(DEFAULT_SYSTEM + CHATML)
    assert finding(template_check(tiny_tokenizer(), default, rows)) == ("pass", 1.0)
    deaf = other_family(
        OTHER.replace("message['content']", "(message['content'] if message['role'] == 'user' else '')")
    )
    check = template_check(tiny_tokenizer(), deaf, rows)
    assert check.status == "warn" and "nothing of the system message" in check.finding


def test_a_template_that_refuses_a_role_fails_with_its_reason() -> None:
    strict = with_template(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    )
    rows = [kept_row(0, "", "Yes.", messages=[Message("system", "Be brief."), Message("user", "Hi?")])]
    check = template_check(strict, None, rows)
    assert check.status == "fail" and "no system" in check.finding


def test_a_template_mismatch_is_refused_and_nothing_is_trained(student: str, tmp_path: Path) -> None:
    teacher = tiny_model(tmp_path / "teacher", layers=4)
    (teacher / "chat_template.jinja").write_text(DEFAULT_SYSTEM + CHATML)
    run = make_run(tmp_path / "run", story_rows(6))
    with pytest.raises(
        DataError, match=r"check templates: only 0 of 6 .*adds 'You are kind\.', the student's ''; give prom"
    ):
        train_run(make_recipe(student, str(teacher)), run, force=True)
    assert not run.student.exists() and not (run.path / "training").exists()
    written = json.loads((run.path / "checks.json").read_bytes())
    assert written["stopped_by"] == ["templates"]


def test_text_that_spells_a_control_token_is_refused(student: str, tmp_path: Path) -> None:
    rows = [*story_rows(5), kept_row(5, "Chat?", "Hello.<|im_end|>\n<|im_start|>user\nMore!")]
    assert finding(markup_check(tiny_tokenizer(), rows)) == ("fail", 1)
    assert finding(markup_check(tiny_tokenizer(), rows[:5])) == ("pass", 0)
    unnamed = tiny_tokenizer()
    unnamed.add_tokens([AddedToken("<|end|>", special=True), AddedToken("<think>")])
    spelt = [kept_row(6, "Hi", "A<|end|>B"), kept_row(7, "Hi", "<think>C")]  # the second is no control token
    assert finding(markup_check(unnamed, spelt)) == ("fail", 1)
    without: Any = SimpleNamespace(added_tokens_decoder={}, all_special_tokens=[])
    assert finding(markup_check(without, spelt)) == ("pass", 0)
    run = make_run(tmp_path / "run", rows)
    with pytest.raises(DataError, match=r"check markup: 1 of 6 rows .* r5: <\|im_end\|>"):
        train_run(make_recipe(student), run, force=True)
    assert not run.student.exists()


def test_a_long_look_at_the_tokens_is_told(
    student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipeline.progress.REPORT_S", 0.01)
    with pytest.raises(DataError, match="check length"):
        train_run(make_recipe(student, max_length=8, too_long="refuse"), make_run(tmp_path / "run", story_rows(20)))
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(r"tokenising \d+ rows and checking their tokens: 0 s so far", said)


def foreign(row: Kept, change: dict[str, Any]) -> bytes:
    return json.dumps({**json.loads(encode_line(row)), **change}).encode() + b"\n"


IMAGE = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/cat.png"}}]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            foreign(kept_row(6, "Hi?", "Yes."), {"messages": [{"role": "user", "content": IMAGE}]}),
            r"kept\.jsonl:7: .*array",
        ),
        (foreign(kept_row(6, "Hi?", "Yes."), {"text": ""}), "the answer is empty"),
        (encode_line(kept_row(6, "Hi?", "x" * 100_000)), "1 of 6 rows are longer than .* r6, has 100024 tokens"),
        (
            b'{"conversations": [{"from": "human", "value": "Hi?"}]}\n',
            r"kept\.jsonl:7: .*`id`; a row is an answer as filt",
        ),
        (
            b'{"instruction": "Hi?", "output": "Yes."}\n',
            r"kept\.jsonl:7: .*`id`; a row is an answer as filters keeps it",
        ),
        (encode_line(kept_row(6, "", "Yes.", messages=[Message("human", "Hi?")])), "no role 'human' is known"),
    ],
    ids=["image", "empty", "100,000 characters", "ShareGPT", "Alpaca", "role"],
)
def test_a_row_that_is_no_answer_ends_training_before_it_begins(
    student: str, tmp_path: Path, line: bytes, reason: str
) -> None:
    run = make_run(tmp_path / "run", story_rows(6))
    with run.kept.open("ab") as file:
        file.write(line)
    with pytest.raises(DataError, match=reason) as error:
        train_run(make_recipe(student), run, force=True)
    assert "\n" not in str(error.value)
    assert not run.student.exists() and not run.validation.exists() and not run.test.exists()


@pytest.mark.parametrize(
    ("name", "lineage", "tags", "expected"),
    [
        ("runs/x/student", {"train": {"teacher": "big"}}, [], ("fail", 1)),
        ("owner/model", None, ["distillate", "lora"], ("fail", 1)),
        ("owner/model", None, ["distillation"], ("warn", 1)),
        ("owner/R1-Distill-Qwen-1.5B", None, [], ("warn", 1)),
        ("owner/model", {"generate": {}}, ["chat"], ("pass", 0)),
    ],
)
def test_a_teacher_that_was_a_student_is_found(
    tmp_path: Path, name: str, lineage: dict[str, Any] | None, tags: list[str], expected: tuple[str, float]
) -> None:
    if lineage is not None:
        (tmp_path / "lineage.json").write_text(json.dumps(lineage))
    (tmp_path / "README.md").write_text(f"---\ntags: {json.dumps(tags)}\n---\nA model.\n")
    assert finding(chain_check(name, tmp_path, read_card(tmp_path))) == expected


def test_an_apis_model_is_of_unknown_descent() -> None:
    assert known_files("gpt-4.1") is None
    assert finding(chain_check("gpt-4.1", None, Card())) == ("note", None)


def test_a_chain_is_refused_without_allow_chain(student: str, tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", story_rows(6))
    train_run(make_recipe(student), first)
    second = make_run(tmp_path / "second", story_rows(7))
    recipe = make_recipe(student, str(first.student))
    with pytest.raises(DataError, match=r"check chain: .*lineage\.json names teacher as its teacher.*--allow-chain"):
        train_run(recipe, second, force=True)
    assert not second.student.exists()
    train_run(recipe, second, allow_chain=True)
    checks = json.loads(second.lineage.read_bytes())["train"]["checks"]
    assert [check["status"] for check in checks if check["name"] == "chain"] == ["note"]


def test_the_licence_is_the_strictest_of_all_teachers_that_answered(student: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", story_rows(6))
    answered = {"generate": {"teacher": {"asked": "Qwen/Qwen2.5-7B-Instruct", "earlier": ["gpt-4.1"]}}}
    run.lineage.write_text(json.dumps(answered))
    with pytest.raises(UsageError, match=r"licence: gpt-4\.1, OpenAI Services Agreement.*train\.accept: \[.*licence"):
        train_run(make_recipe(student, "Qwen/Qwen2.5-7B-Instruct", accept=["filters", "size_ratio"]), run)
    assert not run.student.exists()


def test_a_teacher_that_answered_in_the_place_of_the_recipes_is_told_and_its_terms_hold(
    student: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", story_rows(6))
    run.lineage.write_text(json.dumps({"generate": {"teacher": {"asked": "gpt-4.1", "served": ["gpt-4.1-2025"]}}}))
    kind = {"method": "lora", "accept": ["filters", "size_ratio"]}
    told = r"check teacher: gpt-4\.1 gave the answers, not .*Qwen/Qwen2\.5-7B-Instruct; .*TEACHER_MODEL=gpt-4\.1"
    with pytest.raises(UsageError, match=told):
        train_run(make_recipe(student, "Qwen/Qwen2.5-7B-Instruct", **kind), run)
    kind["accept"] = [*kind["accept"], "teacher"]
    with pytest.raises(UsageError, match=r"check licence: gpt-4\.1, OpenAI Services Agreement"):
        train_run(make_recipe(student, "Qwen/Qwen2.5-7B-Instruct", **kind), run)
    first = make_run(tmp_path / "first", story_rows(6)).student
    run.lineage.write_text(json.dumps({"generate": {"teacher": {"asked": "gpt-4o", "earlier": [str(first)]}}}))
    first.mkdir()
    (first / "lineage.json").write_text(json.dumps({"train": {"teacher": "big"}}))
    with pytest.raises(DataError, match=r"check chain: the teacher .*first/student is itself a distilled student"):
        train_run(make_recipe(student, "Qwen/Qwen2.5-7B-Instruct", **kind), run)


def test_a_teacher_that_is_followed_need_not_have_answered(student: str) -> None:
    answered = {"generate": {"teacher": {"asked": "gpt-4.1", "earlier": ["gpt-4o"]}}}
    ways = [{"method": "lora"}, {"method": "kd"}, {"method": "kd", "kd": {"teacher": "stored"}}]
    taught = [taught_by(make_recipe(student, "big", **way), answered) for way in ways]
    assert taught == [["gpt-4.1", "gpt-4o"], ["gpt-4.1", "gpt-4o", "big"], ["gpt-4.1", "gpt-4o"]]
    assert taught_by(make_recipe(student, "big"), {}) == ["big"]


def test_a_warning_stops_unless_it_is_accepted_or_forced(student: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", story_rows(6))
    with pytest.raises(UsageError, match=r"check filters: no filters .*--force, or train\.accept: \[filters\]$"):
        train_run(make_recipe(student, accept=[]), run)
    assert not run.student.exists()
    train_run(make_recipe(student, accept=[]), run, force=True)
    written = json.loads((run.path / "checks.json").read_bytes())
    assert (written["accepted"], written["stopped_by"]) == (["filters"], [])
    names = [check["name"] for check in written["checks"]]
    assert names == [
        "rows", "prompts", "parts", "filters", "cut_off", "size_ratio", "templates", "markup", "chain", "licence",
        "length", "vocabulary", "eos", "masked", "labels", "context",
    ]  # fmt: skip
    assert json.loads((run.student / "lineage.json").read_bytes())["train"]["checks"] == written["checks"]


def test_each_check_is_shown_once(student: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", story_rows(6))
    train_run(make_recipe(student), run)
    lines = [line.split() for line in capsys.readouterr().err.splitlines() if line.startswith("  ")]
    written = json.loads((run.path / "checks.json").read_bytes())["checks"]
    assert [line[:2] for line in lines] == [[check["status"], check["name"]] for check in written]


def test_force_never_goes_past_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checks = [
        Check(name="licence", status="warn", value=None, finding="unknown [terms]"),
        Check(name="eos", status="fail", value=3, finding="no end", fix="fix it"),
    ]
    run, accepting = RunDir(tmp_path), make_recipe("student", accept=["licence"]).train
    setting = Setting(accepting, tmp_path, Console(stderr=True, soft_wrap=True))
    with pytest.raises(DataError, match=r"^check eos: no end; fix it; nothing was trained$"):
        settle(checks, run, setting, force=True)
    assert capsys.readouterr().err.splitlines() == ["  warn  licence  unknown [terms]", "  fail  eos      no end"]


def test_a_check_that_cannot_warn_cannot_be_accepted() -> None:
    with pytest.raises(ValueError, match="keep_rate"):
        make_recipe("student", accept=["eos"])
