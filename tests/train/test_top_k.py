"""kd without the teacher beside the student: what is stored or served of its answers, and the loss that follows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
import trl
from msgspec.structs import replace
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from generate.logprobs import pack
from pipeline.errors import DataError, DistillError, RecipeError
from pipeline.records import Kept, encode_line
from pipeline.rundir import RunDir
from tests.servers.fake_vllm import scoring
from tests.tiny_student import END, losses, make_recipe, make_run, story_rows, tiny_model
from train.rows import to_examples
from train.run import train_run
from train.soft import top_k_divergence
from train.tokens import answered_row, key_of
from train.top_k import endpoint_client, read_stored, token_names

QWEN3 = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    student, teacher = tiny_model(folder / "student"), tiny_model(folder / "teacher", layers=4)
    model = AutoModelForCausalLM.from_pretrained(teacher)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.3)
    model.save_pretrained(teacher)
    return str(student), str(teacher)


def store(run: RunDir, rows: list[Kept], teacher: str, top: int = 5, *, by_bytes: bool = False) -> None:
    """What the teacher says of its answers, with a stop token after each, as `generate` would store it."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32),
        AutoTokenizer.from_pretrained(teacher),
    )
    lines, bytes_of = [], {id_: name for name, id_ in token_names(tokenizer).items()}
    for row in rows:
        chat = [{"role": message.role, "content": message.content} for message in row.messages]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        answer = [*tokenizer(row.text, add_special_tokens=False)["input_ids"], END]
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)

        def token(id_: int, logprob: float) -> dict[str, Any]:
            if by_bytes:
                return {"token": "?", "logprob": logprob, "bytes": list(bytes_of[id_])}
            return {"token": f"token_id:{id_}", "logprob": logprob}

        content = []
        for place, chosen in enumerate(answer, start=len(prompt)):
            of = scores[place - 1]
            likeliest = [token(id_, of[id_].item()) for id_ in of.argsort(descending=True)[:top].tolist()]
            content.append({**token(chosen, of[chosen].item()), "top_logprobs": likeliest})
        line = pack(row.id, {"content": content}, top)
        assert line is not None
        lines.append(encode_line(line))
    run.logprobs.write_bytes(b"".join(lines))


def read(run: RunDir, rows: list[Kept], tokenizer: Any) -> list[Any]:
    """What is known of each row."""
    tokens = [answered_row(one, one["completion"][0], tokenizer) for one in to_examples(rows)]
    shown = [{"id": row.id, "stripped": False} for row in rows]
    found = read_stored(run.logprobs, shown, tokens, tokenizer, Console(quiet=True))
    return [found[key_of(row["input_ids"])] for row in tokens]


def test_the_divergence_is_as_by_hand() -> None:
    """Two tokens told of four: the other two are one outcome. In float64, by the formula."""
    logits = torch.tensor([[1.0, 0.5, -0.5, 1.2], [0.0, 0.0, 0.0, 0.0]])
    q = np.exp(logits[0].double().numpy())
    q /= q.sum()
    p = np.array([0.6, 0.3])
    expected = (p * np.log(p / q[[3, 0]])).sum() + 0.1 * np.log(0.1 / (q[1] + q[2]))
    likeliest, logprobs = torch.tensor([[3, 0], [-1, -1]]), torch.tensor(np.array([np.log(p), [0, 0]]))
    assert top_k_divergence(logits, likeliest, logprobs).item() == pytest.approx(
        expected, rel=1e-6
    )  # none of the second
    third = torch.tensor([[3, 4], [-1, -1]])  # the student has no 4: its part joins the rest
    expected = 0.6 * np.log(0.6 / q[3]) + 0.4 * np.log(0.4 / (1 - q[3]))
    assert top_k_divergence(logits, third, logprobs).item() == pytest.approx(expected, rel=1e-4)


def test_with_all_tokens_told_it_is_the_whole_divergence() -> None:
    logits = torch.randn(3, 8, requires_grad=True)
    p = torch.randn(3, 8).log_softmax(-1)
    logprobs, likeliest = p.sort(descending=True)
    found = top_k_divergence(logits, likeliest, logprobs)
    q = logits.log_softmax(-1)
    assert found.item() == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-3)
    found.backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize("by_bytes", [False, True])
