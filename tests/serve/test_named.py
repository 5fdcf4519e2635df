"""The models of a run by name: what is loaded for `--model student`, under which name and where."""

import argparse
import json
import shlex
from pathlib import Path

import pytest

import pipeline.adapters
from pipeline.errors import RecipeError, UsageError
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir
from serve.__main__ import main, next_command
from serve.named import Address, address_of, reference_of
from tests.tiny_student import make_recipe, tiny_model


def recipe_at(url: str, student: str = "base") -> Recipe:
    recipe = make_recipe(student)
    return recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"base_url": url})})


def model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"dtype": "float32", "max_position_embeddings": 512}))
    (folder / "model.safetensors").write_bytes(bytes(1000))
    return folder


def test_each_name_has_its_place() -> None:
    here, away = recipe_at("http://localhost:8100/v1"), recipe_at("https://api.example/v1")
    assert address_of(here, "teacher") == Address("teacher", "127.0.0.1", 8100)
    assert address_of(here, "student") == Address("student", "127.0.0.1", 8101)
    assert address_of(here, "before") == Address("before", "127.0.0.1", 8102)
    assert address_of(here, "me/other") == Address("me/other", "127.0.0.1", 8100)
    assert address_of(away, "student").port == 8001  # a student is served here, wherever its teacher is
    with pytest.raises(UsageError, match="not on this machine"):
        address_of(away, "teacher")


def test_a_student_is_its_folder_and_an_adapter_is_merged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, run = model(tmp_path / "base"), RunDir(tmp_path / "run")
    recipe = recipe_at("http://localhost:8000/v1", str(base))
    with pytest.raises(UsageError, match="no student yet; run train first"):
        reference_of(recipe, run, "student")
    assert reference_of(recipe, run, "before") == str(base)
    whole = model(run.student)
    assert reference_of(recipe, run, "student") == str(whole)

    (whole / "adapter_config.json").write_text("{}")
    merges = []
    monkeypatch.setattr(pipeline.adapters, "merge_adapter", lambda *parts: merges.append(parts[:2]))
    merged = run.path / "evaluation" / "student_after-merged"
    assert reference_of(recipe, run, "student") == reference_of(recipe, run, "student") == str(merged)
    assert merges == [(base, whole)]
    (whole / "model.safetensors").write_bytes(bytes(999))  # trained again
    reference_of(recipe, run, "student")
    assert len(merges) == 2


def test_a_student_of_another_recipe_is_refused(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    model(run.student)
    (run.student / "lineage.json").write_text(json.dumps({"train": {"student": "other"}}))
    with pytest.raises(UsageError, match="trained with student other, but the recipe says base"):
        reference_of(recipe_at("http://localhost:8000/v1"), run, "student")


def test_the_command_serves_it_as_student(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(tmp_path / "run")
    model(run.student)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: r\nteacher: {model: m}\nstudent: {model: base}\nprompts: {template: Hi, count: 1}\n"
        "serve: {device: cpu}\n"
    )
    main([str(path), "--run", str(run.path), "--model", "student", "--print"])
    shown = capsys.readouterr().out
    assert f"--model {run.student}" in shown and "--served-model-name student" in shown and "--port 8001" in shown


@pytest.mark.parametrize(
    ("given", "url", "name", "command"),
    [
        ({}, "http://127.0.0.1:8100/v1", "teacher", []),
        ({"run": "my run"}, "http://127.0.0.1:8100/v1", "teacher", ["RUN=my run"]),
        ({}, "http://127.0.0.1:9000/v1", "other", ["TEACHER_URL=http://127.0.0.1:9000/v1", "TEACHER_MODEL=other"]),
        (
            {"flags": ["--teacher.model", "teacher", "--teacher.base_url=http://localhost:8100/v1"]},
            "http://127.0.0.1:8100/v1",
            "teacher",
            ["TEACHER_URL=http://127.0.0.1:8100/v1", "TEACHER_MODEL=teacher"],
        ),
        (
            {"flags": ["--teacher.system", "You tell stories."]},
            "http://127.0.0.1:8100/v1",
            "teacher",
            ["ARGS=--teacher.system 'You tell stories.'"],
        ),
    ],
)
def test_the_next_command_asks_this_very_server_for_this_very_run(
    given: dict[str, object], url: str, name: str, command: list[str]
) -> None:
    options = argparse.Namespace(**{"recipe": "r.yaml", "run": None, "flags": [], "model": "teacher", **given})
    said = next_command(recipe_at("http://localhost:8100/v1"), options, url, name)
    assert shlex.split(said) == ["make", "generate", "RECIPE=r.yaml", *command]
    options.model = "student"
    assert shlex.split(next_command(recipe_at(url), options, url, "student"))[:3] == ["make", "chat", "RECIPE=r.yaml"]


def test_a_damaged_adapter_is_one_clear_error(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base, run = tiny_model(tmp_path / "base"), RunDir(tmp_path / "run")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(run.student)
    weights = run.student / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(RecipeError, match=f"{run.student}: cannot load this adapter: "):
        reference_of(recipe_at("http://localhost:8000/v1", str(base)), run, "student")
    assert [path.name for path in (run.path / "evaluation").iterdir()] == []
