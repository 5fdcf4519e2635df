"""The whole evaluation of a tiny run, with the servers' part made up: what is asked, kept, and said in the end."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from rich.console import Console

import evaluate.measure.results
import evaluate.run
from evaluate.document import Estimate, Report, Scope, exactly, read_report
from evaluate.measure.results import Burst, Lone, ProbeResult, SpeedResult, TaskResult, answer_row
from evaluate.measure.serving import answer_probes, answer_questions
from evaluate.models import Subject, subjects
from evaluate.report.tables import print_report
from evaluate.run import evaluate_run
from pipeline.errors import BudgetReached, DistillError, RecipeError, RequestsFailed, UsageError
from pipeline.filters_config import RuleConfig
from pipeline.recipe import Recipe
from pipeline.records import Dropped, Kept, Message, Prompt, encode_line
from pipeline.rundir import RunDir
from pipeline.section import BudgetConfig
from pipeline.train_config import TrainConfig
from serve.server import free_port
from tests.servers.misbehaving_server import Asked, Behaviour, answer, error, misbehaving
from tests.tiny_student import kept_row, story_rows, tiny_model

PATH = Path("recipe.yaml")
SLOTS = {"who": ["a cat", "a dog", "a fox"], "where": ["at home", "in a wood", "at sea"]}
SAID = {  # what each model answers to any probe
    "teacher": "Here is {who}, {where}, and all was well in the end.",
    "student_before": "zzzz zzzz zzzz zzzz",
    "student_after": "Here is {who}, and then.",
    "other_1": "Here is {who}, {where}, once more and then again.",
}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "run")
    made.path.mkdir()
    made.test.write_bytes(b"".join(encode_line(row) for row in story_rows(4)))
    asked = Prompt(id="1", messages=[Message("user", "Of a cat at home.")], slots={"who": "a cat", "where": "at home"})
    made.prompts.write_bytes(encode_line(asked))
    for folder in (tmp_path / "teacher", tmp_path / "base", made.student):
        tiny_model(folder, layers=3 if folder.name == "teacher" else 1)
    return made


def recipe_of(path: Path, **sections: Any) -> Recipe:
    evaluate = {"probes": 5, "unseen": {"who": ["a lion"]}, "unseen_probes": 2, **sections.pop("evaluate", {})}
    return Recipe(
        name="tiny",
        teacher={"model": str(path / "teacher"), **sections.pop("teacher", {})},
        student={"model": str(path / "base")},
        prompts={"count": 1, "template": "Of {who} {where}.", "slots": SLOTS},
        filters={"rules": [{"rule": "length", "min_chars": 12, "max_chars": 99}], **sections.pop("filters", {})},
        evaluate=evaluate,
    )


@pytest.fixture(autouse=True)
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Puts made-up servers in place; gives the models that were served, and for what."""
    log: list[tuple[str, list[str]]] = []
    timed = set[str]()

    @contextmanager
    def serve_subject(recipe: Recipe, run: RunDir, subject: Subject) -> Iterator[tuple[Any, Path]]:
        log.append((subject.key, []))
        yield SimpleNamespace(served_name=subject.key, base_url="http://127.0.0.1:1/v1"), run.path

    def measure_speed(recipe: Recipe, server: Any, folder: Path, prompts: Sequence[Prompt]) -> SpeedResult:
        log[-1][1].append("speed")
        timed.update(prompt.id for prompt in prompts)
        return SpeedResult(
            device="cpu",
            dtype="float32",
            bursts=[Burst(4, 0, 300 if server.served_name == "student_after" else 100, 10.0)],
            alone=[Lone(0.1, 1.0, 10)],
            peak_rss_bytes=(2 << 30) if server.served_name == "teacher" else (1 << 30),
        )

    def probe(recipe: Recipe, folder: Path, prompts: Sequence[Prompt], asked: Sequence[Prompt]) -> ProbeResult:
        if recipe.teacher.model not in SAID:
            return answer_probes(recipe, folder, prompts, asked)
        log[-1][1].append("probes")
        model = recipe.teacher.model
        return ProbeResult(answers=[answer_row(model, p, SAID[model].format(**p.slots)) for p in prompts])

    def question(
        recipe: Recipe, folder: Path, prompts: Sequence[Prompt], asked: Sequence[Prompt], timing: Sequence[Prompt]
    ) -> ProbeResult:
        model = recipe.teacher.model
        if model not in SAID:
            return answer_questions(recipe, folder, prompts, asked, timing)
        told = asked[0].messages[0].content == "Add."
        log[-1][1].append(f"verify{' told' * told}{' timed' * bool(timing)}")
        assert timed.isdisjoint(prompt.id for prompt in timing)  # the server has read those
        assert not timing or told == (timing[0].messages[0].content == "Add.")
        knows = {"teacher": 9, "student_before": 3 if told else 0, "student_after": 8}[model]  # of every ten
        answers = [answer_row(model, p, str(p.columns["n"] + (p.columns["n"] % 10 >= knows))) for p in prompts]
        bursts = [Burst(10, 1, 90, 3.0 if model == "teacher" else 1.0)] * bool(timing)
        return ProbeResult(answers=answers, bursts=bursts)

    monkeypatch.setattr(evaluate.run, "answer_questions", question)
    monkeypatch.setattr(evaluate.run, "serve_subject", serve_subject)
    monkeypatch.setattr(evaluate.run, "measure_speed", measure_speed)
    monkeypatch.setattr(evaluate.run, "answer_probes", probe)
    return log