def test_a_student_learns_from_what_is_stored_as_from_the_teacher(
    models: tuple[str, str], tmp_path: Path, by_bytes: bool
) -> None:
    rows, all_tokens = story_rows(12), 259
    told, beside = (make_run(tmp_path / name, rows) for name in ("told", "beside"))
    store(told, rows, models[1], all_tokens, by_bytes=by_bytes)
    own = {"method": "kd", "learning_rate": 1e-2, "epochs": 2}
    # No teacher is needed: its name leads nowhere.
    accept = ["filters", "licence", "templates", "size_ratio"]
    kd = {"weights": "full", "alpha": 1.0}
    train_run(make_recipe(models[0], "gpt-4.1", kd={**kd, "teacher": "stored"}, accept=accept, **own), told, force=True)
    train_run(make_recipe(*models, kd=kd, **own), beside)
    assert len(losses(told)) >= 4
    # Stored: nothing of the blank after the stop token, in float16; beside: in bfloat16 where that is native.
    assert losses(told) == pytest.approx(losses(beside), rel=0.1)
    assert losses(told)[-1] < 0.9 * losses(told)[0]


def test_few_tokens_stored_teach_too(models: tuple[str, str], tmp_path: Path, capsys: Any) -> None:
    rows = story_rows(12)
    run = make_run(tmp_path / "run", rows)
    store(run, rows, models[1], 3)
    train_run(make_recipe(*models, method="kd", kd={"weights": "full", "teacher": "stored"}, learning_rate=1e-2), run)
    assert losses(run)[-1] < losses(run)[0]
    assert "the teacher's word on 9" in " ".join(capsys.readouterr().err.split())  # but for blanks after the stop token


def test_what_is_stored_is_found_after_what_the_students_template_begins_an_answer_with(
    models: tuple[str, str], tmp_path: Path
) -> None:
    """A teacher that is asked not to think writes no empty thought; by Qwen3's template an answer begins with one."""
    rows, tokenizer, run = story_rows(6), AutoTokenizer.from_pretrained(models[0]), make_run(tmp_path / "run", [])
    store(run, rows, models[1], 3)
    plain, begin = read(run, rows, tokenizer), len(tokenizer("<think>\n\n</think>\n\n")["input_ids"])
    tokenizer.chat_template = QWEN3
    for (ids, logprobs), (own_ids, own_logprobs) in zip(plain, read(run, rows, tokenizer), strict=True):
        assert (own_ids[:begin] == -1).all() and (ids >= 0).any()
        assert (own_ids[begin:] == ids).all() and (own_logprobs[begin:] == logprobs).all()
    store(run, [replace(row, text=f"\n\n{row.text}") for row in rows], models[1], 3)  # as after an empty thought
    for ids, _ in read(run, rows, tokenizer):
        assert (ids[begin - 2 : -1] >= 0).any(axis=1).all() and (ids[: begin - 2] == -1).all()


def test_nothing_is_told_where_the_teachers_first_token_comes_later_by_chance(
    models: tuple[str, str], tmp_path: Path
) -> None:
    rows, tokenizer, run = story_rows(6), AutoTokenizer.from_pretrained(models[0]), make_run(tmp_path / "run", [])
    store(run, [*rows[:5], replace(rows[5], text=f" {rows[5].text}")], models[1], 3)
    *others, (last, _) = read(run, rows, tokenizer)
    assert all((ids[:-1] >= 0).any(axis=1).all() for ids, _ in others)
    assert (last == -1).all()


def test_answers_without_stored_logprobs_are_refused(models: tuple[str, str], tmp_path: Path) -> None:
    rows = story_rows(12)
    run = make_run(tmp_path / "run", rows)
    recipe = make_recipe(*models, method="kd", kd={"teacher": "stored"})
    with pytest.raises(DataError, match=r"nothing is stored of 10 of 10 answers .*sampling.logprobs"):
        train_run(recipe, run)
    store(run, rows[:6], models[1])
    with pytest.raises(DataError, match=r"nothing is stored of \d of 10 answers .*sampling.logprobs"):
        train_run(recipe, run)


def test_stored_tokens_of_another_tokenizer_are_refused(models: tuple[str, str], tmp_path: Path) -> None:
    rows = story_rows(12)
    run = make_run(tmp_path / "run", rows)
    store(run, [replace(row, text=row.text[::-1]) for row in rows], models[1])
    with pytest.raises(RecipeError, match=r"its tokenizer is not the student's; use train.method: gold"):
        train_run(make_recipe(*models, method="kd", kd={"teacher": "stored"}), run)


