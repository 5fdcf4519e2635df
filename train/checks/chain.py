"""Is the teacher itself a student? Models taught by models taught by models collapse (Shumailov et al. 2024).

Reads the teacher's lineage.json and the tags of its card; writes nothing.
"""

import json
from pathlib import Path

from pipeline.adapters import MERGED_FROM
from pipeline.checks import Check, Status
from train.teacher import Card

OUR_TAG = "distillate"  # on every card that this tool writes
OTHERS_TAGS = {"distillation", "distilled", "knowledge-distillation"}


def chain_check(reference: str, folder: Path | None, card: Card, *, allowed: bool = False) -> Check:
    """Fails for a product of this tool unless `allowed`; warns for a model that others call distilled."""
    status: Status = "warn"
    finding, fix = f"no sign that the teacher {reference} was distilled", "distil from the first teacher instead"
    if origin := _ours(folder, card):
        status = "note" if allowed else "fail"
        finding = f"the teacher {reference} is itself a distilled student: {origin}"
        fix += ", or accept the risk of collapse with --allow-chain"
    elif tags := sorted(card.tags & OTHERS_TAGS):
        finding = f"the makers of the teacher {reference} tag it {', '.join(tags)}"
    elif "distill" in Path(reference).name.lower():
        finding = f"the teacher {reference} was distilled by its makers: its name says so"
    elif folder is None:
        finding = f"nothing is known of {reference} here; an API does not say whether its model was distilled"
        return Check(name="chain", status="note", finding=finding)
    else:
        return Check(name="chain", status="pass", value=0, finding=finding)
    return Check(name="chain", status=status, value=1, finding=finding, fix=fix)


def _ours(folder: Path | None, card: Card) -> str:
    """What shows that this tool made the model; empty if nothing does."""
    if folder is not None:
        try:
            trained = json.loads((folder / "lineage.json").read_bytes())["train"]
            return f"its lineage.json names {trained['teacher']} as its teacher"
        except (OSError, ValueError, KeyError, TypeError):
            pass  # no lineage of ours
        if (folder / MERGED_FROM).is_file():
            return f"{MERGED_FROM} in its folder"
    return f"its card is tagged {OUR_TAG}" if OUR_TAG in card.tags else ""
