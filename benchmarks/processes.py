"""`python -m benchmarks.processes`: one training in one process, in two by DDP, and in two by FSDP, on this machine.

Each is the whole command of a user, on the same rows (made up, as in benchmarks.training). The processes share the
machine's threads. Shown: tokens per second, padding not counted; the highest resident memory of a process; the
validation loss; how far the loss of any step is from that of one process.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.made_up import made_up_rows
from benchmarks.measure import flags, one_of, show
from evaluate.measure.results import answer_row
from pipeline.cli import run_stage
from pipeline.models import resolve_model
from pipeline.records import Kept, Message, Prompt, encode_line
from pipeline.resources import peak_bytes

WAYS: dict[str, list[str]] = {"one": [], "DDP": ["--multi_gpu"], "FSDP": ["--use_fsdp"]}


def main() -> None:
    kinds = {"method": one_of("lora", "full")}
    options = flags(__doc__, kinds, model="embedded:smollm2-135m", rows=48, processes=2, method="full")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = written_recipe(folder, resolve_model(options.model), options.method)
        logs, peaks = {}, {}
        for way, flag in WAYS.items():
            run = folder / way
            run.mkdir()
            (run / "kept.jsonl").write_bytes(b"".join(encode_line(row) for row in kept_rows(options.rows)))
            count = options.processes if flag else 1
            launch = ["-m", "accelerate.commands.launch", *flag, "--num_processes", str(count)] if flag else []
            command = [sys.executable, *launch, "-m", "train", str(recipe), "--run", str(run), "--force"]
            peaks[way] = peak_mib(command, threads=max(1, (os.cpu_count() or 1) // count))
            logs[way] = json.loads((run / "student" / "training_log.json").read_bytes())
    print(f"{options.model}, method {options.method}, {options.rows} rows, {options.processes} processes")
    print(report(logs, peaks))


def kept_rows(count: int) -> list[Kept]:
    rows, made = made_up_rows(count), list[Kept]()
    for number, row in enumerate(rows):
        prompt = Prompt(id=f"p{number}", messages=[Message("user", row["prompt"][0]["content"])])
        made.append(answer_row("made up", prompt, row["completion"][0]["content"]))
    return made


def written_recipe(folder: Path, model: str, method: str) -> Path:
    file = folder / "recipe.yaml"
    train = {"method": method, "epochs": 1, "learning_rate": 2e-5, "lora_dropout": 0, "gradient_checkpointing": False}
    prompts = {"template": "-", "count": 1, "validation": 0.1, "test": 0.05}
    recipe = {"name": "processes", "teacher": {"model": "made-up"}, "student": {"model": model}}
    file.write_text(yaml.safe_dump(recipe | {"prompts": prompts, "train": train}))
    return file


def peak_mib(command: list[str], *, threads: int) -> float:
    """Runs a command to its end; the highest resident memory of a process among it and its children.

    Raises CalledProcessError if it fails.
    """
    process = psutil.Popen(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, *(peak_bytes(one.pid) for one in (process, *process.children(recursive=True))))
        time.sleep(0.2)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return peak / 2**20


def report(logs: dict[str, Any], peaks: dict[str, float]) -> str:
    """A table; the last column compares each step's loss with that of one process."""
    alone = [step["loss"] for step in logs["one"]["loss"]]
    rows = [("", "tokens/s", "peak MiB of a process", "validation loss", "largest difference of a step's loss")]
    for way, log in logs.items():
        apart = max(abs(step["loss"] / other - 1) for step, other in zip(log["loss"], alone, strict=True))
        loss = min(entry["loss"] for entry in log["eval"])
        rows.append((way, f"{log['tokens'] / log['wall_s']:.0f}", f"{peaks[way]:,.0f}", f"{loss:.4f}", f"{apart:.2%}"))
    return show(rows)


if __name__ == "__main__":
    run_stage(main)
