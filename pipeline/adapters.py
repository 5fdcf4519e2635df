"""The weights in a folder: an adapter merged into its base, which engines serve and users can be given.

Also their size, and whether their files are whole.
"""

import hashlib
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from pipeline.errors import UsageError
from pipeline.models import ADAPTER, explained, tokenizer_from
from pipeline.records import read_json
from pipeline.rundir import RunDir, replacing_folder, waiting_lock

PROCESSOR = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
MERGED_FROM = "merged_from.json"  # in a merged folder of a run: the base and adapter that it was made of


class _AdapterConfig(msgspec.Struct):
    base_model_name_or_path: str


def base_of(folder: Path) -> str | None:
    """What the adapter in a folder was trained on; None for a whole model. Raises DataError if it does not say."""
    config = read_json(folder / ADAPTER, _AdapterConfig, "train that student again")
    return config.base_model_name_or_path if config else None


def load_merged(base: str | Path, adapter: Path | None) -> tuple[Any, Any]:
    """The base in float32, with the adapter added to it; and the dtype that the base is stored in.

    Raises RecipeError if the base or the adapter cannot be loaded.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    with explained(f"{base}: cannot load this model"):
        dtype = AutoConfig.from_pretrained(base).dtype or torch.float32
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter:
        with explained(f"{adapter}: cannot load this adapter"):
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model, dtype


def tokenizer_place(base: str | Path, adapter: Path | None) -> str | Path:
    """Where a model's tokenizer is: beside its adapter, or beside the base if PEFT alone saved the adapter."""
    files = ("tokenizer_config.json", "tokenizer.json")
    return adapter if adapter and any((adapter / name).is_file() for name in files) else base


