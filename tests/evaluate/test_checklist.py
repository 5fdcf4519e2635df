"""The checklist: each point and each common failure passes, warns and fails where it should, at any stage of a run."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

import evaluate.report.checklist
from evaluate.document import (
    SCHEMA,
    Claim,
    Difference,
    Estimate,
    Headline,
    ModelReport,
    WinRate,
    read_report,
)
from evaluate.report.checklist import check_run, checklist, main
from evaluate.report.evidence import Evidence, Filtered
from filters.review.agreement import Agreement, Result, Share
from pipeline.checks import Check
from pipeline.errors import DataError, DistillError, UsageError
from pipeline.recipe import Recipe, load_recipe
from pipeline.rundir import RunDir, write_json
from tests.evaluate.made_report import make_report

RECIPE: dict[str, Any] = {
    "name": "stories",
    "teacher": {"model": "org/teacher"},
    "prompts": {"template": "{who}?", "count": 1, "slots": {"who": ["a", "b"]}},
}


def evidence(**changes: Any) -> Evidence:
    return Evidence(recipe=Recipe(**RECIPE), **changes)


def filtered(**changes: Any) -> Filtered:
    fields = {
        "rows": 10_000,
        "kept": 6_000,
        "keep_rate": 0.6,
        "rules": 2,
        "pass_rules": 0.7,
        "failing": {"script_ratio": 0.02, "adherence": 0.2},
        "duplicates": 0.05,
    }
    return Filtered(**{**fields, **changes})


def check(name: str, status: str, value: float | None = None) -> dict[str, Check]:
    return {name: Check(name=name, status=status, value=value, finding="said so", fix="do so")}


def review(done: int, accepted: float | None, gone: int = 0) -> Result:
    share = None if accepted is None else Share(accepted, accepted, accepted)
    return Result(done, 0, gone, [Agreement("filters", done, share, None)], msgspec.convert({}, Any), {})


def claim(name: str, axis: str, value: float | None, promised: float, width: float = 0.0) -> Claim:
    estimate = None if value is None else Estimate(value, value - width, value + width)
    fields = {"name": name, "axis": axis, "text": name, "promised": promised, "value": estimate}
    if estimate is not None:
        fields["verdict"] = "yes" if estimate.low >= promised else "not shown" if promised <= estimate.high else "no"
    return Claim(**fields)  # type: ignore[arg-type]


def promise(quality: float | None = 0.95, size: float | None = 3.1, speed: float | None = 3.2) -> list[Claim]:
    return [
        claim("quality_bits", "quality", quality, 0.9, width=0.02),
        claim("size", "memory", size, 3),
        claim("speed", "speed", speed, 3),
    ]


def change(figure: str, improved: bool | None) -> Difference:
    ours = Estimate(0.1, 0.05, 0.15)
    return Difference(
        figure=figure,
        part="all",
        model="student_after",
        against="student_before",
        change=ours,
        better="higher",
        improved=improved,
    )


def measured(claims: list[Claim] | None = None, ratio: Estimate | None = None, **changes: Any) -> Any:
    headline = Headline(text="t", claims=promise() if claims is None else claims, perplexity_after_over_before=ratio)
    return make_report(headline=headline, **changes)


def wins(rate: float) -> list[WinRate]:
    return [
        WinRate(
            model="student_after",
            against="teacher",
            part="all",
            pairs=10,
            unjudged=0,
            wins=6,
            losses=4,
            ties=0,
            rate=Estimate(rate, 0.4, 0.8),
            first_chosen=0.5,
            flipped=0,
        )
    ]


def named(name: str, **changes: Any) -> Check:
    (point,) = [point for point in checklist(evidence(**changes)).all if point.name == name]
    return point


def teacher_with(adherence: float) -> Any:
    figures = {"all": {"adherence": Estimate(adherence, 0.0, 1.0)}}
    return make_report(models=[ModelReport(key="teacher", label="teacher", reference="t", figures=figures)])  # type: ignore[arg-type]


BETTER = Estimate(0.5, 0.4, 0.6)
REPORTS = {
    "better": measured(ratio=BETTER, differences=[change("passing", True), change("loops", None)]),
    "no probes": measured(ratio=BETTER),
    "mixed": measured(ratio=BETTER, differences=[change("passing", True), change("loops", False)]),
    "perhaps": measured(ratio=Estimate(0.9, 0.7, 1.1), differences=[change("passing", True)]),
    "worse": measured(ratio=Estimate(1.2, 1.1, 1.3), differences=[change("passing", True)]),
}


@pytest.mark.parametrize(
    ("name", "changes", "status", "value"),
    [
        ("size ratio", {"checks": check("size_ratio", "pass", 3.0)}, "pass", 3.0),
        ("size ratio", {"checks": check("size_ratio", "pass", 10.0)}, "pass", 10.0),
        ("size ratio", {"checks": check("size_ratio", "note", 2.8)}, "warn", 2.8),
        ("size ratio", {"checks": check("size_ratio", "warn", 10.1)}, "fail", 10.1),
        ("size ratio", {"checks": check("size_ratio", "fail", 0.9)}, "fail", 0.9),
        ("size ratio", {"checks": check("size_ratio", "note", None)}, "unknown", None),
        ("teacher's ability", {"filters": filtered()}, "pass", 0.7),
        ("teacher's ability", {"filters": filtered(pass_rules=0.4)}, "fail", 0.4),
        ("teacher's ability", {"filters": filtered(failing={"adherence": 0.6})}, "fail", 0.4),
        ("teacher's ability", {"filters": filtered(failing={})}, "warn", 0.7),
        ("teacher's ability", {"filters": filtered(failing={}), "report": teacher_with(0.8)}, "pass", 0.7),
        ("teacher's ability", {"filters": filtered(pass_rules=None)}, "unknown", None),
        ("rows", {"filters": filtered(kept=149)}, "fail", 149),
        ("rows", {"filters": filtered(kept=300)}, "warn", 300),  # training calls it a fair start
        ("rows", {"filters": filtered(kept=4_999)}, "warn", 4_999),
        ("rows", {"filters": filtered(kept=5_000)}, "pass", 5_000),
        ("rows", {"filters": filtered(kept=50_001)}, "warn", 50_001),
        ("keep rate", {"filters": filtered(keep_rate=0.5)}, "pass", 0.5),
        ("keep rate", {"filters": filtered(keep_rate=0.49)}, "fail", 0.49),
        ("human review", {"review": review(100, 0.9)}, "pass", 100),
        ("human review", {"review": review(105, 0.9, gone=6)}, "warn", 99),
        ("human review", {"review": review(100, 0.4)}, "fail", 100),
        ("human review", {"review": review(20, None), "filters": filtered(rows=20)}, "pass", 20),  # all there are
        ("student's quality", {"report": REPORTS["better"]}, "pass", 0.5),
        ("student's quality", {"report": REPORTS["no probes"]}, "warn", 0.5),
        ("student's quality", {"report": REPORTS["mixed"]}, "warn", 0.5),
        ("student's quality", {"report": REPORTS["perhaps"]}, "warn", 0.9),
        ("student's quality", {"report": REPORTS["worse"]}, "fail", 1.2),
        ("three axes", {"report": measured()}, "pass", 3),
        ("three axes", {"report": measured(promise(quality=0.91))}, "warn", 3),  # 0.89 to 0.93: chance may explain it
        ("three axes", {"report": measured(promise(speed=1.6))}, "fail", 3),
        ("three axes", {"report": measured(promise(speed=None))}, "unknown", None),
        ("licence chain", {"checks": check("licence", "pass")}, "pass", None),
        ("licence chain", {"checks": check("licence", "note")}, "warn", None),
        ("licence chain", {"checks": check("licence", "fail")}, "fail", None),
        ("1 no filter", {"filters": filtered()}, "pass", 2),
        ("1 no filter", {"filters": filtered(rules=0)}, "fail", 0),
        ("1 no filter", {"filters": filtered(rules=None)}, "unknown", None),
        ("2 teacher far larger", {"checks": check("size_ratio", "pass", 10)}, "pass", 10),
        ("2 teacher far larger", {"checks": check("size_ratio", "warn", 200)}, "fail", 200),
        ("3 distilling the distilled", {"checks": check("chain", "pass", 0)}, "pass", 0),
        ("3 distilling the distilled", {"checks": check("chain", "note", 1)}, "warn", 1),  # --allow-chain
        ("3 distilling the distilled", {"checks": check("chain", "note", None)}, "unknown", None),  # an API
        ("3 distilling the distilled", {"checks": check("chain", "fail", 1)}, "fail", 1),
        ("4 domain shift", {"filters": filtered()}, "pass", 0.98),
        ("4 domain shift", {"filters": filtered(failing={"script_ratio": 0, "language#2": 0.2})}, "warn", 0.8),
        ("4 domain shift", {"filters": filtered(failing={"script_ratio": 0.6})}, "fail", 0.4),
        ("4 domain shift", {"filters": filtered(failing={"length": 0.6})}, "unknown", None),
        ("5 same prompts", {"distinct_prompts": 1.0, "filters": filtered()}, "pass", 1.0),
        ("5 same prompts", {"distinct_prompts": 1.0, "filters": filtered(duplicates=0.3)}, "warn", 1.0),
        ("5 same prompts", {"distinct_prompts": 1.0, "filters": filtered(duplicates=None)}, "warn", 1.0),
        ("5 same prompts", {"distinct_prompts": 0.4, "filters": filtered()}, "fail", 0.4),
        ("6 student beats teacher", {"report": measured()}, "pass", 0.95),
        ("6 student beats teacher", {"report": measured(promise(quality=1.04))}, "warn", 1.04),
        ("6 student beats teacher", {"report": measured(wins=wins(0.6))}, "warn", 1.2),
        ("6 student beats teacher", {"report": measured(promise(quality=None))}, "unknown", None),
    ],
)
def test_a_point_is_what_was_measured_of_it(name: str, changes: Any, status: str, value: float | None) -> None:
    point = named(name, **changes)
    assert (point.status, point.value) == (status, pytest.approx(value)), point.finding
    assert bool(point.fix) == (status != "pass")


def test_a_new_run_is_unknown_in_every_point() -> None:
    found = checklist(evidence())
    assert (len(found.points), len(found.failures)) == (8, 6)
    assert {point.status for point in found.all} == {"unknown"} and all(point.fix for point in found.all)


@pytest.mark.parametrize(("width", "status"), [(0.04, "pass"), (0.01, "warn")])
def test_more_right_answers_than_the_teacher_are_suspicious_only_beyond_chance(width: float, status: str) -> None:
    claims = [claim("quality_accuracy", "quality", 1.02, 0.9, width)]
    assert named("6 student beats teacher", report=measured(claims)).status == status


@pytest.mark.parametrize(("improved", "status"), [(True, "pass"), (None, "warn"), (False, "fail")])
def test_a_student_whose_answers_are_verified_is_judged_by_them(improved: bool | None, status: str) -> None:
    right = msgspec.structs.replace(change("accuracy", improved), part="verified")
    found = named("student's quality", report=measured(ratio=Estimate(1.2, 1.1, 1.3), differences=[right]))
    assert found.status == status and found.finding == "right answers: +10.0 (+5.0–+15.0) points"


def test_a_quality_over_the_teachers_is_called_suspicious() -> None:
    point = named("6 student beats teacher", report=measured(promise(quality=1.04), wins=wins(0.6)))
    assert point.finding == "suspicious: quality bits 1.04 (1.02–1.06); wins 60% of the pairs"
    assert "trained on" in point.fix


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A filtered and trained run of 40 answers: 30 kept; 4 fail the rules, 2 of them two; 6 are duplicates."""
    made = RunDir(tmp_path / "run")
    made.path.mkdir()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    rule = {"settings": {}, "examples": []}
    rules = [
        {"rule": "length", "dropped": 2, "alone": 2, "together": 0, **rule},
        {"rule": "script_ratio", "dropped": 2, "alone": 0, "together": 2, **rule},
        {"rule": "adherence", "dropped": 0, "alone": 0, "together": 2, **rule},
        {"rule": "exact_duplicate", "dropped": 2, "alone": 2, "together": 0, **rule},
        {"rule": "near_duplicate", "dropped": 4, "alone": 4, "together": 0, **rule},
    ]
    report = {"rows": 40, "kept": 30, "dropped": 10, "keep_rate": 0.75, "overlaps": {}, "slots": {}, "lengths": {}}
    prompts = {"prompts": 10, "kept": 9, "keep_rate": 0.9, "answers": 4, "unsolved": 1, "unsolved_ids": ["p"]}
    report |= {"rules": rules, "prompts": {**prompts, "pass_at": {"1": 0.9}}}
    made.filter_report.write_text(json.dumps(report))
    prompts = {"asked": 40, "distinct": 36, "samples": 3}
    asked = {"rules": rules[:3], "dedup": {"near": 0.8}}
    made.lineage.write_text(json.dumps({"generate": {"requests": 120, "prompts": prompts}, "filters": asked}))
    checks = [{"name": "size_ratio", "status": "pass", "value": 3.1, "finding": "f", "fix": ""}]
    made.checks.write_text(json.dumps({"checks": checks, "accepted": [], "stopped_by": []}))
    return made


