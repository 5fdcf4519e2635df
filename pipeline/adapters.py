"""Merges an adapter into its base: an ordinary model, which engines serve and users can be given."""

import hashlib
import json
from pathlib import Path

from pipeline.errors import UsageError, first_line
from pipeline.rundir import replacing_folder

ADAPTER = "adapter_config.json"  # in the folder of an adapter, and in no other
MERGED_FROM = "merged_from.json"  # in a merged folder of a run: the base and adapter that it was made of


def merge_adapter(base: str | Path, adapter: Path, target: Path) -> None:
    """Adds the adapter to the base in float32 and saves the sum in the base's dtype, with the adapter's tokenizer.

    Raises UsageError if the base cannot be loaded.
    """
    import torch
    import transformers
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        dtype = AutoConfig.from_pretrained(base).dtype or torch.float32
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UsageError(f"the base {base} cannot be loaded: {first_line(error)}") from None
    PeftModel.from_pretrained(model, adapter).merge_and_unload().to(dtype).save_pretrained(target)
    AutoTokenizer.from_pretrained(adapter).save_pretrained(target)


def whole_model(folder: Path, base: str | Path, merged: Path) -> Path:
    """The folder itself; of an adapter, `merged`: the adapter added to its base, made once and by rename."""
    if not (folder / ADAPTER).is_file():
        return folder
    made_of = {"base": str(base), "adapter": digest_files(folder)}
    marker = merged / MERGED_FROM
    if marker.is_file() and json.loads(marker.read_bytes()) == made_of:
        return merged
    with replacing_folder(merged) as building:
        merge_adapter(base, folder, building)
        (building / MERGED_FROM).write_text(json.dumps(made_of))
    return merged


def digest_files(folder: Path) -> str:
    """SHA-256 over the names and contents of a model's or adapter's weights, configuration and chat template."""
    found = hashlib.sha256()
    for path in weight_files(folder):
        found.update(path.name.encode())
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """What decides what a model in a folder says."""
    names = ("*.safetensors", "config.json", ADAPTER, "chat_template.jinja", "tokenizer_config.json")
    return sorted(path for name in names for path in folder.glob(name))
