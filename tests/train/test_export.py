"""Export: folders that transformers, PEFT, datasets and vLLM load, their cards, and the push to the Hub."""

import ast
import asyncio
import base64
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import msgspec
import pytest
import torch
import yaml
from aiohttp import web
from huggingface_hub import ModelCard, close_session
from peft import PeftModel
from pydantic import SecretStr
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from pipeline.errors import DistillError, UsageError
from pipeline.lineage import read_lineage, record_lineage
from pipeline.recipe import Recipe
from pipeline.records import Kept, Message, encode_line
from pipeline.rundir import RunDir
from pipeline.serve_config import ServeConfig
from serve.server import free_port, serving
from tests.tiny_student import END, kept_row, make_recipe, make_run, story_rows, tiny_model
from train.publish.cards import dataset_card, languages, model_card, published, without_places
from train.publish.export import export_dataset, export_gguf, export_model, main, push
from train.rows import part_rows
from train.run import train_run
from train.teacher import earlier_teachers

BASE = "embedded:smollm2-135m"
TOKEN = "hf_secretsecretsecret"
GENERATE: dict[str, Any] = {
    "teacher": {"asked": "Qwen/Qwen2.5-7B-Instruct", "served": ["Qwen/Qwen2.5-7B-Instruct"]},
    "endpoints": ["http://internal.example:8000/v1"],
    "sampling": {"temperature": 0.8, "top_p": 0.9, "max_tokens": 220, "seed": 7},
    "prompts": {"distinct": 9, "grammar": 100},
    "requests": 12,
    "completed": 11,
    "failed": 1,
    "completion_tokens": 1234,
    "versions": {"openai": "3.54.0"},
}
FILTERS: dict[str, Any] = {
    "rules": [{"rule": "length", "min_chars": 10}, {"rule": "banned_words", "words": ["a|b"]}],
    "dropped_by_rule": {"length": 2, "banned_words": 1},
    "rows": 11,
    "kept": 8,
    "keep_rate": 8 / 11,
    "versions": {"msgspec": "0.22.0"},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, RunDir]:
    """A LoRA student of a teacher at some endpoint, in a run that was generated and filtered."""
    student = str(tiny_model(tmp_path_factory.mktemp("models") / "Tiny-Chat"))
    GenerationConfig(eos_token_id=[END], do_sample=True, top_k=20, repetition_penalty=1.1).save_pretrained(student)
    recipe = make_recipe(
        student, "Qwen/Qwen2.5-7B-Instruct", method="lora", accept=["size_ratio"], learning_rate=1e-2, seed=3
    )
    recipe = Recipe.model_validate(
        {
            **recipe.model_dump(),
            "prompts": {"template": "Tell `{x}`:\n```\n{{}}", "slots": {"x": ["a", "b"]}, "count": 12, "seed": 5},
            "filters": {"rules": [{"rule": "script_ratio", "script": "hangul"}]},
        }
    )
    run = make_run(tmp_path_factory.mktemp("runs") / "tiny", story_rows(8))
    rules = [*FILTERS["rules"], {"rule": "contamination", "files": [str(run.kept)], "words": ["/no_think"]}]
    record_lineage(run, "generate", GENERATE)
    record_lineage(run, "filters", FILTERS | {"rules": rules})
    train_run(recipe, run)
    return recipe, run


def tables(card: Path) -> dict[str, str]:
    """The first cell of each line of a card's tables, and the rest of the line where it is first met."""
    lines = [line.strip("| \n").split(" | ") for line in card.read_text().splitlines() if line.startswith("|")]
    found: dict[str, str] = {}
    for cells in lines:
        found.setdefault(cells[0], " | ".join(cells[1:]))
    return found


