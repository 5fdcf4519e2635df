"""`python -m benchmarks.verifiers`: answers in SQL through the filters, and the same queries without any protection.

The questions, their gold SQL and the database are those of recipes/text_to_sql. Every fourth answer is wrong: another
question's, one that does not run, one that would delete. `filters` is the whole stage (read, the rule `sql`, write) on
all cores; `bare` runs each answer and its gold with sqlite3 in one plain loop, without limits of time, size or rights.
"""

import argparse
import sqlite3
import tempfile
from itertools import cycle, islice
from pathlib import Path

from msgspec.structs import replace

from benchmarks.measure import Measured, flags, measured, show
from benchmarks.stories import completion, recipe_of
from filters.run import filter_run
from pipeline.cli import run_stage
from pipeline.records import Completion, encode_line, read_jsonl
from pipeline.rundir import RunDir
from pipeline.user_code import load_function

RECIPES = Path(__file__).parent.parent / "recipes"
TASK = RECIPES / "text_to_sql"
BAD = ("SELECT name FROM products ORDER BY id", "SELECT nothing FROM nowhere", "DELETE FROM customers")


def main() -> None:
    options = flags(__doc__, answers=100_000)
    with tempfile.TemporaryDirectory() as folder:
        print(compare(RunDir(Path(folder)), options))


def compare(run: RunDir, options: argparse.Namespace) -> str:
    """Writes the answers, and measures each side on them."""
    questions = [row for row in load_function(TASK / "questions.py", "rows", "benchmarks")() if "reference" in row]
    with run.completions.open("wb") as file:
        for number, row in enumerate(islice(cycle(questions), options.answers)):
            text = BAD[number // 4 % len(BAD)] if number % 4 == 0 else row["reference"]
            record = replace(completion(number, text, row["prompt"], {}), reference=row["reference"])
            file.write(encode_line(record))
    sides = {"filters": measured(through_filters, run.path), "bare": measured(bare, run.completions)}
    rows: list[tuple[str, ...]] = [("side", "kept", "seconds", "rows/s", "of bare")]
    rows += [(name, *figures(side, options.answers, sides["bare"])) for name, side in sides.items()]
    return show(rows)


def figures(side: Measured, answers: int, bare_side: Measured) -> tuple[str, ...]:
    """The cells of one side."""
    rate, of_bare = answers / side.seconds, bare_side.seconds / side.seconds
    return (f"{side.value:,}", f"{side.seconds:.1f}", f"{rate:,.0f}", f"{of_bare:.2f}")


def through_filters(folder: Path) -> int:
    """How many answers the stage keeps."""
    recipe = recipe_of({"rules": [{"rule": "sql", "database": str(TASK / "shop.sql")}], "warn_keep_rate": 0})
    return filter_run(recipe, RunDir(folder), RECIPES / "text_to_sql.yaml").kept


def bare(completions: Path) -> int:
    """How many answers find what their gold finds, in whatever order; both are run without protection."""
    shop = load_function(TASK / "questions.py", "open_shop", "benchmarks")()
    kept = 0
    for row in read_jsonl(completions, Completion):
        if row.text.startswith("DELETE"):  # it would run here
            continue
        try:
            found, gold = (sorted(map(repr, shop.execute(query))) for query in (row.text, row.reference))
        except sqlite3.Error:
            continue
        kept += found == gold
    return kept


if __name__ == "__main__":
    run_stage(main)
