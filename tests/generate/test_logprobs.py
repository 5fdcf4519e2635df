"""Logprobs of the teacher's own answers: what is asked for, what is stored, and that no answer stands without them."""

import struct
from pathlib import Path
from typing import Any

import pytest

from generate.jobs import build_jobs
from generate.journal import read_journal
from generate.logprobs import pack
from generate.prompts import iter_prompts
from generate.run import generate
from pipeline.errors import DistillError, RecipeError
from pipeline.records import Completion, TokenLogprobs, read_jsonl
from pipeline.rundir import RunDir
from tests.servers.misbehaving_server import (
    Asked,
    Behaviour,
    answer,
    completions,
    error,
    misbehaving,
    recipe_for,
    reply,
)
from tests.servers.misbehaving_server import raw as bytes_of

ASKED = {"logprobs": 2}


pytestmark = pytest.mark.usefixtures("quick")


def said(*tokens: tuple[str, float, dict[str, float]]) -> dict[str, Any]:
    """`logprobs` of a choice, as vLLM and OpenAI have them."""

    def token(name: str, logprob: float) -> dict[str, Any]:
        return {"token": name, "logprob": logprob, "bytes": list(name.encode())}

    return {
        "content": [
            {**token(name, logprob), "top_logprobs": [token(*other) for other in likeliest.items()]}
            for name, logprob, likeliest in tokens
        ]
    }


BY_ID = said(
    ("token_id:7", -0.1, {"token_id:7": -0.1, "token_id:9": -2.5}),
    ("token_id:2", -3.0, {"token_id:4": -0.25, "token_id:2": -3.0, "token_id:5": -9.0}),
    ("token_id:3", 0.0, {"token_id:3": 0.0}),
)


def answered(logprobs: Any) -> Behaviour:
    import msgspec

    body = reply("so it is")
    body["choices"][0]["logprobs"] = logprobs
    return bytes_of(msgspec.json.encode(body))


def test_tokens_are_packed_by_their_ids() -> None:
    line = pack("a", BY_ID, 2)
    assert line is not None and line.names == []
    assert struct.unpack("<3i", line.chosen) == (7, 2, 3)
    assert struct.unpack("<6i", line.likeliest) == (7, 9, 4, 2, 3, -1)
    assert struct.unpack("<6e", line.logprobs) == pytest.approx((-0.1, -2.5, -0.25, -3.0, 0.0, -65504.0), abs=1e-4)


def test_tokens_without_ids_are_packed_by_their_bytes() -> None:
    half = {"token": "\ufffd", "logprob": -1.0, "bytes": [0xEA, 0xB3]}  # no whole character
    chosen = {**half, "top_logprobs": [half, {"token": " a", "logprob": -2.0}]}
    line = pack("a", {"content": [chosen, chosen]}, 2)
    assert line is not None and line.names == [b"\xea\xb3", b" a"]
    assert struct.unpack("<4i", line.likeliest) == (0, 1, 0, 1)


@pytest.mark.parametrize("nothing", [None, {}, {"content": []}, {"content": None}, {"tokens": ["a"]}, "no", [1]])
def test_what_is_no_logprobs_is_nothing(nothing: Any) -> None:
    assert pack("a", nothing, 2) is None


def test_each_answer_has_its_logprobs_before_it(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with misbehaving(lambda asked: answered(BY_ID)) as server:
        recipe = recipe_for(server, 20, sampling=ASKED)
        generate(recipe, run, quiet=True)
        body = server.asked[0].body
        assert (body["logprobs"], body["top_logprobs"], body["return_tokens_as_token_ids"]) == (True, 2, True)
        assert {line.id for line in read_jsonl(run.logprobs, TokenLogprobs)} == {row.id for row in completions(run)}

        # A kill between the two lines, and one in the middle of a line of logprobs.
        lines = run.completions.read_bytes().splitlines(keepends=True)
        run.completions.write_bytes(b"".join(lines[:-1]))
        with run.logprobs.open("ab") as file:
            file.write(b'{"id":"torn')
        assert generate(recipe, run, quiet=True).resumed == 19
    ids = [line.id for line in read_jsonl(run.logprobs, TokenLogprobs)]
    assert set(ids) == {row.id for row in completions(run)} and len(ids) == 21


def test_a_teacher_that_gives_none_ends_the_run(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with (
        misbehaving(lambda asked: answer()) as server,
        pytest.raises(DistillError, match=r"leave out sampling.logprobs"),
    ):
        generate(recipe_for(server, 5, sampling=ASKED), run, quiet=True)
    assert not read_journal(run.completions, Completion).ids and not run.logprobs.read_bytes()


def test_a_teacher_that_knows_no_token_ids_is_asked_without(tmp_path: Path) -> None:
    run, words = RunDir(tmp_path / "run"), said((" a", -0.1, {" a": -0.1, " b": -2.5}))

    def script(asked: Asked) -> Behaviour:
        if "return_tokens_as_token_ids" in asked.body:
            return error(400, "Unrecognized request argument supplied: return_tokens_as_token_ids")
        return answered(words)

    with misbehaving(script) as server:
        generate(recipe_for(server, 5, sampling=ASKED), run, quiet=True)
    assert [line.names for line in read_jsonl(run.logprobs, TokenLogprobs)] == [[b" a", b" b"]] * 5


def test_logprobs_are_part_of_what_identifies_an_answer_only_if_asked_for() -> None:
    plain, asking = (recipe_for("http://127.0.0.1:1/v1", 1, sampling=own) for own in ({}, ASKED))
    ids = [next(iter(build_jobs(iter_prompts(recipe), recipe))).request.id for recipe in (plain, asking)]
    assert ids[0] != ids[1]
    assert "logprobs" not in plain.sampling.fields()


def test_answers_to_be_followed_by_their_logprobs_are_not_asked_for_without(tmp_path: Path) -> None:
    run, followed = RunDir(tmp_path / "run"), {"method": "kd", "kd": {"teacher": "stored"}}
    with misbehaving(lambda asked: answered(BY_ID)) as server:
        recipe = recipe_for(server, 3, train=followed)
        with pytest.raises(RecipeError, match=r"set it, as in sampling.logprobs: 20.*nothing was asked"):
            generate(recipe, run, quiet=True)
        assert not server.asked
        generate(recipe_for(server, 3, train={**followed, "method": "lora"}), run, quiet=True)
        assert generate(recipe, run, quiet=True).resumed == 3  # nothing is left to ask
        assert generate(recipe_for(server, 3, train=followed, sampling=ASKED), run, quiet=True).completed == 3