def test_the_student_folder_of_every_training_has_its_card(trained: tuple[Recipe, RunDir]) -> None:
    _, run = trained
    card = ModelCard.load(run.student / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == "Tiny-Chat"
    assert data["base_model_relation"] == "adapter"
    assert (data["license"], data["license_name"]) == ("other", "see-licence-chain")  # nobody knows Tiny-Chat's
    assert {"distillate", "distillation", "lora"} <= set(data["tags"])
    assert data["language"] == ["ko"]
    assert "datasets" not in data
    found = tables(run.student / "README.md")
    assert found["teacher"].startswith("Qwen/Qwen2.5-7B-Instruct")
    assert found["sampling"] == "temperature 0.8, top_p 0.9, max_tokens 220, seed 7"
    assert found["prompts"] == "12 drawn from a template, 9 distinct, seed 5"
    assert found["answers"] == "11 to 12 requests, 1,234 tokens"
    assert found["kept"] == "8 of 11 answers (72.7%)"
    assert found["length"] == "min_chars 10 | 2" and "by the first rule that dropped an answer" in card.text
    assert found["size_ratio"].startswith("warn | teacher 7B")
    assert found["method"] == "lora"
    assert found["learning_rate"] == "0.01"
    assert "Not measured" in card.text
    assert "openai 3.54.0" in card.text and "trl " in card.text
    assert "words ['a\\|b']" in card.text  # a bar in a cell


def test_a_known_pair_has_its_licence_and_an_unknown_one_has_other(trained: tuple[Recipe, RunDir]) -> None:
    recipe, run = trained
    lineage = json.loads(run.lineage.read_bytes())
    lineage["train"] |= {"initialised_from": "Qwen/Qwen2.5-0.5B-Instruct"}
    card = ModelCard(model_card(recipe, lineage)).data.to_dict()
    assert (card["base_model"], card["license"]) == ("Qwen/Qwen2.5-0.5B-Instruct", "apache-2.0")


def test_cards_name_every_teacher_of_the_answers_and_follow_the_strictest_terms(trained: tuple[Recipe, RunDir]) -> None:
    recipe, run = trained
    lineage = json.loads(run.lineage.read_bytes())
    lineage["train"] |= {"initialised_from": "Qwen/Qwen2.5-0.5B-Instruct"}
    lineage["generate"]["teacher"] |= {"earlier": ["gpt-4.1"]}
    for text in (model_card(recipe, lineage), dataset_card(recipe, lineage, {"train": 8, "validation": 1, "test": 1})):
        card = ModelCard(text)
        assert (card.data.to_dict()["license"], card.data.to_dict()["license_name"]) == ("other", "see-licence-chain")
        assert "Qwen/Qwen2.5-7B-Instruct and gpt-4.1" in card.text
        assert "| teacher | gpt-4.1 | [OpenAI" in card.text


def test_the_card_of_answers_that_were_there_names_no_sampling_and_no_model_that_made_them_up(
    trained: tuple[Recipe, RunDir],
) -> None:
    recipe, run = trained
    lineage = json.loads(run.lineage.read_bytes())
    lineage["generate"] |= {"sampling": {}, "endpoints": [], "given": "output"}
    prompts, parts = recipe.prompts.model_copy(update={"answers": "output"}), {"train": 8, "validation": 1, "test": 1}
    asked = ModelCard(dataset_card(recipe, lineage, parts))
    card = ModelCard(dataset_card(recipe.model_copy(update={"prompts": prompts}), lineage, parts))
    assert "| sampling | not known: the answers were there already |" in card.text
    assert {*asked.data.tags} - {*card.data.tags} == {"synthetic"}


def test_cards_of_answers_that_people_wrote_and_nobody_counted_say_nothing_untrue(
    trained: tuple[Recipe, RunDir],
) -> None:
    recipe, run = trained
    lineage = json.loads(run.lineage.read_bytes())
    lineage["generate"] |= {"teacher": {"asked": "people", "served": ["people"]}, "completion_tokens": 0}
    for text in (model_card(recipe, lineage), dataset_card(recipe, lineage, {"train": 8, "validation": 1, "test": 1})):
        assert "| answers | 11 to 12 requests |" in text
        assert "No person" not in text


def test_a_student_of_another_run_names_the_teachers_of_that_one_too(
    trained: tuple[Recipe, RunDir], tmp_path: Path
) -> None:
    first = export_model(*trained, merged=True)
    run = make_run(tmp_path / "second", story_rows(6))
    train_run(make_recipe(str(first)), run)
    lineage = json.loads(run.lineage.read_bytes())
    assert lineage["train"]["earlier_teachers"] == ["Qwen/Qwen2.5-7B-Instruct"]
    card = (run.student / "README.md").read_text()
    assert "A student that teacher taught" in card and "| earlier teacher | Qwen/Qwen2.5-7B-Instruct | [Apache" in card
    assert earlier_teachers(str(run.student)) == ["teacher", "Qwen/Qwen2.5-7B-Instruct"]
    known = json.loads(trained[1].lineage.read_bytes())
    known["train"] |= {"initialised_from": "Qwen/Qwen2.5-0.5B-Instruct", "earlier_teachers": ["gpt-4.1"]}
    bound = ModelCard(model_card(trained[0], known))
    assert bound.data.to_dict()["license"] == "other" and "| earlier teacher | gpt-4.1 | [OpenAI" in bound.text


def test_the_teachers_of_a_student_on_the_hub_are_known_too(
    trained: tuple[Recipe, RunDir], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed = export_model(*trained, merged=True)

    def download(repo: str, *, allow_patterns: list[str], **_: Any) -> str:
        def others(_: str, names: list[str]) -> set[str]:
            return {name for name in names if not any(fnmatch(name, pattern) for pattern in allow_patterns)}

        return str(shutil.copytree(pushed, tmp_path / repo, ignore=others))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert earlier_teachers("me/tiny") == ["Qwen/Qwen2.5-7B-Instruct"]
    assert not (tmp_path / "me" / "tiny" / "model.safetensors").exists()


def test_a_model_that_a_killed_call_asked_is_an_earlier_teacher(tmp_path: Path) -> None:
    asked = {"asked": "big", "earlier": ["old"], "asking": {"model": "gpt-4.1", "answers": 5}}
    train = {"teacher": "big", "method": "full"}
    lineage = {"generate": {"teacher": asked}, "filters": {"rows": 6}, "train": train}
    (tmp_path / "lineage.json").write_text(json.dumps(lineage))
    assert earlier_teachers(str(tmp_path)) == ["gpt-4.1", "big", "old"]


@pytest.mark.parametrize("train", ["data.csv", {"teacher": "big"}, {"method": "full"}, {}])
def test_another_tools_lineage_names_no_teachers(tmp_path: Path, train: Any) -> None:
    (tmp_path / "lineage.json").write_text(json.dumps({"train": train}))
    assert earlier_teachers(str(tmp_path)) == []


def test_cards_name_the_teacher_that_answered_not_the_recipes(trained: tuple[Recipe, RunDir]) -> None:
    recipe, run = trained
    lineage = json.loads(run.lineage.read_bytes())
    lineage["generate"]["teacher"] = {"asked": "gpt-4.1", "served": ["gpt-4.1-2025-04-14"]}
    for text in (model_card(recipe, lineage), dataset_card(recipe, lineage, {"train": 8, "validation": 1, "test": 1})):
        assert "| teacher | gpt-4.1 (the server named it gpt-4.1-2025-04-14) |" in text
        assert "| teacher | gpt-4.1 | [OpenAI" in text and "| teacher | Qwen" not in text
        assert ModelCard(text).data.to_dict()["license"] == "other"


def test_an_adapter_is_exported_as_it_is_and_no_path_goes_with_it(trained: tuple[Recipe, RunDir]) -> None:
    recipe, run = trained
    folder = export_model(recipe, run)
    assert folder == run.path / "export" / "adapter"
    assert recipe.student is not None
    for file in folder.rglob("*"):
        if file.suffix in (".json", ".md", ".jinja"):
            assert str(Path(recipe.student.model).parent) not in file.read_text()
            assert "internal.example" not in file.read_text()
            assert str(run.path) not in file.read_text()
    assert {"files": ["kept.jsonl"], "words": ["/no_think"]}.items() <= read_lineage(RunDir(folder))["filters"][
        "rules"
    ][2].items()
    assert json.loads((folder / "adapter_config.json").read_bytes())["base_model_name_or_path"] == "Tiny-Chat"
    logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(recipe.student.model), folder), folder)


