"""Several processes that train one student: `accelerate launch --multi_gpu -m train RECIPE`.

The first leads: it alone holds the run's lock, writes and prints. The others compute along and wait where it has to
be first. The launcher tells each its place in the environment (RANK, WORLD_SIZE).
"""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Processes:
    """This process among those that train together."""

    rank: int = 0
    count: int = 1

    @property
    def lead(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Goes on when all of them are here."""
        if self.count > 1:
            import torch
            from accelerate import PartialState

            PartialState(cpu=not torch.cuda.is_available()).wait_for_everyone()


ALONE = Processes()


def launched() -> Processes:
    """As the launcher says; one alone where there was none."""
    return Processes(rank=int(os.environ.get("RANK", 0)), count=int(os.environ.get("WORLD_SIZE", 1)))
