"""What the tasks of lm-eval say of a served model: what a student forgot of all that it is not trained on.

Runs EleutherAI's `lm_eval` command against our server, and keeps its files in evaluation/served-<model>/. The command
has an environment of its own, since it needs a package that is named `evaluate`, as ours is.
"""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import msgspec

from evaluate.document import Estimate, Z
from evaluate.measure.results import TaskResult
from pipeline.errors import DistillError, UsageError
from pipeline.recipe import Recipe
from serve.server import Server

COMMAND = "lm_eval"


def find_command() -> str:
    """Where `lm_eval` is. Raises UsageError if it is not installed."""
    found = shutil.which(COMMAND)
    if found is None:
        raise UsageError(
            f"evaluate.lm_eval: there is no `{COMMAND}` command; install it apart from this project "
            "(pipx install 'lm-eval[api]'), or take the key out of the recipe"
        )
    return found


def measure_tasks(recipe: Recipe, server: Server, folder: Path) -> TaskResult:
    """Runs all tasks. Raises DistillError if the command fails."""
    wanted, out, log = recipe.evaluate, folder / "lm_eval", folder / "lm_eval.log"
    about = {
        "model": server.served_name,
        "base_url": f"{server.base_url}/chat/completions",
        "num_concurrent": wanted.speed_concurrency,
    }
    command = [find_command(), "--model", "local-chat-completions", "--apply_chat_template"]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in about.items())]
    command += ["--tasks", ",".join(wanted.lm_eval), "--output_path", str(out)]
    command += ["--limit", str(wanted.lm_eval_limit)] if wanted.lm_eval_limit else []
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    own["OPENAI_API_KEY"] = os.environ.get("VLLM_API_KEY", "none")
    with log.open("wb") as file:
        code = subprocess.run(command, cwd=folder, env=own, stdout=file, stderr=file, check=False).returncode
    results = sorted(out.rglob("results_*.json"))
    if code or not results:
        raise DistillError(f"{COMMAND} ended with {code} and {len(results)} results; see {log}")
    return TaskResult(scores=read_scores(msgspec.json.decode(results[-1].read_bytes())["results"]))


def read_scores(results: dict[str, dict[str, Any]]) -> dict[str, Estimate]:
    """The figures of lm-eval's `results` by task and metric, each with the interval of its standard error."""
    found = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, _, how = key.partition(",")
            if isinstance(value, float) and not metric.endswith("_stderr"):
                error = values.get(f"{metric}_stderr,{how}")
                spread = Z * error if isinstance(error, float) else 0.0
                found[f"{task} {metric}"] = Estimate(value, value - spread, value + spread)
    return found
