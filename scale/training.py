"""`train --cluster`: one training by the GPUs of a Ray cluster, or on CPUs by one process on each node.

Ray Train starts the processes, lets them find each other, and notices when one is lost. Each does what `train` does
under a launcher (train.processes), so the student is that of one process. After a loss all processes are started again,
on the nodes that there are then, and go on from the last checkpoint.

All nodes see the run's folder; or the run is in a store. Then each process fetches its files into a folder of its own,
and the leading one puts its checkpoints, and at the end the student, into the store.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pipeline.cli import GO_ON, INTERRUPTED
from pipeline.errors import DistillError, UsageError, first_line
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir
from scale.cluster import Cluster
from scale.run_in_store import repeated
from scale.storage import open_store
from scale.sync import CHECKPOINT, WHOLE, Mirror, State
from train.processes import launched

RAY = "training-ray"  # folder in which Ray Train keeps its books
MOST_LOSSES = 3  # in a row, without a new checkpoint between them


class Training(NamedTuple):
    """What each process is told."""

    recipe: Recipe
    run: RunDir
    flags: dict[str, bool]
    store: str = ""  # the URL of a run that is in one; else all nodes see its folder


def train_on_cluster(address: str, training: Training) -> None:
    """Trains the run's student.

    Raises as train.run.train_run; DistillError too if processes are lost again and again.
    """
    if address.startswith("ray://"):
        raise UsageError(f"--cluster {address}: train on a machine of the cluster, with host:port or auto")
    training.run.check_there()
    recipe = training.recipe
    with _fetched_at_end(training.run) as store:
        if store and recipe.student and recipe.student.made and recipe.train.weights != "full":
            raise UsageError(
                f"student.model {recipe.student.model}: an adapter on it would name a folder of the node that made it; "
                "use train.method: full, or fetch the run into a folder that all nodes see"
            )
        _train(address, training._replace(store=store))


@contextmanager
def _fetched_at_end(run: RunDir) -> Iterator[str]:
    """Yields the URL of a run that is in a store; empty if it is not. What the nodes have put there is then fetched."""
    state = State.read(run.path)
    if not state.url:
        yield ""
        return
    lease, state.lease = state.lease, ""  # until the end, what is here may be older than what is there
    state.save(run.path)
    yield state.url
    Mirror(open_store(state.url), run.path, state).fetch_files()
    state.lease = lease
    state.save(run.path)


def _train(address: str, training: Training) -> None:
    """Trains until it has ended, however often it is cut off."""
    # A process stays in its folder, and prints as everywhere: with Ray Train's own print, what dill catches is shown.
    os.environ |= {"RAY_CHDIR_TO_TRIAL_DIR": "0", "RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}
    losses, before = 0, _checkpoints(training)
    pool = ThreadPoolExecutor(1)  # in the main thread Ray would take SIGTERM, and Ray Train end with code 0 at Ctrl-C
    cluster = pool.submit(Cluster, address, "train", show_logs=True).result()
    try:
        while reason := pool.submit(_fit, cluster, training).result():
            now = _checkpoints(training)
            losses, before = 1 if now != before else losses + 1, now
            if losses > MOST_LOSSES:
                raise DistillError(f"the training was cut off {losses} times without a new checkpoint: {reason}")
            print(f"warning: {reason}; going on from the last checkpoint", file=sys.stderr)
    except KeyboardInterrupt:  # the other thread waits in Ray; Ray ends the nodes' processes when this one is gone
        shutil.rmtree(_books(training), ignore_errors=True)
        print(GO_ON, file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)
    finally:
        cluster.close()
        pool.shutdown()
        shutil.rmtree(_books(training), ignore_errors=True)


def _fit(cluster: Cluster, training: Training) -> str | None:
    """Trains once. Returns None when it has ended, or why it was cut off. Raises the DistillError of a process."""
    from ray.exceptions import RayError
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

    nodes = cluster.nodes()
    gpus = sum(node.gpus for node in nodes)
    workers = {"num_workers": gpus or len(nodes), "use_gpu": bool(gpus)}
    keys = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    cores = {} if gpus else {"CPU": min(node.cpus for node in nodes)}
    trainer = TorchTrainer(
        lambda: _train_here(training, keys),  # not as train_loop_config, which Ray Train shows
        scaling_config=ScalingConfig(**workers, resources_per_worker=cores or None),
        run_config=RunConfig(name="ray", storage_path=str(_books(training))),
    )
    try:
        trainer.fit()
    except WorkerGroupError as error:
        return reason_of(error.worker_failures)
    except ControllerError as error:
        raise DistillError(f"Ray cannot train: {first_line(error.controller_failure)}") from None
    except RayError as error:
        raise DistillError(f"the cluster is lost: {first_line(error)}; the same command goes on") from None
    return None


def reason_of(failures: dict[int, Exception]) -> str:
    """Why a training was cut off, from the errors of its processes by rank. Raises the DistillError among them."""
    own = {rank: getattr(failure, "_base_exc", failure) for rank, failure in failures.items()}  # Ray Train wraps them
    for failure in own.values():
        if isinstance(failure, DistillError):
            raise failure from None
    return "; ".join(f"process {rank}: {first_line(failure)}" for rank, failure in sorted(own.items()))


def _train_here(training: Training, variables: dict[str, str]) -> None:
    """One process, in which Ray Train has set what a launcher sets."""
    from train.__main__ import train_launched

    os.environ.update(variables)
    with _own_folder(training) as run:
        train_launched(training.recipe, run, training.flags)


@contextmanager
def _own_folder(training: Training) -> Iterator[RunDir]:
    """The folder in which this process works. If the run is in a store, its files are there, and go back there."""
    if not training.store:
        yield training.run
        return
    with tempfile.TemporaryDirectory(prefix="distillate-") as name:
        folder = Path(name)
        mirror = Mirror(open_store(training.store), folder, State("node"))
        mirror.fetch_files()
        if not launched().lead:
            yield RunDir(folder)
            return
        with repeated(mirror.put_checkpoints, "the checkpoints"):
            yield RunDir(folder)
        mirror.push()


def _books(training: Training) -> Path:
    return Path(tempfile.gettempdir()) / RAY if training.store else training.run.path.absolute() / RAY


def _checkpoints(training: Training) -> set[str]:
    if training.store:
        return {name for name in open_store(training.store).names("training") if name.endswith(WHOLE)}
    return {folder.name for folder in training.run.path.glob(f"{CHECKPOINT}*")}
