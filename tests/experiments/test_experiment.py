"""Experiments on tiny models: the real stages, in this process; no server, so speed and probes are saved by hand."""

import json
import os
import re
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import evaluate.run
import experiments.runs
import filters.__main__
from evaluate.document import MEASURES, Estimate, read_report
from evaluate.figures.quality import difference
from evaluate.figures.statistics import Figure
from evaluate.measure.results import Entry, PerplexityResult, ProbeResult, RowScore, answer_row
from evaluate.report.charts import dot_panel
from evaluate.report.html import draw_svg
from evaluate.run import evaluate_run
from experiments.__main__ import main
from experiments.arms import EXPERIMENTS, matched_epochs
from experiments.human import read_human
from experiments.results import Column, Comparison, _columns, conclusions, rows_of, write_results
from experiments.runs import Arm, Design, Setup
from generate.jobs import build_jobs
from generate.prompts import iter_prompts
from pipeline.errors import DataError, RecipeError, RequestsFailed, UsageError
from pipeline.lineage import record_lineage
from pipeline.prompts_config import PromptsConfig
from pipeline.recipe import Recipe, load_recipe
from pipeline.records import Completion, Dropped, Kept, Message, Prompt, encode_line, question_text, read_jsonl
from pipeline.rundir import RunDir
from tests.completion_fields import completion_fields
from tests.evaluate.made_report import make_report, verified_report
from tests.tiny_student import tiny_model
from train.rows import part_rows, read_rows
from train.run import train_run

PROMPTS = 24
SHORT = 6  # of them have answers that the rules drop
USD = {"other": 3.0}
TOOLS = '[{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]'
LENGTH = '[{"rule": "length"}]'
OTHER, AT_B = ["--b-model", "m"], ["--b-url", "http://b/v1"]


@pytest.fixture
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_model(folder / "student")
    tiny_model(folder / "teacher", layers=3)
    return folder