def test_stored_tokens_of_reasoning_that_is_stripped_are_refused(models: tuple[str, str], tmp_path: Path) -> None:
    rows = story_rows(12)
    run = make_run(tmp_path / "run", [replace(row, reasoning="Let me think. ") for row in rows])
    store(run, [replace(row, text=f"Let me think. {row.text}") for row in rows], models[1])
    with pytest.raises(RecipeError, match=r"those of 0% .* begin with its reasoning; use train.reasoning: keep, or"):
        train_run(make_recipe(*models, method="kd", kd={"teacher": "stored"}), run)


def test_names_are_bytes_and_special_tokens_are_their_text() -> None:
    from tests.tiny_student import tiny_tokenizer

    names = token_names(tiny_tokenizer())
    assert len(names) == 259
    assert names[b"<|im_end|>"] == END
    assert names[b" "] == tiny_tokenizer()(" ")["input_ids"][0]
    assert names[b"\xea"] == tiny_tokenizer()("가")["input_ids"][0]


def test_a_served_teacher_is_asked_once_and_teaches_the_same(
    models: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = story_rows(12)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("TEAM", "ours")
    kd = {"weights": "full", "alpha": 1.0, "top_k": 20}
    served, stored = (make_run(tmp_path / name, rows) for name in ("served", "stored"))
    own = {"method": "kd", "learning_rate": 1e-2, "epochs": 2}
    with scoring(models[1]) as server:
        recipe = make_recipe(*models, kd={**kd, "teacher": "served"}, **own)
        urls = tmp_path / "urls"
        urls.write_text(f"# its servers\n{server.url} 4\nhttp://127.0.0.1:9/v1\n")
        given = {"urls_file": urls, "headers": {"X-Team": "${TEAM}"}, "query": {"version": "1"}}
        teacher = recipe.teacher.model_copy(update={"base_url": "http://the-fleet/v1", **given})
        train_run(recipe.model_copy(update={"teacher": teacher}), served)
        assert server.keys == {"Bearer secret"}
        assert server.teams == {"ours"} and server.queries == {"version=1"}
        scored = [ids for request in server.asked if "prompt_logprobs" in request for ids in request["prompt"]]
        assert len(scored) == 10  # the training rows, once, for two epochs
    store(stored, rows, models[1], 20)
    train_run(make_recipe(*models, kd={**kd, "teacher": "stored"}, **own), stored)
    assert losses(served) == pytest.approx(losses(stored), rel=0.1)  # which has nothing of the blank at the end


def test_an_endpoint_with_other_tokens_or_fewer_logprobs_is_refused(models: tuple[str, str], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", story_rows(6))
    recipe = make_recipe(*models, method="kd", kd={"teacher": "served"})

    def train_at(url: str) -> None:
        teacher = recipe.teacher.model_copy(update={"base_url": url})
        train_run(recipe.model_copy(update={"teacher": teacher}), run)

    other = tiny_model(tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["cat sat"])
    tokenizer.save_pretrained(other)
    with scoring(str(other)) as server, pytest.raises(RecipeError, match=r"splits text into other tokens .*gold"):
        train_at(server.url)
    with (
        scoring(models[1], most=5) as server,
        pytest.raises(DistillError, match=r"more than 5 logprobs.*--max-logprobs"),
    ):
        train_at(server.url)
    with pytest.raises(DistillError, match="cannot be reached"):
        train_at("http://127.0.0.1:9/v1")


@pytest.mark.parametrize("error", [Exception, ValueError, requests.ConnectionError])
def test_an_endpoint_gets_the_key_and_no_message_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    (tmp_path / "netrc").write_text("machine the-teacher login someone password else")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("OPENAI_API_KEY", "the-secret")
    teacher = make_recipe("student").teacher.model_copy(update={"base_url": "http://the-teacher/v1"})
    client = endpoint_client(teacher, {})
    request = client.session.prepare_request(requests.Request("POST", client.base_url))
    assert request.headers["Authorization"] == "Bearer the-secret"

    def refused(*_: Any, **request: Any) -> None:
        raise error("the key the-secret")

    monkeypatch.setattr(client, "_post", refused)
    with pytest.raises(DistillError, match=r"the endpoint .*the key \[secret\]"):
        client.tokens_of("text")
    with pytest.raises(DistillError, match=r"the endpoint .*the key \[secret\]"):
        client.get_sequence_logprobs([[1, 2]], [1])
