"""`train --cluster`: one training by the GPUs of a Ray cluster, or on CPUs by one process on each node.

Ray Train starts the processes, lets them find each other, and notices when one is lost. Each does what `train` does
under a launcher (train.processes), so the student is that of one process. All nodes see the run's folder. After a loss
all processes are started again, on the nodes that there are then, and go on from the last checkpoint.
"""

import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from pipeline.cli import GO_ON, INTERRUPTED
from pipeline.errors import DistillError, UsageError, first_line
from pipeline.recipe import Recipe
from pipeline.rundir import RunDir
from scale.cluster import Cluster
from scale.sync import State

RAY = "training-ray"  # folder of the run in which Ray Train keeps its books
MOST_LOSSES = 3  # in a row, without a new checkpoint between them


class Training(NamedTuple):
    """What each process is told."""

    recipe: Recipe
    run: RunDir
    flags: dict[str, bool]


def train_on_cluster(address: str, training: Training) -> None:
    """Trains the run's student.

    Raises as train.run.train_run; DistillError too if processes are lost again and again.
    """
    if address.startswith("ray://"):
        raise UsageError(f"--cluster {address}: train on a machine of the cluster, with host:port or auto")
    training.run.check_there()
    if url := State.read(training.run.path).url:
        raise UsageError(f"--cluster trains in a folder that all nodes see: make fetch RUN={url}, and give its copy")
    # A process stays in its folder, and prints as everywhere: with Ray Train's own print, what dill catches is shown.
    os.environ |= {"RAY_CHDIR_TO_TRIAL_DIR": "0", "RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}
    losses, before = 0, _checkpoints(training.run)
    pool = ThreadPoolExecutor(1)  # in the main thread Ray would take SIGTERM, and Ray Train end with code 0 at Ctrl-C
    cluster = pool.submit(Cluster, address, "train", show_logs=True).result()
    try:
        while reason := pool.submit(_fit, cluster, training).result():
            now = _checkpoints(training.run)
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


def _fit(cluster: Cluster, training: Training) -> str | None:
    """Trains once. Returns None when it has ended, or why it was cut off. Raises the DistillError of a process."""
    from ray.exceptions import RayError
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

    nodes = cluster.nodes()
    gpus = sum(node.gpus for node in nodes)
    workers = {"num_workers": gpus or len(nodes), "use_gpu": bool(gpus)}
    cores = {} if gpus else {"CPU": min(node.cpus for node in nodes)}
    trainer = TorchTrainer(
        _train_here,
        train_loop_config={"training": training},
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


def _train_here(setting: dict[str, Any]) -> None:
    """One process, in which Ray Train has set what a launcher sets."""
    from train.__main__ import train_launched

    train_launched(*setting["training"])


def _checkpoints(run: RunDir) -> set[str]:
    return {folder.name for folder in run.path.glob("training/checkpoint-*")}
