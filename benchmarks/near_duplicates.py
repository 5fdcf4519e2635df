"""`python -m benchmarks.near_duplicates`: duplicates among made-up Korean stories, found by the filters and by
datasketch: precision, recall, time and memory, side by side.

5% of the stories are copies of another, with 5-15% of the characters changed. The truth is computed without the code
under test: the exact Jaccard similarity of the sets of 3-grams of each copy and its original. A dropped row counts as
right if it is at least as similar as the threshold to the row it was dropped for. Both sides read the same JSONL, in a
process of their own, and write what they keep. datasketch looks up each row before it inserts it, with the bands that
it chooses for the threshold, and its candidates are checked by its own estimate.

datasketch is for this benchmark only: `pip install datasketch`.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measure import Measured, flags, measured, show
from benchmarks.stories import PROMPT, Writer, completion, recipe_of
from filters.minhash import fold
from filters.run import filter_run
from pipeline.records import encode_line
from pipeline.rundir import RunDir

NGRAM = 3
COPIES = 0.05


def main() -> None:
    options = flags(__doc__, stories=200_000, near=0.8, seed=0, sides="filters,datasketch")
    if "datasketch" in options.sides and importlib.util.find_spec("datasketch") is None:
        sys.exit("datasketch is not installed: pip install datasketch, or leave it out with --sides filters")
    with tempfile.TemporaryDirectory() as folder:
        print(compare(RunDir(Path(folder)), options))


def compare(run: RunDir, options: argparse.Namespace) -> str:
    """Writes the stories, and measures each side on them."""
    stories = list(Writer(options.seed).stories(options.stories, COPIES))
    with run.completions.open("wb") as file:
        file.writelines(encode_line(completion(at, story.text, PROMPT)) for at, story in enumerate(stories))
    texts = [story.text for story in stories]
    copies = {number: story.copy_of for number, story in enumerate(stories) if story.copy_of is not None}
    alike = {copy: original for copy, original in copies.items() if exact(texts, copy, original) >= options.near}
    print(f"{len(texts):,} stories, {len(copies):,} copies, {len(alike):,} of them {options.near} similar or more")
    rows: list[tuple[str, ...]] = [("side", "dropped", "precision", "recall", "seconds", "rows/s", "peak MiB")]
    for side in options.sides.split(","):
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(measured, SIDES[side], run, options.near)
            peak = peak_mib(call)
        seconds, quality = call.result().seconds, judge(run, texts, alike, options.near)
        rows.append((side, *quality, f"{seconds:.1f}", f"{len(texts) / seconds:,.0f}", f"{peak:,.0f}"))
    return show(rows)


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


def with_filters(run: RunDir, near: float) -> None:
    """The whole stage."""
    filter_run(recipe_of({"dedup": {"near": near, "ngram": NGRAM}}), run, Path("recipe.yaml"))


def with_datasketch(run: RunDir, near: float) -> None:
    """The same task with datasketch; kept.jsonl and dropped.jsonl are written alike."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=near, num_perm=128)
    signatures: dict[str, Any] = {}
    with run.completions.open() as lines, run.kept.open("w") as kept, run.dropped.open("w") as dropped:
        for line in lines:
            row = json.loads(line)
            signature = MinHash(num_perm=128)
            signature.update_batch([ngram.encode() for ngram in ngrams(fold(row["text"]))])
            like = [other for other in index.query(signature) if signatures[other].jaccard(signature) >= near]
            if like:
                row |= {"rule": "near_duplicate", "detail": [{"rule": "near_duplicate", "of": like[0]}]}
                dropped.write(json.dumps(row, ensure_ascii=False) + "\n")
            else:
                index.insert(row["id"], signature)
                signatures[row["id"]] = signature
                kept.write(line)


SIDES = {"filters": with_filters, "datasketch": with_datasketch}


def peak_mib(call: "Future[Measured]") -> float:
    """The most memory that this process's children held together until the call ended, in samples of 0.2 s.

    Shared pages count once.
    """
    peak = 0
    while wait([call], 0.2).not_done:
        held = 0
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):  # it has ended
                held += child.memory_full_info().pss
        peak = max(peak, held)
    return peak / 2**20


if __name__ == "__main__":
    main()
