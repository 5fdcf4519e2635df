"""What the chain says in the end, of a made-up report."""

import shlex
import shutil
from pathlib import Path

from chain.last_words import last_words
from evaluate.document import Claim, Estimate, Headline, exactly
from pipeline.rundir import RunDir, write_json
from tests.evaluate.made_report import make_report


def words(path: Path, claims: list[Claim], *flags: str) -> list[str]:
    run = RunDir(path)
    report = make_report(headline=Headline(text="t", claims=claims, holds=True))
    for number, value in ((0, 0.84), (2, 0.81)):
        report.models[number].figures["verified"] = {"accuracy": exactly(value)}
    report.models[0].figures["engine"]["answers_per_s"] = exactly(1.1)
    report.models[2].figures["engine"]["answers_per_s"] = exactly(5.2)
    write_json(run.report, report)
    return last_words(Path("recipes/my sql.yaml"), run, flags)


def claim(name: str, axis: str, value: float) -> Claim:
    return Claim(name=name, axis=axis, text=name, promised=1, value=Estimate(value, value, value), verdict="yes")  # type: ignore[arg-type]


def test_three_lines_say_what_was_won_and_two_how_to_ask(tmp_path: Path) -> None:
    claims = [
        claim("quality_accuracy", "quality", 0.964),
        claim("size", "memory", 3.12),
        claim("speed", "speed", 4.7),
        claim("memory", "memory", 3.1),
    ]
    accuracy, size, speed, verdict, _, page, terminal = words(tmp_path, claims)
    assert accuracy == "accuracy  96.4% of the teacher's: right answers 81.0%, the teacher's 84.0%"
    assert size == "size      3.12× smaller: parameters 494.0M, the teacher's 1.54B"
    assert speed == "speed     4.70× as fast: answers/s, as it is asked 5.20, the teacher's 1.10"
    assert verdict.startswith("the promise holds")
    command = shlex.split(page)
    assert shutil.which(command[0]) and command[1:] == ["-m", "chat", "recipes/my sql.yaml", "--run", str(tmp_path)]
    assert shlex.split(terminal) == [*command, "--terminal"]
    other = words(tmp_path, claims, "--student.model", "my student")[-1]
    assert shlex.split(other) == [*command, "--student.model", "my student", "--terminal"]


def test_without_a_report_nothing_is_said(tmp_path: Path) -> None:
    assert last_words(Path("r.yaml"), RunDir(tmp_path)) == []