def merge_adapter(base: str | Path, adapter: Path, target: Path) -> None:
    """Saves the base with the adapter added, in the base's dtype, with the tokenizer of `tokenizer_place`."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, dtype = load_merged(base, adapter)
    model.to(dtype).save_pretrained(target)
    copy_processor(model, target)
    tokenizer_from(tokenizer_place(base, adapter)).save_pretrained(target)


def copy_processor(model: Any, folder: Path) -> None:
    """Writes how images are prepared beside a saved model that reads them, as it is beside the one that was loaded.

    Without these files vLLM serves no such model, not even for text. A model of text has none.
    """
    from transformers.utils import cached_file

    config = model.config
    if config.get_text_config() is config:
        return
    for name in PROCESSOR:
        if found := cached_file(config.name_or_path, name, _raise_exceptions_for_missing_entries=False):
            shutil.copyfile(found, folder / name)


def whole_model(folder: Path, base: str | Path, merged: Path) -> Path:
    """The folder itself; for an adapter the folder `merged`, its base with the adapter added, made once, by rename."""
    if not (folder / ADAPTER).is_file():
        return folder
    made_of = {"base": str(base), "base_files": stamp_files(Path(base)), "adapter": digest_files(folder)}
    if _is_made_of(merged, made_of):
        return merged
    # Two processes at once: the second waits and finds the folder. The lock is hidden, so it is not synced to a store.
    with waiting_lock(merged.with_name(f".{merged.name}.lock")):
        if not _is_made_of(merged, made_of):
            with replacing_folder(merged) as building:
                merge_adapter(base, folder, building)
                (building / MERGED_FROM).write_text(json.dumps(made_of))
    return merged


def _is_made_of(merged: Path, made_of: dict[str, Any]) -> bool:
    """Whether the merged folder is there, with a whole model, and is made of these."""
    marker = merged / MERGED_FROM
    there = (merged / "config.json").is_file() and marker.is_file()
    whole = there and torn_file(merged) is None and missing_weights(merged) is None
    return whole and json.loads(marker.read_bytes()) == made_of


def digest_files(folder: Path) -> str:
    """SHA-256 over the names and contents of a model's or adapter's weights, configuration and chat template."""
    found = hashlib.sha256()
    for path in weight_files(folder):
        found.update(path.name.encode())
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def stamp_files(folder: Path, *, times: bool = True) -> list[str]:
    """Names, sizes and times of change of what digest_files reads: other weights are told without reading them."""
    stats = [(path.name, path.stat()) for path in weight_files(folder)]
    return [f"{name} {stat.st_size}" + f" {stat.st_mtime_ns}" * times for name, stat in stats]


def weight_files(folder: Path) -> list[Path]:
    """What decides what a model in a folder says."""
    names = ("*.safetensors", "config.json", ADAPTER, "chat_template.jinja", "tokenizer_config.json")
    return sorted(path for name in names for path in folder.glob(name))


def check_whole(student: Path) -> None:
    """Raises UsageError if a file of a run's student is damaged, or its weights are missing.

    A student that is not there is neither. The weights of a model that no training of ours wrote may have other names.
    """
    again = f"train this student again (python -m train RECIPE --run {student.parent} --again)"
    if torn := torn_file(student):
        size = torn.stat().st_size
        raise UsageError(f"{torn}: {size:,} bytes, empty or cut off as after a power cut; {again}")
    if RunDir(student).lineage.is_file() and (missing := missing_weights(student)):
        raise UsageError(f"{missing}: is not there; copy it here again, or {again}")


def missing_weights(folder: Path) -> Path | None:
    """A file of weights that is not there, though the configuration of its adapter or model is; None if all are."""
    index = folder / "model.safetensors.index.json"
    if (folder / ADAPTER).is_file():
        names = {"adapter_model.safetensors"}
    elif index.is_file():
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    else:
        names = {"model.safetensors"} if (folder / "config.json").is_file() else set()
    return next((folder / name for name in sorted(names) if not (folder / name).is_file()), None)


def torn_file(folder: Path) -> Path | None:
    """A file in the folder that is empty, or JSON or weights without their beginning or end; None if all are whole."""
    return next((path for path in sorted(folder.rglob("*")) if path.is_file() and not _is_whole(path)), None)


def _is_whole(path: Path) -> bool:
    size = path.stat().st_size
    if path.suffix in (".pt", ".pth"):  # of a checkpoint: zip files
        return zipfile.is_zipfile(path)
    if path.suffix == ".json":
        return path.read_bytes().rstrip().endswith((b"}", b"]"))
    if path.suffix != ".safetensors":
        return size > 0 or path.suffix != ".jinja"
    with path.open("rb") as file:  # the length of a JSON header, the header, the tensors
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length)) if length < size else {}
        except ValueError:
            return False
    ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    return bool(ends) and 8 + length + max(ends) == size


class Weights(NamedTuple):
    """A model's size; tied weights are stored, and counted, once."""

    parameters: int | None  # None: quantised, and its architecture is not known here
    size_bytes: int  # as its safetensors files hold it


def is_quantised(folder: Path) -> bool:
    """Whether a model's weights are stored packed, as AWQ's and GPTQ's are."""
    config = folder / "config.json"
    return config.is_file() and bool(json.loads(config.read_bytes()).get("quantization_config"))


def count_parameters(folder: Path) -> int | None:
    """A model's parameters by its configuration, tied ones once; None if its architecture is not known here."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):  # shapes only: no memory, no weights
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    except (OSError, ValueError, KeyError):
        return None
    return int(model.num_parameters())


def measure_weights(folder: Path) -> Weights | None:
    """A model's size, from the headers of its safetensors files; None if one of them is missing.

    A quantised model packs several parameters into one number, so its configuration counts them.
    """
    from huggingface_hub import get_local_safetensors_metadata
    from huggingface_hub.errors import NotASafetensorsRepoError

    try:
        weights = get_local_safetensors_metadata(folder)
    except (NotASafetensorsRepoError, FileNotFoundError):
        return None
    tensors = [tensor for file in weights.files_metadata.values() for tensor in file.tensors.values()]
    size_bytes = sum(end - start for start, end in (tensor.data_offsets for tensor in tensors))
    stored = sum(weights.parameter_count.values())
    return Weights(count_parameters(folder) if is_quantised(folder) else stored, size_bytes)
