"""`from generate import generate, agenerate`: the client as a library, also where an event loop runs already."""

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from generate import agenerate, generate
from pipeline.errors import DistillError, UsageError
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir
from tests.servers.misbehaving_server import (
    MisbehavingServer,
    answer,
    completions,
    error,
    failures,
    misbehaving,
    recipe_for,
)


def data(server: MisbehavingServer, count: int = 10, **more: Any) -> dict[str, Any]:
    return {**recipe_for(server, count).model_dump(mode="json", exclude={"student"}), **more}


async def test_in_a_running_loop_it_answers_all_and_leaves_the_loop_free(tmp_path: Path) -> None:
    turns = 0

    async def beside() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0.01)
            turns += 1

    def script(asked: Any) -> Any:
        return error(400) if asked.text == "say 3" else answer(delay_s=0.2)

    with misbehaving(script) as server:
        task = asyncio.create_task(beside())
        summary = await agenerate(Recipe(**data(server, 20)), tmp_path / "run", quiet=True)
        task.cancel()
        again = await agenerate(Recipe(**data(server, 20)), str(tmp_path / "run"), quiet=True, retry_failures=True)
    assert (summary.requests, summary.answered, summary.failed) == (20, 19, 1)
    assert (again.resumed, again.failed) == (19, 1)
    assert turns > 5
    assert len(completions(RunDir(tmp_path / "run"))) == 19


async def test_two_runs_at_once_and_one_run_locked(tmp_path: Path) -> None:
    with misbehaving(lambda asked: answer(delay_s=0.2)) as server:
        recipe = Recipe(**data(server))
        one, two = (agenerate(recipe, tmp_path / name, quiet=True) for name in ("one", "two"))
        third = asyncio.create_task(agenerate(recipe, tmp_path / "one", quiet=True))
        summaries = await asyncio.gather(one, two, third, return_exceptions=True)
    assert sorted(type(summary).__name__ for summary in summaries) == ["Summary", "Summary", "UsageError"]


async def test_a_cancelled_call_keeps_what_was_answered(tmp_path: Path) -> None:
    with misbehaving(lambda asked: answer(delay_s=0 if asked.text == "say 3" else 60)) as server:
        recipe = Recipe(**data(server, generate={"concurrency": 10, "request_timeout_s": 100}))
        task = asyncio.create_task(agenerate(recipe, tmp_path / "run", quiet=True))
        while server.at_once < 9 or not completions(RunDir(tmp_path / "run")):  # noqa: ASYNC110, another thread's
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    run = RunDir(tmp_path / "run")
    assert [record.slots["n"] for record in completions(run)] == ["3"]
    assert run.lineage.exists()
    with run.locked():  # it is free again
        assert not failures(run)


async def test_a_cancelled_call_of_several_processes_leaves_the_run_free(tmp_path: Path) -> None:
    table = "TABLE = bytearray(b'x') * (300 << 20)\n"  # so that its process takes a while to die
    (tmp_path / "p.py").write_text(f"{table}def rows():\n    return [{{'prompt': f'say {{n}}'}} for n in range(10)]\n")
    run = RunDir(tmp_path / "run")
    with misbehaving(lambda asked: answer(delay_s=60)) as server:
        config = {"concurrency": 10, "request_timeout_s": 100, "processes": 2}
        recipe = Recipe(**data(server, generate=config, prompts={"file": tmp_path / "p.py"}))
        task = asyncio.create_task(agenerate(recipe, run, quiet=True))
        while server.at_once < 10:  # noqa: ASYNC110, another thread's
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with run.locked():
            pass


async def test_in_a_running_loop_generate_says_what_to_use(tmp_path: Path) -> None:
    with misbehaving() as server, pytest.raises(UsageError, match=r"await agenerate\(\.\.\.\)"):
        generate(Recipe(**data(server)), tmp_path / "run")


def test_a_recipe_built_here_is_taken_as_it_is_and_a_file_obeys_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with misbehaving() as server:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(data(server)))
        monkeypatch.setenv("DISTILL_SAMPLING__TEMPERATURE", "0.125")
        monkeypatch.setenv("DISTILL_NAME", "other")
        monkeypatch.chdir(tmp_path)
        assert generate(Recipe(**data(server)), quiet=True).answered == 10
        assert {asked.body["temperature"] for asked in server.asked} == {0.8}
        assert generate(path, quiet=True).answered == 10
        assert {asked.body["temperature"] for asked in server.asked[10:]} == {0.125}
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["other", "t"]


def test_a_store_is_no_folder_and_none_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with misbehaving() as server:
        with pytest.raises(UsageError, match=r"s3://bucket/x: a folder is needed here; .*--run s3://bucket/x"):
            generate(Recipe(**data(server)), "s3://bucket/x")
        with pytest.raises(UsageError, match="a folder is needed here"):
            asyncio.run(agenerate(Recipe(**data(server)), "s3://bucket/x"))
        assert not server.asked
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_go_on_is_raised(tmp_path: Path) -> None:
    with misbehaving(lambda asked: error(401, "wrong key")) as server, pytest.raises(DistillError, match="wrong key"):
        generate(Recipe(**data(server)), tmp_path / "run", quiet=True)


def test_importing_it_imports_nothing_else() -> None:
    code = "import sys, generate; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "generate" in loaded
    assert not {"aiohttp", "pydantic", "msgspec", "generate.run"} & set(loaded)


def test_an_empty_name_of_a_run_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `--run ""` is, from a variable that is not set."""
    monkeypatch.chdir(tmp_path)
    with misbehaving() as server:
        generate(Recipe(**data(server)), "", quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_a_folder_that_cannot_be_written_is_an_oserror_as_the_docs_say(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with misbehaving() as server, pytest.raises(NotADirectoryError):
        generate(Recipe(**data(server)), tmp_path / "file" / "run", quiet=True)
    said = (Path(__file__).parents[2] / "docs" / "generation.md").read_text(encoding="utf-8").split()
    assert "| a file or folder that cannot be written, as on a full disk | raises `OSError` |" in " ".join(said)