@pytest.fixture
def recipe(models: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    data: dict[str, Any] = {
        "name": "tiny",
        "teacher": {"model": str(models / "teacher"), "base_url": "https://teacher.example/v1"},
        "student": {"model": str(models / "student")},
        "prompts": {
            "template": "A story of {who}.",
            "count": PROMPTS,
            "slots": {"who": [f"cat {n}" for n in range(40)]},
            "validation": 0.1,
            "test": 0.2,
        },
        "filters": {"rules": [{"rule": "length", "min_chars": 30, "max_chars": 400}], "dedup": {"near": None}},
        "train": {
            "method": "full",
            "epochs": 1,
            "learning_rate": 1e-3,
            "batch_size": 4,
            "max_length": 512,
            "accept": ["licence", "size_ratio", "chain"],
        },
        "evaluate": {"probes": 0},
    }
    path.write_text(yaml.safe_dump(data))
    return path


def answer(run: RunDir, recipe: Recipe, *, usd: float | None = None, twin: bool = False) -> None:
    """What `generate` would leave: every fourth answer too short. `twin`: one said twice, which nothing asks for."""
    run.path.mkdir(parents=True, exist_ok=True)
    run.prompts.write_bytes(b"".join(map(encode_line, iter_prompts(recipe))))
    lines = []
    for number, job in enumerate(build_jobs(iter_prompts(recipe), recipe)):
        text = "Too short." if number % (PROMPTS // SHORT) == 1 else f"Once there was a cat, number {number}. It sat."
        own = {name: getattr(job.request, name) for name in ("prompt_id", "messages", "slots")}
        lines.append(Completion(**completion_fields(job.request.id, text, **own, model=recipe.teacher.model)))
    if twin:
        lines.append(Completion(**completion_fields("twin", lines[0].text, prompt_id="t")))
    run.completions.write_bytes(b"".join(map(encode_line, lines)))
    spent = {"tokens": 1000, "usd": usd}
    made = {"requests": len(lines), "prompts": {"distinct": len(lines)}, "teacher": {"asked": recipe.teacher.model}}
    record_lineage(run, "generate", {**made, "spent": spent})


def trained_at(run: RunDir) -> int | None:
    path = run.student / "lineage.json"
    return path.stat().st_mtime_ns if path.exists() else None


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages that do something, as `stage run`; they are the real ones but for `generate`."""
    done: list[str] = []

    def stage(name: str, run: RunDir, path: Path, flags: Sequence[str]) -> int:
        if name != "train":
            done.append(f"{name} {run.path.name}")
        own = [flag for flag in flags if flag != "--no-speed"]
        if name == "filters":
            filters.__main__.main([str(path), "--run", str(run.path), *own])
            return 0
        recipe = load_recipe(path, own)
        if name == "generate":
            answer(run, recipe, usd=USD.get(recipe.teacher.model))
        elif name == "train":
            before = trained_at(run)
            train_run(recipe, run)
            done.extend([f"train {run.path.name}"] if trained_at(run) != before else [])
        else:
            evaluate_run(recipe, run, path, speed=False)
        return 0

    monkeypatch.setattr(experiments.runs, "stage", stage)
    return done


@pytest.fixture
def run(recipe: Path, tmp_path: Path, stages: list[str]) -> RunDir:
    """A run that is answered and filtered: 24 answers and a twin, 6 too short."""
    made = RunDir(tmp_path / "run")
    answer(made, load_recipe(recipe, []), usd=1.0, twin=True)
    filters.__main__.main([str(recipe), "--run", str(made.path)])
    return made


def experiment(name: str, recipe: Path, run: RunDir, *flags: str) -> Path:
    main([name, str(recipe), "--run", str(run.path), "--no-speed", *flags])
    return run.path / "experiments" / name


def kept(folder: Path) -> list[Kept]:
    return list(read_jsonl(RunDir(folder).kept, Kept))


def test_shares_of_a_run_are_trained_apart_from_what_all_are_scored_on(
    recipe: Path, run: RunDir, stages: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """25 answers, 18 kept. The shares are of all answers but those to the test prompts, whether kept or dropped."""
    pair = {"twin", next(iter(read_jsonl(run.completions, Completion))).id}  # one is kept, one dropped as the same
    rows, prompts = read_rows(run), load_recipe(recipe).prompts
    seeds = {n: part_rows(rows, prompts.model_copy(update={"seed": n})).test for n in range(99)}
    seed = next(n for n, test in seeds.items() if pair & {row.id for row in test} and len(test) < 6)
    folder = experiment("keep-rate", recipe, run, "--shares", "40,90", "--prompts.seed", str(seed))
    test = list(read_jsonl(folder / "test.jsonl", Kept))
    assert test == [*seeds[seed]]
    answers = list(read_jsonl(run.completions, Completion))
    part_of = prompts.model_copy(update={"seed": seed}).part_of
    tested = [row for row in answers if part_of(row) == "test"]
    questions = {question_text(row.messages) for row in tested}
    assert len(tested) > len(test)  # some of them were dropped by the filters
    others = [*kept(folder / "pool"), *read_jsonl(RunDir(folder / "pool").dropped, Dropped)]
    assert len(others) == 25 - len({row.id for row in tested} | pair)
    assert not pair & {row.id for row in others}  # the other one of the two is not trained on either
    for share, name in ((0.4, "keep-40"), (0.9, "keep-90")):
        rows = kept(folder / name)
        assert len(rows) == np.ceil(len(others) * share)
        assert questions.isdisjoint(question_text(row.messages) for row in rows)
        assert RunDir(folder / name).test.read_bytes() == (folder / "test.jsonl").read_bytes()
    assert {row.text for row in kept(folder / "keep-90")} & {"Too short."}  # a share takes in what the rules dropped
    assert not {row.text for row in kept(folder / "keep-40")} & {"Too short."}
    steps = [read_report(RunDir(folder / name)).training.loss[-1].step for name in ("keep-40", "keep-90")]  # type: ignore[union-attr]
    assert steps[0] == steps[1]
    assert stages[0] == "filters pool"
    assert stages[1:] == ["train keep-40", "evaluate keep-40", "train keep-90", "evaluate keep-90"]
    text = (folder / "results.md").read_text(encoding="utf-8")
    trained = json.loads((folder / "keep-40" / "lineage.json").read_bytes())["train"]
    assert trained["rows"] + trained["validation"] == len(kept(folder / "keep-40"))
    assert (
        f"| rows | {trained['rows']} |" in text
        and "|  | keep-40 | keep-90 |" in text
        and "student before" in text
        and "steps" in text
    )
    assert (folder / "results.svg").read_text().startswith("<svg")
    assert "keep-90" in capsys.readouterr().out


def test_what_is_finished_is_not_done_again(
    recipe: Path, run: RunDir, stages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the second arm, it goes on there; other settings are another training; one measures for all."""
    flags = ["--shares", "50,60", "--match", "epochs"]
    running, measuring = experiments.runs.stage, evaluate.run.measure_perplexity
    measured: list[str] = []

    def measure(subject: Any, *rest: Any, **options: Any) -> Any:
        measured.append(subject.key)
        return measuring(subject, *rest, **options)

    monkeypatch.setattr(evaluate.run, "measure_perplexity", measure)

    def stopped(name: str, arm: RunDir, *rest: Any) -> int:
        if (name, arm.path.name) == ("train", "keep-60"):
            raise KeyboardInterrupt
        return running(name, arm, *rest)

    monkeypatch.setattr(experiments.runs, "stage", stopped)
    with pytest.raises(KeyboardInterrupt):
        experiment("keep-rate", recipe, run, *flags)
    monkeypatch.setattr(experiments.runs, "stage", running)
    stages.clear()
    folder = experiment("keep-rate", recipe, run, *flags)
    assert stages == ["filters pool", "evaluate keep-50", "train keep-60", "evaluate keep-60"]
    assert (folder / "keep-60" / "evaluation" / "perplexity-teacher.json").is_file()
    assert measured == ["teacher", "student_before", "student_after", "student_after"]
    stages.clear()
    experiment("keep-rate", recipe, run, *flags)
    assert stages == ["filters pool", "evaluate keep-50", "evaluate keep-60"]
    measured.clear()
    experiment("keep-rate", recipe, run, *flags, "--evaluate.max_rows", "2")
    assert not any(name.startswith("train") for name in stages)
    assert measured == ["teacher", "student_before", "student_after", "student_after"]
    learning = ["--train.learning_rate", "0.01"]
    running("train", RunDir(folder / "keep-50"), recipe, learning)  # by hand
    stages.clear()
    experiment("keep-rate", recipe, run, *flags)
    assert [name for name in stages if name.startswith("train")] == ["train keep-50"]
    experiment("keep-rate", recipe, run, *flags, *learning)
    assert "train keep-60" in stages


def test_an_evaluation_that_is_not_complete_goes_on_and_nothing_is_trained_twice(
    recipe: Path, run: RunDir, stages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = experiments.runs.stage

    def failing(name: str, arm: RunDir, *rest: Any) -> int:
        return running(name, arm, *rest) or (4 if (name, arm.path.name) == ("evaluate", "seed-0") else 0)

    monkeypatch.setattr(experiments.runs, "stage", failing)
    for trained in (["train seed-0", "train seed-1"], []):
        stages.clear()
        with pytest.raises(RequestsFailed, match="the same command makes them again"):
            experiment("seeds", recipe, run, "--seeds", "2")
        assert [name for name in stages if name.startswith("train")] == trained
        assert [name for name in stages if name.startswith("evaluate")] == ["evaluate seed-0", "evaluate seed-1"]
    assert (run.path / "experiments/seeds/results.md").is_file()


def test_what_an_earlier_student_answered_is_not_shown(recipe: Path, run: RunDir) -> None:
    """`--no-speed` asks the new one nothing, so its report has no right answers."""
    flags = ["--seeds", "2", "--evaluate.verify", '[{"rule": "length", "min_chars": 1}]']
    folder = experiment("seeds", recipe, run, *flags)
    for name in ("seed-0", "seed-1"):
        arm = RunDir(folder / name)
        answers = ProbeResult(answers=[answer_row("m", prompt, "yes") for prompt in read_jsonl(arm.prompts, Prompt)])
        (arm.path / "evaluation" / "verify-student_after.json").write_bytes(encode_line(answers))
    experiment("seeds", recipe, run, *flags)
    text = (folder / "results.md").read_text(encoding="utf-8")
    assert "| perplexity |" in text and "| right answers |" not in text


def test_rows_of_an_earlier_recipe_are_told(
    recipe: Path, run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(*flags: str) -> str:
        setup = Setup(load_recipe(recipe, flags), recipe, [*flags], run, tmp, Namespace(seeds=2), recipe.read_bytes())
        EXPERIMENTS["seeds"].prepare(setup)
        return capsys.readouterr().err

    tmp = run.path / "experiments" / "seeds"
    tmp.mkdir(parents=True)
    assert "warning" not in told()
    others = "its answers or the rules have changed since it was filtered; the arms learn from the rows there are"
    assert others in told("--filters.rules", "[]")
    assert "12 requests of this recipe are not answered" in told("--prompts.count", "36")
    mine = recipe.with_name("mine.py")
    mine.write_text("def good(answer):\n    return None\n")
    rules = ["--filters.rules", '[{"rule": "function", "file": "mine.py", "name": "good"}]']
    filters.__main__.main([str(recipe), "--run", str(run.path), *rules])
    assert "warning" not in told(*rules)
    later = run.kept.stat().st_mtime_ns + 10**9
    os.utime(mine, ns=(later, later))
    assert others in told(*rules)
    filters.__main__.main([str(recipe), "--run", str(run.path)])
    os.utime(run.completions, ns=(later, later))  # as `make fetch` or a copy leaves it
    assert "warning" not in told()
    answers = run.completions.read_bytes()
    run.completions.write_bytes(answers + answers.splitlines(keepends=True)[-1])
    assert others in told()
    run.completions.unlink()
    assert "warning" not in told()  # rows of the user's own


def test_another_teacher_has_its_own_run_and_its_price(
    recipe: Path, run: RunDir, stages: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="teachers needs the other teacher: --b-model"):
        experiment("teachers", recipe, run)
    with pytest.raises(UsageError, match=r"run: the recipe does not ask for 1 of its answers .*name another --run"):
        experiment("teachers", recipe, run, "--b-model", "other")
    answer(run, load_recipe(recipe, []), usd=1.0)
    filters.__main__.main([str(recipe), "--run", str(run.path)])
    with pytest.raises(UsageError, match=r"does not ask for 4 of its answers .*so the teachers' prompts would differ"):
        experiment("teachers", recipe, run, "--b-model", "other", "--prompts.count", str(PROMPTS - 4))
    assert not stages  # the other teacher is asked nothing
    folder = experiment("teachers", recipe, run, "--b-model", "other", "--b-url", "https://other.example/v1")
    assert stages[:2] == ["generate b", "filters b"]
    test = list(read_jsonl(folder / "test.jsonl", Kept))
    assert len({row.model for row in test}) == 2 and "other" in {row.model for row in test}
    for name in ("a", "b"):
        trained = json.loads((folder / name / "lineage.json").read_bytes())["train"]
        assert trained["rows"] + trained["validation"] == 18 - len(test) / 2
    text = (folder / "results.md").read_text(encoding="utf-8")
    assert "bits per character of A" in text and "b: 3.00 USD, 1,000 tokens" in text and "b is other" in text
    lax = json.dumps([{"rule": "length", "min_chars": 5, "max_chars": 400}])
    options = Namespace(b_model="other", b_url="https://other.example/v1", b_price=None, b_key_env=None)
    grown = ["generate b", "filters b", "generate run", "filters run"]
    for more, done in (([], grown[1::2]), ([], []), (["--prompts.count", "26"], grown)):
        stages.clear()
        flags = ["--filters.rules", lax, *more]
        EXPERIMENTS["teachers"].prepare(
            Setup(load_recipe(recipe, flags), recipe, flags, run, folder, options, recipe.read_bytes())
        )
        assert stages == done
        assert all("Too short." in {row.text for row in kept(folder / name)} for name in "ab")
    with pytest.raises(UsageError, match="b: it holds the answers of other, not of third; remove this folder"):
        experiment("teachers", recipe, run, "--b-model", "third")
    with pytest.raises(UsageError, match=r"b: the recipe does not ask for 26 of its answers .*or remove this folder"):
        another = ["--b-model", "other", "--b-url", "http://b.example/v1"]
        experiment("teachers", recipe, run, "--prompts.count", "26", *another)
    RunDir(folder / "b").completions.write_bytes(b"")  # as where every request has failed
    options.b_model = "third"
    setup = Setup(load_recipe(recipe, flags), recipe, flags, run, folder, options, recipe.read_bytes())
    assert "b is third" in EXPERIMENTS["teachers"].prepare(setup).note


def test_rows_of_people_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "human.jsonl"
    file.write_text('{"prompt": "Hi", "completion": "Ho"}\n', encoding="utf-8-sig")
    assert [row.text for row in read_human(file, PromptsConfig(template="x", count=1))] == ["Ho"]


def test_rows_of_people_have_the_recipe_s_tools_as_the_teacher_s_have(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
    (tmp_path / "human.jsonl").write_text('{"prompt": "Hi", "completion": "Ho", "topic": "greetings"}\n')
    (row,) = read_human(tmp_path / "human.jsonl", PromptsConfig(template="x", count=1, tools=[tool]))
    assert (row.tools, row.columns) == ([tool], {"topic": "greetings"})


def test_people_write_as_many_rows_as_the_teacher(recipe: Path, run: RunDir, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": f"Tell {n}.", "completion": f"A person wrote this, {n}."} for n in range(9)
    ]
    turns = [{"role": "user", "content": "Tell 9."}, {"role": "assistant", "content": "And this."}]
    file = tmp_path / "human.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"messages": turns}]))
    folder = experiment("human", recipe, run, "--human", str(file))
    test = list(read_jsonl(folder / "test.jsonl", Kept))
    human = sum(row.model == "human" for row in test)
    assert 0 < human < len(test)
    assert len(kept(folder / "human")) == len(kept(folder / "distilled")) == 10 - human
    assert {row.model for row in kept(folder / "human")} == {"human"}
    asked = {prompt.id for prompt in read_jsonl(RunDir(folder / "distilled").prompts, Prompt)}
    assert len(asked) == PROMPTS + 10  # what people were asked is no probe for either
    assert "bits per character of human" in (folder / "results.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "Hi"}', "row 1: give either `prompt` and `completion`, or `messages`"),
        ('{"messages": [{"role": "user", "content": "Hi"}]}', "row 1: `messages` must end with the assistant's"),
        ('{"prompt": "Hi", "completion": "Ho", "messages": []}', "row 1: give either"),
        ('{"messages": []}', "row 1: `messages` must end with the assistant's"),
        ('{"prompt": "Hi", "completion": " "}', "row 1: the answer is empty"),
        ('{"prompt": 1}', r"row 1: Expected `str \| null`, got `int` - at `\$\.prompt`"),
        ("[1]", r"human\.jsonl:1: Expected `object`"),
        ("", "no rows in it"),
    ],
)
def test_a_wrong_row_of_a_person_is_named(line: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "human.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(DataError, match=reason):
        read_human(file, PromptsConfig(template="x", count=1))


def test_hard_and_soft_learn_the_same_rows(recipe: Path, run: RunDir) -> None:
    folder = experiment("soft", recipe, run, "--train.on_policy.max_new_tokens", "4")
    methods = {}
    for name in ("full", "kd", "on_policy"):
        trained = json.loads((folder / name / "lineage.json").read_bytes())["train"]
        methods[name] = (trained["method"], trained["weights"], trained["rows"], trained["steps"])
    steps = {"full": 4, "kd": 4, "on_policy": 3}  # TRL leaves out the rows of a last step that is not full
    assert methods == {name: (name, "full", 14, count) for name, count in steps.items()}


def test_seeds_are_trained_on_the_same_rows_and_their_spread_is_said(recipe: Path, run: RunDir) -> None:
    folder = experiment("seeds", recipe, run, "--seeds", "2", "--train.seed", "4")
    trained = [json.loads((folder / f"seed-{seed}" / "lineage.json").read_bytes())["train"] for seed in (4, 5)]
    assert [own["seed"] for own in trained] == [4, 5] and trained[0]["rows"] == trained[1]["rows"]
    assert trained[0]["validation_loss"] != trained[1]["validation_loss"]
    text = (folder / "results.md").read_text(encoding="utf-8")
    assert "|  | seed-4 | seed-5 |" in text
    assert re.search(
        r"- bits per character: [\d.]+ on average over 2 seeds, standard deviation [\d.]+ \([\d.]+ to", text
    )
    with pytest.raises(UsageError, match="--seeds 1: give at least 2, so that there is a spread"):
        experiment("seeds", recipe, run, "--seeds", "1")


def test_a_recipe_that_changes_meanwhile_ends_the_experiment(
    recipe: Path, run: RunDir, stages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its arms would differ by more than the seed."""
    running = experiments.runs.stage

    def editing(name: str, arm: RunDir, *rest: Any) -> int:
        if name == "evaluate":
            recipe.write_text(recipe.read_text().replace("epochs: 1", "epochs: 2"))
        return running(name, arm, *rest)

    monkeypatch.setattr(experiments.runs, "stage", editing)
    with pytest.raises(
        UsageError, match=r"recipe\.yaml: changed since the experiment began, .*the same command goes on"
    ):
        experiment("seeds", recipe, run, "--seeds", "2")
    assert [name for name in stages if name.startswith("train")] == ["train seed-0"]


def test_what_no_arm_could_do_is_said_before_anything_is_paid(recipe: Path, stages: list[str], tmp_path: Path) -> None:
    empty = RunDir(tmp_path / "empty")
    for name, flags, message in (
        ("soft", ["--teacher.model", "gpt-4.1"], r"needs the teacher's weights, and gpt-4\.1 has none here"),
        ("soft", ["--train.kd.teacher", "stored"], "kd.teacher stored is not for method on_policy"),
        ("human", ["--human", str(tmp_path / "missing.jsonl")], "no such file"),
        ("human", ["--train.method", "dpo"], "human: train.method dpo learns from pairs, and its arms have none"),
        ("keep-rate", ["--train.method", "dpo"], "keep-rate: train.method dpo learns from pairs"),
        ("keep-rate", ["--shares", "30;50"], "--shares wants percents from 1 to 100"),
        ("teachers", ["--teacher.model", "m", "--b-model", "m"], "--b-model m: this is the recipe's own teacher"),
        ("teachers", ["--filters.judge", "{}", *OTHER], r"the other by m at .*set filters\.judge\.model"),
        ("teachers", ["--evaluate.judge", '{"model": "j"}', *OTHER, *AT_B], "by j at .* by j at http://b/v1; set"),
        ("seeds", ["--evaluate.models", f'["{tmp_path}/none"]'], "none: the folder is not there"),
        ("seeds", ["--evaluate.verify", '[{"rule": "sql"}]'], r"evaluate\.verify\[0\]"),
        ("seeds", ["--evaluate.judge.model", "paid", "--evaluate.judge.budget.usd", "1"], "price of paid is not known"),
        ("seeds", ["--evaluate.probes_file", str(tmp_path / "none.jsonl")], r"evaluate\.probes_file"),
    ):
        with pytest.raises((RecipeError, UsageError), match=message):
            experiment(name, recipe, empty, *flags)
    with (
        RunDir(empty.path / "experiments" / "seeds").locked(new=True),
        pytest.raises(UsageError, match="experiments/seeds: another call in this process"),
    ):
        experiment("seeds", recipe, empty)
    assert not stages


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--evaluate.lm_eval", '["ifeval"]'], "there is no `lm_eval` command"),
        (["--prompts.tools", TOOLS], "vLLM refuses requests with tools.*without --enable-auto-tool-choice"),
        (["--evaluate.verify", LENGTH, "--evaluate.category", "kind"], "no test prompt has a value under 'kind'"),
    ],
)
def test_what_no_evaluation_could_do_is_said_before_an_arm_is_trained(
    flags: list[str], message: str, recipe: Path, run: RunDir, stages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    if "--prompts.tools" in flags:
        answer(run, load_recipe(recipe, flags))
        filters.__main__.main([str(recipe), "--run", str(run.path)])
    with pytest.raises((DataError, UsageError), match=message):
        main(["seeds", str(recipe), "--run", str(run.path), *flags])
    assert not stages


def test_without_a_student_there_is_nothing_to_compare(recipe: Path, run: RunDir) -> None:
    data = yaml.safe_load(recipe.read_text())
    del data["student"]
    recipe.write_text(yaml.safe_dump(data))
    with pytest.raises(RecipeError, match="student is missing"):
        experiment("soft", recipe, run)


def test_equal_steps_are_counted_in_whole_batches() -> None:
    """8 rows a step: 30, 50 and 80 rows are 4, 7 and 10 steps an epoch; 3 epochs of the largest are 30 steps."""
    epochs = matched_epochs({"a": 30, "b": 50, "c": 80}, 8, 3)
    assert epochs == {"a": 7.5, "b": pytest.approx(30 / 7), "c": 3}
    for largest in range(8, 400, 8):  # a trainer's steps are rounded up: none may make one more
        given = matched_epochs({"a": 24, "b": 56, "c": largest}, 8, 1)
        assert np.ceil(given["b"] * 7) == np.ceil(given["a"] * 3) == max(7, largest // 8)


def figure(value: float, spread: float) -> Figure:
    return Figure(value, np.linspace(value - spread, value + spread, 201))


def results(name: str = "bits_per_character", **arms: Figure) -> Comparison:
    measure = MEASURES[name]
    column = Column(measure.name, measure, arms, {"teacher": Estimate(0.5, 0.4, 0.6)})
    one, other = list(arms)[:2]
    change = difference(measure.name, other, one, arms[other], arms[one], measure.better, "test")
    facts = {name: ["10", "–", "–", "–"] for name in arms}
    return Comparison("soft", "Which?", "a note", facts, [column], [change], [])


def test_a_difference_is_named_only_where_its_interval_leaves_zero_out() -> None:
    lines = conclusions(results(hard=figure(1.3, 0.0), soft=figure(1.2, 0.04)))
    assert lines[0] == "soft is better than hard in bits per character: -0.1 (-0.138 to -0.062)"
    lines = conclusions(results(hard=figure(1.2, 0.0), soft=figure(1.3, 0.04)))
    assert lines[0] == "soft is worse than hard in bits per character: +0.1 (+0.062–+0.138)"
    lines = conclusions(results(hard=figure(1.3, 0.0), soft=figure(1.25, 0.06)))
    assert lines[0] == "No difference between the arms is significant."
    assert "a note" in lines


@pytest.mark.parametrize("name", ["accuracy", "passing"])
def test_a_difference_of_shares_is_in_points(name: str) -> None:
    line, *_ = conclusions(results(name, hard=figure(0.6, 0.0), soft=figure(0.65, 0.02)))
    assert line == f"soft is better than hard in {MEASURES[name].name}: +5.0 (+3.1–+6.9) points"


def test_the_table_has_the_arms_and_the_other_models() -> None:
    heads, rows = rows_of(results(hard=figure(1.3, 0.0), soft=figure(1.2, 0.04)))
    assert heads == ["", "hard", "soft", "teacher"]
    assert rows == [  # nobody has a price
        ["rows", "10", "10", ""],
        ["bits per character", "1.300", "1.200 (1.162–1.238)", "0.500 (0.400–0.600)"],
    ]


def test_the_plot_is_to_scale_and_escaped() -> None:
    dots = [("one", Estimate(1, 0, 2), "arm", "1"), ("둘", Estimate(2, 2, 2), "other", "2")]
    svg = draw_svg("<x>", [dot_panel("a & b", "", dots)])
    assert "&lt;x&gt;" in svg and "a &amp; b" in svg and "<x>" not in svg
    assert 'cx="360.0"' in svg and 'cx="570.0"' in svg  # the middle and the end of 150 to 570
    assert ">둘</text>" in svg and 'x1="150.0" x2="570.0"' in svg  # text stays text; the interval of the first


def test_figures_far_apart_are_drawn_on_a_logarithmic_scale() -> None:
    far = [("one", Estimate(1, 1, 1), "arm", ""), ("two", Estimate(10, 10, 10), "arm", "")]
    assert dot_panel("", "lower is better", far).hint == "lower is better"
    panel = dot_panel("", "lower is better", [*far, ("three", Estimate(100, 100, 100), "other", "")])
    assert panel.hint == "lower is better; logarithmic scale" and panel.marks[1].at == 50


def test_arms_are_compared_by_right_answers_where_these_are_verified(recipe: Path, tmp_path: Path) -> None:
    prompts = [Prompt(id=f"n{n}", messages=[Message("user", f"{n}?")], reference=str(n)) for n in range(20)]
    rule = {"rule": "matches"}
    made = load_recipe(recipe, ["--evaluate.verify", json.dumps([rule])])
    made = made.model_copy(update={"prompts": made.prompts.model_copy(update={"test": 1.0})})
    arms = []
    for name, right in (("one", 15), ("four", 19)):
        run = RunDir(tmp_path / name)
        (run.path / "evaluation").mkdir(parents=True)
        run.prompts.write_bytes(b"".join(map(encode_line, prompts)))
        answers = [answer_row(name, p, p.id[1:] if n < right else "no") for n, p in enumerate(prompts)]
        (run.path / "evaluation" / "verify-student_after.json").write_bytes(encode_line(ProbeResult(answers=answers)))
        arms.append(Arm(name, run, []))
    setup = Setup(made, recipe, [], arms[0].run, tmp_path, Namespace(), recipe.read_bytes())
    (column,) = _columns(setup, Design(arms, {"": []}), {arm.name: verified_report() for arm in arms})
    assert column.title == "right answers" and {name: one.value for name, one in column.arms.items()} == {
        "one": 0.75,
        "four": 0.95,
    }


def test_a_source_without_a_test_row_has_no_column(recipe: Path, tmp_path: Path) -> None:
    rows = [answer_row("m", Prompt(id=f"p{n}", messages=[Message("user", f"{n}?")]), "text") for n in range(8)]
    scores = [RowScore(row.id, row.prompt_id, nll_nats=3.0, tokens=3, characters=4) for row in rows]
    arms = []
    for name in ("distilled", "human"):
        run = RunDir(tmp_path / name)
        path = run.path / "evaluation" / "perplexity-student_after.json"
        Entry(path, "").write(PerplexityResult(dtype="float32", device="cpu", scores=scores))
        arms.append(Arm(name, run, []))
    setup = Setup(load_recipe(recipe), recipe, [], arms[0].run, tmp_path, Namespace(), recipe.read_bytes())
    columns = _columns(setup, Design(arms, {"teacher": rows, "human": []}), {arm.name: make_report() for arm in arms})
    assert [column.title for column in columns] == ["perplexity", "bits per character", "bits per character of teacher"]
    facts = {arm.name: ["–"] * 4 for arm in arms}
    write_results(Comparison("human", "?", "", facts, columns, [], []), tmp_path)
    assert "bits per character of teacher" in (tmp_path / "results.svg").read_text(encoding="utf-8")