@pytest.mark.parametrize(
    ("write", "name", "mine"),
    [
        (export_model, "adapter", "notes.md"),
        (export_model, "adapter", ".git/HEAD"),
        (partial(export_gguf, kind="f16"), "gguf", "tiny-q4_k_m.gguf"),
        (export_dataset, "dataset", "data/more.jsonl"),
    ],
)
def test_what_no_export_wrote_is_named_and_stays(
    trained: tuple[Recipe, RunDir], tmp_path: Path, write: Any, name: str, mine: str
) -> None:
    recipe, run = trained[0], RunDir(shutil.copytree(trained[1].path, tmp_path / "tiny"))
    shutil.rmtree(run.path / "export", ignore_errors=True)
    file = run.path / "export" / name / mine
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    named = re.escape(f"export/{name}/{mine.removesuffix('/HEAD')}: no export wrote it")
    with pytest.raises(UsageError, match=named):
        write(recipe, run)
    assert file.read_text() == "mine"


def test_all_that_an_earlier_export_wrote_is_replaced(trained: tuple[Recipe, RunDir], tmp_path: Path) -> None:
    recipe, run = trained[0], RunDir(shutil.copytree(trained[1].path, tmp_path / "tiny"))
    old = ["README.md", "model-00001-of-00002.safetensors", "tokenizer.model", "Modelfile", "before-bf16.gguf"]
    for written in (export_model(recipe, run), export_dataset(recipe, run)):
        before = {path.relative_to(written) for path in written.rglob("*")}
        for name in old:
            (written / name).write_text("old")
        assert (export_model if written.name == "adapter" else export_dataset)(recipe, run) == written
        assert {path.relative_to(written) for path in written.rglob("*")} == before


def logits(model: Any, folder: Path) -> torch.Tensor:
    ids = AutoTokenizer.from_pretrained(folder)("Story 3?", return_tensors="pt")
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**ids).logits
    return found


def test_a_merged_model_says_what_the_adapter_over_its_base_says(trained: tuple[Recipe, RunDir]) -> None:
    recipe, run = trained
    assert recipe.student is not None
    base = AutoModelForCausalLM.from_pretrained(recipe.student.model)
    before = logits(base, run.student)
    adapted = logits(PeftModel.from_pretrained(base, run.student), run.student)
    folder = export_model(recipe, run, merged=True)
    merged = logits(AutoModelForCausalLM.from_pretrained(folder), folder)
    assert torch.allclose(merged, adapted, atol=1e-4)
    assert not torch.allclose(merged, before, atol=1e-2)
    assert not (folder / "adapter_config.json").exists()
    data = ModelCard.load(folder / "README.md").data.to_dict()
    assert (data["base_model_relation"], data["library_name"]) == ("finetune", "transformers")


@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "merged"])
def test_an_export_decodes_as_the_evaluation_did(trained: tuple[Recipe, RunDir], merged: bool) -> None:
    """Whose servers take no sampling and no penalty from the base's generation_config.json."""
    recipe, run = trained
    folder = export_model(recipe, run, merged=merged)
    if merged:
        settings = json.loads((folder / "generation_config.json").read_bytes())
        assert settings.pop("eos_token_id") == [END] and settings.keys() == {"transformers_version"}
    card = (folder / "README.md").read_text()
    assert "do_sample=False, repetition_penalty=1.0)" in card
    assert re.search(r"^vllm serve \S+ --generation-config vllm\b", card, re.MULTILINE)


def test_scores_are_those_of_this_student_or_none(trained: tuple[Recipe, RunDir]) -> None:
    recipe, run = trained
    scores = {
        "headline": "a third of the size",
        "right": {"teacher": 0.7, "student_before": 0.1, "student_after": 0.9},
        "perplexity": {"student_before": 9.5, "student_after": 3.25},
        "prompts": {"verified": 1350, "verified_unseen": 20},
        "rows": 40,
    }
    try:
        record_lineage(run, "evaluate", {**scores, "created": "2000-01-01T00:00:00+00:00"})
        assert "Not measured" in (export_model(recipe, run) / "README.md").read_text()
        record_lineage(run, "evaluate", {**scores, "created": "2999-01-01T00:00:00+00:00"})
        card = ModelCard.load(export_model(recipe, run) / "README.md")
        assert "a third of the size" in card.text
        assert "| this student | 0.9 | 3.25 |\n" in card.text and "| teacher | 0.7 | - |\n" in card.text
        assert "right answers to 1,350 test prompts" in card.text and "over 40 of the teacher's answers" in card.text
        results = {result.metric_type: result.metric_value for result in card.data.eval_results}
        assert results == {"accuracy": 0.9, "perplexity": 3.25}
    finally:
        lineage = json.loads(run.lineage.read_bytes())
        del lineage["evaluate"]
        run.lineage.write_text(json.dumps(lineage))


