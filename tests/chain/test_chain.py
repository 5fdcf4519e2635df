"""The chain on the real thing: a real vLLM server, a real teacher, a student trained and measured, in one command."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import yaml
from transformers import AutoTokenizer

from chain.__main__ import main
from chain.stages import StageFailed
from pipeline.errors import RecipeError, UsageError
from pipeline.models import resolve_model
from pipeline.records import Completion, Dropped, Kept, read_jsonl
from pipeline.rundir import RunDir
from serve.machine import detect
from serve.server import free_port
from tests.tiny_student import tiny_model

LAMP = '[{"type": "function", "function": {"name": "lamp", "parameters": {}}}]'
PROMPTS = 16
MIB = 1 << 20


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The demo's recipe, small: it passes nearly every answer, so that a handful of prompts is enough to train on."""
    small = yaml.safe_load(Path("recipes/stories_demo.yaml").read_text())
    small["name"] = "small"
    small["teacher"]["base_url"] = f"http://127.0.0.1:{free_port()}/v1"
    small["student"] = {"model": "prune:2"}
    small["prompts"]["count"] = PROMPTS
    small["sampling"]["max_tokens"] = 48
    small["serve"] = {"kv_cache_gib": 1}
    small["generate"]["concurrency"] = 4
    small["filters"]["rules"] = [{"rule": "length", "min_chars": 20, "max_chars": 2000}]
    small["train"]["epochs"] = 1
    small["evaluate"] = {
        "max_rows": 4,
        "probes": 4,
        "unseen": {"character": ["Leo the lion"]},
        "unseen_probes": 2,
        "speed_requests": 4,
        "speed_concurrency": 4,
        "speed_max_tokens": 8,
        "speed_repeats": 1,
        "speed_alone": 2,
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(small))
    return path