def test_a_report_of_another_version_is_not_read(run: RunDir) -> None:
    write_json(run.report, msgspec.structs.replace(measured(ratio=BETTER), schema=SCHEMA - 1))
    assert read_report(run) is None


def test_an_emptied_file_of_training_names_the_flag_that_makes_it_again(run: RunDir, tmp_path: Path) -> None:
    run.checks.write_bytes(b"")
    with pytest.raises(DataError, match=r"checks\.json: .*; train again \(--again\)"):
        main([str(tmp_path / "recipe.yaml"), "--run", str(run.path)])


def test_the_checks_are_those_of_the_student_that_is_there(run: RunDir, tmp_path: Path) -> None:
    """checks.json may be of a later training, which a check stopped."""
    later = [{"name": "licence", "status": "pass", "value": None, "finding": "of another teacher", "fix": ""}]
    run.checks.write_text(json.dumps({"checks": later}))
    own = [{"name": "licence", "status": "warn", "value": None, "finding": "the student's teacher", "fix": "ask"}]
    run.student.mkdir()
    RunDir(run.student).lineage.write_text(json.dumps({"train": {"checks": own}}))
    points = {point.name: point for point in check_run(load_recipe(tmp_path / "recipe.yaml"), run, None).all}
    assert (points["licence chain"].status, points["licence chain"].finding) == ("warn", "the student's teacher")


