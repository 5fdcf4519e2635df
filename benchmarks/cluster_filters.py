"""`python -m benchmarks.cluster_filters`: the filters of one machine and of a Ray cluster on it, on the same answers.

Made-up Korean stories, 5% of them near copies of another and 2% exact ones, the flagship's first five rules and
near-duplicates. Each side runs in a process of its own. It prints seconds and the peak memory of the largest process
of each kind (unique, in samples of 0.2 s), and whether the two sides wrote the same bytes. The nodes share this
machine's cores: a cluster can win nothing here, and the difference is what it costs. They run before the clock starts.
"""

import argparse
import random
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.chapter_filter import RULES
from benchmarks.measure import between, flags, measured, show
from benchmarks.ray_nodes import ray_cluster
from benchmarks.stories import PROMPT, Writer, completion, recipe_of
from filters.run import filter_run
from pipeline.cli import run_stage
from pipeline.records import encode_line
from pipeline.rundir import RunDir

NEAR_COPIES, COPIES = 0.05, 0.02
STORE = 1 << 30  # bytes of a node's object store
FILES = "kept.jsonl", "dropped.jsonl", "filter_report.json"


def main() -> None:
    options = flags(__doc__, {"near": between(0.5, 1)}, rows=1_000_000, nodes=2, near=0.8, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        print(compare(Path(folder), options))


def compare(folder: Path, options: argparse.Namespace) -> str:
    """Writes the answers, and measures each side on them."""
    alone, cluster = RunDir(folder / "alone"), RunDir(folder / "cluster")
    alone.path.mkdir()
    write(alone.completions, options)
    cluster.path.mkdir()
    cluster.completions.hardlink_to(alone.completions)
    print(f"{options.rows:,} answers, {alone.completions.stat().st_size >> 20:,} MiB", flush=True)
    rows: list[tuple[str, ...]] = [("side", "seconds", "rows/s", "peak MiB by kind of process")]
    rows.append(figures("one machine", options.rows, on_one_machine, alone, options.near))
    with ray_cluster(options.nodes, blind=0, store=STORE) as (address, _):
        rows.append(figures(f"{options.nodes} nodes", options.rows, on_a_cluster, cluster, options.near, address))
    same = [(alone.path / name).read_bytes() == (cluster.path / name).read_bytes() for name in FILES]
    return f"{show(rows)}\nthe same bytes: {dict(zip(FILES, same, strict=True))}"


def figures(side: str, rows: int, filters: Callable[..., None], *arguments: object) -> tuple[str, ...]:
    """A side's line of the table."""
    peaks = dict[str, float]()
    seconds = measured(filters, *arguments, sample=lambda: raise_peaks(peaks)).seconds
    shown = ", ".join(f"{kind} {mib:,.0f}" for kind, mib in sorted(peaks.items()))
    return side, f"{seconds:.1f}", f"{rows / seconds:,.0f}", shown


def write(path: Path, options: argparse.Namespace) -> None:
    """The answers; exact copies stand at random places."""
    rng, texts = random.Random(options.seed), list[str]()
    with path.open("wb") as file:
        stories = Writer(options.seed).stories(options.rows, NEAR_COPIES)
        for number, story in enumerate(stories):
            text = rng.choice(texts) if texts and rng.random() < COPIES else story.text
            if len(texts) < 100_000:
                texts.append(text)
            file.write(encode_line(completion(number, text, PROMPT)))


def settings(near: float) -> dict[str, Any]:
    return {"rules": RULES, "dedup": {"near": near, "ngram": 3}}


def on_one_machine(run: RunDir, near: float) -> None:
    filter_run(recipe_of(settings(near)), run, Path("recipe.yaml"))


def on_a_cluster(run: RunDir, near: float, address: str) -> None:
    from scale.filtering import cluster_machine

    with cluster_machine(address) as machine:
        filter_run(recipe_of(settings(near)), run, Path("recipe.yaml"), machine=machine)


def raise_peaks(peaks: dict[str, float]) -> None:
    """Raises each kind's peak to what one process of it holds by itself now."""
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended
            name = "tasks" if "ray::" in " ".join(child.cmdline()[:1]) else child.name()
            kind = name if name in ("tasks", "raylet", "gcs_server") else "filters"
            peaks[kind] = max(peaks.get(kind, 0), child.memory_full_info().uss / 2**20)


if __name__ == "__main__":
    run_stage(main)  # also when it is terminated, it ends the nodes