def start(recipe: Path, run: RunDir) -> subprocess.Popen[str]:
    """`python -m chain` in a process group of its own, as a terminal would start it."""
    return subprocess.Popen(
        [sys.executable, "-m", "chain", str(recipe), "--run", str(run.path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def left_of(run: RunDir) -> list[str]:
    """Command lines of processes that still work on the run: its server's, its stages'."""
    marker = str(run.path)
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        command = " ".join(process.info["cmdline"] or [])
        if marker in command or (process.info["environ"] or {}).get("CHAIN_TEST_RUN") == marker:
            found.append(command)
    return found


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_chain_interrupted_and_run_again_ends_with_a_measured_student(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path / "run")
    monkeypatch.setenv("CHAIN_TEST_RUN", str(run.path))  # marks every process that comes of it

    first = start(recipe, run)
    while lines(run.completions) < 3:
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGINT)
    output = first.communicate(timeout=60)[0]
    assert first.returncode == 130, output
    monkeypatch.delenv("CHAIN_TEST_RUN")
    assert left_of(run) == []
    answered = lines(run.completions)
    assert 3 <= answered < PROMPTS

    second = start(recipe, run)
    output = second.communicate()[0]
    assert second.returncode == 0, output
    assert str(run.report_html) in output.splitlines()[-1]

    completions = list(read_jsonl(run.completions, Completion))
    assert len(completions) == PROMPTS == len({completion.id for completion in completions})
    kept, dropped = list(read_jsonl(run.kept, Kept)), list(read_jsonl(run.dropped, Dropped))
    assert {row.id for row in kept} | {row.id for row in dropped} == {row.id for row in completions}
    assert len(kept) + len(dropped) == PROMPTS and len(kept) > PROMPTS / 2
    assert {completion.model for completion in completions} == {"embedded:smollm2-135m"}

    lineage = json.loads(run.lineage.read_text())
    assert {"generate", "filters", "train", "evaluate"} <= set(lineage)
    assert json.loads((run.student / "config.json").read_text())["num_hidden_layers"] == 2
    assert run.report_html.exists()
    report = json.loads(run.report.read_text())
    assert (report["probes"]["seen"], report["probes"]["unseen"], report["probes"]["answered"]) == (4, 2, 6)
    for model in report["models"]:  # the engine streamed, and answered every probe
        figures = model["figures"]
        assert {"passing", "loops"} <= figures["seen"].keys() & figures["unseen"].keys(), model
        for name in ("first_token_s", "tokens_per_s", "tokens_per_s_alone", "peak_rss_mib", "kv_bytes_per_token"):
            assert figures["engine"][name]["value"] > 0, (name, model)
    weights = (Path(resolve_model("embedded:smollm2-135m")) / "model.safetensors").stat().st_size / MIB
    engines = {model["key"]: model["figures"]["engine"] for model in report["models"]}
    assert engines["teacher"]["peak_rss_mib"]["value"] > weights + 1024  # MiB of KV cache

    before = run.report.stat().st_mtime_ns
    third = start(recipe, run)
    output = third.communicate()[0]
    assert third.returncode == 0, output
    assert lines(run.completions) == PROMPTS and run.report.stat().st_mtime_ns == before


def test_a_recipe_without_a_student_is_refused_before_anything_starts(recipe: Path, tmp_path: Path) -> None:
    text = yaml.safe_load(recipe.read_text())
    del text["student"]
    recipe.write_text(yaml.safe_dump(text))
    with pytest.raises(RecipeError, match="student is missing"):
        main([str(recipe), "--run", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_missing_teacher_folder_stops_the_chain_with_one_line(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the folder is not there"):
        main([str(recipe), "--run", str(tmp_path / "run"), "--teacher.model", str(tmp_path / "none")])


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"method": "kd", "teacher": "gpt-4.1"}, "needs the teacher's weights, and gpt-4.1 has none here"),
        ({"method": "gold", "teacher": "gpt-4.1"}, "needs the teacher's weights"),
        ({"method": "kd", "kd.teacher": "stored"}, "sampling.logprobs is null"),
        ({"method": "on_policy", "teacher": "OTHER"}, "has another vocabulary than the student"),
        ({"method": "on_policy", "start": "nowhere"}, "nowhere: no student to start from"),
        ({"method": "dpo"}, "no student to start from"),
        ({"method": "qlora"}, "qlora needs a GPU"),
        ({"padding_free": "true"}, "padding_free needs a GPU"),
        ({"report_to": "[tensorboard]"}, "tensorboard is not installed"),
        ({"method": "on_policy", "on_policy.rollouts": "vllm"}, "rollouts vllm needs a GPU"),
        ({"loss_on": "all"}, "chat template does not mark what the assistant says"),
        ({"tools": LAMP}, "check tools: the student's chat template does not render tool calls"),
    ],
)
def test_what_cannot_be_trained_is_told_before_anything_is_asked(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, str],
    word: str,
    dry: list[str],
) -> None:
    monkeypatch.setattr("train.machine.find_spec", lambda package: None)
    student, other = tiny_model(tmp_path / "student"), tiny_model(tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["cat sat"])
    tokenizer.save_pretrained(other)
    flags = ["--student.model", str(student), "--train.accept", "[licence]"]
    flags += ["--teacher.model", given.get("teacher", str(student)).replace("OTHER", str(other))]
    flags += [f"--{'prompts' if name == 'tools' else 'train'}.{name}={given[name]}" for name in {*given} - {"teacher"}]
    with pytest.raises((RecipeError, UsageError), match=word):
        main([str(recipe), "--run", str(tmp_path / "run"), *flags, *dry])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--student.model", "/no/such/model"], "model /no/such/model: the folder is not there"),
        (["--student.model", "embedded:none"], "model embedded:none: no such embedded model"),
        (["--student.model", "prune:4"], "has 4 layers; choose 1 to 3"),
        (
            ["--student.model", "prune:4", "--teacher.model", "org/api"],
            "prune:4 needs the teacher's weights, and org/api",
        ),
        (
            ["--student.model", "new:30m", "--student.tokenizer", "./none", "--train.method", "full"],
            "model ./none: the",
        ),
        (["--student.model", "BARE"], "has no chat template"),
        (["--student.model", "org/mistyped"], "cannot load the tokenizer of org/mistyped"),
        (["--student.model", "org/mistyped", "--student.chat_template", "chatml"], "cannot load the tokenizer of org/"),
        (
            ["--student.model", "new:30m", "--student.tokenizer", "org/mistyped", "--train.method", "full"],
            "cannot load the tokenizer of org/mistyped",
        ),
        (["--train.test_rows", "none.jsonl"], "train.test_rows none.jsonl: no such file"),
        (["--evaluate.models", "[/no/such/model]"], "model /no/such/model: the folder is not there"),
        (["--evaluate.models", "[runs/mistyped]"], "evaluate.models runs/mistyped: no such folder, and no such model"),
        (["--evaluate.probes_file", "none.jsonl"], "evaluate.probes_file none.jsonl: No such file"),
        (
            ["--evaluate.verify", '[{"rule": "choice", "labels": ["a"]}]', "--evaluate.category", "charakter"],
            "no test prompt has a value under 'charakter'; there are ",
        ),
        (
            ["--student.chat_template", "chatml", "--prompts.tools", LAMP],
            "serve.args: vLLM refuses requests with tools, which the prompts have, without --enable-auto-tool-choice",
        ),
        (["--evaluate.lm_eval", "[ifeval]"], "there is no `lm_eval_that_is_not_there` command"),
        (
            ["--filters.judge.model", "paid", "--filters.judge.budget.usd", "1"],
            r"^filters\.judge\.budget\.usd is 1, but the price of paid is not known: set filters\.judge\.price: ",
        ),
        (
            ["--evaluate.judge.model", "paid", "--evaluate.judge.budget.usd", "1"],
            r"^evaluate\.judge\.budget\.usd is 1, but the price of paid is not known: set evaluate\.judge\.price: ",
        ),
        (
            ["--evaluate.judge.base_url", "http://127.0.0.1:1/v1/chat/completions"],
            r"^evaluate\.judge\.base_url .* is too long",
        ),
        (["--filters.dedup.against", "[none]"], r"filters\.dedup\.against\[0\]: none/kept\.jsonl: no such file"),
    ],
)
def test_what_a_later_stage_lacks_is_told_before_anything_is_asked(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], word: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("evaluate.measure.lm_eval.COMMAND", "lm_eval_that_is_not_there")
    teacher, bare = tiny_model(tmp_path / "teacher", layers=4), tiny_model(tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    run = tmp_path / "run"
    given = ["--teacher.model", str(teacher), *(flag.replace("BARE", str(bare)) for flag in flags)]
    with pytest.raises((RecipeError, UsageError), match=word):
        main([str(recipe), "--run", str(run), "--train.accept", "[licence]", *given, "--dry-run"])
    assert not run.exists()


def test_several_gpus_that_one_process_would_not_train_on_are_told_before_anything_is_asked(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chain.__main__.detect", lambda: replace(detect(), gpus=2))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    student = str(tiny_model(tmp_path / "student"))
    with pytest.raises(UsageError, match=r"^2 GPUs are visible to one process; .* CUDA_VISIBLE_DEVICES=0"):
        main([str(recipe), "--run", str(tmp_path / "run"), "--train.accept", "[licence]", "--student.model", student])
    assert not (tmp_path / "run").exists()


def test_a_student_in_the_hubs_cache_needs_no_network(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, repository = "0" * 40, tmp_path / "hub/models--org--cached"
    tiny_model(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(repository.parent))
    main([str(recipe), "--run", str(tmp_path / "run"), "--student.model", "org/cached", "--dry-run"])
    with pytest.raises(RecipeError, match="cannot load the tokenizer of org/another"):
        main([str(recipe), "--run", str(tmp_path / "run"), "--student.model", "org/another", "--dry-run"])


@pytest.mark.parametrize("ask", ["false", "true"])
def test_a_teacher_that_the_report_would_lack_is_told_at_the_start(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ask: str
) -> None:
    flags = ["--student.model", str(tiny_model(tmp_path / "student")), "--train.accept", "[licence]"]
    flags += ["--teacher.model", "gpt-4.1-mini", "--teacher.base_url", "https://api.openai.com/v1"]
    main([str(recipe), "--run", str(tmp_path / "run"), *flags, "--evaluate.ask_teacher", ask, "--dry-run"])
    assert ("whose weights are not here; evaluate.ask_teacher: true" in capsys.readouterr().out) == (ask == "false")


def test_no_server_is_started_for_answers_that_the_rows_bring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    student, run = str(tiny_model(tmp_path / "student")), RunDir(tmp_path / "run")
    (tmp_path / "rows.csv").write_text("prompt,output\nHi?,Hi.\nBye?,Bye.\n")
    sections = {"teacher": {"model": student}, "student": {"model": student}}
    recipe = {"name": "given", **sections, "prompts": {"file": "rows.csv", "answers": "output"}}
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(recipe))

    def stop(name: str, *_: object) -> int:
        raise StageFailed(name, 1)

    monkeypatch.setattr("chain.__main__.teacher", lambda *_: pytest.fail("served"))
    monkeypatch.setattr("chain.__main__.stage", lambda name, *given: 0 if name == "generate" else stop(name))
    with pytest.raises(StageFailed, match="python -m filters"):
        main([str(tmp_path / "given.yaml"), "--run", str(run.path), "--train.accept", "[licence,size_ratio]"])
    assert "1/4 generate" in capsys.readouterr().out
