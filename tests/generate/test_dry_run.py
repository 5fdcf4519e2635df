"""The dry run: counts by hand-calculated figures, what it says of cost and budget, and that it touches nothing."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from generate.budget import Budget
from generate.dialect import Dialect
from generate.dry_run import describe, dry_run
from generate.jobs import build_jobs
from generate.journal import Contents
from generate.prompts import iter_prompts
from generate.tokens import bound
from pipeline.errors import RecipeError
from pipeline.recipe import Recipe
from pipeline.records import Completion, Failure, Usage, encode_line
from pipeline.rundir import RunDir
from tests.generate.test_tokens import folder
from tests.servers.misbehaving_server import recipe_for

URL = "https://api.example.com/v1"
PRICED = {"model": "teacher-x", "base_url": URL, "price": {"input": 3.0, "output": 12.0}}


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "not-a-key")


def planned(count: int, **sections: Any) -> Recipe:
    return recipe_for(URL, count, **{"sampling": {"max_tokens": 100}, "teacher": PRICED, **sections})


def answered(recipe: Recipe, run: RunDir, count: int, usage: Usage, failures: int = 0) -> None:
    """Writes the journals of a run with so many answers, and as many failures."""
    jobs = list(build_jobs(iter_prompts(recipe), recipe))
    said = {"model": "teacher-x", "attempts": 1, "created": ""}
    run.path.mkdir(parents=True)
    Budget.open(recipe, run, Contents())  # a call begins
    with run.completions.open("wb") as file:
        for job in jobs[:count]:
            answer = {"text": "once", "finish_reason": "stop", "usage": usage, "latency_s": 1.0}
            file.write(encode_line(Completion(**msgspec.structs.asdict(job.request), **answer, **said)))
    with run.failures.open("wb") as file:
        for job in jobs[count : count + failures]:
            error = {"error": "bad_request", "status": 400, "message": "no"}
            file.write(encode_line(Failure(**msgspec.structs.asdict(job.request), **error, **said)))


def test_a_fresh_run_is_bounded_by_its_bytes(tmp_path: Path) -> None:
    recipe = planned(10)
    dry = dry_run(recipe, RunDir(tmp_path / "run"))
    dialect = Dialect()
    most = sum(bound(len(dialect.body(job))) for job in build_jobs(iter_prompts(recipe), recipe))
    assert (dry.requests, dry.to_ask, dry.counted, dry.reserved_tokens) == (10, 10, False, 0)
    assert (dry.prompt_tokens, dry.completion_tokens) == (most, 1000)
    assert dry.cost == pytest.approx((3 * most + 12 * 1000) / 10**6)
    assert (dry.expected_prompt_tokens, dry.expected_completion_tokens, dry.expected_cost) == (None, None, None)
    text = "\n".join(describe(recipe, dry))
    assert "one token per byte" in text
    assert "expected numbers need 20 answers" in text
    assert "price: $3 and $12 per million prompt and completion tokens, from teacher.price" in text
    assert not (tmp_path / "run").exists()


def test_prompts_are_counted_with_a_tokenizer_at_hand(tmp_path: Path) -> None:
    model = folder(tmp_path, "{% for m in messages %}{{ m.content }}{% endfor %}")
    recipe = planned(5, teacher={**PRICED, "model": model})
    dry = dry_run(recipe, RunDir(tmp_path / "run"))
    by_hand = sum(len(message.content.encode()) for prompt in iter_prompts(recipe) for message in prompt.messages)
    assert (dry.counted, dry.prompt_tokens, dry.expected_prompt_tokens) == (True, by_hand, by_hand)
    assert f"prompt tokens: {by_hand:,} counted with the teacher's tokenizer" in describe(recipe, dry)[1]


def test_a_template_that_refuses_the_prompts_leaves_the_bound(tmp_path: Path) -> None:
    recipe = planned(5, teacher={**PRICED, "model": folder(tmp_path, "{{ raise_exception('no') }}")})
    dry = dry_run(recipe, RunDir(tmp_path / "run"))
    dialect = Dialect()
    most = sum(bound(len(dialect.body(job))) for job in build_jobs(iter_prompts(recipe), recipe))
    assert (dry.counted, dry.prompt_tokens) == (False, most)


def test_the_rest_of_a_run_is_expected_to_be_like_its_answers(tmp_path: Path) -> None:
    recipe, run = planned(50), RunDir(tmp_path / "run")
    answered(recipe, run, 20, Usage(prompt_tokens=30, completion_tokens=60), failures=4)
    before = {path.name: path.read_bytes() for path in run.path.iterdir()}
    dry = dry_run(recipe, run)
    assert (dry.requests, dry.answered, dry.to_ask) == (50, 20, 26)
    assert (dry.expected_prompt_tokens, dry.expected_completion_tokens) == (26 * 30, 26 * 60)
    assert dry.expected_cost == pytest.approx(26 * (3 * 30 + 12 * 60) / 10**6)
    assert dry.spent == pytest.approx(20 * (3 * 30 + 12 * 60) / 10**6)
    assert dry_run(recipe, run, retry_failures=True).to_ask == 30
    assert {path.name: path.read_bytes() for path in run.path.iterdir()} == before


def test_answers_whose_tokens_nobody_counted_make_nothing_cheaper(tmp_path: Path) -> None:
    """As those that were taken in from a file, or of a gateway that does not count."""
    recipe, run, later = planned(100), RunDir(tmp_path / "run"), RunDir(tmp_path / "later")
    answered(recipe, run, 60, Usage())
    assert dry_run(recipe, run).expected_completion_tokens is None
    answered(recipe, later, 80, Usage(prompt_tokens=30, completion_tokens=60))
    with run.completions.open("ab") as file:
        file.writelines(later.completions.read_bytes().splitlines(keepends=True)[60:])
    dry = dry_run(recipe, run)
    assert (dry.expected_prompt_tokens, dry.expected_completion_tokens) == (20 * 30, 20 * 60)


def test_nineteen_answers_are_too_few_to_expect_anything(tmp_path: Path) -> None:
    recipe, run = planned(50), RunDir(tmp_path / "run")
    answered(recipe, run, 19, Usage(prompt_tokens=30, completion_tokens=60))
    assert dry_run(recipe, run).expected_completion_tokens is None


def test_a_batch_costs_half(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    online, batch = (planned(10, generate={"mode": mode}) for mode in ("online", "batch"))
    full, half = dry_run(online, run).cost, dry_run(batch, run).cost
    assert full is not None
    assert half == pytest.approx(full / 2)
    assert f"costs half (at most ${half:,.4f})" in "\n".join(describe(online, dry_run(online, run)))
    assert f"online: at most ${full:,.4f}" in "\n".join(describe(batch, dry_run(batch, run)))


def test_a_batch_is_not_advised_where_samples_share_a_request(tmp_path: Path) -> None:
    """The recipe would be refused."""
    recipe, run = planned(10, generate={"share_prompt": True}), RunDir(tmp_path / "run")
    said = "\n".join(describe(recipe, dry_run(recipe, run)))
    assert "cost: at most $" in said and "batch" not in said


@pytest.mark.parametrize(("spare", "verdict"), [(0, "is enough for all"), (-1, "may end the run early")])
def test_a_budget_counts_what_the_last_request_reserves(tmp_path: Path, spare: int, verdict: str) -> None:
    model = folder(tmp_path, "{{ messages[0].content }}")
    teacher, run = {**PRICED, "model": model}, RunDir(tmp_path / "run")
    dry = dry_run(planned(5, teacher=teacher), run)
    dialect, recipe = Dialect(), planned(5, teacher=teacher)
    jobs = list(build_jobs(iter_prompts(recipe), recipe))
    beyond = max(bound(len(dialect.body(job))) - len(job.request.messages[0].content.encode()) for job in jobs)
    enough = dry.prompt_tokens + 500 + beyond
    tight = planned(5, teacher=teacher, budget={"tokens": enough + spare})
    assert f"budget.tokens {enough + spare:,} {verdict}" in "\n".join(describe(tight, dry_run(tight, run)))


def test_what_a_killed_run_may_owe_counts_as_spent(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    (run.path / "spend.json").write_text(json.dumps({"unsaid": {"tokens": 700, "cost": 4_000_000_000}}))
    dry = dry_run(planned(5), run)
    assert (dry.spent_tokens, dry.spent) == (700, pytest.approx(0.004))


@pytest.mark.parametrize(
    ("url", "words"),
    [("http://127.0.0.1:8000/v1", "cost: none, the teacher is a server of your own"), (URL, "cost: not known; set")],
)
def test_without_a_price_the_cost_is_said_to_be_open(tmp_path: Path, url: str, words: str) -> None:
    recipe = planned(5, teacher={"model": "teacher-x", "base_url": url})
    dry = dry_run(recipe, RunDir(tmp_path / "run"))
    assert (dry.cost, dry.expected_cost) == (None, None)
    assert words in "\n".join(describe(recipe, dry))


@pytest.mark.parametrize(("chars", "teacher", "warned"), [(110_000, {}, 1), (90_000, {}, 0), (110_000, PRICED, 0)])
def test_prompts_longer_than_the_table_s_prices_hold_for_are_told(
    tmp_path: Path, chars: int, teacher: dict[str, Any], warned: int
) -> None:
    prompts = {"count": 1, "template": "{n}", "slots": {"n": ["x" * chars]}}
    recipe = planned(1, prompts=prompts, teacher={"model": "gpt-4.1", "base_url": URL, **teacher})
    text = describe(recipe, dry_run(recipe, RunDir(tmp_path / "run")))
    assert sum("1 requests may have over 100,000 prompt tokens" in line for line in text) == warned


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ({"template": "{n}", "slots": {"n": ["a", "b"]}, "count": 5}, "5 prompts asked for, but only 2 differ: 3 ask"),
        ({"file": "rows.jsonl"}, "3 prompts asked for, but only 2 differ: 1 ask the same again; repeated rows"),
        ({"file": "rows.jsonl"}, "1 questions have several different references"),
        ({"file": "rows.jsonl", "count": 9}, "prompts.count is 9, but rows.jsonl has only 3 rows"),
    ],
)
def test_what_is_odd_about_the_prompts_is_told_before_it_is_paid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompts: dict[str, Any], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "a", "reference": 1}, {"prompt": "b", "reference": 1}, {"prompt": "a", "reference": 2}]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = planned(1, prompts=prompts)
    assert words in "\n".join(describe(recipe, dry_run(recipe, RunDir(tmp_path / "run"))))


def test_a_budget_in_usd_without_a_price_is_refused(tmp_path: Path) -> None:
    recipe = planned(5, teacher={"model": "teacher-x", "base_url": URL}, budget={"usd": 2})
    with pytest.raises(RecipeError, match=r"budget\.usd is 2, .*set teacher\.price"):
        dry_run(recipe, RunDir(tmp_path / "run"))


def test_a_file_of_servers_that_is_not_there_is_a_warning(tmp_path: Path) -> None:
    """The run itself ends with that line; `serve --cluster` may write the file until then."""
    recipe = planned(1, teacher={**PRICED, "urls_file": tmp_path / "urls.txt"})
    said = describe(recipe, dry_run(recipe, RunDir(tmp_path / "run")))
    assert (
        said[-1]
        == f"warning: teacher.urls_file {tmp_path}/urls.txt: No such file or directory; it needs one URL per line"
    )
