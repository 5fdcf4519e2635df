"""A vLLM server as a context manager: checks, starts, waits, measures its memory, and ends it with all its children.

Reads the server's log and /proc, and writes the log. `serve.command` decides how vLLM is called, `serve.checks` what is
checked first, and `serve.guard` makes sure that nothing outlives this process.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import psutil

from pipeline.errors import DistillError, UsageError
from pipeline.models import resolve_model
from pipeline.resources import peak_bytes
from pipeline.serve_config import ServeConfig
from serve.checks import check_memory, check_port, check_vllm, port_taken
from serve.command import Command, build_command
from serve.machine import detect
from serve.model_facts import model_facts
from serve.vllm_log import cause, last_line, tail

POLL_S = 0.25
ANSWER_S = 10.0  # for a server to say that it is ready
STOP_S = 40.0  # more than the guard ever needs
RESTARTS = 3  # of a server that ended by itself
WRONG_USAGE = 2  # vLLM's exit code for a flag it does not know
CAUSE_CHARS = 300

Waiting = Callable[[float, str], None]  # seconds since the start, and the last line of vLLM's log


class Server:
    """A running server. Made by `serving`."""

    def __init__(self, command: Command, guard: "subprocess.Popen[bytes]", log: Path) -> None:
        self.command = command
        self.served_name = command.served_name
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(command.host, command.host)  # reached from this machine
        self.base_url = url_of(host, command.port)
        self.log = self._first_log = log
        self.startup_s = 0.0  # seconds from the start of the process until it was ready
        self._guard = guard
        self._restarts = 0
        self._peak = 0

    def peak_rss(self) -> int:
        """The most bytes of resident memory, summed over the server's processes.

        It is the sum of their peaks (VmHWM). Pages that processes share are counted in each of them.
        """
        with contextlib.suppress(psutil.NoSuchProcess):
            tree = psutil.Process(self._guard.pid).children(recursive=True)
            self._peak = max(self._peak, sum(peak_bytes(process.pid) for process in tree))
        return self._peak

    def listens(self) -> bool:
        """Whether one of the server's processes listens at its port; True where the system does not say."""
        try:
            for process in psutil.Process(self._guard.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    for connection in process.net_connections("tcp"):
                        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == self.command.port:
                            return True
        except psutil.NoSuchProcess:
            return False
        except (psutil.AccessDenied, OSError):
            return True
        return False

    def wait(self, timeout: float | None = None) -> int | None:
        """Waits for the server to end by itself. Returns its exit code, or None after `timeout` seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._guard.wait(timeout)
        return None

    def keep_up(self, say: Callable[[str], None]) -> bool:
        """Starts the server again if it has ended by itself, as after a fault of a GPU, and says so. Waits for nothing.

        Returns False if it has ended too often, or cannot be started. Each start has a log of its own.
        """
        if self.wait(0) is None:
            return True
        if self._restarts == RESTARTS:
            return False
        self._restarts += 1
        say(f"{self.failure('while it was serving')}; starting it again ({self._restarts} of {RESTARTS})")
        self.stop()  # a guard that was killed has left its server
        self.log = self._first_log.with_suffix(f".{self._restarts + 1}.log")
        try:
            with open_log(self.log) as output:
                self._guard = _start(self.command, output)
        except (OSError, UsageError):
            return False
        return True

    def failure(self, when: str) -> DistillError:
        """The error that says why the server ended."""
        code = self._guard.wait()
        text = tail(self.log)
        reason = cause(text) or last_line(text) or "it printed nothing"
        if code == 128 + 9:
            reason = "it was killed; out of memory?"
        kind = UsageError if code == WRONG_USAGE else DistillError
        return kind(f"vLLM ended {when} (exit code {code}): {reason[:CAUSE_CHARS]}; its log: {self.log}")

    def stop(self) -> None:
        """Ends the server and everything that it started. Does nothing if it has ended."""
        self.peak_rss()
        if self._guard.stdin:
            with contextlib.suppress(OSError):
                self._guard.stdin.close()
        self.wait(STOP_S)
        with contextlib.suppress(ProcessLookupError):  # a guard that hangs or was killed leaves its session
            os.killpg(self._guard.pid, signal.SIGKILL)
        self._guard.wait()


@contextmanager
def serving(
    model: str,
    *,
    port: int,
    config: ServeConfig,
    log: Path | None = None,
    served_name: str | None = None,
    host: str = "127.0.0.1",
    waiting: Waiting | None = None,
) -> Iterator[Server]:
    """Serves a model reference with vLLM while the block runs, ready when it begins.

    `served_name` is the `model` that clients ask for; the default is the reference itself. vLLM's log goes to `log`, or
    to a temporary file that stays only if the server fails. `waiting` is called a few times per second until the server
    is ready. Raises UsageError for what can be seen before the start, DistillError if vLLM ends before it is ready or
    is not ready after `serve.ready_timeout_s`.
    """
    machine = detect()
    resolved = resolve_model(model)
    command = build_command(
        resolved,
        served_name=served_name or model,
        host=host,
        port=port,
        config=config,
        machine=machine,
        facts=model_facts(resolved, ask_hub=True),
        environ=os.environ,
    )
    check_vllm(command, machine)
    check_port(command.host, command.port)
    check_memory(command, machine)
    temporary = log is None
    if log is None:
        handle, name = tempfile.mkstemp(prefix="vllm-", suffix=".log")
        os.close(handle)
        log = Path(name)
    with open_log(log) as output:
        server = Server(command, _start(command, output), log)
    try:
        _wait_until_ready(server, config.ready_timeout_s, waiting)
        yield server
        temporary = temporary and server.wait(0) is None
    except DistillError:
        temporary = False
        raise
    finally:
        server.stop()
        if temporary:
            log.unlink(missing_ok=True)


def free_port(host: str = "127.0.0.1") -> int:
    """A port of an address of this machine on which nothing listens."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def url_of(host: str, port: int) -> str:
    """Where a server at this address answers."""
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


def open_log(path: Path) -> BinaryIO:
    """Opens a new log for vLLM. Raises UsageError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("wb")
    except OSError as error:
        raise UsageError(f"{path}: cannot write vLLM's log ({error.strerror}); choose another folder") from None


def _start(command: Command, output: BinaryIO) -> "subprocess.Popen[bytes]":
    """Starts the guard, which starts vLLM, in a session of its own: Ctrl-C reaches only us, and we end the server."""
    guard = Path(__file__).with_name("guard.py")
    return subprocess.Popen(
        [sys.executable, "-I", str(guard), *command.argv],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        env={**os.environ, **command.env},
        start_new_session=True,
    )


def _wait_until_ready(server: Server, timeout_s: float, waiting: Waiting | None) -> None:
    """Returns once /health answers and /v1/models names the model."""
    start = time.monotonic()
    while not is_ready(server.base_url, server.served_name):
        server.startup_s = time.monotonic() - start
        if server.wait(POLL_S) is not None:
            raise server.failure("before it was ready")
        if server.startup_s > timeout_s:
            raise DistillError(
                f"vLLM was not ready after {timeout_s:.0f} s (serve.ready_timeout_s); its log: {server.log}; "
                f"last line: {last_line(tail(server.log))}"
            )
        if waiting:
            waiting(server.startup_s, last_line(tail(server.log)))
    server.startup_s = time.monotonic() - start
    # Another's server may answer in its place: vLLM binds the port at once, and listens once it has loaded the model.
    if server.wait(POLL_S) is not None:
        raise server.failure("before it was ready")
    if not server.listens():
        raise port_taken(server.command.port)


def is_ready(base_url: str, served_name: str) -> bool:
    """Whether a server answers at the URL, and serves the model. Raises UsageError if it refuses our key."""
    well = _read(f"{base_url.removesuffix('/v1')}/health") is not None
    return well and served_name in served_models(base_url)


def served_models(base_url: str) -> set[str]:
    """The models that the server at a URL names; none if it does not say. Raises UsageError if it refuses our key."""
    try:
        return {model["id"] for model in json.loads(_read(f"{base_url}/models") or b"")["data"]}
    except (ValueError, KeyError, TypeError):
        return set()


def _read(url: str) -> bytes | None:
    """What a server of ours answers; None if it does not. Raises UsageError if it refuses our key. Asks no proxy."""
    key = os.environ.get("VLLM_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with build_opener(ProxyHandler({})).open(Request(url, headers=headers), timeout=ANSWER_S) as answer:
            body: bytes = answer.read()
    except HTTPError as refused:
        if refused.code in (401, 403):
            fix = "set VLLM_API_KEY to the key that the server was started with"
            raise UsageError(f"{url}: answers {refused.code}; {fix}") from None
        return None
    except (OSError, HTTPException):
        return None
    return body
