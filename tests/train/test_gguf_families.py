"""Students of other families as GGUF files: llama.cpp splits a text into the tokens that they were trained with."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from gguf import GGUFReader
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from pipeline.errors import DistillError
from tests.tiny_student import SHAPE, make_recipe, saved, tiny_tokenizer
from train.publish.to_gguf import _text, write_gguf

TEXTS = ("Toby says hello.", "Dudu eats 12  honeys,\nMimi sleeps all day.", "옛날 옛적에 user model")
TURNS = "{% for m in messages %}{{ '<user>' + m['content'] + '<end>' }}{% endfor %}"
TEXT = SHAPE | {"head_dim": 16}


def with_pieces(*, blank: bool) -> Any:
    """As SentencePiece's: blanks in the pieces, bytes for what has none. `blank`: Llama 2 begins a text with one."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    begin = [normalizers.Prepend("▁")] if blank else []
    tokenizer.normalizer = normalizers.Sequence([*begin, normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    control, of_bytes = ["<unk>", "<s>", "</s>", "<user>", "<end>"], [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[*control, *of_bytes], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    written = json.loads(tokenizer.to_str())
    written["added_tokens"] = [token for token in written["added_tokens"] if token["content"] not in of_bytes]
    tokenizer = Tokenizer.from_str(json.dumps(written))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=TURNS
    )


def with_bytes() -> Any:
    """The tiny tokenizer, with a merge: llama.cpp takes none without."""
    written = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    written["model"]["merges"] = [["a", "y"]]
    written["model"]["vocab"]["ay"] = len(written["model"]["vocab"])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(written)))
    tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", TURNS
    return tokenizer


TOKENISE = """
import json, sys, urllib.request, xllamacpp
settings = xllamacpp.CommonParams()
settings.model.path, settings.n_ctx = sys.argv[1], 512
server = xllamacpp.Server(settings)
asked = json.dumps({"content": sys.argv[2], "add_special": False, "parse_special": True}).encode()
request = urllib.request.Request(server.listening_address + "/tokenize", asked, {"Content-Type": "application/json"})
print(urllib.request.urlopen(request).read().decode())
"""


def tokens_of(file: Path, text: str) -> list[int]:
    """llama.cpp's own, in a process of its own: where it does not like a file, it ends its process."""
    done = subprocess.run([sys.executable, "-c", TOKENISE, file, text], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[int] = json.loads(done.stdout.splitlines()[-1])["tokens"]
    return found


@pytest.mark.parametrize(
    ("config", "tokenizer"),
    [
        (transformers.MistralConfig(**TEXT), with_pieces(blank=False)),
        (transformers.LlamaConfig(**TEXT), with_pieces(blank=True)),
        (transformers.Gemma2Config(**TEXT), with_pieces(blank=False)),
        (transformers.Gemma3TextConfig(**TEXT), with_pieces(blank=False)),
        (transformers.Phi3Config(**SHAPE), with_bytes()),  # Phi-4-mini
        (
            transformers.AutoConfig.for_model("qwen3_5_text", **TEXT | {"head_dim": 256, "num_hidden_layers": 4}),
            with_bytes(),
        ),
    ],
    ids=lambda given: getattr(given, "model_type", ""),
)
def test_llama_cpp_splits_text_as_the_students_tokenizer(tmp_path: Path, config: Any, tokenizer: Any) -> None:
    config.vocab_size = len(tokenizer)
    folder = saved(config, tmp_path / "student")
    tokenizer.save_pretrained(folder)
    file = tmp_path / write_gguf(make_recipe("x"), folder, tmp_path, name="x", kind="f16")
    text = "".join(f"<s><user>{text}<end>" for text in TEXTS)
    assert tokens_of(file, text) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_token_that_the_model_has_no_place_for_is_not_missed(tmp_path: Path) -> None:
    """Gemma 3's tokenizer has one for images, which its models of text alone do not know."""
    tokenizer = with_pieces(blank=False)
    folder = saved(transformers.Gemma3TextConfig(**TEXT | {"vocab_size": len(tokenizer)}), tmp_path / "student")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    assert (tmp_path / write_gguf(make_recipe("x"), folder, tmp_path, name="x", kind="f16")).is_file()


def test_a_tokenizer_that_llama_cpp_has_no_way_to_follow_is_refused(tmp_path: Path) -> None:
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "a"]
    unigram = models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0, byte_fallback=True)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(unigram), unk_token="<unk>")
    folder = saved(transformers.LlamaConfig(**TEXT | {"vocab_size": len(tokenizer)}), tmp_path / "student")
    tokenizer.save_pretrained(folder)
    with pytest.raises(DistillError, match="its tokenizer is Unigram"):
        write_gguf(make_recipe("x"), folder, tmp_path, name="x", kind="f16")


def test_of_several_chat_templates_the_file_has_the_usual_one(tmp_path: Path) -> None:
    """As Hermes and Command R, which have another one for tools."""
    tokenizer = with_bytes()
    folder = saved(transformers.Phi3Config(**SHAPE | {"vocab_size": len(tokenizer)}), tmp_path / "student")
    tokenizer.save_pretrained(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    file = tmp_path / write_gguf(make_recipe("x"), folder, tmp_path, name="x", kind="f16")
    assert _text(GGUFReader(file), "tokenizer.chat_template") == tokenizer.chat_template