@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "merged"])
def test_the_example_of_a_card_generates_text(
    trained: tuple[Recipe, RunDir], merged: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = trained
    assert recipe.student is not None
    folder = export_model(recipe, run, merged=merged)
    (code,) = re.findall(r"```python\n(.*?)\n```", (folder / "README.md").read_text(), re.DOTALL)
    assert '[{"role": "user", "content": "Tell `a`:\\n```\\n{}"}]' in code
    monkeypatch.chdir(folder.parent)  # where the folder goes by the name that the card has for it
    exec(code.replace('"Tiny-Chat"', repr(recipe.student.model)), {})
    assert capsys.readouterr().out.strip()


def test_an_adapter_over_a_pruned_base_is_only_exported_merged(tmp_path: Path) -> None:
    teacher = str(tiny_model(tmp_path / "teacher", layers=4))
    run = make_run(tmp_path / "run", story_rows(6))
    recipe = make_recipe("prune:2", teacher, method="lora")
    train_run(recipe, run)
    with pytest.raises(UsageError, match="a pruned base, which nobody else has; export with --merged"):
        export_model(recipe, run)
    folder = export_model(recipe, run, merged=True)
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 2
    assert "teacher cut down to 2 layers" in (folder / "README.md").read_text()


def test_an_adapter_with_a_chat_template_of_its_own_is_only_exported_merged(tmp_path: Path) -> None:
    """A server takes the template, and the tokens that end an answer, from the base."""
    base = tiny_model(tmp_path / "base")
    config = json.loads((base / "config.json").read_bytes()) | {"eos_token_id": 0}
    (base / "config.json").write_text(json.dumps(config))
    recipe = make_recipe(str(base), method="lora").model_dump(mode="json")
    recipe = Recipe(**recipe | {"student": {"model": str(base), "chat_template": "chatml"}})
    run = make_run(tmp_path / "run", story_rows(6))
    train_run(recipe, run)
    with pytest.raises(UsageError, match=r"an adapter with student\.chat_template.*; export with --merged"):
        export_model(recipe, run)
    assert not (run.path / "export").exists()
    folder = export_model(recipe, run, merged=True)
    assert AutoModelForCausalLM.from_pretrained(folder).config.eos_token_id == END
    assert (
        AutoTokenizer.from_pretrained(folder).chat_template == AutoTokenizer.from_pretrained(run.student).chat_template
    )


@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "merged"])
def test_a_student_that_another_recipe_trained_is_not_exported(trained: tuple[Recipe, RunDir], merged: bool) -> None:
    recipe, run = trained
    other = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"model": "gpt-4.1"})})
    with pytest.raises(UsageError, match=r"trained with teacher 'Qwen/Qwen2\.5-7B-Instruct', but the recipe says"):
        export_model(other, run, merged=merged)


def test_a_student_without_its_tokenizer_is_not_exported(trained: tuple[Recipe, RunDir], tmp_path: Path) -> None:
    recipe, run = trained
    shutil.copytree(run.student, tmp_path / "student")
    (tmp_path / "student" / "tokenizer.json").unlink()
    for export_student in (export_model, partial(export_gguf, kind="f16")):
        with pytest.raises(UsageError, match=f"cannot load the tokenizer of {tmp_path}/student: "):
            export_student(recipe, RunDir(tmp_path))
    assert not (tmp_path / "export").exists()


def test_a_student_without_its_lineage_has_no_card(trained: tuple[Recipe, RunDir], tmp_path: Path) -> None:
    recipe, run = trained
    shutil.copytree(run.student, tmp_path / "student")
    RunDir(tmp_path / "student").lineage.unlink()
    with pytest.raises(UsageError, match=r"student: its lineage\.json is gone, .*; train again"):
        export_model(recipe, RunDir(tmp_path))


