"""`python -m benchmarks.near_duplicates`: near-duplicates that the filters find among made-up Korean stories.

5% of the stories are copies of another, with 5-15% of the characters changed. The truth is computed without the code
under test: the exact Jaccard similarity of the sets of 3-grams of each copy and its original. A dropped row counts as
right if it is at least as similar as the threshold to the row it was dropped for.
"""

import argparse
import json
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.measure import between, flags, measured, show
from benchmarks.stories import PROMPT, Writer, completion, recipe_of
from filters.minhash import fold
from filters.run import filter_run
from pipeline.cli import run_stage
from pipeline.records import encode_line
from pipeline.rundir import RunDir

NGRAM = 3
COPIES = 0.05


def main() -> None:
    options = flags(__doc__, {"near": between(0.5, 1)}, stories=200_000, near=0.8, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        print(measure(RunDir(Path(folder)), options))


def measure(run: RunDir, options: argparse.Namespace) -> str:
    """Writes the stories, and measures the whole stage on them."""
    stories = list(Writer(options.seed).stories(options.stories, COPIES))
    with run.completions.open("wb") as file:
        file.writelines(encode_line(completion(at, story.text, PROMPT)) for at, story in enumerate(stories))
    texts = [story.text for story in stories]
    copies = {number: story.copy_of for number, story in enumerate(stories) if story.copy_of is not None}
    alike = {copy: original for copy, original in copies.items() if exact(texts, copy, original) >= options.near}
    print(f"{len(texts):,} stories, {len(copies):,} copies, {len(alike):,} of them {options.near} similar or more")
    held = [0.0]
    call = measured(filter_duplicates, run, options.near, sample=lambda: held.append(held_mib()))
    seconds, quality = call.seconds, judge(run, texts, alike, options.near)
    head = ("", "dropped", "precision", "recall", "seconds", "rows/s", "peak MiB")
    return show([head, ("filters", *quality, f"{seconds:.1f}", f"{len(texts) / seconds:,.0f}", f"{max(held):,.0f}")])


def filter_duplicates(run: RunDir, near: float) -> None:
    filter_run(recipe_of({"dedup": {"near": near, "ngram": NGRAM}}), run, Path("recipe.yaml"))


def exact(texts: list[str], first: int, second: int) -> float:
    """The Jaccard similarity of the two texts' sets of n-grams."""
    one, other = (ngrams(fold(texts[number])) for number in (first, second))
    return len(one & other) / len(one | other)


def ngrams(folded: str) -> set[str]:
    return {folded[start : start + NGRAM] for start in range(max(1, len(folded) - NGRAM + 1))}


def judge(run: RunDir, texts: list[str], alike: dict[int, int], near: float) -> tuple[str, str, str]:
    """Dropped rows, precision, and recall: of the pairs as similar as the threshold, those of which one was dropped."""
    rows = map(json.loads, run.dropped.read_bytes().splitlines())
    dropped = {int(row["id"], 16): int(row["detail"][0]["of"], 16) for row in rows}
    right = sum(exact(texts, row, other) >= near for row, other in dropped.items())
    found = sum(copy in dropped or original in dropped for copy, original in alike.items())
    return f"{len(dropped):,}", f"{right / max(1, len(dropped)):.4f}", f"{found / max(1, len(alike)):.4f}"


def held_mib() -> float:
    """The memory that this process's children hold together. Shared pages count once."""
    held = 0
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended
            held += child.memory_full_info().pss
    return held / 2**20


if __name__ == "__main__":
    run_stage(main)
