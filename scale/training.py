"""`train --cluster`: one training by the GPUs of a Ray cluster, or on CPUs by one process on each node.

Ray Train starts the processes, lets them find each other, and notices when one is lost. Each does what `train` does
under a launcher (train.processes), so the student is that of one process. After a loss all processes are started again,
on the nodes that there are then, and go on from the last checkpoint.

All nodes see the run's folder, or the run is in a store. Then each node fetches what training reads into a temporary
folder of its own; the leading process puts its checkpoints, and at the end the student, into the store.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pipeline.cli import GO_ON
from pipeline.errors import INTERRUPTED, DistillError, UsageError, first_line
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir
from scale.cluster import Cluster, variables_of
from scale.run_lease import check_lease, is_held, repeated
from scale.storage import open_store
from scale.sync import RAY, TRAIN_READS, TRAIN_WRITES, WHOLE, Mirror, StoreState, names_in
from train.processes import OWN_FOLDER, launched
from train.rows import read_parts
from train.run import first_training
from train.student import initial_student

MOST_LOSSES = 3  # in a row, without a new checkpoint between them


class Training(NamedTuple):
    """What each process is told."""

    recipe: Recipe
    run: RunDir
    flags: dict[str, bool]
    store: str = ""  # the URL of a run that is in one; else all nodes see its folder
    lease: str = ""  # under which nodes may write there


def train_on_cluster(address: str, training: Training) -> None:
    """Trains the run's student.

    Raises as train.run.train_run; DistillError too if processes are lost again and again.
    """
    if address.startswith("ray://"):
        raise UsageError(f"--cluster {address}: train on a machine of the cluster, with host:port or auto")
    training.run.check_there()
    if url := StoreState.read(training.run.path).url:
        training = training._replace(store=url)
        _check_stored(training)
        training = training._replace(lease=open_store(url).names("lease")[-1])
        _make_student(training)
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
        shutil.rmtree(training.run.path / RAY, ignore_errors=True)
        print(GO_ON, file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)
    finally:
        cluster.close()
        pool.shutdown()
        shutil.rmtree(training.run.path / RAY, ignore_errors=True)


def _check_stored(training: Training) -> None:
    """Raises UsageError for what needs the run of a store in one folder, or its URL."""
    recipe, run, url = training.recipe, training.run, training.store
    if not is_held(run.path):
        raise UsageError(f"{run.path} is the folder of a run in a store; train on a cluster with --run {url}")
    if recipe.student and recipe.student.built and recipe.train.weights != "full":
        raise UsageError(
            f"student.model {recipe.student.model}: it is made first, and adapters would name the folder of a node; "
            "train all its weights, or fetch the run into a folder that all nodes see"
        )
    if first := first_training(recipe, run):
        raise UsageError(
            f"train.method on_policy starts from a student that has learned from answers, and {url} has none of these "
            f"rows and settings: train it by the same command with --train.method {first.train.method} first"
        )


def _make_student(training: Training) -> None:
    """Puts a student that is made first into the store: of many processes, transformers lets only one write a model."""
    recipe, run = training.recipe, training.run
    if recipe.student and recipe.student.built and not recipe.train.further:
        initial_student(recipe, run, read_parts(recipe, run).train)
        Mirror(open_store(training.store), run.path, StoreState.read(run.path)).push()


def _fit(cluster: Cluster, training: Training) -> str | None:
    """Trains once. Returns None when it has ended, or why it was cut off. Raises the DistillError of a process."""
    from ray.exceptions import RayError
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

    if not (nodes := cluster.nodes()):
        raise DistillError("no node of the cluster can work yet (see `ray status`); the same command goes on")
    gpus = sum(node.gpus for node in nodes)
    workers = {"num_workers": gpus or len(nodes), "use_gpu": bool(gpus)}
    cores = {} if gpus else {"CPU": min(node.cpus for node in nodes)}
    files = names_in(open_store(training.store), TRAIN_READS + TRAIN_WRITES) if training.store else []
    variables = variables_of(training.recipe.teacher)
    trainer = TorchTrainer(
        lambda: _train_here(training, files, variables),  # Ray Train would show a train_loop_config
        scaling_config=ScalingConfig(**workers, resources_per_worker=cores or None),
        run_config=RunConfig(name="ray", storage_path=str(training.run.path.absolute() / RAY)),
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


def _train_here(training: Training, files: list[str], variables: dict[str, str]) -> None:
    """One process, in which Ray Train has set what a launcher sets. `files` of a store are what a node fetches."""
    from train.run import train_launched

    os.environ.update(variables)
    if not training.store:
        train_launched(training.recipe, training.run, training.flags)
        return
    with _fetched(training, files) as run:
        train_launched(training.recipe, run, training.flags)


@contextmanager
def _fetched(training: Training, files: list[str]) -> Iterator[RunDir]:
    """The run in a folder of this node, which its processes share. What the leading one writes there goes to the store.

    A process that is killed leaves the folder; the next training of the run on this node removes it.
    """
    os.environ[OWN_FOLDER] = "true"
    processes, folder = launched(), _folder_of_node(training)
    store = open_store(training.store)
    # A node may outlive the machine that had the lease.
    mirror = Mirror(store, folder, StoreState("node"), partial(check_lease, store, training.lease))
    with processes.lead_first():
        if processes.lead_in_folder:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            mirror.fetch_files(files)
    try:
        if processes.lead:
            with repeated(mirror.put_training, "checkpoints and student"):
                yield RunDir(folder)
        else:
            yield RunDir(folder)
        with processes.lead_first():
            pass  # nobody reads in a folder of a node any more
        if processes.lead:
            mirror.push()
    finally:
        if processes.lead_in_folder:
            shutil.rmtree(folder.parent, ignore_errors=True)


def _folder_of_node(training: Training) -> Path:
    """It has the run's name, which a new lineage takes. Ray Train too tells nodes apart by their address."""
    from ray.util import get_node_ip_address

    own = f"distillate-{training.run.path.parent.name}-{get_node_ip_address()}"
    return Path(tempfile.gettempdir()) / own / training.run.path.name


def _checkpoints(training: Training) -> set[str]:
    if training.store:
        return {name for name in names_in(open_store(training.store), ["training"]) if name.endswith(WHOLE)}
    return {folder.name for folder in training.run.path.glob("training/checkpoint-*")}
