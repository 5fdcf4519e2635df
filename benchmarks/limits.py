"""`python -m benchmarks.limits`: what one driver of a cluster can do, and what a large fleet asks of it.

The driver's own code is run here without a network: the table of leases with `--workers` of them and a clock that this
script moves, the reading of their parts into a journal, the set of answered ids. From that it computes where a fleet of
`--gpus`, each of which makes `--tokens-per-s`, passes what one driver can do in a run of `--answers`.
Times are CPU seconds of one core. docs/scale_limits.md explains the table.
"""

import asyncio
import gzip
import json
import os
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from itertools import chain, count
from pathlib import Path
from typing import Any

from benchmarks.measure import flags, show
from benchmarks.runs import recipe_for
from benchmarks.stories import PROMPT, completion
from generate.budget import Spend
from generate.context import opened_run
from generate.idset import WIDTH, IdSet
from generate.journal import read_journal
from generate.progress import Counters
from pipeline.cli import run_stage
from pipeline.records import Completion, encode_line
from pipeline.rundir import RunDir
from scale.collect import Collector
from scale.generation import BEAT_S
from scale.parts import ROWS, SECONDS, part_name
from scale.request_leases import Item, Leases, LeaseState
from scale.storage import Folder

MOST = Spend(700, 700)
IDS = 1_000_000  # in the set that is looked at: a look-up takes as long in a larger one
PUT, GET = 0.005 / 1000, 0.0004 / 1000  # USD per request: S3 Standard, us-east-1
PUTS, GETS = 2, 4  # requests per part: it and the account are written and read; two reads find nothing yet
PUTS_PER_S, GETS_PER_S = 3500, 5500  # that S3 takes under one prefix


def main() -> None:
    fleet = {"workers": 1000, "gpus": 1000, "tokens_per_s": 5000.0, "answer_tokens": 300, "answers": 10**9}
    options = flags(__doc__, **fleet, rows=50_000, beats=20)
    found = lease_table(options.workers, options.beats) | driver(options.rows) | ids(options.answers)
    print(json.dumps({name: float(f"{value:.4g}") for name, value in found.items()}))
    print(show(arithmetic(options, found)))


def cpu_s(call: Callable[[], Any]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def lease_table(workers: int, beats: int) -> dict[str, float]:
    """Each worker has an endpoint of its own, and says at each heartbeat that it has room for one more request."""
    items = (Item(str(number), b"", MOST) for number in count())
    leases = Leases(items, LeaseState(), IdSet(), tokens=10**15, lease_s=30)
    weights = {f"http://node-{number}": 1.0 for number in range(workers)}

    def beat(now: float) -> None:
        leases.silent(now)
        for name in leases.workers:
            askers = leases.askers(name)
            leases.offer(name, askers)
            leases.lease(name, 1)
            leases.heard(name, askers, now)

    began = time.process_time()
    for number in range(workers):
        leases.join(str(number), leases.deal(weights, workers - number), 0.0)
    joined = time.process_time()
    for number in range(beats):
        beat(BEAT_S * number)
    beaten = time.process_time()
    return {
        "join of all workers, s": joined - began,
        "heartbeat, us": (beaten - joined) / workers / beats * 1e6,
    }


def driver(rows: int) -> dict[str, float]:
    """Makes a lease's items of prompts, and reads a worker's parts into the journal."""
    with tempfile.TemporaryDirectory() as name:
        folder, store = Path(name), Folder(Path(name) / "store")
        recipe, run = recipe_for(folder, "http://127.0.0.1/v1", rows), RunDir(folder / "run")
        run.path.mkdir()
        size = sum(store.put_new(part, data) * len(data) for part, data in parts(rows))
        with opened_run(recipe, run, Counters(), say=print, show=lambda: None) as opened:
            collector = Collector(opened, store, lease_s=30)
            looks = chain(opened.left.survey(recipe, Counters()), opened.jobs())  # what is left; those to ask
            prompts_s = cpu_s(lambda: sum(1 for _ in looks))
            collector.leases.join("w", [], 0.0)
            leased_s = cpu_s(lambda: collector.leases.lease("w", rows))
            read_s = cpu_s(lambda: asyncio.run(collector.collect("w")))
        journal = run.completions
        return {
            "lease of a request, us": leased_s / rows * 1e6,
            "answer into the journal, us": read_s / rows * 1e6,
            "journal read at a start, us": cpu_s(lambda: read_journal(journal, Completion)) / rows * 1e6,
            "prompt looked at twice at a start, us": prompts_s / rows * 1e6,
            "bytes of an answer": journal.stat().st_size / rows,
            "bytes of it in a part": size / rows,
        }


def parts(rows: int) -> Iterator[tuple[str, bytes]]:
    for number, start in enumerate(range(0, rows, ROWS)):
        lines = (encode_line(completion(row, os.urandom(300).hex(), PROMPT)) for row in range(start, start + ROWS))
        yield part_name("completions", "w", number), gzip.compress(b"".join(lines), compresslevel=1)


def ids(answers: int) -> dict[str, float]:
    known = IdSet()
    added_s = cpu_s(lambda: [known.add(str(n)) for n in range(IDS)])
    size = sys.getsizeof(known._buckets) + sum(map(sys.getsizeof, known._buckets))
    return {
        "id added, us": added_s / IDS * 1e6,
        "look-up of an id, us": cpu_s(lambda: [str(n) in known for n in range(IDS)]) / IDS * 1e6,
        "ids, GB": size / IDS * answers / 1e9,
        "two ids alike, %": answers**2 / 2 / 2 ** (8 * WIDTH) * 100,
    }


def arithmetic(options: Namespace, found: dict[str, float]) -> list[tuple[str, ...]]:
    """What the fleet asks for, and what that takes of one driver."""
    per_s, answers = options.gpus * options.tokens_per_s / options.answer_tokens, options.answers
    parts_per_s, beats_per_s = max(per_s / ROWS, options.workers / SECONDS), options.workers / BEAT_S
    driver_us = found["lease of a request, us"] + found["answer into the journal, us"]
    look_up_us = found["look-up of an id, us"]
    at_a_start = "journal read at a start, us", "prompt looked at twice at a start, us", "id added, us"
    restart_us = sum(found[name] for name in at_a_start)
    size, puts, gets = found["bytes of an answer"], PUTS * parts_per_s, GETS * parts_per_s
    share, usd = max(puts / PUTS_PER_S, gets / GETS_PER_S), (puts * PUT + gets * GET) * answers / per_s
    return [
        ("what", "how much", "takes"),
        ("answers", f"{per_s:,.0f}/s, {answers / per_s / 86400:.1f} days", f"{per_s * driver_us / 1e6:.2f} cores"),
        ("look-ups of ids, 3 per answer", f"{3 * per_s:,.0f}/s", f"{3 * per_s * look_up_us / 1e6:.2f} cores"),
        ("heartbeats", f"{beats_per_s:,.0f}/s", f"{beats_per_s * found['heartbeat, us'] / 1e6:.2f} cores"),
        ("a start after a kill", f"{answers:,} rows", f"{restart_us * answers / 3.6e9:,.1f} hours"),
        ("the journal", f"{per_s * size / 1e6:.0f} MB/s", f"{answers * size / 1e12:.2f} TB"),
        ("puts and gets", f"{puts:.0f} and {gets:.0f}/s", f"{share:.0%} of one prefix's rate, {usd:,.0f} USD"),
        ("a set of ids", f"{answers:,}", f"{found['ids, GB']:.0f} GB; two alike: {found['two ids alike, %']:.1f}%"),
    ]


if __name__ == "__main__":
    run_stage(main)
