"""The models of a run by name: what is loaded for `--model student`, under which name and where."""

import json
from pathlib import Path

import pytest

import pipeline.adapters
from pipeline.errors import UsageError
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir
from serve.__main__ import main
from serve.named import Address, address_of, reference_of
from tests.tiny_student import make_recipe


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
