"""`python -m benchmarks.datatrove_filters --datatrove FOLDER`: our stage and datatrove's filters on the same rows.

datatrove is no dependency; put it into a folder of its own first, which only its side's process sees:

    pip install --target FOLDER "datatrove[processing,io]"

Both read JSONL and write kept and dropped rows with reasons as JSONL, uncompressed, with two processes; both in one
call, in turn; medians. The rows are the workload of `benchmarks.chapter_filter`. What corresponds:

| ours | datatrove's |
|---|---|
| the five rules | one LambdaFilter with the reference function, up to the first rule that drops |
| `repetition` | GopherRepetitionFilter, same thresholds; words by white space: no tokenizer to download |
| kept.jsonl, dropped.jsonl | JsonlWriter, and an `exclusion_writer` for each filter |

What does not: datatrove runs a filter only on what the one before kept, checks no fields, and counts no slots; ours
runs every rule on every row, checks each line in full, and writes report and lineage with fsync. Our repetition counts
sentences, datatrove's lines. datatrove gets the rows in two files, one a task, and only `LocalPipelineExecutor.run` is
timed, its workers forked.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.chapter_filter import CHARACTERS, KEYWORDS, RULES, TEMPLATE, chapter_reason, recipe_of, workload
from benchmarks.table import show
from filters.run import filter_run
from pipeline.records import encode_line
from pipeline.rundir import RunDir

TASKS = 2
REPETITION = "the five rules and repetition"
SETS: dict[str, list[dict[str, Any]]] = {
    "the five rules": RULES,
    REPETITION: [*RULES, {"rule": "repetition", "repeated_span": None}],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datatrove", type=Path, required=True, help="the folder that datatrove is in")
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--side", nargs=2, metavar=("FOLDER", "SET"), help="what this benchmark calls itself with")
    options = parser.parse_args()
    if options.side:
        print(_datatrove(Path(options.side[0]), options.side[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        run, shards = RunDir(Path(folder) / "run"), Path(folder) / "shards"
        run.path.mkdir()
        shards.mkdir()
        made = workload(options.rows, options.seed, TEMPLATE, {"character": CHARACTERS, "keywords": KEYWORDS})
        lines = [encode_line(row) for row in made]
        run.completions.write_bytes(b"".join(lines))
        for task in range(TASKS):
            (shards / f"{task}.jsonl").write_bytes(b"".join(islice(lines, task, None, TASKS)))
        for name, rules in SETS.items():
            print(f"{name}:\n{_race(run, shards, name, rules, options)}\n", flush=True)


def _race(run: RunDir, shards: Path, name: str, rules: list[dict[str, Any]], options: argparse.Namespace) -> str:
    ours, theirs, kept = [], [], 0
    command = [sys.executable, "-m", "benchmarks.datatrove_filters", "--datatrove", str(options.datatrove)]
    theirs_only = os.environ | {"PYTHONPATH": str(options.datatrove)}
    for _ in range(options.runs):
        started = time.perf_counter()
        report = filter_run(recipe_of(rules), run, Path("recipe.yaml"))
        ours.append(time.perf_counter() - started)
        side = [*command, "--side", str(shards), name]
        done = subprocess.run(side, env=theirs_only, capture_output=True, text=True, check=True)
        seconds, count = done.stdout.split()[-2:]
        theirs.append(float(seconds))
        kept = int(count)
    table = [
        ("side", "rows/s", "kept"),
        ("datatrove", f"{options.rows / median(theirs):,.0f}", f"{kept:,}"),
        ("filters", f"{options.rows / median(ours):,.0f}", f"{report.kept:,}"),
    ]
    return f"{show(table)}\n{options.rows:,} rows: {median(theirs) / median(ours):.1f} times datatrove's speed"


def _datatrove(shards: Path, name: str) -> str:
    """Runs datatrove's side; its seconds and how many rows it kept."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.filters import GopherRepetitionFilter, LambdaFilter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.word_tokenizers import WordTokenizer
    from loguru import logger

    logger.remove()

    class Words(WordTokenizer):
        """By white space; datatrove's own needs spaCy."""

        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

        def sent_tokenize(self, text: str) -> list[str]:
            raise NotImplementedError

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            raise NotImplementedError

    def chapter(document: Any) -> bool | tuple[bool, str]:
        reason = chapter_reason(document.metadata["messages"][-1]["content"], document.text)
        return (False, reason) if reason else True

    with tempfile.TemporaryDirectory() as out:
        steps: list[Any] = [
            JsonlReader(str(shards), compression=None),
            LambdaFilter(chapter, exclusion_writer=JsonlWriter(f"{out}/dropped", compression=None)),
        ]
        if name == REPETITION:
            writer = JsonlWriter(f"{out}/repeated", compression=None)
            steps.append(GopherRepetitionFilter(exclusion_writer=writer, language=Words()))
        steps.append(JsonlWriter(f"{out}/kept", compression=None))
        executor = LocalPipelineExecutor(
            steps, tasks=TASKS, workers=TASKS, logging_dir=f"{out}/logs", start_method="fork"
        )
        started = time.perf_counter()
        executor.run()
        seconds = time.perf_counter() - started
        kept = sum(path.read_bytes().count(b"\n") for path in Path(out, "kept").iterdir())
    return f"{seconds} {kept}"


if __name__ == "__main__":
    main()
