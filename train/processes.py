"""Several processes that train one student: `accelerate launch --multi_gpu -m train RECIPE`, or with `--use_fsdp`.

The first leads: it alone holds the run's lock, writes and prints. The others compute too, and wait where it must go
first. The launcher sets RANK, WORLD_SIZE and what else it was told in the environment of each. All work in one folder;
or each machine has a folder of its own, in which its first process writes what the others read.
"""

import atexit
import os
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from pipeline.errors import UsageError
from pipeline.train_config import TrainConfig

# What the launcher can be told to do with a model, by the variable that says so, and why this training cannot.
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed would take a step after every forward pass, not after every batch",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM has models of its own",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "each process takes whole rows and whole layers",
}
SHARDED_METHODS = ("lora", "full", "kd")
OWN_FOLDER = "DISTILLATE_OWN_FOLDER"  # "true": this machine has a folder of its own


@dataclass(frozen=True)
class Processes:
    """This process among those that train together."""

    rank: int = 0
    count: int = 1
    sharded: bool = False  # FSDP: each holds its part of the weights, gradients and moments; otherwise DDP
    local_rank: int | None = None  # among those of this machine, if it has a folder of its own

    @property
    def lead(self) -> bool:
        return self.rank == 0

    @property
    def lead_in_folder(self) -> bool:
        """Whether it writes what all processes that work in its folder read."""
        return (self.rank if self.local_rank is None else self.local_rank) == 0

    @property
    def shards(self) -> int:
        """Parts that weights, gradients and moments are in; each is in the memory of one process."""
        return self.count if self.sharded else 1

    def check(self, config: TrainConfig) -> None:
        """Raises UsageError if the launcher was told what this training cannot do; before anything is loaded."""
        for name, reason in REFUSED.items():
            if _is_set(name):
                raise UsageError(f"{name} is set, but {reason}; use accelerate launch --use_fsdp, or --multi_gpu")
        if self.sharded and config.method not in SHARDED_METHODS:
            raise UsageError(
                f"train.method {config.method} cannot be sharded (--use_fsdp: {', '.join(SHARDED_METHODS)}); "
                "use accelerate launch --multi_gpu, where each process holds the whole student"
            )

    def lead_first(self) -> AbstractContextManager[None]:
        """The others enter the block when the leading process, or that of each folder, has left it."""
        state = _state()
        own = self.local_rank is not None
        first: AbstractContextManager[None] = state.local_main_process_first() if own else state.main_process_first()
        return first

    def leave(self) -> None:
        """Waits for the others, closes the connection to them, and ends this process with code 0; alone: does nothing.

        Python's own end is left out, but for what is registered for it (a tracker's last upload): torch's caches hold
        FSDP's mesh that long, and a thread of gloo that then still runs can abort the process.
        """
        if self.count > 1:
            state = _state()
            state.wait_for_everyone()
            state.destroy_process_group()
            atexit._run_exitfuncs()
            for stream in filter(None, (sys.stdout, sys.stderr)):  # one that was closed is None
                stream.flush()
            os._exit(0)

    def shard_on_cpu(self) -> None:
        """Accelerate shards on GPUs; on a CPU it would train by DDP without a word. After this it shards there too."""
        import torch
        from accelerate import DistributedType, PartialState

        if self.sharded and not torch.cuda.is_available():
            PartialState().distributed_type = DistributedType.MULTI_GPU

    def share_weights(self, model: Any) -> None:
        """Gives all processes the trained weights of the first: the best ones are in its folder alone."""
        if self.local_rank is not None:
            from accelerate.utils import broadcast

            broadcast([weights.data for weights in model.parameters() if weights.requires_grad])

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; all of them must ask, while they train."""
        from accelerate.utils import gather_object

        return any(gather_object([flag]))

    def joined(self, own: dict[Any, Any]) -> dict[Any, Any]:
        """What all processes have found, in each of them; all must ask."""
        from accelerate.utils import gather_object

        return {key: value for found in gather_object([own]) for key, value in found.items()}


ALONE = Processes()


def launched() -> Processes:
    """This process, as the launcher says; without a launcher it is alone."""
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ["LOCAL_RANK"]) if _is_set(OWN_FOLDER) else None
    return Processes(rank, count, sharded=count > 1 and _is_set("ACCELERATE_USE_FSDP"), local_rank=local_rank)


def _state() -> Any:
    """What Accelerate knows of these processes; the first call connects them."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"
