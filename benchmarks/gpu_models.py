"""Models of Qwen2.5's shapes with random weights, and rows for them: good for speed and memory, never for quality.

No hub and no file of anybody's is needed. The tokenizer is a small one, filled up to the vocabulary of the shape.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.made_up import WORDS, made_up_rows

SHAPES: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("shapes.json").read_text())
LONGER = 4  # times as long as the stories of lengths.json: about 660 tokens with the prompt and the template


def random_model(work: Path, shape: str, *, weights: bool = True) -> str:
    """A folder with config, tokenizer and, unless vLLM makes them up itself, weights. It is made once."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = work / f"{shape}{'' if weights else '-empty'}"
    if not (folder / "tokenizer_config.json").is_file():  # written last
        tokenizer = filled_tokenizer(SHAPES[shape]["vocab_size"])
        config = Qwen2Config(**SHAPES[shape], eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
        config.dtype, config.architectures = torch.bfloat16, ["Qwen2ForCausalLM"]
        if weights:
            torch.manual_seed(0)
            with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
                Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def filled_tokenizer(vocabulary: int) -> Any:
    """A word of the rows is a token. The other entries are never used, and make the heads as costly as real ones."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from train.new_student import END, PAD, START, apply_template, train_tokenizer

    small = train_tokenizer(["".join(f" {word}" for word in WORDS)] * 10, 1024)
    content = json.loads(small.backend_tokenizer.to_str())
    known = content["model"]["vocab"]
    known |= {f"unused {number}": number for number in range(len(known), vocabulary)}
    named: dict[str, Any] = {"pad_token": PAD, "eos_token": END, "extra_special_tokens": [START]}
    whole = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), **named)
    apply_template(whole, "chatml")
    return whole


def rows(count: int, longer: int = LONGER) -> list[dict[str, Any]]:
    """Made-up rows, `longer` times as long as a real run's: a word is a token of the tokenizer above."""
    made = made_up_rows(count, words_per_token=longer)
    return [{**row, "told": row["prompt"], "id": str(number)} for number, row in enumerate(made)]
