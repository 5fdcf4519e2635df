"""`python -m benchmarks.near_duplicates`: duplicates among made-up Korean stories, found by the filters and by
datasketch: precision, recall, time and memory, side by side.

5% of the stories are copies of another, 5-15% of the characters changed. The truth is computed without any of the code
under test: the exact Jaccard similarity of the sets of 3-grams of each copy and its original. A dropped row counts as
right if it is as similar as the threshold, exactly, to the row it was dropped for. Both sides read the same JSONL, in a
process of their own, and write what they keep. datasketch is asked before each insertion, with the bands that it
chooses for the threshold, and its candidates are checked by its own estimate.

datasketch is for this benchmark only: `pip install datasketch`.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import yaml

from benchmarks.chapter_filter import PROMPT, completion
from benchmarks.stories import Writer
from benchmarks.table import show
from filters.minhash import fold
from pipeline.records import encode_line

NGRAM = 3
COPIES = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=int, default=200_000)
    parser.add_argument("--near", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sides", default="filters,datasketch")
    parser.add_argument("--datasketch", type=Path, help=argparse.SUPPRESS)  # that side's own process: the folder
    options = parser.parse_args()
    if options.datasketch:
        with_datasketch(options.datasketch, options.near)
        return
    if "datasketch" in options.sides and importlib.util.find_spec("datasketch") is None:
        sys.exit("datasketch is not installed: pip install datasketch, or leave it out with --sides filters")
    with tempfile.TemporaryDirectory() as folder:
        print(measure(Path(folder), options))


def measure(folder: Path, options: argparse.Namespace) -> str:
    """Each side's figures, as a table."""
    texts, planted = write_run(folder, options.stories, options.seed)
    alike = {copy: original for copy, original in planted.items() if exact(texts, copy, original) >= options.near}
    print(f"{len(texts):,} stories, {len(planted):,} copies, {len(alike):,} of them {options.near} similar or more")
    recipe = folder / "recipe.yaml"
    about = {"name": "near", "teacher": {"model": "teacher"}, "prompts": {"count": 1, "template": PROMPT}}
    recipe.write_text(yaml.safe_dump({**about, "filters": {"dedup": {"near": options.near, "ngram": NGRAM}}}))
    filters = ["-m", "filters", str(recipe), "--run", str(folder)]
    commands = {
        "filters": filters,
        "filters, rules only": [*filters, "--filters.dedup", "null"],
        "datasketch": ["-m", "benchmarks.near_duplicates", "--datasketch", str(folder), "--near", str(options.near)],
    }
    rows: list[tuple[str, ...]] = [("side", "dropped", "precision", "recall", "seconds", "rows/s", "peak MiB")]
    for side, command in commands.items():
        if side.split(",")[0] not in options.sides:
            continue
        started = time.perf_counter()
        with peak_mib() as peak:
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        quality = ("-", "-", "-") if side == "filters, rules only" else judge(folder, texts, alike, options.near)
        rows.append((side, *quality, f"{seconds:.1f}", f"{len(texts) / seconds:,.0f}", f"{peak[0]:,.0f}"))
    return show(rows)


def write_run(folder: Path, count: int, seed: int) -> tuple[list[str], dict[int, int]]:
    """Writes completions.jsonl; returns the texts by number, and for each copy its original."""
    texts: list[str] = []
    planted: dict[int, int] = {}
    with (folder / "completions.jsonl").open("wb") as file:
        for number, (text, copy_of) in enumerate(Writer(seed).stories(count, COPIES)):
            texts.append(text)
            if copy_of is not None:
                planted[number] = copy_of
            file.write(encode_line(completion(number, text, PROMPT)))
    return texts, planted


def exact(texts: list[str], first: int, second: int) -> float:
    """The Jaccard similarity of the two texts' sets of n-grams."""
    one, other = (_ngrams(fold(texts[number])) for number in (first, second))
    return len(one & other) / len(one | other)


def _ngrams(folded: str) -> set[str]:
    return {folded[start : start + NGRAM] for start in range(max(1, len(folded) - NGRAM + 1))}


def judge(folder: Path, texts: list[str], alike: dict[int, int], near: float) -> tuple[str, str, str]:
    """Dropped rows, precision, and recall: of the pairs as similar as the threshold, those of which one was dropped."""
    rows = map(json.loads, (folder / "dropped.jsonl").read_bytes().splitlines())
    dropped = {int(row["id"], 16): int(row["detail"][0]["of"], 16) for row in rows}
    right = sum(exact(texts, row, other) >= near for row, other in dropped.items())
    found = sum(copy in dropped or original in dropped for copy, original in alike.items())
    return f"{len(dropped):,}", f"{right / max(1, len(dropped)):.4f}", f"{found / max(1, len(alike)):.4f}"


def with_datasketch(folder: Path, near: float) -> None:
    """The same task as the filters have, with datasketch; kept.jsonl and dropped.jsonl are written alike."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=near, num_perm=128)
    signatures: dict[str, Any] = {}
    with (
        (folder / "completions.jsonl").open(encoding="utf-8") as lines,
        (folder / "kept.jsonl").open("w", encoding="utf-8") as kept,
        (folder / "dropped.jsonl").open("w", encoding="utf-8") as dropped,
    ):
        for line in lines:
            row = json.loads(line)
            signature = MinHash(num_perm=128)
            signature.update_batch([ngram.encode() for ngram in _ngrams(fold(row["text"]))])
            like = [other for other in index.query(signature) if signatures[other].jaccard(signature) >= near]
            if like:
                row |= {"rule": "near_duplicate", "detail": [{"rule": "near_duplicate", "of": like[0]}]}
                dropped.write(json.dumps(row, ensure_ascii=False) + "\n")
            else:
                index.insert(row["id"], signature)
                signatures[row["id"]] = signature
                kept.write(line)


@contextmanager
def peak_mib() -> Iterator[list[float]]:
    """The most memory that this process's children held together, shared pages counted once, in samples of 0.2 s."""
    import psutil

    peak, done = [0.0], Event()

    def watch() -> None:
        while not done.wait(0.2):
            held = 0
            for child in psutil.Process().children(recursive=True):
                try:
                    held += child.memory_full_info().pss
                except psutil.Error:
                    continue
            peak[0] = max(peak[0], held / 2**20)

    watcher = Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


if __name__ == "__main__":
    main()