def completion(row: Kept) -> dict[str, Any]:
    return {name: value for name, value in msgspec.structs.asdict(row).items() if name != "scores"}


def figure(report: Report, key: str, name: str, part: Scope = "all") -> float:
    return next(model for model in report.models if model.key == key).figures[part][name].value


def test_every_model_is_served_once_and_compared(
    run: RunDir, tmp_path: Path, served: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    other = RunDir(tmp_path / "other_run")
    shutil.copytree(run.student, other.student)
    recipe = recipe_of(tmp_path, evaluate={"models": [str(other.path)]})
    report = evaluate_run(recipe, run, PATH)
    both = ["speed", "probes"]
    assert served == [(key, both) for key in ("teacher", "student_before", "student_after", "other_1")]
    assert [model.label for model in report.models][3] == "student of other_run"
    assert report.probes and (report.probes.seen, report.probes.unseen, report.probes.source) == (5, 2, "slots")
    assert figure(report, "student_after", "passing") == 1 and figure(report, "student_after", "named") == 0.5
    assert figure(report, "teacher", "adherence", "unseen") == 1 and figure(report, "student_before", "named") == 0
    assert figure(report, "student_before", "loops") == 1
    after = report.models[2]
    assert {"perplexity", "bits_per_character", "passing"} <= set(after.figures["unseen"]) and report.rows.unseen == 2
    gains = {(d.against, d.figure, d.part): d for d in report.differences}
    assert gains["student_before", "named", "all"].change.low > 0 and gains["teacher", "named", "all"].change.high < 0
    assert {one.improved for one in gains.values()} == {None}  # seven prompts are too few
    assert any("over fewer than 20 prompts" in note for note in report.notes)
    assert any("the teacher's own, which favours the teacher" in note for note in report.notes)
    assert ("student_before", "perplexity", "test") in gains and ("teacher", "perplexity", "unseen") in gains
    claims = {claim.name: claim for claim in report.headline.claims}
    assert claims["speed"].value and claims["speed"].value.value == 3
    assert claims["speed"].verdict == "not shown"  # of one timing
    teacher, student = (model.figure("engine", "weights_mib") for model in (report.models[0], after))
    assert teacher and student and 2 < teacher.value / student.value < 3  # stored in bytes of one dtype
    assert claims["memory"].value == exactly(teacher.value / student.value) and claims["memory"].verdict == "no"
    recorded = json.loads(run.lineage.read_bytes())["evaluate"]
    assert report.headline.holds is False and recorded["promise"]["memory"] == "no"
    assert [(sample.part, len(sample.answers)) for sample in report.samples] == [("seen", 4)] * 2 + [("unseen", 4)] * 2
    assert after.figure("engine", "kv_bytes_per_token")
    assert json.loads(run.report.read_bytes())["schema"] == 4
    capsys.readouterr()
    for width in (80, 100):
        print_report(report, Console(width=width))
        lines = capsys.readouterr().out.splitlines()
        assert not [line for line in lines if "…" in line or len(line) > width]
        assert any(line.strip().startswith("named of what was") and "50%" in line for line in lines)
        assert any(line.strip().startswith("unseen perplexity") for line in lines)


def test_nothing_is_asked_twice_and_another_rule_asks_nobody(run: RunDir, tmp_path: Path, served: list[Any]) -> None:
    first = evaluate_run(recipe_of(tmp_path), run, PATH)
    served.clear()
    assert evaluate_run(recipe_of(tmp_path), run, PATH) == first and served == []
    strict = recipe_of(tmp_path, filters={"rules": [{"rule": "length", "min_chars": 40, "max_chars": 99}]})
    second = evaluate_run(strict, run, PATH)
    assert served == [] and figure(second, "student_after", "passing") == 0
    assert figure(second, "teacher", "passing") == 1
    more = recipe_of(tmp_path, evaluate={"probes": 6})
    evaluate_run(more, run, PATH)
    assert [what for _, what in served] == [["probes"]] * 3  # the speed stands


@pytest.mark.parametrize(("reasoning", "passing"), [("strip", 1), ("keep", 0)])
def test_a_student_that_learned_no_thoughts_breaks_no_rule_about_them(
    run: RunDir, tmp_path: Path, reasoning: str, passing: float
) -> None:
    rules = [{"rule": "length", "min_chars": 12, "max_chars": 99}, {"rule": "length", "of": "reasoning"}]
    recipe = recipe_of(tmp_path, filters={"rules": rules})
    recipe = recipe.model_copy(update={"train": TrainConfig(reasoning=reasoning)})
    report = evaluate_run(recipe, run, PATH)
    assert figure(report, "student_after", "passing") == passing


def test_a_cached_result_is_read_once_and_written_where_it_was_measured(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run keeps its results in memory: the files are no variables of it."""
    read: list[str] = []
    reading = evaluate.measure.results.read_result

    def counting(path: Path, kind: Any) -> Any:
        read.append(path.name)
        return reading(path, kind)

    monkeypatch.setattr(evaluate.measure.results, "read_result", counting)
    for _ in range(2):  # all measured, all cached
        read.clear()
        evaluate_run(recipe_of(tmp_path), run, PATH)
        kinds = ("perplexity", "probes", "speed", "unseen")
        models = ("student_after", "student_before", "teacher")
        assert sorted(read) == [f"{kind}-{model}.json" for kind in kinds for model in models]
        assert sorted(set(read)) == sorted(path.name for path in (run.path / "evaluation").glob("*.json"))


def test_the_report_says_how_many_of_the_teachers_test_answers_passed(run: RunDir, tmp_path: Path) -> None:
    """Of 40 answers every second one passes, kept or left out by `select`; only those to test prompts count."""
    recipe = recipe_of(tmp_path)
    recipe = recipe.model_copy(update={"prompts": recipe.prompts.model_copy(update={"test": 0.5})})
    rows = [kept_row(i, f"Question {i}?", "An answer.") for i in range(40)]
    dropped = [Dropped(**completion(row), rule="length", detail=[]) for row in rows[1::2]]
    dropped += [Dropped(**completion(row), rule="select", detail=[]) for row in rows[20::2]]
    run.kept.write_bytes(b"".join(map(encode_line, rows[:20:2])))
    run.dropped.write_bytes(b"".join(map(encode_line, dropped)))
    in_test = [recipe.prompts.part_of(row) == "test" for row in rows]
    assert 10 < sum(in_test) < 30
    found = evaluate_run(recipe, run, PATH, speed=False)
    assert (found.rows.teacher_answers, found.rows.teacher_kept) == (sum(in_test), sum(in_test[::2]))
    share = f"({sum(in_test[::2]) / sum(in_test):.1%})"
    assert any("answers to the test prompts" in note and share in note for note in found.notes)


def test_tools_that_vllm_would_refuse_are_told_before_anything_is_measured(run: RunDir, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    tools = [{"type": "function", "function": {"name": "lamp"}}]
    recipe = recipe.model_copy(update={"prompts": recipe.prompts.model_copy(update={"tools": tools})})
    with pytest.raises(UsageError, match=r"serve\.args: vLLM refuses requests with tools"):
        evaluate_run(recipe, run, PATH)
    assert not (run.path / "evaluation").exists()
    evaluate_run(recipe, run, PATH, speed=False)
    assert (run.path / "evaluation").exists()


def test_without_servers_nothing_is_probed(run: RunDir, tmp_path: Path, served: list[Any]) -> None:
    report = evaluate_run(recipe_of(tmp_path), run, PATH, speed=False)
    assert served == [] and report.probes is None and report.differences and report.samples == []
    assert report.headline.holds is False  # of an untrained student, by bits or by size: it is not 3 times smaller


def test_a_teacher_elsewhere_answers_where_it_is_only_if_asked_to(
    run: RunDir,
    tmp_path: Path,
    served: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("evaluate.models.is_loopback", lambda url: False)
    with misbehaving(lambda asked: answer("The teacher says that all is well.")) as server:
        away = {"model": "gpt", "base_url": server.url}
        silent = evaluate_run(recipe_of(tmp_path, teacher=away), run, PATH)
        note = "the report will have nothing of the teacher, whose weights are not here; evaluate.ask_teacher: true"
        assert note in capsys.readouterr().err
        assert server.asked == [] and "all" not in silent.models[0].figures
        assert any("evaluate.ask_teacher" in note for note in silent.notes)
        tasks = list[str]()
        monkeypatch.setattr(evaluate.run, "find_command", lambda: "lm_eval")
        monkeypatch.setattr(
            evaluate.run,
            "measure_tasks",
            lambda recipe, server, folder: tasks.append(server.served_name) or TaskResult(scores={}),
        )
        asking = {"ask_teacher": True, "lm_eval": ["ifeval"]}
        said = evaluate_run(recipe_of(tmp_path, teacher=away, evaluate=asking), run, PATH)
        assert note not in capsys.readouterr().err and tasks == ["student_before", "student_after"]
        assert len(server.asked) == 7 and {asked.body["model"] for asked in server.asked} == {"gpt"}
    assert figure(said, "teacher", "passing") == 1 and said.models[0].figure("test", "perplexity") is None
    assert said.models[2].figure("unseen", "perplexity")  # of the teacher's answers, wherever they come from


def test_a_judge_that_is_not_there_is_said_and_the_rest_is_reported(run: RunDir, tmp_path: Path) -> None:
    judge = {"model": "judge", "base_url": f"http://127.0.0.1:{free_port()}/v1"}
    report = evaluate_run(recipe_of(tmp_path, evaluate={"judge": judge}), run, PATH)
    assert any(note.startswith("The judge was not asked: nothing answers at") for note in report.notes)
    assert report.wins == [] and figure(report, "student_after", "passing") == 1


def test_a_judge_scores_and_compares(run: RunDir, tmp_path: Path) -> None:
    def script(asked: Any) -> Any:
        if "<answer_A>" in asked.text:
            return answer('{"better": "A"}')
        return answer('{"fit": 4, "score": 4}')

    with misbehaving(script) as server:
        judge = {"model": "judge", "base_url": server.url, "rubric": {"fit": "for a child"}}
        report = evaluate_run(recipe_of(tmp_path, evaluate={"judge": judge}), run, PATH)
        asked = len(server.asked)
        evaluate_run(recipe_of(tmp_path, evaluate={"judge": judge}), run, PATH)
        assert len(server.asked) == asked == 3 * 7 + 2 * 2 * 7
    assert figure(report, "teacher", "judge") == 4
    overall = {win.against: win for win in report.wins if win.part == "all"}
    assert set(overall) == {"teacher", "student_before"} and overall["teacher"].ties == 7
    assert overall["teacher"].first_chosen == 1.0 and report.probes and report.probes.judge == "judge"
    assert report.samples[0].answers[0].score == 4


def test_a_judge_that_fails_leaves_the_report_and_is_told(run: RunDir, tmp_path: Path) -> None:
    with misbehaving(lambda asked: error(401)) as server:
        judge = {"model": "judge", "base_url": server.url}
        with pytest.raises(DistillError, match="401"):
            evaluate_run(recipe_of(tmp_path, evaluate={"judge": judge}), run, PATH)
    assert "win rates are not complete" in run.report.read_text(encoding="utf-8")


def test_a_judge_s_requests_that_failed_are_counted_and_made_again(run: RunDir, tmp_path: Path) -> None:
    refused = {"score", "pair"}  # of the two prompts about a lion

    def script(asked: Any) -> Any:
        kind = "pair" if "<answer_A>" in asked.text else "score"
        if "a lion" in asked.text and kind in refused:
            return error(400, "no")
        return answer('{"better": "A"}' if kind == "pair" else '{"fit": 4, "score": 4}')

    def asked_by(**options: Any) -> int:
        before = len(server.asked)
        evaluate_run(recipe, run, PATH, **options)
        return len(server.asked) - before

    with misbehaving(script) as server:
        judge = {"model": "judge", "base_url": server.url, "rubric": {"fit": "for a child"}, "attempts": 1}
        recipe = recipe_of(tmp_path, evaluate={"judge": judge})
        with pytest.raises(RequestsFailed, match=r"14 of the requests to judge failed .*evaluate again"):
            asked_by()
        refused.remove("score")
        with pytest.raises(RequestsFailed, match="8 of the requests"):
            asked_by()
        report = evaluate_run(recipe, run, PATH, report_only=True)  # shows what is there, and what is missing
        assert figure(report, "teacher", "judge") == 4 and any(
            "complete: 8 of the requests" in note for note in report.notes
        )
        refused.remove("pair")
        assert asked_by() == 8 and "of the requests" not in run.report.read_text(encoding="utf-8")
        shutil.rmtree(run.path / "evaluation/pairs")
        assert asked_by() == 0 and asked_by(force=True) == 28


def test_other_models_are_folders_runs_or_students(run: RunDir, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter_run" / "student"
    adapter.mkdir(parents=True)
    base = str(tmp_path / "base")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    named = [base, str(run.path), str(adapter)]
    found = subjects(recipe_of(tmp_path, evaluate={"models": named}), run)[3:]
    assert [(s.key, s.label) for s in found] == [
        ("other_1", "base"),
        ("other_2", "student of run"),
        ("other_3", "student of adapter_run"),
    ]
    assert found[1].folder == run.student and found[2].folder == tmp_path / "base" and found[2].adapter == adapter
    with pytest.raises(UsageError, match="the folder is not there"):
        subjects(recipe_of(tmp_path, evaluate={"models": ["./nowhere"]}), run)
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="`base_model_name_or_path`; train that student again"):
        subjects(recipe_of(tmp_path, evaluate={"models": [str(adapter)]}), run)


def verified(tmp_path: Path, run: RunDir, **sections: Any) -> Recipe:
    """A recipe whose answers are verified, and 40 test prompts of which every model knows some of every ten."""
    check = "return None if answer.text == answer.reference else 'another number'"
    (tmp_path / "right.py").write_text(f"def right(answer):\n    {check}\n")
    prompts = [
        Prompt(
            id=f"n{n}",
            messages=[Message("user", f"Which number is {n}?")],
            reference=str(n),
            columns={"n": n, "kind": "odd" if n % 2 else "even"},
            part="test",
        )
        for n in range(40)
    ]
    run.prompts.write_bytes(b"".join(map(encode_line, [*prompts, prompts[0]])))
    rule = {"rule": "function", "file": "right.py", "name": "right"}
    evaluate = {
        "verify": [rule],
        "category": "kind",
        "probes": 0,
        "unseen": {},
        "speed_requests": 2,  # so that there are prompts for both timings
        "speed_alone": 2,
        **sections.pop("evaluate", {}),
    }
    told = {"system": "Add.", **sections.pop("teacher", {})}
    recipe = recipe_of(tmp_path, evaluate=evaluate, teacher=told, **sections)
    return recipe.model_copy(update={"prompts": recipe.prompts.model_copy(update={"test": 1.0})})


def test_right_answers_are_the_quality_where_they_are_verified(
    run: RunDir, tmp_path: Path, served: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    report = evaluate_run(verified(tmp_path, run), run, path)
    assert served == [
        ("teacher", ["speed", "verify told timed"]),
        ("student_before", ["speed", "verify", "verify told"]),
        ("student_after", ["speed", "verify timed"]),
    ]
    found = report.accuracy
    assert found and found.prompts == {"verified": 40} and found.told
    keys = ("teacher", "student_before", "student_after")
    assert [figure(report, key, "accuracy", "verified") for key in keys] == [0.9, 0.0, 0.8]
    assert found.told.figures["verified"]["accuracy"].value == 0.3 and found.told.label == "student before, told"
    assert report.models[1].figures["verified"]["accuracy"].high == pytest.approx(0.0876, abs=1e-4)  # Wilson's
    assert found.over_teacher["verified"].value == pytest.approx(0.8 / 0.9)
    assert {name: own["student_after"].value for name, own in found.categories.items()} == {"even": 0.8, "odd": 0.8}
    assert found.wrong["student_after"] == {"right": pytest.approx(0.2)}
    assert [claim.name for claim in report.headline.claims] == ["quality_accuracy", "size", "speed", "memory"]
    speed = report.headline.claims[2].value
    assert speed and speed.value == pytest.approx(3)
    assert figure(report, "student_after", "answers_per_s", "engine") == 9  # one of ten requests failed
    assert report.headline.text.startswith("student: right answers 0% → 80% (teacher 90%)")
    gains = {(d.against, d.figure) for d in report.differences if d.part == "verified" and d.improved}
    assert gains == {("student_before", "accuracy")}
    assert len(found.samples) == 20 and found.samples[0].answers[0].label == "reference"
    notes = " ".join(report.notes)
    assert "temperature 0" in notes and "is told a system prompt" in notes
    page = run.report_html.read_text(encoding="utf-8")
    assert page.index("Right answers") < page.index("All figures") and "right: another number" in page
    capsys.readouterr()
    print_report(report, Console(width=80))
    lines = capsys.readouterr().out.splitlines()
    shares = next(line for line in lines if "right answers" in line).split()[2:]
    assert shares == ["90.0%", "0.0%", "80.0%", "30.0%"]
    assert any("▲ before" in line for line in lines)
    changes = [msgspec.structs.replace(one, improved=one.against == "student_before") for one in report.differences]
    print_report(msgspec.structs.replace(report, differences=changes), Console(width=80))
    lines = capsys.readouterr().out.splitlines()
    assert "▲ before" in " ".join(lines) and "▼ teacher" in " ".join(lines)


def test_a_new_reference_or_rule_checks_again_and_asks_nobody(run: RunDir, tmp_path: Path, served: list[Any]) -> None:
    path = tmp_path / "recipe.yaml"
    recipe = verified(tmp_path, run)
    evaluate_run(recipe, run, path)
    served.clear()
    lines = [line.replace('"reference":"2"', '"reference":"none"') for line in run.prompts.read_text().splitlines()]
    run.prompts.write_text("\n".join(lines))
    second = evaluate_run(recipe, run, path)
    assert served == [] and figure(second, "student_after", "accuracy", "verified") == pytest.approx(31 / 40)
    wrong = {"rule": "length", "min_chars": 2, "max_chars": 9}
    stricter = recipe.evaluate.model_copy(update={"verify": [*recipe.evaluate.verify, RuleConfig(**wrong)]})
    third = evaluate_run(recipe.model_copy(update={"evaluate": stricter}), run, path)
    assert served == [] and third.accuracy and "length" in third.accuracy.wrong["teacher"]
    (tmp_path / "right.py").write_text("def right(answer):\n    return 'always wrong'\n")
    assert figure(evaluate_run(recipe, run, path), "student_after", "accuracy", "verified") == 0 and served == []


def test_a_wrong_rule_of_verify_is_named_before_anything_is_measured(run: RunDir, tmp_path: Path) -> None:
    recipe = verified(tmp_path, run, evaluate={"verify": [{"rule": "righteous"}]})
    with pytest.raises(RecipeError, match=r"evaluate\.verify\[0\]: no rule named `righteous`"):
        evaluate_run(recipe, run, tmp_path / "recipe.yaml")


def test_a_teacher_elsewhere_is_verified_where_it_is_and_told_once(
    run: RunDir, tmp_path: Path, served: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluate.models.is_loopback", lambda url: False)
    with misbehaving(lambda asked: answer("7")) as server:
        away = {"model": "gpt", "base_url": server.url}
        recipe = verified(tmp_path, run, teacher=away, evaluate={"ask_teacher": True})
        report = evaluate_run(recipe, run, tmp_path / "recipe.yaml")
        assert len(server.asked) == 40
        assert [asked.body["messages"][0]["content"] for asked in server.asked] == ["Add."] * 40
        assert {asked.body["temperature"] for asked in server.asked} == {0}
    assert figure(report, "teacher", "accuracy", "verified") == 1 / 40
    claims = {claim.name: claim for claim in report.headline.claims}
    assert claims["quality_accuracy"].value and claims["speed"].value is None  # it was not timed: it runs elsewhere


def test_the_budget_is_for_all_that_a_teacher_elsewhere_is_asked(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 tokens each: 39 of the 40 questions take 468, beside 60 for 5 probes; the last may take 740, and has 712."""
    monkeypatch.setattr("evaluate.models.is_loopback", lambda url: False)
    with misbehaving(lambda asked: answer("7")) as server:
        away = {"model": "gpt", "base_url": server.url}
        recipe = verified(tmp_path, run, teacher=away, evaluate={"ask_teacher": True, "probes": 5})
        small, enough = (recipe.model_copy(update={"budget": BudgetConfig(tokens=most)}) for most in (1240, 1300))
        with pytest.raises(BudgetReached, match=r"of budget\.tokens 1,240 spent"):
            evaluate_run(small, run, tmp_path / "recipe.yaml")
        evaluate_run(enough, run, tmp_path / "recipe.yaml")
        assert len(server.asked) == 45


def test_questions_that_a_model_never_answered_are_counted_and_asked_again(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left out in silence they would make the teacher better than it is: the hard ones fail first."""
    monkeypatch.setattr("evaluate.models.is_loopback", lambda url: False)
    refused, healed = set[str](), list[bool]()

    def too_hard(asked: Asked) -> Behaviour:
        if not healed and (len(refused) < 3 or asked.text in refused):
            refused.add(asked.text)
            return error(400, "maximum context length exceeded")
        return answer("7")

    with misbehaving(too_hard) as server:
        recipe = verified(
            tmp_path, run, teacher={"model": "gpt", "base_url": server.url}, evaluate={"ask_teacher": True}
        )
        for _ in range(2):
            with pytest.raises(
                RequestsFailed, match=r"failed for good \(3 to teacher\): evaluate again, and they are made"
            ):
                evaluate_run(recipe, run, tmp_path / "recipe.yaml")
        report = read_report(run)
        assert report and "Right answers are over the 37 of 40 prompts that every model answered." in report.notes
        healed.append(True)
        server.asked.clear()
        whole = evaluate_run(recipe, run, tmp_path / "recipe.yaml")
        assert {asked.text for asked in server.asked} == refused
    assert not any("failed for good" in note or "37 of 40" in note for note in whole.notes)


def test_other_tasks_are_asked_of_every_model_once(
    run: RunDir, tmp_path: Path, served: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def measure_tasks(recipe: Recipe, server: Any, folder: Path) -> TaskResult:
        asked.append(server.served_name)
        return TaskResult(scores={"ifeval acc": Estimate(len(asked) / 10, 0.0, 1.0)})

    recipe = recipe_of(tmp_path, evaluate={"lm_eval": ["ifeval"], "probes": 0, "unseen": {}})
    with pytest.raises(UsageError, match="there is no `lm_eval` command"):
        evaluate_run(recipe, run, PATH)
    monkeypatch.setattr(evaluate.run, "measure_tasks", measure_tasks)
    monkeypatch.setattr(evaluate.run, "find_command", lambda: "lm_eval")
    report = evaluate_run(recipe, run, PATH)
    assert evaluate_run(recipe, run, PATH) == report and asked == ["teacher", "student_before", "student_after"]
    assert report.tasks["ifeval acc"]["student_after"].value == 0.3
    assert "other tasks, by lm-eval" in run.report_html.read_text(encoding="utf-8")
