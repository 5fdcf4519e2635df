"""`python -m benchmarks.kills`: kills `generate` at random moments, hundreds of times, and counts what that cost.

A run of `--requests` requests is killed (SIGKILL) again and again at random moments until it is done, then another
begins, until there have been `--kills` of them. `--power-cuts` of the kills also cut the journal at a random byte of
its last lines, as a power cut before the next fsync would: an answer lost that way must be asked again, exactly once.
Counted: answers that were in the journal at a kill and are not there at the end (lost), requests with two answers or
none (duplicated, missing), and lines at the end that are no record (torn).
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.http_server import running
from benchmarks.simulated import write_recipe

TAIL_BYTES = 4096  # as far back a power cut may take the journal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--power-cuts", type=float, default=0.2, help="share of the kills that cut the journal, too")
    parser.add_argument("--processes", type=int, default=1, help="generate.processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=2, help="runs beside each other")
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    with running("benchmarks.stub", "--delay-ms", "50", "--jitter-ms", "100") as url:
        shares = [len(range(part, options.kills, options.at_once)) for part in range(options.at_once)]
        with ThreadPoolExecutor(options.at_once) as pool:
            for part in pool.map(
                lambda n: work(url, options, shares[n], random.Random(options.seed + n)), range(len(shares))
            ):
                counts += part
    names = ("runs", "kills", "while asking", "power cuts", "cut by them", "lost", "duplicated", "missing", "torn")
    print(f"seed {options.seed}: " + ", ".join(f"{counts[name]} {name}" for name in names))
    if counts["lost"] or counts["duplicated"] or counts["missing"] or counts["torn"]:
        sys.exit(1)


def work(url: str, options: argparse.Namespace, kills: int, rng: random.Random) -> Counter[str]:
    """Runs, one after the other, until so many kills have been dealt."""
    counts: Counter[str] = Counter()
    while counts["kills"] < kills:
        with tempfile.TemporaryDirectory() as folder:
            counts += one_run(url, options, kills - counts["kills"], rng, Path(folder))
        print(f"{counts['kills']} of {kills} kills, {counts['runs']} runs", file=sys.stderr)
    return counts


def one_run(url: str, options: argparse.Namespace, most: int, rng: random.Random, folder: Path) -> Counter[str]:
    """One run from its first start to its end, killed on the way."""
    recipe = write_recipe(folder, url, options.requests, options.processes, "64")
    journal = folder / "run" / "completions.jsonl"
    command = [sys.executable, "-m", "generate", str(recipe), "--run", str(folder / "run"), "--quiet"]
    counts: Counter[str] = Counter(runs=1)
    seen: set[str] = set()
    while True:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if counts["kills"] < most:
            before = size(journal)
            deadline = time.monotonic() + 20
            at_start = rng.random() < 0.1  # while it reads what is there; else while it asks
            while not at_start and size(journal) == before and process.poll() is None:
                time.sleep(0.005)
                if time.monotonic() > deadline:
                    break
            time.sleep(rng.uniform(0, 0.5))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                counts["kills"] += 1
                counts["while asking"] += size(journal) > before
                held = whole_ids(journal)
                if rng.random() < options.power_cuts and journal.exists():
                    counts["power cuts"] += 1
                    cut(journal, rng)
                    left = whole_ids(journal)
                    counts["cut by them"] += len(held) - len(left)
                    seen -= held - left
                    held = left
                counts["lost"] += len(seen - held)
                seen |= held
                continue
        _, errors = process.communicate()
        if process.returncode == 0:
            break
        if b"another process" in errors:  # children of a killed parent may hold the run for a moment
            time.sleep(0.05)
            continue
        raise SystemExit(f"generate ended with {process.returncode}: {errors.decode()}")
    ids: Counter[str] = Counter()
    for line in journal.read_bytes().splitlines():
        try:
            ids[json.loads(line)["id"]] += 1
        except (ValueError, KeyError):
            counts["torn"] += 1
    counts["lost"] += len(seen - set(ids))
    counts["duplicated"] += sum(count - 1 for count in ids.values())
    counts["missing"] += options.requests - len(ids)
    return counts


def size(journal: Path) -> int:
    return journal.stat().st_size if journal.exists() else 0


def cut(journal: Path, rng: random.Random) -> None:
    """Takes away up to TAIL_BYTES of the end."""
    with journal.open("r+b") as file:
        file.truncate(max(0, size(journal) - rng.randrange(TAIL_BYTES)))


def whole_ids(journal: Path) -> set[str]:
    """The ids of the whole lines."""
    if not journal.exists():
        return set()
    lines = journal.read_bytes().split(b"\n")[:-1]
    return {json.loads(line)["id"] for line in lines if line}


if __name__ == "__main__":
    main()
