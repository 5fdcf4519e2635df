"""`python -m benchmarks.gpu --out DIR`: trains and serves on the GPU of this machine, without network.

Each step runs in a process of its own and adds its rows to DIR/results.jsonl as they are measured, so a machine that
goes away costs one step. A step that fails adds its error, and its log is DIR/<step>.log; one that lacks a package adds
a line that says which. In the end all rows of DIR are printed as a table.

Models have Qwen2.5's shapes and random weights: tokens/s and memory mean something, losses only against each other.
`--small` makes all tiny and runs on a CPU. `--steps a,b`: only these. `--smollm2`: the folder of the real model.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu_steps import STEPS, Skip
from benchmarks.measure import flags, show
from pipeline.cli import run_stage
from pipeline.errors import UsageError

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "flash_attn")
COLUMNS = {
    "tokens_per_s": "{:,.0f}",
    "share_of_peak": "{:.1%}",
    "peak_gib": "{:.2f}",
    "loss": "{:.4f}",
    "seconds": "{:.0f}",
}


def main() -> None:
    options = flags(
        __doc__, out="", steps=",".join(STEPS), small=False, count=50, smollm2="", limit_s=600, work="", inside=""
    )
    if not options.out:
        raise UsageError("--out is missing; name the folder that the results go to")
    if unknown := set(options.steps.split(",")) - set(STEPS):
        raise UsageError(f"--steps {', '.join(sorted(unknown))}: there are {', '.join(STEPS)}")
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    if options.inside:
        run_step(options.inside, options, out / "results.jsonl")
        return
    facts = machine()
    print("\n".join(f"{name}: {value}" for name, value in facts.items()), flush=True)
    add(out / "results.jsonl", {"step": "machine", **facts})
    with tempfile.TemporaryDirectory() as work:
        for name in options.steps.split(","):
            error = run_apart(name, options, work, out)
            if error:
                add(out / "results.jsonl", {"step": name, "error": error})
    print(table(out / "results.jsonl"))


def machine() -> dict[str, str]:
    """Card, driver and versions. Does not load torch, which would take memory of the card from the steps."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        card = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        card = "none"
    found = {name: version(name) for name in PACKAGES if find_spec(name)}
    return {"card, driver, memory": card, "python": sys.version.split()[0], **found}


def run_apart(name: str, options: argparse.Namespace, work: str, out: Path) -> str:
    """Runs a step in a process of its own, and ends all that it started. Returns what went wrong; empty if nothing."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--inside", name, "--work", work, "--out", str(out)]
    command += ["--count", str(options.count), "--smollm2", options.smollm2, *(["--small"] if options.small else [])]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env |= {"CUDA_VISIBLE_DEVICES": ""} if name.endswith("-cpu") else {}
    log = out / f"{name}.log"
    with log.open("w") as file:
        child = subprocess.Popen(command, env=env, stderr=file, start_new_session=True)
        try:
            status = child.wait(options.limit_s)
        except subprocess.TimeoutExpired:
            return f"more than {options.limit_s} s"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    lines = log.read_text(errors="replace").strip().splitlines() or [""]
    return f"status {status}: {lines[-1]}" if status else ""


def run_step(name: str, options: argparse.Namespace, results: Path) -> None:
    """The step, in this process. Adds each row as it is measured."""
    try:
        for row in STEPS[name](options):
            add(results, {"step": name, **row})
    except Skip as reason:
        add(results, {"step": name, "skipped": str(reason)})


def add(results: Path, row: dict[str, Any]) -> None:
    with results.open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
    if row["step"] != "machine":
        print(", ".join(f"{key} {COLUMNS.get(key, '{}').format(value)}" for key, value in row.items()), flush=True)


def table(results: Path) -> str:
    """All rows that were measured, and below them what the steps said."""
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    head = ("step", *COLUMNS)
    lines, said = [head], []
    for row in rows:
        name = f"{row['step']} {row.get('what', '')}".strip()
        if any(column in row for column in COLUMNS):
            lines.append((name, *(form.format(row[key]) if key in row else "" for key, form in COLUMNS.items())))
        said += [f"{name}: {row[key]}" for key in ("note", "skipped", "error") if key in row]
    return "\n".join([show(lines), *said])


if __name__ == "__main__":
    run_stage(main)
