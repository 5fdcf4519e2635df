"""What must be known about a model before a server is started: size and dtype of its weights, context, KV cache.

Reads config.json and the names and sizes of the weight files from a folder, the Hub cache, or (only if asked to) the
Hub. Does not read the weights.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from pipeline.errors import UsageError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
WEIGHT_SUFFIXES = (".safetensors", ".bin")  # vLLM loads the first kind that exists
INDEX = "model.safetensors.index.json"
# The names that vLLM knows for the context; if there are several, it takes the smallest.
POSITIONS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length", "max_target_positions",
    "max_sequence_length", "max_seq_length", "seq_len",
)  # fmt: skip


@dataclass(frozen=True)
class ModelFacts:
    """None where something is not known."""

    local: bool = False  # a folder with all of the model: nothing must be fetched
    weight_bytes: int | None = None  # as stored
    dtype: str | None = None  # as stored: float32, bfloat16, float16; None for a quantised model
    max_positions: int | None = None  # tokens of context the model was made for
    kv_values_per_token: int | None = None  # numbers cached per token: keys and values of all layers

    def weight_bytes_as(self, dtype: str | None) -> int | None:
        """Bytes of the weights once loaded as `dtype`; None keeps the stored one."""
        if self.weight_bytes is None or self.dtype is None or dtype is None:
            return self.weight_bytes
        return self.weight_bytes * DTYPE_BYTES[dtype] // DTYPE_BYTES[self.dtype]


def model_facts(model: str, *, ask_hub: bool) -> ModelFacts:
    """Facts about a model folder or Hub id; without `ask_hub`, only what the local cache knows of a Hub id.

    Raises UsageError if a folder holds no readable config, or the Hub does not give the model.
    """
    return _from_folder(Path(model)) if Path(model).is_dir() else _from_hub(model, ask_hub=ask_hub)


def facts_of(config: Mapping[str, Any], sizes: Mapping[str, int]) -> ModelFacts:
    """Facts out of a parsed config.json and the sizes of the model's files (name to bytes)."""
    inner = config.get("text_config")
    text: Mapping[str, Any] = inner if isinstance(inner, dict) else config
    stored = str(text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or config.get("torch_dtype"))
    weights = next((found for suffix in WEIGHT_SUFFIXES if (found := _total(sizes, suffix))), None)
    return ModelFacts(
        weight_bytes=weights,
        dtype=stored if stored in DTYPE_BYTES and not config.get("quantization_config") else None,
        max_positions=min((tokens for key in POSITIONS if (tokens := _number(text, key))), default=None),
        kv_values_per_token=_kv_values(text),
    )


def _kv_values(config: Mapping[str, Any]) -> int | None:
    layers, heads, hidden = (
        _number(config, key) for key in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    )
    head_size = _number(config, "head_dim") or (hidden // heads if hidden and heads else None)
    if layers is None or heads is None or head_size is None:
        return None
    return 2 * layers * (_number(config, "num_key_value_heads") or heads) * head_size


def _number(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if isinstance(value, int) and value > 0 else None


def _total(sizes: Mapping[str, int], suffix: str) -> int:
    found = {name: size for name, size in sizes.items() if name.endswith(suffix) and "/" not in name}
    # Mistral's repositories hold the weights twice, the second time in these; vLLM loads them once.
    once = [size for name, size in found.items() if not name.startswith("consolidated")]
    return sum(once or found.values())


def _from_folder(folder: Path) -> ModelFacts:
    path = folder / "config.json"
    try:
        config = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError) as error:
        raise UsageError(f"{path}: not a model's configuration ({error}); give a model folder or a Hub id") from None
    facts = facts_of(config, {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()})
    return replace(facts, local=True)


def _is_complete(folder: Path) -> bool:
    """Whether all weights are there. A download that was interrupted leaves some of the files, or no index."""
    index = folder / INDEX
    if not index.is_file():
        files = [file.name for file in folder.glob("*.safetensors")]
        return bool(files) and not any(re.search(r"-\d+-of-\d+", name) for name in files)
    names = json.loads(index.read_bytes())["weight_map"].values()
    return all((folder / name).is_file() for name in set(names))


def _from_hub(model: str, *, ask_hub: bool) -> ModelFacts:
    import httpx2  # huggingface_hub sends its requests with it and lets its errors through
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        cached = try_to_load_from_cache(model, "config.json")
        if isinstance(cached, str) and _is_complete(Path(cached).parent):
            return _from_folder(Path(cached).parent)
        if not ask_hub:
            return ModelFacts()
        files = HfApi().model_info(model, files_metadata=True, timeout=30).siblings or []
        config = json.loads(Path(hf_hub_download(model, "config.json")).read_bytes())
    except HFValidationError:
        raise UsageError(f"model {model!r}: neither a folder nor a Hub id (owner/name)") from None
    except (HfHubHTTPError, httpx2.HTTPError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"model {model}: not all in the Hub cache, and the Hub did not give it ({type(error).__name__}: {reason}); "
            "check the name, the network, and HF_TOKEN for a gated model"
        ) from None
    return facts_of(config, {file.rfilename: file.size or 0 for file in files})
