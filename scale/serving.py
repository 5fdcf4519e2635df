"""`serve --cluster`: vLLM servers on the nodes of a Ray cluster, and a file with the URLs of those that answer.

An actor starts the very server that `serve` starts on one machine. This process supervises: it asks each actor whether
its server still runs, and each server whether it answers, over the network as a client would. When a server has ended
or is silent, it replaces the actor too. It keeps the file up to date, which `generate` follows. When this process ends,
even by SIGKILL, Ray ends its actors, and serve.guard ends the servers.
"""

import asyncio
import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

from generate.event_loop import on_signals, run_loop
from pipeline.errors import DistillError, UsageError
from pipeline.rundir import replacing
from pipeline.serve_config import ServeConfig
from scale.cluster import Cluster, Lost, Node, server_variables
from serve.command import ranks
from serve.server import STOP_S, free_port, is_ready, serving, url_of

LOOK_S = 2.0  # between two looks at the nodes, and at each server
SILENT_S = 60.0  # without a word of a server that was ready, after which it is replaced
ACTOR_S = 60.0  # what an actor may take to start: code must arrive, and packages be imported
# Ray would kill the guard together with its actor, and so leave the server; the guard ends by itself, after the server.
ENVIRONMENT = {"env_vars": {"RAY_kill_child_processes_on_worker_exit": "false"}}
FIRST_WAIT_S, LONGEST_WAIT_S = 2.0, 60.0  # before a server is started again; doubled by each failure in a row
TRIES = 3  # in each place before any server has answered: vLLM may fail on a node that has just joined


class Model(NamedTuple):
    """What every node serves."""

    reference: str  # a folder that every node has, or a Hub id
    served_name: str
    config: ServeConfig
    port: int | None  # of the first server on a node; None: any that is free


class Place(NamedTuple):
    """Where one server is."""

    node: Node
    number: int  # among the node's servers


class NodeServer:
    """A server as an actor."""

    def __init__(self, environment: dict[str, str]) -> None:
        os.environ.update(environment)
        os.environ.pop("OMP_NUM_THREADS", None)  # Ray sets it to 1
        self._stack = ExitStack()

    def start(self, model: Model, place: Place) -> str:
        """Returns the server's URL when it is ready. Raises as serve.server.serving does."""
        host = place.node.address
        port = free_port(host) if model.port is None else model.port + place.number
        self._server = self._stack.enter_context(
            serving(model.reference, port=port, host=host, config=model.config, served_name=model.served_name)
        )
        return url_of(host, self._server.command.port)

    def check(self) -> None:
        """Raises DistillError with the reason if the server has ended."""
        if self._server.wait(0) is not None:
            raise self._server.failure("while it was serving")

    def stop(self) -> None:
        """Returns when nothing of the server is left."""
        self._stack.close()


def serve_on_cluster(address: str, model: Model, urls_file: Path, say: Callable[[str], None]) -> None:
    """Serves until Ctrl-C or SIGTERM. Raises DistillError if no node can serve the model."""

    async def serve() -> None:
        cluster = await asyncio.to_thread(Cluster, address, "serve")
        try:
            supervisor = Supervisor(cluster, model, urls_file, say)
            with on_signals(supervisor.stop):
                await supervisor.run()
        finally:
            cluster.close()

    run_loop(serve())


