"""Several processes that train one student: `accelerate launch --multi_gpu -m train RECIPE`.

The first leads: it alone holds the run's lock, writes and prints. The others compute too, and wait where it must go
first. The launcher sets RANK and WORLD_SIZE in the environment of each.
"""

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Processes:
    """This process among those that train together."""

    rank: int = 0
    count: int = 1

    @property
    def lead(self) -> bool:
        return self.rank == 0

    def lead_first(self) -> AbstractContextManager[None]:
        """The others enter the block when the leading process has left it."""
        import torch
        from accelerate import PartialState

        state: Any = PartialState(cpu=not torch.cuda.is_available())
        first: AbstractContextManager[None] = state.main_process_first()
        return first

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; all of them must ask, while they train."""
        from accelerate.utils import gather_object

        return any(gather_object([flag]))


ALONE = Processes()


def launched() -> Processes:
    """This process, as the launcher says; without a launcher it is alone."""
    return Processes(rank=int(os.environ.get("RANK", 0)), count=int(os.environ.get("WORLD_SIZE", 1)))
