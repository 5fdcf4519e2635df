"""The folder of a training's checkpoints: which training they belong to, and which of them it can go on from."""

import json
import shutil
from pathlib import Path

from rich.console import Console

from pipeline.adapters import torn_file
from pipeline.errors import UsageError
from pipeline.rundir import write_file

FINGERPRINT = "fingerprint"  # in the folder: which training its checkpoints belong to
AGAIN = " again"  # follows the fingerprint there if --again began the training


def training_in(work: Path) -> str:
    """The fingerprint of the training that left checkpoints, with AGAIN if --again began it; empty if none did."""
    mark = work / FINGERPRINT
    return mark.read_text() if mark.is_file() else ""


def _step(checkpoint: Path) -> int:
    step = checkpoint.name.partition("-")[2]
    return int(step) if step.isdecimal() else 0  # a folder of the user's own is no whole checkpoint


def check_no_link(*folders: Path) -> None:
    """Raises UsageError if one of these folders, which are renamed when the student is there, is a link."""
    for folder in folders:
        if folder.is_symlink():
            raise UsageError(
                f"{folder}: a link to {folder.readlink()}, but a training puts a folder of its own there; remove the "
                "link (for another disk, choose a run there with --run)"
            )


def open_work(work: Path, fingerprint: str, *, again: bool, console: Console) -> None:
    """Prepares the folder of checkpoints: only whole ones of this very training stay.

    With `again` these are the ones of a training that began with it.
    """
    own = {fingerprint + AGAIN} if again else {fingerprint, fingerprint + AGAIN}
    if training_in(work) not in own:
        if work.is_dir():
            if not again and any(work.iterdir()):
                console.print(f"{work}: checkpoints of other rows or settings, removed")
            shutil.rmtree(work)
        work.mkdir(parents=True)
        write_file(work / FINGERPRINT, (fingerprint + (AGAIN if again else "")).encode())
    for folder in sorted(work.glob("checkpoint-*"), key=_step):
        try:
            state = json.loads((folder / "trainer_state.json").read_bytes())  # written last: it closes a checkpoint
        except (FileNotFoundError, ValueError):
            shutil.rmtree(folder)  # cut off while it was written
            continue
        best = state.get("best_model_checkpoint")
        torn = torn_file(folder)
        if torn or (best and not (work / Path(best).name).is_dir()):  # the best one is of an earlier step
            why = f"{torn.name} is empty or cut off, as after a power cut" if torn else "it needs one that is gone"
            console.print(f"{folder}: {why}; this checkpoint is removed")
            shutil.rmtree(folder)
            continue
        if best and Path(best).parent != work.resolve():  # it was written on another machine
            state["best_model_checkpoint"] = str(work.resolve() / Path(best).name)
            write_file(folder / "trainer_state.json", json.dumps(state).encode())