class Supervisor:
    """Keeps a server in every place."""

    def __init__(self, cluster: Cluster, model: Model, urls_file: Path, say: Callable[[str], None]) -> None:
        self._cluster, self._model, self._file, self._say = cluster, model, urls_file, say
        self._tasks: dict[Place, asyncio.Task[None]] = {}
        self._urls: dict[Place, str] = {}  # of the servers that answer
        self._failed: dict[Place, list[DistillError]] = {}  # why servers there failed, since one last answered
        self._any_answered = False  # so far
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Ends `run` in order."""
        if not self._stopping.is_set():
            self._say("ending all servers")
        self._stopping.set()

    async def run(self) -> None:
        """Serves until `stop` is called. Raises DistillError if no node can serve the model."""
        try:
            while not self._stopping.is_set():
                await self._look()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), LOOK_S)
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)
            self._file.unlink(missing_ok=True)

    async def _look(self) -> None:
        """Begins with new nodes, and lets go of those that have left."""
        wanted = places_on(await asyncio.to_thread(self._cluster.nodes), self._model.config)
        for place in self._tasks.keys() - wanted:
            self._tasks.pop(place).cancel()
            self._say(f"{place.node.address} has left the cluster")
        for task in self._tasks.values():
            if task.done():
                task.result()  # it raises: a full disk, or a defect
        if self._tasks and not self._any_answered and all(map(self._is_hopeless, self._tasks)):
            raise self._failed[min(self._tasks)][-1]
        for place in sorted(wanted - self._tasks.keys()):
            self._tasks[place] = asyncio.create_task(self._keep(place))

    def _is_hopeless(self, place: Place) -> bool:
        failed = self._failed.get(place, [])
        return len(failed) >= TRIES or any(isinstance(error, UsageError) for error in failed)

    async def _keep(self, place: Place) -> None:
        """Starts a server in this place, again and again."""
        while True:
            try:
                await self._serve(place)
            except (Lost, DistillError) as error:
                failure = error if isinstance(error, DistillError) else DistillError(f"its actor is lost: {error}")
            failed = self._failed.setdefault(place, [])
            failed.append(type(failure)(f"{place.node.address}: {failure}"))
            wait_s = min(FIRST_WAIT_S * 2 ** min(len(failed) - 1, 10), LONGEST_WAIT_S)
            self._say(f"warning: {failed[-1]}; a server is started again in {wait_s:.0f} s")
            await asyncio.sleep(wait_s)

    async def _serve(self, place: Place) -> None:
        """Starts a server, and watches it until an error ends it: Lost, or DistillError."""
        model, cluster = self._model, self._cluster
        gpus = ranks(model.config) if place.node.gpus and model.config.device != "cpu" else 0
        maker = cluster.on_node(NodeServer, place.node, num_gpus=gpus, runtime_env=ENVIRONMENT)
        actor = maker.remote(server_variables())
        self._say(f"starting vLLM on {place.node.address}")
        started = False
        try:
            url = await self._call(model.config.ready_timeout_s + ACTOR_S, actor.start, model, place)
            started = True
            await self._watch(place, actor, url)
        finally:
            self._withdraw(place)
            if started:  # before that the actor hears nothing
                with suppress(Lost, DistillError):
                    await self._call(STOP_S, actor.stop)
            cluster.kill(actor)

    async def _watch(self, place: Place, actor: Any, url: str) -> None:
        """Publishes a server while it answers this process. Returns by an error."""
        heard = monotonic()
        while True:
            await self._call(SILENT_S, actor.check)
            if await asyncio.to_thread(is_ready, url, self._model.served_name):
                heard = monotonic()
                if place not in self._urls:
                    self._urls[place], self._any_answered = url, True
                    self._failed.pop(place, None)
                    self._publish()
                    self._say(f"ready: {url} ({len(self._urls)} of {len(self._tasks)} servers)")
            elif monotonic() - heard > SILENT_S:
                raise DistillError(f"{url} has not answered this machine for {SILENT_S:.0f} s")
            await asyncio.sleep(LOOK_S)

    async def _call(self, seconds: float, method: Any, *args: Any) -> Any:
        """Calls an actor. Raises Lost, what the method does, or DistillError when it is silent for so long."""
        try:
            async with asyncio.timeout(seconds):
                return await self._cluster.call(method, *args)
        except TimeoutError:
            raise DistillError(f"its actor has said nothing for {seconds:.0f} s") from None

    def _withdraw(self, place: Place) -> None:
        if self._urls.pop(place, None):
            self._publish()

    def _publish(self) -> None:
        """Writes the file. Without any server the last one stays in it: an empty file says less."""
        if self._urls:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._file) as file:
                file.writelines(f"{url}\n".encode() for url in sorted(self._urls.values()))


def places_on(nodes: list[Node], config: ServeConfig) -> set[Place]:
    """As many servers as a node has GPUs for; without GPUs in the cluster one on each node.

    Raises UsageError if the GPUs of no node suffice for a server.
    """
    on_gpus = config.device == "gpu" or (config.device == "auto" and any(node.gpus for node in nodes))
    each = ranks(config)
    places = {Place(node, number) for node in nodes for number in range(node.gpus // each if on_gpus else 1)}
    if nodes and not places:
        most = max(node.gpus for node in nodes)
        raise UsageError(
            f"a server needs {each} GPUs on one node (serve.args), and Ray knows of {most} at most; use a smaller "
            "--tensor-parallel-size, or name them: ray start --num-gpus"
        )
    return places
