"""`python -m filters` with every verifier at once, and answers that mean harm: each is dropped with its reason."""

from pathlib import Path
from typing import Any

import yaml

from filters.__main__ import main
from filters.reasons import describe
from pipeline.records import Completion, Dropped, Kept, encode_line, read_jsonl
from pipeline.rundir import RunDir
from tests.completion_fields import completion_fields
from tests.filters.verifying import SHOP

GOOD = "```sql\nSELECT count(*) FROM customers\n```"
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i FROM n) SELECT max(i) FROM n"
HOSTILE = {  # by the answer's id: its text, and how one of its reasons begins
    "drop": ("DROP TABLE customers", "sql: may only read: not authorized"),
    "endless": (ENDLESS, "sql: takes too long: more than 0.5 s"),
    "deep": ("[" * 10_000, "sql: does not run"),
    "pattern": ("a" * 40 + "!", "unverified: matches: the check took longer than 0.5 s"),
    "loop": ("while True: pass", "python: takes too long: more than 2 s"),
}
RULES: list[dict[str, Any]] = [
    {"rule": "sql", "database": "shop.sql", "seconds": 0.5},
    {"rule": "matches", "pattern": "^(a+)+$", "seconds": 0.5},
    {"rule": "python", "tests": "tests", "seconds": 2},
]


def filtered(folder: Path, rules: list[dict[str, Any]]) -> tuple[set[str], dict[str, list[str]]]:
    """The ids that the stage keeps by these rules, and the reasons of the others."""
    recipe, run = folder / "recipe.yaml", RunDir(folder / "run")
    prompts = {"count": 1, "template": "{a}", "slots": {"a": ["b"]}}
    settings = {"name": "shop", "teacher": {"model": "m"}, "prompts": prompts, "filters": {"rules": rules}}
    recipe.write_text(yaml.safe_dump(settings))
    main([str(recipe), "--run", str(run.path)])
    dropped = read_jsonl(run.dropped, Dropped)
    reasons = {row.id: [f"{why.rule}: {describe(why)}" for why in row.detail] for row in dropped}
    return {row.id for row in read_jsonl(run.kept, Kept)}, reasons


def test_the_stage_goes_on_whatever_an_answer_does(tmp_path: Path) -> None:
    (tmp_path / "shop.sql").write_text(SHOP)
    texts = {name: text for name, (text, _) in HOSTILE.items()} | {"good": GOOD}
    (tmp_path / "run").mkdir()
    with RunDir(tmp_path / "run").completions.open("wb") as file:
        for name, text in texts.items():
            fields = completion_fields(name, text, prompt_id=name, reference="SELECT 3", columns={"tests": "assert 1"})
            file.write(encode_line(Completion(**fields)))
    kept, reasons = filtered(tmp_path, RULES[:1])
    assert kept == {"good"} and reasons.keys() == HOSTILE.keys()
    kept, reasons = filtered(tmp_path, RULES)
    assert kept == set()
    for name, (_, words) in HOSTILE.items():
        assert any(reason.startswith(words) for reason in reasons[name]), reasons[name]
