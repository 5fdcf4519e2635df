"""`prompts.answers`: answers that the rows bring are taken in, and nobody is asked."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from generate.__main__ import main
from generate.jobs import build_jobs
from generate.prompts import iter_prompts
from generate.run import agenerate, generate, pending
from pipeline.errors import DataError, RecipeError, RequestsFailed, UsageError
from pipeline.lineage import read_lineage
from pipeline.recipe import Recipe, load_recipe
from pipeline.records import Completion, Failure, read_jsonl
from pipeline.rundir import RunDir
from tests.servers.misbehaving_server import misbehaving

CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}


def recipe_of(folder: Path, rows: list[dict[str, Any]], **sections: Any) -> Path:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    prompts = {"file": "rows.jsonl", "answers": "output"} | sections.pop("prompts", {})
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"name": "x", "teacher": {"model": "gpt-4.1"}, "prompts": prompts, **sections}))
    return path


def row(question: str, output: Any, **columns: Any) -> dict[str, Any]:
    return {"prompt": question, "output": output, **columns}


def test_each_row_brings_its_answer_and_nobody_is_asked(tmp_path: Path) -> None:
    given = [
        row("a", "Ä.", author="ann"),
        row("b", "<think>Hm.</think>B."),
        row("c", {"role": "assistant", "content": None, "tool_calls": [CALL]}),
        row("d", 5),
        row("a", "Another."),
        row("e", {"room": "attic", "device": "fan"}),
    ]
    run = RunDir(tmp_path / "run")
    with misbehaving(lambda asked: pytest.fail("asked")) as server:
        path = recipe_of(tmp_path, given, teacher={"model": "gpt-4.1", "base_url": server.url, "system": "Be kind."})
        summary = generate(path, run, quiet=True)
        assert not server.asked
    assert (summary.answered, summary.failed, summary.requests, summary.prompt_tokens) == (6, 0, 6, 0)
    rows = [*read_jsonl(run.completions, Completion)]
    assert [(one.text, one.reasoning) for one in rows] == [
        ("Ä.", ""), ("B.", "Hm."), ("", ""), ("5", ""), ("Another.", ""), ('{"room":"attic","device":"fan"}', "")
    ]  # fmt: skip
    assert rows[2].tool_calls[0]["function"] == CALL["function"]
    assert {(one.model, one.finish_reason, one.endpoint, len(one.sampling)) for one in rows} == {
        ("gpt-4.1", "stop", "", 0)
    }
    assert rows[0].columns == {"author": "ann", "output": "Ä."}
    lineage = read_lineage(run)["generate"]
    assert (lineage["given"], lineage["endpoints"], lineage["sampling"]) == ("output", [], {})
    assert lineage["teacher"]["asked"] == "gpt-4.1"


async def test_a_running_event_loop_takes_them_in_too(tmp_path: Path) -> None:
    assert (await agenerate(recipe_of(tmp_path, [row("a", "A.")]), tmp_path / "run", quiet=True)).answered == 1


def test_what_the_teacher_was_told_and_how_it_sampled_make_no_other_answer(tmp_path: Path) -> None:
    def ids(**sections: Any) -> list[str]:
        recipe = load_recipe(recipe_of(tmp_path, [row("a", "A.")], **sections))
        return [job.request.id for job in build_jobs(iter_prompts(recipe), recipe)]

    teacher = {"model": "gpt-4.1", "base_url": "http://other.example/v1", "system": "Be kind."}
    assert ids() == ids(teacher=teacher, sampling={"temperature": 0.1})
    assert ids() != ids(teacher={"model": "another"})


@pytest.mark.parametrize("missing", [None, "", " \n"])
def test_a_row_without_an_answer_fails_until_it_has_one(tmp_path: Path, missing: str | None) -> None:
    run = RunDir(tmp_path / "run")
    path = recipe_of(tmp_path, [row("a", "A."), row("b", missing)])
    with pytest.raises(RequestsFailed, match=r"1 of 2 requests .* the same command takes in answers that come later"):
        _command(path, run)
    (failure,) = read_jsonl(run.failures, Failure)
    assert (failure.error, failure.messages[0].content) == ("empty_answer", "b")
    recipe_of(tmp_path, [row("a", "Not taken."), row("b", "B."), row("c", "C.")])
    assert pending(load_recipe(path), run) == 1  # c: b has failed so far
    _command(path, run)
    assert [one.text for one in read_jsonl(run.completions, Completion)] == ["A.", "B.", "C."]


def _command(path: Path, run: RunDir, *flags: str) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sys.argv", ["generate", str(path), "--run", str(run.path), "--quiet", *flags])
        main()


def test_a_dry_run_says_how_many_rows_there_are_to_take_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _command(recipe_of(tmp_path, [row("a", "A."), row("b", "B.")]), RunDir(tmp_path / "run"), "--dry-run")
    assert capsys.readouterr().out == "x: 2 rows without an answer so far, which prompts.answers brings\n"
    assert not (tmp_path / "run").exists()


def test_one_column_may_be_the_answer_and_the_reference(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    generate(recipe_of(tmp_path, [row("a", "A.")], prompts={"columns": {"reference": "output"}}), run, quiet=True)
    (answer,) = read_jsonl(run.completions, Completion)
    assert (answer.text, answer.reference) == ("A.", "A.")


def test_a_column_that_is_not_there_is_told_before_anything_is_taken_in(tmp_path: Path) -> None:
    path, run = recipe_of(tmp_path, [row("a", "A."), {"prompt": "b", "answer": "B."}]), RunDir(tmp_path / "run")
    with pytest.raises(DataError, match=r"rows.jsonl:2: no column 'output', which prompts.answers names; there are"):
        generate(path, run, quiet=True)
    assert not run.completions.read_bytes()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"prompts": {"samples": 2}}, "answers: a row holds one answer, to its own question; leave out samples"),
        ({"prompts": {"user": {"turns": 1}}}, "leave out user"),
        ({"sampling": {"logprobs": 5}}, "the answers of prompts.answers have none"),
    ],
)
def test_what_rows_cannot_bring_is_refused(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe_of(tmp_path, [row("a", "A.")], **sections))


def test_a_template_has_no_rows_and_there_is_no_batch(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`answers` are for `file`"):
        Recipe(name="x", teacher={"model": "m"}, prompts={"template": "t", "count": 1, "answers": "output"})
    with pytest.raises(UsageError, match="there is no batch"):
        generate(recipe_of(tmp_path, [row("a", "A.")]), tmp_path / "run", collect=tmp_path / "rows.jsonl")
