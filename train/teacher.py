"""What is known of a model without its weights: configuration, tokenizer, card, number of parameters.

Reads a folder, the Hub's cache, or the Hub (small files only). A model behind an API has none of it.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.adapters import count_parameters
from pipeline.errors import RecipeError
from pipeline.lineage import answered_by, read_lineage
from pipeline.models import explained, local_folder, resolve_model, tokenizer_from
from pipeline.rundir import RunDir
from pipeline.train_config import SOFT
from train.student import load_tokenizer

TOKENIZER_FILES = ["vocab.json", "merges.txt", "tokenizer*", "*tokens*.json"]
SMALL_FILES = ["*config.json", "chat_template*", *TOKENIZER_FILES, "README.md", "lineage.json"]
HUB_TIMEOUT_S = 10
FIX = "use train.method: lora or full, which learn from its text"


@dataclass(frozen=True)
class Card:
    """The metadata of a model's README.md."""

    tags: frozenset[str] = frozenset()
    licence: str | None = None


def known_files(reference: str) -> Path | None:
    """A folder with what is known of a model: its own, or the Hub's files without the weights; None if nothing is."""
    if (folder := local_folder(reference)) is not None or not re.fullmatch(r"[\w.-]+/[\w.-]+", reference):
        return folder
    import httpx2  # what huggingface_hub speaks HTTP with, whose errors it lets through
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(reference, allow_patterns=SMALL_FILES, etag_timeout=HUB_TIMEOUT_S))
    except (HfHubHTTPError, httpx2.HTTPError, OSError, ValueError, RuntimeError):
        return None  # not on the Hub, or no network: an API's model


def followed_files(reference: str) -> Path:
    """What is known of a teacher whose weights a soft method follows. Raises RecipeError where only an API knows it."""
    known = known_files(resolve_model(reference))
    if known is None:
        raise RecipeError(
            f"soft distillation needs the teacher's weights, and {reference} has none here; {FIX}, or its distribution "
            "from elsewhere: train.kd.teacher: served or stored"
        )
    return known


def check_same_tokens(reference: str, student: Any, texts: Iterable[str] = ()) -> None:
    """Raises RecipeError if a teacher's tokens are not the student's, by its vocabulary or in one of `texts`.

    `student`: the student's tokenizer. As followed_files, too.
    """
    known = followed_files(reference)
    with explained(f"teacher.model: cannot load {reference} ({FIX})"):
        difference = differing_tokens(tokenizer_from(known), student, texts)
    if difference:
        raise RecipeError(
            f"soft distillation needs one tokenizer, and {reference} {difference}; {FIX}, or, with the teacher beside "
            "the student, gold"
        )


def differing_tokens(teacher: Any, student: Any, texts: Iterable[str]) -> str:
    """How the teacher's tokenizer differs from the student's; empty if both make the same ids of everything."""
    own, other = student.get_vocab(), teacher.get_vocab()
    if own != other:
        differing = len({*own.items()} ^ {*other.items()})
        return f"has another vocabulary than the student ({differing:,} tokens or ids are not shared)"
    for text in texts:
        if student(text)["input_ids"] != teacher(text)["input_ids"]:
            return f"splits text into other tokens than the student: {text[:40]!r}"
    return ""


def read_card(folder: Path | None) -> Card:
    """Tags and licence of a model's card; none if no card can be read."""
    from huggingface_hub.repocard import metadata_load

    try:
        data = (metadata_load(folder / "README.md") or {}) if folder else {}
    except (OSError, ValueError, yaml.YAMLError):
        return Card()
    tags, licence = data.get("tags"), data.get("license_name" if data.get("license") == "other" else "license")
    return Card(
        tags=frozenset(str(tag).lower() for tag in tags) if isinstance(tags, list) else frozenset(),
        licence=licence if isinstance(licence, str) else None,
    )


def earlier_teachers(origin: str | None) -> list[str]:
    """The models that taught a student of ours before it is trained on, by its lineage, here or on the Hub; else none.

    Raises DataError if the lineage is not JSON.
    """
    folder = known_files(origin) if origin else None
    lineage = read_lineage(RunDir(folder)) if folder else {}
    train = lineage.get("train", {})
    if not {"teacher", "method"} <= {*train}:
        return []  # another tool's file of this name
    followed = [train["teacher"]] if train["method"] in SOFT else []
    return list(dict.fromkeys([*answered_by(train["teacher"], lineage), *followed, *train.get("earlier_teachers", [])]))


def tokenizer_of(folder: Path | None) -> Any | None:
    """The tokenizer in a folder; None if there is none with a chat template."""
    try:
        return load_tokenizer(str(folder)) if folder else None
    except RecipeError:
        return None


def parameters_of(folder: Path | None, reference: str) -> int | None:
    """Number of parameters, tied ones once: from the configuration, or else from the size in the name (`70B`)."""
    if folder is not None and (folder / "config.json").is_file() and (counted := count_parameters(folder)):
        return counted
    named = re.search(r"(?<![\w.])(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", Path(reference).name.lower())
    return round(float(named[1]) * (1e9 if named[2] == "b" else 1e6)) if named else None