def test_there_is_nothing_to_export_before_training(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no student yet; run train first"):
        export_model(make_recipe("student"), make_run(tmp_path, story_rows(3)))


@pytest.mark.parametrize(
    ("name", "ollama"),
    [
        ('Ed\'s "run" $(x) 한글', "Edsrunx"),
        ("$(touch here)", "touchhere"),
        ("이야기", "student"),
        ("-demo.1", "demo.1"),
    ],
)
def test_the_commands_of_a_card_say_any_name(trained: tuple[Recipe, RunDir], name: str, ollama: str) -> None:
    recipe, run = trained
    lineage = json.loads(RunDir(run.student).lineage.read_bytes()) | {"name": name}
    lineage["train"] |= {"initialised_from": f"/models/{name}"}

    def commands(card: str, language: str) -> list[str]:
        found: list[str] = re.findall(rf"```{language}\n(.*?)\n```", card, re.DOTALL)
        return found

    card = model_card(recipe, lineage)
    assert shlex.split(*commands(card, "sh"))[:3] == ["vllm", "serve", name]
    assert name in {
        node.value for node in ast.walk(ast.parse(*commands(card, "python"))) if isinstance(node, ast.Constant)
    }
    words = shlex.split(*commands(model_card(recipe, lineage, adapter=False, gguf=f"{name}-f16.gguf"), "sh"))
    assert words[2] == words[8] == ollama and words[-1] == f"{name}-f16.gguf"


def test_the_data_set_loads_whatever_tools_are_called_with(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    recipe, asked = make_recipe("student", test=0.3), [kept_row(n, f"Q{n}?", f"A{n}.", tools=tools) for n in range(20)]
    given = {part: [row.id for row in rows] for part, rows in vars(part_rows(asked, recipe.prompts)).items()}

    def row_of(row: Kept) -> Kept:
        arguments = {"x": 1.5, "of": ["a"]} if row.id in given["test"] else {"x": 1}
        function = {"name": "f", "arguments": json.dumps(arguments)}
        return msgspec.structs.replace(row, text="", tool_calls=[{"id": "c", "type": "function", "function": function}])

    rows = [row_of(row) for row in asked]
    folder = export_dataset(recipe, make_run(tmp_path / "run", rows))
    found = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    loaded = {row["id"]: row for part in found.values() for row in part}
    for row in rows:
        (turn,) = loaded[row.id]["completion"]
        said = [call["function"]["arguments"] for call in turn["tool_calls"]]
        assert said == [json.loads(call["function"]["arguments"]) for call in row.tool_calls]
        assert (turn["content"], json.loads(loaded[row.id]["tools"])) == (row.text, tools)


def test_the_data_set_loads_with_its_splits_whatever_the_rows_hold(tmp_path: Path) -> None:
    odd = [
        {"slots": {"x": "a"}, "scores": {"judge": 4.0}},
        {"slots": {"things": ["b", "c"]}, "messages": [Message("system", "Sei lieb."), Message("user", "동화?")]},
        {"text": "옛날 옛적에\n“숲”"},
    ]
    rows = [kept_row(n, f"Q{n}?", f"A{n}.", **(odd[n] if n < 3 else {})) for n in range(10)]
    run = make_run(tmp_path / "run", rows)
    record_lineage(run, "filters", FILTERS)
    folder = export_dataset(make_recipe("student", test=0.3), run)
    found = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert {part: len(found[part]) for part in found} == {"train": 6, "validation": 1, "test": 3}
    loaded = {row["id"]: row for part in found.values() for row in part}
    assert loaded.keys() == {row.id for row in rows}
    for row in rows:
        assert loaded[row.id]["prompt"] == [{"role": m.role, "content": m.content} for m in row.messages]
        assert loaded[row.id]["completion"] == [{"role": "assistant", "content": row.text}]
        assert json.loads(loaded[row.id]["slots"]) == row.slots
        assert json.loads(loaded[row.id]["scores"]) == row.scores
    assert {row["tools"] for row in loaded.values()} == {None}
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict()["size_categories"] == ["n<1K"]
    assert "null if there are none" in next(line for line in card.text.splitlines() if "`tools`" in line)
    assert "endpoint" not in "".join(file.read_text() for file in folder.rglob("*.jsonl"))


def test_the_data_set_is_split_as_training_split_it(trained: tuple[Recipe, RunDir]) -> None:
    recipe, run = trained
    folder = export_dataset(recipe, run)
    for used in (run.validation, run.test):
        assert ids(folder / "data" / used.name) == ids(used)
    assert len(ids(folder / "data/train.jsonl")) == json.loads(run.lineage.read_bytes())["train"]["rows"]
    told = json.loads((folder / "lineage.json").read_bytes())
    assert {"generate", "filters"} < {*told} and "train" not in told  # how the rows were made, of no student


def test_a_data_set_that_is_split_otherwise_than_the_student_was_trained_is_refused(
    trained: tuple[Recipe, RunDir],
) -> None:
    recipe, run = trained
    other = recipe.model_copy(update={"prompts": recipe.prompts.model_copy(update={"test": 0.5})})
    with pytest.raises(
        UsageError, match=r"parted otherwise \(.*seed 5.*\), so it may know the test rows .*; train again"
    ):
        export_dataset(other, run)
    assert export_dataset(other, make_run(run.path.with_name("untrained"), story_rows(8))).is_dir()


def test_the_data_set_has_the_rows_to_test_on_that_training_was_given(tmp_path: Path) -> None:
    run, path = make_run(tmp_path / "run", story_rows(10)), tmp_path / "tested.jsonl"
    theirs = [kept_row(9, "Story 9?", "Another teacher's answer."), kept_row(20, "Story 20?", "Nobody trained on it.")]
    path.write_bytes(b"".join(map(encode_line, theirs)))
    folder = export_dataset(make_recipe("student", test_rows=str(path)), run)
    assert ids(folder / "data/test.jsonl") == {"r9", "r20"}
    assert ids(folder / "data/train.jsonl") | ids(folder / "data/validation.jsonl") == {f"r{n}" for n in range(9)}


def ids(path: Path) -> set[str]:
    return {json.loads(line)["id"] for line in path.read_bytes().splitlines()}


def test_a_folder_goes_by_its_last_part_and_a_hub_id_by_its_whole(tmp_path: Path) -> None:
    assert published(str(tmp_path / "My-Model")) == "My-Model"
    assert published("./models/My-Model") == "My-Model"
    assert published("Qwen/Qwen2.5-7B") == "Qwen/Qwen2.5-7B"
    assert published("embedded:smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([{"rule": "script_ratio", "script": "kana"}], ["ja"]),
        ([{"rule": "script_ratio", "script": ["han", "kana"]}], ["ja"]),
        ([{"rule": "script_ratio", "script": "latin"}], None),
        ([{"rule": "language", "allowed": ["de", "fr"]}], ["de", "fr"]),
        ([], None),
    ],
)
def test_the_language_is_what_the_rules_say(rules: list[dict[str, Any]], expected: list[str] | None) -> None:
    recipe = make_recipe("student").model_dump() | {"filters": {"rules": rules}}
    assert languages(Recipe.model_validate(recipe)) == expected


PLACES: dict[str, Any] = {
    "generate": {
        "teacher": {"asked": "/srv/acme/Teacher-7B", "served": ["/srv/acme/Teacher-7B", "Qwen/Qwen2.5-7B"]},
        "endpoints": ["http://gpu7.acme.example/v1"],
        "nodes": {"gpu7.acme.example": {"answered": 3}},
        "user": {"model": "~/acme/User-1B", "turns": 2},
        "sampling": {"stop": ["/srv/acme/"], "temperature": 0.8},
        "last_call": {"answered": 3, "by_endpoint": {"http://gpu7.acme.example/v1": {"answered": 3}}},
    },
    "filters": {
        "rules": [
            {
                "rule": "contamination",
                "files": ["data/acme/test.jsonl", "D:\\acme\\test.jsonl"],
                "words": ["/no/think"],
            },
            {"rule": "python", "command": ["ssh", "gpu7.acme.example"]},
            {"rule": "json_schema", "schema": {"properties": {"command": {"type": "string"}}}},
            {"rule": "function", "file": "/srv/acme/rule.py", "lexicon": "/srv/acme/words.txt", "mark": "/no_think"},
        ],
        "dedup": {"against": ["/srv/acme/runs/first"], "contamination": ["../acme/second"]},
        "judge": {
            "model": "/srv/acme/Judge-70B",
            "base_url": "http://gpu8.acme.example/v1",
            "api_key_env": "ACME_KEY",
            "rubric": {"file": "/a it names the file", "endpoints": "both ends"},
        },
    },
    "train": {
        "student": "/srv/acme/Student-1B",
        "teacher": "/srv/acme/Teacher-7B",
        "initialised_from": "Qwen/Qwen2.5-0.5B",
        "start": {"hyperparameters": {"test_rows": "acme/first.jsonl"}},
        "hyperparameters": {
            "test_rows": "/srv/acme/clients.jsonl",
            "start": "acme/student",
            "kd": {"teacher": "local"},
        },
        "checks": [{"finding": "no sign that the teacher /srv/acme/Teacher-7B was distilled", "fix": ""}],
    },
}


def test_what_is_passed_on_names_no_endpoint_and_no_folder_there_or_not() -> None:
    given = json.loads(json.dumps(PLACES))
    found = without_places(PLACES, make_recipe("/srv/acme/Student-1B", "/srv/acme/Teacher-7B"))
    assert given == PLACES  # the run's own stays as it is
    assert found == {
        "generate": {
            "teacher": {"asked": "Teacher-7B", "served": ["Teacher-7B", "Qwen/Qwen2.5-7B"]},
            "user": {"model": "User-1B", "turns": 2},
            "sampling": PLACES["generate"]["sampling"],
            "last_call": {"answered": 3},
        },
        "filters": {
            "rules": [
                {"rule": "contamination", "files": ["test.jsonl", "test.jsonl"], "words": ["/no/think"]},
                {"rule": "python"},
                PLACES["filters"]["rules"][2],
                {"rule": "function", "file": "rule.py", "lexicon": "words.txt", "mark": "/no_think"},
            ],
            "dedup": {"against": ["first"], "contamination": ["second"]},
            "judge": {"model": "Judge-70B", "rubric": PLACES["filters"]["judge"]["rubric"]},
        },
        "train": {
            "student": "Student-1B",
            "teacher": "Teacher-7B",
            "initialised_from": "Qwen/Qwen2.5-0.5B",
            "start": {"hyperparameters": {"test_rows": "first.jsonl"}},
            "hyperparameters": {"test_rows": "clients.jsonl", "start": "student", "kd": {"teacher": "local"}},
            "checks": [{"finding": "no sign that the teacher Teacher-7B was distilled", "fix": ""}],
        },
    }


@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "merged"])
def test_an_export_names_no_endpoint_and_no_folder_that_is_gone(trained: tuple[Recipe, RunDir], merged: bool) -> None:
    recipe, run = trained
    saved = RunDir(run.student).lineage
    before = saved.read_bytes()
    lineage = json.loads(before)
    lineage["generate"] |= {"last_call": PLACES["generate"]["last_call"], "nodes": PLACES["generate"]["nodes"]}
    lineage["filters"] |= {"judge": PLACES["filters"]["judge"], "dedup": PLACES["filters"]["dedup"]}
    lineage["filters"]["rules"][1]["words"] = ["/srv/banned"]
    lineage["train"]["hyperparameters"]["test_rows"] = "/srv/acme/clients.jsonl"
    system = recipe.prompts.model_copy(update={"system": "/srv/acme is what you are asked about."})
    lineage["train"]["system"] = system.system
    try:
        saved.write_text(json.dumps(lineage))
        folder = export_model(recipe.model_copy(update={"prompts": system}), run, merged=merged)
    finally:
        saved.write_bytes(before)
    assert recipe.student is not None
    texts = {file: file.read_text() for file in folder.rglob("*") if file.suffix in (".json", ".md", ".jinja")}
    for text in texts.values():
        assert not re.search(r"gpu\d|ACME_KEY|clients\.jsonl\w|/acme/", text)
        assert str(Path(recipe.student.model).parent) not in text and str(run.path) not in text
    card = texts[folder / "README.md"]
    assert "/srv/acme is what you are asked about." in card and "['/srv/banned']" in card