def test_the_files_of_a_run_are_read(run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(run.report, measured(ratio=BETTER))
    with pytest.raises(DistillError, match=r"not as wanted: rows$") as caught:
        main([str(tmp_path / "recipe.yaml"), "--run", str(run.path)])
    assert caught.value.exit_code == 1
    report = read_report(run)
    assert report
    points = {point.name: (point.status, point.value) for point in report.checklist.all}
    assert points["teacher's ability"] == ("pass", 0.9)  # 36 of 40 pass the rules, 38 name what was asked for
    assert points["4 domain shift"] == ("pass", 0.95)
    assert points["5 same prompts"] == ("warn", 0.9) and points["rows"] == ("fail", 30)
    (twins,) = [point.finding for point in report.checklist.failures if point.name == "5 same prompts"]
    assert twins == "90% of the prompts are different, 15.0% of the answers are duplicates"
    out = capsys.readouterr().out
    assert "→ raise prompts.count" in out and out.endswith("8 pass, 2 warn, 1 fail, 3 unknown\n")
    assert "4 domain shift" in run.report_html.read_text(encoding="utf-8")


def test_the_report_of_the_student_before_says_nothing_of_a_new_one(run: RunDir, tmp_path: Path) -> None:
    write_json(run.report, msgspec.structs.replace(measured(ratio=BETTER), lineage={"train": {"created": "1"}}))
    old, arguments = run.report.read_bytes(), [str(tmp_path / "recipe.yaml"), "--run", str(run.path), "--strict"]
    run.student.mkdir()
    RunDir(run.student).lineage.write_text(json.dumps({"train": {"created": "2"}}))
    with pytest.raises(DistillError, match="three axes"):
        main(arguments)
    assert run.report.read_bytes() == old
    RunDir(run.student).lineage.write_text(json.dumps({"train": {"created": "1"}}))
    with pytest.raises(DistillError) as caught:
        main(arguments)
    assert "three axes" not in str(caught.value) and run.report.read_bytes() != old


def test_what_is_written_is_found_in_the_report_that_is_there_then(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(run.report, measured(ratio=BETTER))

    def evaluated_meanwhile(*_: object) -> None:
        write_json(run.report, measured(ratio=Estimate(1.2, 1.1, 1.3)))

    monkeypatch.setattr(evaluate.report.checklist, "print_checklist", evaluated_meanwhile)
    with pytest.raises(DistillError):
        main([str(tmp_path / "recipe.yaml"), "--run", str(run.path)])
    report = read_report(run)
    assert report
    (found,) = [point for point in report.checklist.points if point.name == "student's quality"]
    assert (found.status, found.value) == ("fail", 1.2)


def test_answers_of_which_one_is_selected_do_not_lower_the_keep_rate(run: RunDir, tmp_path: Path) -> None:
    report = json.loads(run.filter_report.read_text())
    report["rules"].append(
        {"rule": "select", "dropped": 20, "alone": 20, "together": 0, "settings": {}, "examples": []}
    )
    report |= {"keep_rate": 0.25, "kept": 10}
    run.filter_report.write_text(json.dumps(report))
    points = {
        point.name: (point.status, point.value)
        for point in check_run(load_recipe(tmp_path / "recipe.yaml"), run, None).all
    }
    assert points["keep rate"] == ("pass", 0.9)
    assert points["teacher's ability"] == ("pass", 0.9)
    assert points["1 no filter"] == ("pass", 4)  # three rules and the duplicates; to select is none


def test_without_its_lineage_a_run_is_not_said_to_have_no_rule(run: RunDir, tmp_path: Path) -> None:
    run.lineage.unlink()
    found = check_run(load_recipe(tmp_path / "recipe.yaml"), run, None)
    (point,) = [point for point in found.all if point.name == "1 no filter"]
    assert (point.status, point.value) == ("unknown", None)


def test_how_it_ends(run: RunDir, tmp_path: Path) -> None:
    """A share of another run has no report of its own filters: its lineage says how many rows it has."""
    run.filter_report.unlink()
    section = {"rows": 10_000, "kept": 6_000, "keep_rate": 0.6, "rules": [{"rule": "length"}]}
    run.lineage.write_text(json.dumps({"filters": section}))
    arguments = [str(tmp_path / "recipe.yaml"), "--run", str(run.path)]
    main(arguments)  # nothing fails, much is unknown
    assert not run.report.exists()
    with pytest.raises(DistillError, match="human review"):
        main([*arguments, "--strict"])
    with pytest.raises(UsageError, match="no such run"):
        main([*arguments[:2], str(tmp_path / "none")])
