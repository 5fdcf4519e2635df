"""`python -m benchmarks.near_duplicates`: duplicates among made-up Korean stories, found by the filters and by
datasketch: precision, recall, time and memory, side by side.

5% of the stories are copies of another, 5-15% of the characters changed. The truth is computed without any of the code
under test: the exact Jaccard similarity of the sets of 3-grams of each copy and its original. A dropped row counts as
right if it is as similar as the threshold, exactly, to the row it was dropped for. Both sides read the same JSONL, in a
process of their own, and write what they keep. datasketch is asked before each insertion, and its candidates are
checked by its own estimate. It has the bands that it chooses for the threshold; `--same-bands` asks it once more, with
as many as the filters have, which takes six times as long.

datasketch is for this benchmark only: `pip install datasketch`.
"""

import argparse
import importlib.util
import json
import re
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

from benchmarks.stories import NAMES, PLACES, Writer
from benchmarks.table import show
from filters.minhash import fold, shape_for

NGRAM = 3
COPIES = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=int, default=200_000)
    parser.add_argument("--near", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sides", default="filters,datasketch")
    parser.add_argument("--same-bands", action="store_true", help="datasketch once more, with as many bands as ours")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--datasketch", type=Path, help=argparse.SUPPRESS)  # that side's own process: the folder
    parser.add_argument("--bands", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.datasketch:
        with_datasketch(options.datasketch, options.near, tuple(options.bands) if options.bands else None)
        return
    if "datasketch" in options.sides and importlib.util.find_spec("datasketch") is None:
        sys.exit("datasketch is not installed: pip install datasketch, or leave it out with --sides filters")
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), options)
    print(describe(figures, options))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


def measure(folder: Path, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Each side's figures."""
    texts, planted = write_run(folder, options.stories, options.seed)
    alike = {copy: original for copy, original in planted.items() if exact(texts, copy, original) >= options.near}
    print(f"{len(texts):,} stories, {len(planted):,} copies, {len(alike):,} of them {options.near} similar or more")
    recipe = write_recipe(folder, options.near)
    datasketch = ["-m", "benchmarks.near_duplicates", "--datasketch", str(folder), "--near", str(options.near)]
    commands = {
        "filters": ["-m", "filters", str(recipe), "--run", str(folder)],
        "filters, rules only": ["-m", "filters", str(recipe), "--run", str(folder), "--filters.dedup", "null"],
        "datasketch": datasketch,
    }
    if options.same_bands:
        commands["datasketch, bands as here"] = [*datasketch, "--bands", *map(str, shape_for(options.near))]
    figures = {}
    for side, command in commands.items():
        if side.split(",")[0] not in options.sides:
            continue
        started = time.perf_counter()
        with peak_mib() as peak:
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        figures[side] = {"seconds": time.perf_counter() - started, "peak_mib": peak[0]}
        if side != "filters, rules only":
            figures[side] |= judge(dropped_by(folder), texts, alike, options.near)
    return figures


def write_run(folder: Path, count: int, seed: int) -> tuple[list[str], dict[int, int]]:
    """Writes completions.jsonl; returns the texts by number, and for each copy its original."""
    texts: list[str] = []
    planted: dict[int, int] = {}
    with (folder / "completions.jsonl").open("w", encoding="utf-8") as file:
        for number, (text, copy_of) in enumerate(Writer(seed).stories(count, COPIES)):
            texts.append(text)
            if copy_of is not None:
                planted[number] = copy_of
            asked = (
                f"어린이용 한국어 동화 한 편. 등장: {NAMES[number % 8]}. 장소: {PLACES[number // 8 % 8]}. 200~400자."
            )
            row = {
                "id": f"{number:016x}",
                "prompt_id": f"{number:016x}",
                "messages": [{"role": "user", "content": asked}],
                "slots": {"character": NAMES[number % 8], "place": PLACES[number // 8 % 8]},
                "endpoint": "http://127.0.0.1:8000/v1",
                "sampling": {"temperature": 0.8, "top_p": 0.9, "max_tokens": 500, "seed": number},
                "text": text,
                "finish_reason": "stop",
                "model": "teacher",
                "usage": {"prompt_tokens": 60, "completion_tokens": 250},
                "latency_s": 1.5,
                "attempts": 1,
                "created": "2026-01-01T00:00:00Z",
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return texts, planted


def write_recipe(folder: Path, near: float) -> Path:
    recipe = {
        "name": "near_duplicates",
        "teacher": {"model": "teacher"},
        "prompts": {"count": 1, "template": "동화 한 편."},
        "filters": {"dedup": {"near": near, "ngram": NGRAM}},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    return path


def exact(texts: list[str], first: int, second: int) -> float:
    """The Jaccard similarity of the two texts' sets of n-grams."""
    one, other = (_ngrams(fold(texts[number])) for number in (first, second))
    return len(one & other) / len(one | other)


def _ngrams(folded: str) -> set[str]:
    return {folded[start : start + NGRAM] for start in range(max(1, len(folded) - NGRAM + 1))}


def dropped_by(folder: Path) -> dict[int, int]:
    """Numbers of the dropped stories, and of those they were dropped for."""
    found = {}
    with (folder / "dropped.jsonl").open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            other = re.search(r"[0-9a-f]{16}$", row["detail"][row["rule"]])
            assert other is not None, row["detail"]
            found[int(row["id"], 16)] = int(other[0], 16)
    return found


def judge(dropped: dict[int, int], texts: list[str], alike: dict[int, int], near: float) -> dict[str, float]:
    """Recall: of the pairs as similar as the threshold, those of which one story was dropped."""
    right = sum(exact(texts, row, other) >= near for row, other in dropped.items())
    found = sum(copy in dropped or original in dropped for copy, original in alike.items())
    return {"dropped": len(dropped), "precision": right / max(1, len(dropped)), "recall": found / max(1, len(alike))}


def with_datasketch(folder: Path, near: float, bands: tuple[int, int] | None) -> None:
    """The same task as the filters have, with datasketch; kept.jsonl and dropped.jsonl are written alike."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=near, num_perm=128, params=bands)
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
                row |= {"rule": "near_duplicate", "detail": {"near_duplicate": f"similar to {like[0]}"}}
                dropped.write(json.dumps(row, ensure_ascii=False) + "\n")
            else:
                index.insert(row["id"], signature)
                signatures[row["id"]] = signature
                kept.write(line)


@contextmanager
def peak_mib() -> Iterator[list[float]]:
    """The most memory that this process's children held together, shared pages counted once; looked at 5 times a
    second."""
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


def describe(figures: dict[str, dict[str, float]], options: argparse.Namespace) -> str:
    rows: list[tuple[str, ...]] = [("side", "dropped", "precision", "recall", "seconds", "rows/s", "peak MiB")]
    for side, row in figures.items():
        quality = (
            (f"{row['dropped']:,.0f}", f"{row['precision']:.4f}", f"{row['recall']:.4f}")
            if "dropped" in row
            else ("-", "-", "-")
        )
        per_s = options.stories / row["seconds"]
        rows.append((side, *quality, f"{row['seconds']:.1f}", f"{per_s:,.0f}", f"{row['peak_mib']:,.0f}"))
    table = show(rows)
    for side in figures.keys() - {"filters", "filters, rules only"} if "filters" in figures else ():
        ours, theirs = figures["filters"], figures[side]
        table += (
            f"\n{side}: {theirs['seconds'] / ours['seconds']:.1f} times the filters' time, "
            f"{theirs['peak_mib'] / ours['peak_mib']:.1f} times their memory"
        )
    return table


if __name__ == "__main__":
    main()