def test_a_data_set_without_filters_says_so() -> None:
    card = dataset_card(make_recipe("student"), {"name": "x"}, {"train": 3, "validation": 1, "test": 1})
    assert "| filters | none were run |" in card


class FakeHub:
    """As much of the Hub as an upload needs, over real HTTP: repositories, their commits, and a key that may write."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], dict[str, Any]] = {}
        self.url = ""
        self.fails = 0  # with this status, where there is one
        self.before_commit: Callable[[], None] = lambda: None

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 28, middlewares=[self._authorised])
        app.router.add_post("/api/repos/create", self._create)
        app.router.add_post("/api/validate-yaml", self._validate)
        app.router.add_post("/api/{kind}/{owner}/{name}/preupload/{revision}", self._preupload)
        app.router.add_post("/api/{kind}/{owner}/{name}/commit/{revision}", self._commit)
        app.router.add_get("/api/{kind}/{owner}/{name}", self._info)
        app.router.add_get("/api/{kind}/{owner}/{name}/tree/{revision}", self._tree)
        app.router.add_get("/api/{kind}/{owner}/{name}/revision/{revision}", self._info)
        return app

    @web.middleware
    async def _authorised(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return web.json_response({"error": "Invalid username or password."}, status=401)
        if self.fails:
            return web.json_response({"error": "Not now."}, status=self.fails)
        answer: web.StreamResponse = await handler(request)
        return answer

    async def _create(self, request: web.Request) -> web.Response:
        body = await request.json()
        repo = f"{body['organization']}/{body['name']}" if body.get("organization") else body["name"]
        private = body.get("private", body.get("visibility") == "private")
        self.repos.setdefault((body.get("type", "model"), repo), {"private": private, "files": {}})
        return web.json_response({"url": f"{self.url}/{repo}", "name": repo})

    async def _validate(self, request: web.Request) -> web.Response:
        head = (await request.json())["content"].split("---")[1]
        return web.json_response({"errors": [] if yaml.safe_load(head) else [{"message": "empty"}], "warnings": []})

    async def _preupload(self, request: web.Request) -> web.Response:
        files = (await request.json())["files"]
        entries = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None} for f in files]
        return web.json_response({"files": entries})

    async def _commit(self, request: web.Request) -> web.Response:
        self.before_commit()
        for line in (await request.read()).splitlines():
            entry = json.loads(line)
            if entry["key"] == "deletedFile":
                del self._repo(request)["files"][entry["value"]["path"]]
            if entry["key"] == "file":
                content = base64.b64decode(entry["value"]["content"])
                self._repo(request)["files"][entry["value"]["path"]] = content
        kind, owner, name = (request.match_info[part] for part in ("kind", "owner", "name"))
        address = f"{self.url}/{'datasets/' if kind == 'datasets' else ''}{owner}/{name}/commit/{'1' * 40}"
        return web.json_response({"commitUrl": address, "commitOid": "1" * 40, "success": True})

    async def _tree(self, request: web.Request) -> web.Response:
        name = f"{request.match_info['owner']}/{request.match_info['name']}"
        files = self.repos.get((request.match_info["kind"].removesuffix("s"), name), {}).get("files")
        if files is None:
            raise web.HTTPNotFound  # the card looks for the teacher's
        return web.json_response(
            [{"type": "file", "path": path, "size": len(files[path]), "oid": "0" * 40} for path in files]
        )

    async def _info(self, request: web.Request) -> web.Response:
        return web.json_response({"id": f"{request.match_info['owner']}/{request.match_info['name']}", "sha": "0" * 40})

    def _repo(self, request: web.Request) -> dict[str, Any]:
        kind, owner, name = (request.match_info[part] for part in ("kind", "owner", "name"))
        return self.repos[(kind.removesuffix("s"), f"{owner}/{name}")]


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    fake, ready, loop = FakeHub(), threading.Event(), asyncio.new_event_loop()
    runner = web.AppRunner(fake.app())

    async def start() -> None:
        await runner.setup()
        port = free_port()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        fake.url = f"http://127.0.0.1:{port}"
        ready.set()

    def serve() -> None:
        loop.run_until_complete(start())
        loop.run_forever()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert ready.wait(30)
    yield fake
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(100)  # clients leave their connections open
    loop.call_soon_threadsafe(loop.stop)
    thread.join(30)
    loop.close()


def given(trained: tuple[Recipe, RunDir]) -> list[str]:
    """The recipe and the run, as arguments."""
    recipe, run = trained
    file = run.path / "given.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_defaults=True)))
    return [str(file), "--run", str(run.path)]


def export(trained: tuple[Recipe, RunDir], *flags: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    kept = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    return subprocess.run(
        [sys.executable, "-m", "train.publish.export", *given(trained), *flags],
        env={**kept, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def export_here(trained: tuple[Recipe, RunDir], hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The command as `export` runs it, in this process, which has imported all that it takes."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name, value in (("HF_TOKEN", TOKEN), ("NO_PROXY", "127.0.0.1"), ("no_proxy", "127.0.0.1")):
        monkeypatch.setenv(name, value)

    def run(*flags: str) -> None:
        monkeypatch.setattr("sys.argv", ["export", *given(trained), *flags])
        main()

    close_session()  # its client knows the proxies of before
    return run


def test_model_and_data_set_are_pushed_with_the_key_of_the_environment(
    trained: tuple[Recipe, RunDir], hub: FakeHub
) -> None:
    done = export(trained, "--dataset", "--push", "me/tiny", HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
    assert (done.returncode, done.stderr) == (0, "")
    assert TOKEN not in done.stdout
    model, data = hub.repos[("model", "me/tiny")], hub.repos[("dataset", "me/tiny")]
    assert model["private"] and data["private"]
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "lineage.json"} <= set(model["files"])
    assert {"README.md", "data/train.jsonl", "data/test.jsonl"} <= set(data["files"])
    assert ModelCard(model["files"]["README.md"].decode()).data.to_dict()["datasets"] == ["me/tiny"]
    assert (
        model["files"]["adapter_model.safetensors"] == (trained[1].student / "adapter_model.safetensors").read_bytes()
    )


@pytest.mark.parametrize(
    ("repo", "token", "code", "reason"),
    [
        ("me/tiny", None, 2, "--push needs HF_TOKEN"),
        ("me/tiny", "hf_other", 2, "the Hub refused (401"),
        ("tiny", TOKEN, 2, "--push tiny: give owner and name"),
        ("me/ti ny", TOKEN, 2, "--push me/ti ny: "),
        ("", TOKEN, 2, "--push: no repository; give one, as in make push REPO=owner/name"),
    ],
)
def test_a_push_that_cannot_be_is_one_line(
    export_here: Callable[..., None],
    hub: FakeHub,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    repo: str,
    token: str | None,
    code: int,
    reason: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token or "")
    with pytest.raises(DistillError) as error:
        export_here("--push", repo)
    said, printed = str(error.value), capfd.readouterr()
    assert (error.value.exit_code, said.count("\n"), printed.err) == (code, 0, "")
    assert reason in said
    assert "hf_" not in (said + printed.out).replace("HF_", "")
    assert not hub.repos


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (403, 2, "the Hub refused (403: Not now.); may the key in HF_TOKEN write there?"),
        (413, 2, "the Hub refused (413: Not now.)"),
        (500, 1, "the Hub failed (500: Not now.); try again later"),
    ],
)
def test_only_a_push_that_the_key_may_not_do_names_the_key(
    export_here: Callable[..., None], hub: FakeHub, status: int, code: int, reason: str
) -> None:
    hub.fails = status
    with pytest.raises(DistillError) as error:
        export_here("--push", "me/tiny")
    said = str(error.value)
    assert (error.value.exit_code, said.count("\n")) == (code, 0)
    assert reason in said and ("HF_TOKEN" in said) == (status == 403)


def test_a_push_replaces_another_model_and_leaves_what_was_put_there_by_hand(
    export_here: Callable[..., None], hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    hand = {"samples.md": b"1", "onnx/config.json": b"2", "other-q8_0.gguf": b"3", "tiny-q4_k_m.gguf": b"4"}
    hand |= {"Modelfile": b"5", "tiny-q8_0.gguf": b"6"}  # beside any other model
    left = {"model-00001-of-00002.safetensors": b"7"}
    hub.repos[("model", "me/tiny")] = {"private": True, "files": {**hand, **left, "lineage.json": b"{}"}}
    for flags, weights in (([], "adapter_model"), (["--merged"], "model"), ([], "adapter_model")):
        export_here(*flags, "--push", "me/tiny")
        files = hub.repos[("model", "me/tiny")]["files"]
        exported = {file.name for file in Path(capsys.readouterr().out.split()[1]).iterdir()}
        assert f"{weights}.safetensors" in exported
        assert {*files} == exported | {*hand}
        assert "me/tiny" in files["README.md"].decode()  # what its examples load


def test_a_run_is_held_until_its_push_has_ended(
    trained: tuple[Recipe, RunDir], export_here: Callable[..., None], hub: FakeHub
) -> None:
    """The Hub's client reads small files last: another export would put its card beside these weights."""
    said = list[str]()

    def export_again() -> None:
        try:
            with trained[1].locked():
                said.append("not held")
        except UsageError as error:
            said.append(str(error))

    hub.before_commit = export_again
    export_here("--push", "me/tiny")
    assert len(said) == 1 and "another call in this process works on this run" in said[0]


