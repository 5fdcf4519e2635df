"""`python -m benchmarks.kills`: kills `generate` at random moments, hundreds of times, and counts what that cost.

A run of `--requests` requests is killed (SIGKILL) again and again at random moments until it is done, then another
begins, until there have been `--kills` of them; `--at-once` runs go on beside each other. The share `--power-cuts` of
the kills also cuts the journal at a random byte of its last lines, as a power cut before the next fsync would: an
answer lost that way must be asked again, exactly once. Counted: answers that were in the journal at a kill and are not
there at the end (lost), requests with two answers or none (duplicated, missing), and lines that are no record (torn).
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from math import ceil
from pathlib import Path

from benchmarks.http_server import running
from benchmarks.measure import between, flags
from benchmarks.runs import recipe_for
from pipeline.cli import run_stage
from pipeline.rundir import RunDir

TAIL_BYTES = 4096  # a power cut takes at most so much of the journal
FAULTS = ("lost", "duplicated", "missing", "torn")


def main() -> None:
    kinds = {"power_cuts": between(0, 1)}
    options = flags(__doc__, kinds, kills=500, requests=2000, power_cuts=0.2, processes=1, seed=0, at_once=2)
    with (
        running("benchmarks.stub", "--delay-ms", 50, "--jitter-ms", 100) as url,
        ThreadPoolExecutor(options.at_once) as pool,
    ):
        seeds, kills = range(options.seed, options.seed + options.at_once), ceil(options.kills / options.at_once)
        calls = [pool.submit(work, url, options, kills, random.Random(seed)) for seed in seeds]
    counts = sum((call.result() for call in calls), Counter[str]())
    names = ("runs", "kills", "while asking", "power cuts", "cut by them", *FAULTS)
    print(f"seed {options.seed}: " + ", ".join(f"{counts[name]} {name}" for name in names))
    sys.exit(1 if any(counts[fault] for fault in FAULTS) else 0)


def work(url: str, options: argparse.Namespace, kills: int, rng: random.Random) -> Counter[str]:
    """Runs, one after the other, until `generate` was killed `kills` times."""
    counts: Counter[str] = Counter()
    while counts["kills"] < kills:
        with tempfile.TemporaryDirectory() as folder:
            counts += one_run(url, options, kills - counts["kills"], rng, Path(folder))
        print(f"{counts['kills']} of {kills} kills, {counts['runs']} runs", file=sys.stderr)
    return counts


def one_run(url: str, options: argparse.Namespace, most: int, rng: random.Random, folder: Path) -> Counter[str]:
    """One run from its first start to its end, killed `most` times at most."""
    settings = {"concurrency": 64, "processes": options.processes}
    made = recipe_for(folder, url, options.requests, sampling={"max_tokens": 500}, generate=settings)
    recipe = folder / "recipe.yaml"
    recipe.write_text(made.model_dump_json(exclude_unset=True))  # JSON is YAML, too
    journal = RunDir(folder / "run").completions
    command = [sys.executable, "-m", "generate", str(recipe), "--run", str(folder / "run"), "--quiet"]
    counts: Counter[str] = Counter(runs=1)
    seen: set[str] = set()  # what must be in the journal
    while True:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if counts["kills"] < most and kill(process, journal, rng, counts):
            held = whole_ids(journal)
            counts["lost"] += len(seen - held)
            seen |= held
            if rng.random() < options.power_cuts and journal.exists():
                cut(journal, rng)
                seen = whole_ids(journal)
                counts["power cuts"] += 1
                counts["cut by them"] += len(held - seen)
            continue
        _, errors = process.communicate()
        if process.returncode == 0:
            return counts + verdict(journal, seen, options.requests)
        if b"another process" not in errors:  # children of a killed parent may hold the run for a moment
            raise SystemExit(f"generate ended with {process.returncode}: {errors.decode()}")
        time.sleep(0.05)


def kill(process: "subprocess.Popen[bytes]", journal: Path, rng: random.Random, counts: Counter[str]) -> bool:
    """Kills the process at a random moment, mostly while it asks; False if it ended before."""
    before, deadline = size(journal), time.monotonic() + 20
    at_start = rng.random() < 0.1  # while it reads what is there
    while not at_start and size(journal) == before and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.5))
    if process.poll() is not None:
        return False
    process.kill()
    process.communicate()
    counts["kills"] += 1
    counts["while asking"] += size(journal) > before
    return True


def verdict(journal: Path, seen: set[str], requests: int) -> Counter[str]:
    """What is wrong with the journal of a finished run."""
    counts: Counter[str] = Counter()
    ids: Counter[str] = Counter()
    for line in journal.read_bytes().splitlines():
        try:
            ids[json.loads(line)["id"]] += 1
        except (ValueError, KeyError):
            counts["torn"] += 1
    counts["lost"] = len(seen - set(ids))
    counts["duplicated"] = ids.total() - len(ids)
    counts["missing"] = requests - len(ids)
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
    run_stage(main)
