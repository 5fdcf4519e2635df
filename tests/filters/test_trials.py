"""`--sweep`: which answers are better, what the shares hold, and what they are told apart by."""

import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from filters.__main__ import main
from filters.answer import Answer
from filters.judgements import Judgement
from filters.reasons import describe
from filters.rows import filtered_rows
from filters.ruleset import load_rules
from filters.trials import Subset, margin, parse_shares, print_sweep, stricter
from pipeline.errors import DataError, UsageError
from pipeline.filters_config import FiltersConfig
from pipeline.records import Dropped, Kept, Reason, encode_line, read_jsonl
from pipeline.rundir import RunDir, write_file
from tests.completion_fields import completion_fields

RULES = [{"rule": "length", "min_chars": 10, "max_chars": 110}, {"rule": "repeated_word", "word": "b", "max_count": 5}]
LONG = Reason(rule="length", value=120, at_most=110)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Ten answers: five kept, four dropped (one a duplicate), one of those without text."""
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.completions.write_text("{}\n")
    kept = [("near", 12, 4), ("middle", 60, 4), ("best", 40, 5), ("poor", 60, 3), ("far", 88, 4)]
    dropped = [
        ("twice", "a" * 60, [Reason(rule="near_duplicate", what="answer", of="best", similarity=0.9)]),
        ("long", "a" * 120, [LONG]),
        ("worse", "b" * 6, [Reason(rule="length", value=6), Reason(rule="repeated_word", value=6)]),
        ("empty", " ", [Reason(rule="length", value=1)]),
        ("judged", "a" * 60, [Reason(rule="judge", value=2, at_least=3)]),
    ]
    rows = [Kept(**completion_fields(name, "a" * n), scores={"judge": score}) for name, n, score in kept]
    run.kept.write_bytes(b"".join(map(encode_line, rows)))
    others = [Dropped(**completion_fields(name, text), rule=why[0].rule, detail=why) for name, text, why in dropped]
    run.dropped.write_bytes(b"".join(map(encode_line, others)))
    run.lineage.write_text(json.dumps({"name": "run", "filters": {"rules": RULES, "keep_rate": 0.5}, "train": {}}))
    path = tmp_path / "recipe.yaml"
    data = {"name": "s", "teacher": {"model": "m"}, "prompts": {"template": "Hi", "count": 1}}
    path.write_text(yaml.safe_dump({**data, "filters": {"rules": RULES}}))
    return path


def names(run: RunDir) -> set[str]:
    return {row.id for row in read_jsonl(run.kept, Kept)}


def test_of_what_the_judge_dropped_the_better_scored_comes_first(recipe: Path) -> None:
    run = RunDir(recipe.with_name("run"))
    why = [Reason(rule="judge", value=1, at_least=3)]
    rows = [
        Dropped(**completion_fields(name, "a" * 60), rule="judge", detail=why) for name in ("bad", "bearable", "none")
    ]
    run.kept.write_bytes(b"")
    run.dropped.write_bytes(b"".join(map(encode_line, rows)))
    verdicts = [Judgement(id=id_, score=score, version="v", attempts=1) for id_, score in (("bad", 1), ("bearable", 2))]
    run.judgements.write_bytes(b"".join(map(encode_line, verdicts)))
    main([str(recipe), "--run", str(run.path), "--sweep", "30,60"])
    assert names(RunDir(run.path / "sweep" / "30")) == {"bearable"}
    assert names(RunDir(run.path / "sweep" / "60")) == {"bearable", "bad"}


def test_the_mean_counts_what_the_judge_dropped(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(recipe.with_name("run"))
    why = [Reason(rule="judge", value=1, at_least=3)]
    good = Kept(**completion_fields("good", "a" * 60), scores={"judge": 5, "facts": 4})
    bad = Dropped(**completion_fields("bad", "a" * 60), rule="judge", detail=why)
    run.kept.write_bytes(encode_line(good))
    run.dropped.write_bytes(encode_line(bad))
    verdict = Judgement(id="bad", score=1, criteria={"facts": 2}, version="v", attempts=1)
    run.judgements.write_bytes(encode_line(verdict))
    main([str(recipe), "--run", str(run.path), "--sweep", "50,100"])
    means = [line.split("│")[4].strip() for line in capsys.readouterr().out.splitlines() if "%" in line]
    assert means == ["5.00", "3.00"]
    kept = {row.id: row.scores for row in read_jsonl(RunDir(run.path / "sweep" / "100").kept, Kept)}
    assert kept == {"good": {"judge": 5, "facts": 4}, "bad": {"judge": 1, "facts": 2}}


def test_a_right_answer_that_select_left_out_comes_before_a_wrong_one(recipe: Path) -> None:
    run = RunDir(recipe.with_name("run"))
    run.kept.write_bytes(encode_line(Kept(**completion_fields("z-kept", "a" * 60))))
    others = [("right", Reason(rule="select", what="first", n=0)), ("a-wrong", Reason(rule="choice", found="a"))]
    rows = [Dropped(**completion_fields(name, "a" * 60), rule=why.rule, detail=[why]) for name, why in others]
    run.dropped.write_bytes(b"".join(encode_line(row) for row in reversed(rows)))
    main([str(recipe), "--run", str(run.path), "--sweep", "30,60,100"])
    shares = {percent: RunDir(run.path / "sweep" / percent) for percent in ("30", "60", "100")}
    found = [names(share) for share in shares.values()]
    assert found == [{"z-kept"}, {"z-kept", "right"}, {"z-kept", "right", "a-wrong"}]
    counts = [json.loads(share.lineage.read_text())["filters"]["sweep"] for share in shares.values()]
    assert [count["dropped_by_rules"] for count in counts] == [0, 0, 1]


def test_the_best_of_a_run_become_runs(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(recipe.with_name("run"))
    main([str(recipe), "--run", str(run.path), "--sweep", "80,30,100"])
    shares = {percent: RunDir(run.path / "sweep" / str(percent)) for percent in (30, 80, 100)}
    assert names(shares[30]) == {"best", "middle", "far"}  # 5, then 4 by their distance to the thresholds
    assert names(shares[80]) == {"best", "middle", "far", "near", "poor", "long", "judged", "worse"}
    assert names(shares[100]) == names(shares[80]) | {"twice"}
    left_out = {row.id: row.detail for row in read_jsonl(shares[30].dropped, Dropped)}
    assert len(left_out) == 7
    assert left_out["near"] == [Reason(rule="sweep", value=4, total=10, at_most=0.3)]
    assert describe(left_out["near"][0]) == "rank 4 of 10, the best 30% are kept"
    assert left_out["long"] == [LONG]
    lineage = json.loads(shares[80].lineage.read_bytes())
    assert lineage["filters"]["keep_rate"] == 0.8 and lineage["filters"]["rules"] == RULES and "train" not in lineage
    assert lineage["filters"]["sweep"] == {"percent": 80, "dropped_by_rules": 3}
    assert "4.33" in capsys.readouterr().out  # (5 + 4 + 4) / 3
    assert len(list(read_jsonl(run.kept, Kept))) == 5  # the run itself is as it was


def test_what_an_evaluation_asks_is_in_no_share(recipe: Path) -> None:
    run = RunDir(recipe.with_name("run"))
    why = [Reason(rule="contamination", what="prompt", of="test")]
    with run.dropped.open("ab") as file:
        file.write(encode_line(Dropped(**completion_fields("asked", "a" * 60), rule="contamination", detail=why)))
    main([str(recipe), "--run", str(run.path), "--sweep", "100"])
    share = RunDir(run.path / "sweep" / "100")
    assert "twice" in names(share) and "asked" not in names(share)
    assert {row.id: row.detail for row in read_jsonl(share.dropped, Dropped)}["asked"] == why


def test_a_margin_is_the_share_of_stricter_thresholds_that_still_pass() -> None:
    """20, 40, 60 and 80% stricter: 20 to 100, 30 to 90, 40 to 80, 50 to 70 characters; 4, 3, 2 and 1 times."""
    rules = load_rules(FiltersConfig.model_validate({"rules": RULES}), Path("recipe.yaml"))

    def of(text: str) -> tuple[float, float]:
        return margin(Answer(text, "", "stop", {}), stricter(rules))

    assert of("a" * 60) == (1.0, 1.0)
    assert of("a" * 85) == (0.5, 0.75)
    assert of("a" * 57 + "b" * 3) == (0.5, 0.75)
    assert of("a" * 12 + "b" * 5) == (0.0, 0.0)


@pytest.mark.parametrize("text", ["", "30,,50", "0", "101", "half", "30.5"])
def test_what_are_no_percents_is_said(text: str) -> None:
    with pytest.raises(UsageError, match="--sweep wants percents from 1 to 100"):
        parse_shares("--sweep", text)


def test_a_run_that_is_not_filtered_is_not_ranked(recipe: Path) -> None:
    run = RunDir(recipe.with_name("run"))
    run.dropped.unlink()
    with pytest.raises(DataError, match="run the filters first"):
        main([str(recipe), "--run", str(run.path), "--sweep", "30"])


def test_rows_of_two_filterings_are_never_taken_for_one(recipe: Path) -> None:
    run = RunDir(recipe.with_name("run"))
    rows = filtered_rows(run)
    next(rows)
    for path in (run.kept, run.dropped):  # other filters end now
        write_file(path, b"")
    with pytest.raises(DataError, match="run: was filtered just now, while its answers were read; run the same"):
        list(rows)


def test_a_dry_run_leaves_what_the_judge_dropped(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(recipe), "--run", str(recipe.with_name("run")), "--dry-run"])
    assert "judged" not in capsys.readouterr().out


def test_a_sweep_names_its_runs_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_sweep([Subset(50, RunDir(Path("sql[v2]")), 1, 0, None)], Console())
    assert "sql[v2]" in capsys.readouterr().out