@pytest.mark.usefixtures("export_here")
def test_a_gguf_file_is_pushed_beside_any_other_model(hub: FakeHub, tmp_path: Path) -> None:
    there = {"model.safetensors": b"1", "lineage.json": b"{}"}
    hub.repos[("model", "me/tiny")] = {"private": True, "files": {**there}}
    (tmp_path / "tiny-f16.gguf").write_bytes(b"2")
    push(tmp_path, "me/tiny", kind="model", token=SecretStr(TOKEN))
    assert {*hub.repos[("model", "me/tiny")]["files"]} == {*there, "tiny-f16.gguf"}


def test_a_push_takes_nothing_from_a_repository_without_an_export(
    export_here: Callable[..., None], hub: FakeHub
) -> None:
    hub.repos[("model", "me/mine")] = {"private": True, "files": {"model.safetensors": b"1"}}
    export_here("--push", "me/mine")
    assert {"model.safetensors", "adapter_model.safetensors"} <= {*hub.repos[("model", "me/mine")]["files"]}


def test_a_hub_that_is_not_there_is_one_line(export_here: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(DistillError, match="the Hub cannot be reached") as error:
        export_here("--push", "me/tiny")
    assert error.value.exit_code == 1 and "\n" not in str(error.value)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, RunDir, str, str]:
    """A real student that gives three answers, whatever follows their question; one it was not trained on, and its."""
    answers = {"What does Toby say?": "Toby says hello.", "What does Dudu say?": "Dudu says honey.", "Who?": "Mimi."}
    rows = [kept_row(3 * n + i, f"{q} {n}.", a) for n in range(8) for i, (q, a) in enumerate(answers.items())]
    run = make_run(tmp_path_factory.mktemp("runs") / "taught", rows)
    settings = {"epochs": 6, "learning_rate": 3e-3, "test": 0.2, "batch_size": 8, "max_length": 128}
    recipe = make_recipe(BASE, BASE, method="lora", accept=["filters"], **settings)
    train_run(recipe, run)
    question = json.loads(run.test.read_bytes().splitlines()[0])["messages"][0]["content"]
    return recipe, run, question, next(text for q, text in answers.items() if question.startswith(q))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "merged"])
def test_an_export_answers_in_vllm_as_it_was_taught(
    taught: tuple[Recipe, RunDir, str, str], tmp_path: Path, merged: bool
) -> None:
    recipe, run, question, answer = taught
    folder = export_model(recipe, run, merged=merged)
    flags = [] if merged else ["--enable-lora", "--max-lora-rank", "16", "--lora-modules", f"student={folder}"]
    served = str(folder) if merged else BASE
    settings = ServeConfig(kv_cache_gib=1, args=flags)
    with serving(served, port=free_port(), config=settings, log=tmp_path / "vllm.log") as server:
        assert ask(server.base_url, served if merged else "student", question) == (answer, "stop")
        if not merged:
            assert ask(server.base_url, BASE, question)[0] != answer


def ask(base_url: str, model: str, question: str) -> tuple[str, str]:
    body = {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 24}
    request = urllib.request.Request(
        f"{base_url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=300) as given:
        choice = json.loads(given.read())["choices"][0]
    return choice["message"]["content"].strip(), choice["finish_reason"]
