"""Several processes that train one student: `accelerate launch --multi_gpu -m train RECIPE`.

The first leads: it alone holds the run's lock, writes and prints. The others compute too, and wait where it must go
first. The launcher sets RANK and WORLD_SIZE in the environment of each.
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
        """Returns when all processes have called it."""
        if self.count > 1:
            import torch
            from accelerate import PartialState

            PartialState(cpu=not torch.cuda.is_available()).wait_for_everyone()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; all of them must ask."""
        if self.count == 1:
            return flag
        import torch
        from accelerate import PartialState

        flags = torch.tensor(int(flag), device=PartialState().device)
        torch.distributed.all_reduce(flags)
        return bool(flags.item())


ALONE = Processes()


def launched() -> Processes:
    """This process, as the launcher says; without a launcher it is alone."""
    return Processes(rank=int(os.environ.get("RANK", 0)), count=int(os.environ.get("WORLD_SIZE", 1)))
