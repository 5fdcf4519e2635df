"""Ray nodes on this machine, each a process tree of its own that can be killed, frozen and revived.

One kind cannot see the project's code: an empty folder lies over every package of it (`unshare -m`, which needs root),
and over other folders if asked; then it also has an address of its own, as another machine has.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from serve.server import free_port

ROOT = Path(__file__).parents[1]
PACKAGES = ("generate", "pipeline", "scale", "serve", "train")
UNTIL_JOINED = """if True:
    import sys, time, ray
    while not ray.is_initialized():
        try:
            ray.init(address=sys.argv[1], log_to_driver=False, logging_level="error")
        except ConnectionError:  # the head is not yet known to itself
            time.sleep(1)
    while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[2]):
        time.sleep(0.2)
"""
START = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", "--num-cpus=1"]
SMALL_STORE = 80_000_000  # bytes of a node's object store
READY_S = 300.0
ADDRESSES = (f"127.0.1.{number}" for number in count(1))  # of this machine
os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else a token in ~/.ray is asked of all, and only a head knows it


class RayNode:
    """A head, or a node of the cluster at `address`.

    `blind`: without the project's code and the `hidden` folders; `store`: bytes.
    """

    def __init__(
        self,
        address: str,
        *,
        head_folder: Path | None = None,
        blind: bool = False,
        hidden: Sequence[Path] = (),
        store: int = SMALL_STORE,
    ) -> None:
        where = [f"--address={address}"]
        if head_folder:
            port = address.rpartition(":")[2]
            where = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={head_folder}"]
            where.append(f"--ray-client-server-port={free_port()}")  # its usual port may be another head's
        elif hidden:
            where.append(f"--node-ip-address={next(ADDRESSES)}")
        command = [*START, f"--object-store-memory={store}", *where]
        if blind:
            hide = " && ".join(f"mount -t tmpfs none {folder}" for folder in (*code_folders(), *hidden))
            command = ["unshare", "-m", "bash", "-c", f'{hide} && cd / && exec "$@"', "bash", *command]
        self._command = command
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/")

    def ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self) -> None:
        """As when the machine is switched off."""
        family = self._family()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        psutil.wait_procs(family, timeout=10)

    def freeze(self) -> None:
        for process in self._family():
            with suppress(psutil.NoSuchProcess):
                process.suspend()

    def revive(self) -> None:
        for process in self._family():
            with suppress(psutil.NoSuchProcess):
                process.resume()

    def workers(self, kind: str = "NodeWorker") -> list[psutil.Process]:
        """The processes of actors on it, by their class."""
        return [process for process in self._family() if kind in " ".join(_command(process))]

    def journals(self) -> list[Path]:
        """Where its actors have their answers before they upload them."""
        paths = []
        for process in self.workers():
            with suppress(psutil.Error):  # it has ended
                paths += [Path(file.path) for file in process.open_files()]
        return [path for path in paths if path.name == "completions.jsonl"]

    def _family(self) -> list[psutil.Process]:
        try:
            parent = psutil.Process(self._process.pid)
        except psutil.NoSuchProcess:
            return []
        return [parent, *parent.children(recursive=True)]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def code_folders() -> list[Path]:
    """Where the project's packages are on this machine: here, and where an editable installation finds them."""
    finders = (module for name, module in sys.modules.items() if name.startswith("__editable___distillate"))
    installed = [Path(folder) for finder in finders for folder in finder.MAPPING.values()]
    return sorted({*(ROOT / name for name in PACKAGES), *(folder for folder in installed if folder.exists())})


@contextmanager
def ray_cluster(
    nodes: int, *, blind: int = 1, hidden: Sequence[Path] = (), store: int = SMALL_STORE
) -> Iterator[tuple[str, list[RayNode]]]:
    """Starts a head and further nodes, the last `blind` of which do not see the code and the `hidden` folders.

    Yields address and nodes.

    All have joined then: processes that start together with a node were seen to fail.
    """
    address = f"127.0.0.1:{free_port()}"
    with TemporaryDirectory(prefix="ray") as folder:
        started = [RayNode(address, head_folder=Path(folder), store=store)]
        try:
            _until_open(address)
            blinds = [number >= nodes - blind for number in range(1, nodes)]
            started += [RayNode(address, blind=one, hidden=hidden, store=store) for one in blinds]
            _until_joined(address, started)
            yield address, started
        finally:
            for node in started:
                node.revive()
                node.kill()


def _until_open(address: str) -> None:
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection((host, int(port)), 1):
            return
        time.sleep(0.2)
    raise SystemExit(f"no Ray head at {address} after {READY_S:.0f} s")


def _until_joined(address: str, nodes: list[RayNode]) -> None:
    """Waits for all nodes. On a busy machine `ray start` gives up after 30 s: it is called again, as is the waiter."""
    command = [sys.executable, "-c", UNTIL_JOINED, address, str(len(nodes))]
    deadline = time.monotonic() + READY_S
    waiting = subprocess.Popen(command)
    try:
        while waiting.poll() != 0:
            for node in nodes:
                if node.ended():
                    node.start()
            if waiting.returncode is not None:
                waiting = subprocess.Popen(command)
            if time.monotonic() > deadline:
                raise SystemExit(f"Ray's nodes have not joined {address} after {READY_S:.0f} s")
            time.sleep(0.2)
    finally:
        waiting.kill()
        waiting.wait()
