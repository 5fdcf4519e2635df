"""The models of a run by name: what is loaded for `--model student`, under which name and where."""

import argparse
import json
import shlex
import shutil
import threading
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import chat.models
import evaluate.measure.serving
import pipeline.adapters
from evaluate.models import Subject
from pipeline.errors import RecipeError, UsageError
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir
from pipeline.serve_config import ServeConfig
from pipeline.students import AFTER, BEFORE, TEACHER
from serve.__main__ import main, next_command
from serve.named import Address, address_of, name_of_files, reference_of
from tests.tiny_student import make_recipe, tiny_model


def recipe_at(url: str, student: str = "base") -> Recipe:
    recipe = make_recipe(student)
    return recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"base_url": url})})


def model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"dtype": "float32", "max_position_embeddings": 512}))
    save_file({"weight": np.zeros(250, np.float32)}, folder / "model.safetensors")
    return folder


def test_each_name_has_its_place() -> None:
    here, away = recipe_at("http://localhost:8100/v1"), recipe_at("https://api.example/v1")
    assert address_of(here, "teacher") == Address("teacher", "127.0.0.1", 8100)
    assert address_of(here, AFTER) == Address("student", "127.0.0.1", 8101)
    assert address_of(here, BEFORE) == Address("before", "127.0.0.1", 8102)
    assert address_of(here, "me/other") == Address("me/other", "127.0.0.1", 8100)
    assert address_of(away, AFTER) == Address("student", "127.0.0.1", 8001)  # served here, wherever its teacher is
    with pytest.raises(UsageError, match="not on this machine"):
        address_of(away, "teacher")


@pytest.mark.parametrize(
    ("url", "port"),
    [("http://localhost:3000/api", 3000), ("https://localhost:3000/v1", 3000), ("https://localhost/v1", 8000)],
)
def test_a_student_is_served_beside_a_gateway_on_this_machine(url: str, port: int) -> None:
    recipe = recipe_at(url)
    assert address_of(recipe, AFTER) == Address("student", "127.0.0.1", port + 1)
    assert address_of(recipe, BEFORE) == Address("before", "127.0.0.1", port + 2)
    with pytest.raises(UsageError, match=f"{url} is not a server that can be started here"):
        address_of(recipe, "teacher")


def test_a_student_is_its_folder_and_an_adapter_is_merged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, run = model(tmp_path / "base"), RunDir(tmp_path / "run")
    recipe = recipe_at("http://localhost:8000/v1", str(base))
    with pytest.raises(UsageError, match="no student yet; run train first"):
        reference_of(recipe, run, AFTER)
    assert reference_of(recipe, run, BEFORE) == str(base)
    assert [reference_of(recipe, run, key) for key in (TEACHER, "me/other")] == [recipe.teacher.model, "me/other"]
    whole = model(run.student)
    assert reference_of(recipe, run, AFTER) == str(whole)

    (whole / "adapter_config.json").write_text("{}")
    save_file({"weight": np.zeros(2)}, whole / "adapter_model.safetensors")
    merges = []

    def merge(base: str, adapter: Path, target: Path) -> None:
        merges.append((base, adapter))
        (target / "config.json").write_text("{}")
        save_file({"weight": np.zeros(2)}, target / "model.safetensors")

    monkeypatch.setattr(pipeline.adapters, "merge_adapter", merge)
    merged = run.path / "evaluation" / "student_after-merged"
    assert reference_of(recipe, run, AFTER) == reference_of(recipe, run, AFTER) == str(merged)
    assert merges == [(base, whole)]
    save_file({"weight": np.ones(250, np.float32)}, whole / "model.safetensors")  # trained again
    reference_of(recipe, run, AFTER)
    assert len(merges) == 2


def test_a_student_of_another_recipe_is_refused(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    model(run.student)
    (run.student / "lineage.json").write_text(json.dumps({"train": {"student": "other"}}))
    with pytest.raises(UsageError, match="trained with student 'other', but the recipe says 'base'"):
        reference_of(recipe_at("http://localhost:8000/v1"), run, AFTER)


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
    names = f"--served-model-name student {name_of_files('student', str(run.student))}"
    assert f"--model {run.student}" in shown and names in shown and "--port 8001" in shown
    shutil.rmtree(run.student)
    model(run.student)  # trained again
    assert name_of_files("student", str(run.student)) not in names


@pytest.mark.parametrize(
    ("name", "context", "template"), [("student", "512", None), ("m", "4096", "t"), ("teacher", "4096", "t")]
)
def test_a_student_gets_no_flags_of_the_teacher_but_those_of_the_call(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, context: str, template: str | None
) -> None:
    run, teacher, path = RunDir(tmp_path / "run"), model(tmp_path / "m"), tmp_path / "recipe.yaml"
    model(run.student)
    path.write_text(
        f"name: r\nteacher: {{model: {teacher}}}\nstudent: {{model: base}}\nprompts: {{template: Hi, count: 1}}\n"
        "serve: {device: cpu, args: [--max-model-len, '4096', --chat-template, t, --port, '9', --max-num-seqs, '3']}\n"
    )
    name = str(teacher) if name == "m" else name
    main([str(path), "--run", str(run.path), "--model", name, "--args", "--revision x", "--print"])
    words = shlex.split(capsys.readouterr().out.replace("\\\n", " "))
    given = {flag: words[words.index(flag) + 1] for flag in words if flag.startswith("--")}
    assert given["--max-model-len"] == context and given.get("--chat-template") == template
    assert given["--port"] == ("8001" if name == "student" else "9")
    assert given["--max-num-seqs"] == "3" and given["--revision"] == "x"


@pytest.mark.parametrize(("key", "template"), [(TEACHER, True), (AFTER, False)])
def test_a_page_and_the_evaluation_give_a_student_no_flags_of_the_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, template: bool
) -> None:
    args = ["--chat-template", "t", "--max-num-seqs", "3"]
    recipe = recipe_at("http://localhost:8000/v1").model_copy(update={"serve": ServeConfig(device="cpu", args=args)})
    run, given = RunDir(tmp_path), list[list[str]]()
    model(run.student)

    def serving(*_: object, config: ServeConfig, **__: object) -> ExitStack:
        given.append(config.args)
        return ExitStack()

    monkeypatch.setattr(chat.models, "serving", serving)
    monkeypatch.setattr(evaluate.measure.serving, "serving", serving)
    chat.models._start(chat.models.Model(key, key, recipe), run, 1, ExitStack(), threading.Event())
    with evaluate.measure.serving.serve_subject(recipe, run, Subject(key, key, key, run.student)):
        assert given == [args if template else args[2:]] * 2


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
    options.model = AFTER
    assert shlex.split(next_command(recipe_at(url), options, url, "student"))[:3] == ["make", "chat", "RECIPE=r.yaml"]


def test_a_damaged_adapter_is_one_clear_error(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base, run = tiny_model(tmp_path / "base"), RunDir(tmp_path / "run")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(run.student)
    weights = run.student / "adapter_model.safetensors"
    whole, recipe = weights.read_bytes(), recipe_at("http://localhost:8000/v1", str(base))
    weights.write_bytes(whole[:1000])
    with pytest.raises(UsageError, match=f"{weights}: 1,000 bytes, empty or cut off"):
        reference_of(recipe, run, AFTER)
    weights.write_bytes(whole)
    (run.student / "adapter_config.json").write_text('{"peft_type": "NONE"}')
    with pytest.raises(RecipeError, match=f"{run.student}: cannot load this adapter: "):
        reference_of(recipe, run, AFTER)
    assert [path.name for path in (run.path / "evaluation").iterdir()] == [".student_after-merged.lock"]
