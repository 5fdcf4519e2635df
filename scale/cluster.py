"""Ray, as far as this project uses it: nodes, and actors that are started, called and ended (scale.filtering has its
tasks). Ray is imported only when a cluster is asked for.

Actors are detached: they outlive a driver that is killed, upload what they have, and end by themselves or by the next
driver's word. Code goes to the nodes as the runtime environment's working_dir; packages must be there already.
"""

import asyncio
import os
import socket
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from pipeline.address import VARIABLE
from pipeline.errors import DistillError, UsageError, first_line
from pipeline.teacher_config import TeacherConfig
from scale.worker import Worker

ROOT = Path(__file__).parents[1]
NOT_SENT = ["runs", "tests", "docs", "experiments", "benchmarks"]  # beside .git, .venv and what git ignores
CONNECT_S = 10.0  # what a node of a cluster may take to be reached
KINDS = ("GPU", "CPU")  # as Ray calls them, in Node's order


class Node(NamedTuple):
    """A machine of the cluster that is alive."""

    id: str
    address: str
    gpus: int = 0
    cpus: int = 1


class Lost(Exception):
    """An actor did not answer: it died, its node did, or it never started. The message is Ray's."""


class NodeWorker(Worker):
    """A Worker as an actor: its process ends when its driver is silent."""

    async def live(self) -> None:
        await self.work()
        os._exit(0)  # ray.actor.exit_actor works in a call only


class Cluster:
    """A connection to a Ray cluster. `namespace` is the run's: its actors are found by it."""

    def __init__(self, address: str, namespace: str, *, show_logs: bool = False) -> None:
        """`show_logs`: what the nodes' processes print is printed here too.

        Raises UsageError if ray is not installed, DistillError if there is no cluster at the address.

        To be called in a thread: in the main one Ray would take SIGTERM.
        """
        try:
            import ray
        except ImportError:
            raise UsageError("a cluster needs ray: pip install -c constraints.txt -e '.[ray]'") from None
        if why := _unreachable(address):
            raise DistillError(f"no Ray cluster at {address}: {why}; docs/clusters.md")
        environment = {"working_dir": str(ROOT), "excludes": NOT_SENT}
        try:
            ray.init(
                address,
                namespace=namespace,
                runtime_env=environment,
                log_to_driver=show_logs,
                logging_level="warning",
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise DistillError(f"no Ray cluster at {address}: {first_line(error)}; docs/clusters.md") from None
        self._ray = ray

    def nodes(self) -> list[Node]:
        """The nodes that are alive and may have work: a head with no CPUs may not."""
        return [
            Node(node["NodeID"], node["NodeManagerAddress"], *(int(node["Resources"].get(kind, 0)) for kind in KINDS))
            for node in self._ray.nodes()
            if node["Alive"] and node["Resources"].get("CPU")
        ]

    def start(self, node: Node, name: str, *args: Any) -> Any:
        """Starts a worker on a node, and returns its actor before it is there."""
        actor = self.on_node(NodeWorker, node, name=name, lifetime="detached").remote(name, *args)
        actor.live.remote()
        return actor

    def on_node(self, kind: type, node: Node, **options: Any) -> Any:
        """What makes an actor of this class on a node, by `.remote(…)`. Ray does not restart it."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(node.id, soft=False)
        return self._ray.remote(kind).options(num_cpus=0, max_restarts=0, scheduling_strategy=here, **options)

    def leftovers(self) -> dict[str, Any]:
        """The actors of an earlier driver of the run that are still there, by name."""
        found = {}
        for name in self._ray.util.list_named_actors():
            try:
                found[name] = self._ray.get_actor(name)
            except ValueError:  # it has just ended
                continue
        return found

    async def call(self, method: Any, *args: Any) -> Any:
        """Calls an actor's method. Raises Lost, or what the method does; never returns if the node is frozen."""
        try:
            return await asyncio.wrap_future(method.remote(*args).future())
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self._ray.exceptions.RayError as error:
            raise Lost(first_line(error)) from None

    def kill(self, actor: Any) -> None:
        """Ends an actor at once."""
        self._ray.kill(actor)

    def close(self) -> None:
        """Leaves the cluster."""
        self._ray.shutdown()


def variables_of(teacher: TeacherConfig) -> dict[str, str]:
    """The variables of this environment that a worker needs: the key, what the headers name, and a cloud's."""
    names = {teacher.api_key_env, *(name for value in teacher.headers.values() for name in VARIABLE.findall(value))}
    return {name: value for name, value in os.environ.items() if name in names or name.startswith("AWS_")}


def server_variables() -> dict[str, str]:
    """The variables of this environment that servers need: the keys of the Hub and of vLLM, and vLLM's settings."""
    return {name: value for name, value in os.environ.items() if name == "HF_TOKEN" or name.startswith("VLLM_")}


def _unreachable(address: str) -> str:
    """Why nothing can be asked at host:port or ray://host:port: Ray tries for many minutes. Empty: Ray may try."""
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        if parts.scheme in ("", "ray") and parts.port:
            socket.create_connection((parts.hostname, parts.port), CONNECT_S).close()
    except (OSError, ValueError) as error:
        return str(error)
    return ""
