"""A tiny chat model and a run with kept rows, made on the spot, for the tests of training."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.recipe import Recipe
from pipeline.records import Kept, Message, encode_line
from pipeline.rundir import RunDir
from tests.completion_fields import completion_fields

# As SmolLM2's: a blank follows the end-of-turn token, which is the EOS and the pad token too.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
START, END = 1, 2  # ids of <|im_start|> and <|im_end|>
SHAPE = {
    "vocab_size": 3 + 256,  # the control tokens and the bytes of `tiny_tokenizer`
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": START,
    "eos_token_id": END,
    "pad_token_id": END,
}


def tiny_tokenizer() -> Any:
    """One token a byte, and the control tokens <unk>, <|im_start|>, <|im_end|>: ids can be counted by hand."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    control = ["<unk>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(control + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHATML,
    )


def tiny_model(folder: Path, *, layers: int = 2, architecture: str = "llama", context: int = 512) -> Path:
    """Writes a model folder: hidden size 64, random weights, the tiny tokenizer."""
    import transformers

    name = {"llama": "Llama", "qwen2": "Qwen2", "mixtral": "Mixtral"}[architecture]
    experts = {"num_local_experts": 4, "router_aux_loss_coef": 0.5} if architecture == "mixtral" else {}
    shape = SHAPE | {"num_hidden_layers": layers, "max_position_embeddings": context}
    return saved(getattr(transformers, f"{name}Config")(**shape, **experts), folder)


def saved(config: Any, folder: Path) -> Path:
    """Writes a model folder: random weights, the tiny tokenizer."""
    import torch
    import transformers

    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def kept_row(number: int, question: str, answer: str, **changes: Any) -> Kept:
    own = {"prompt_id": f"p{number}", "messages": [Message("user", question)], "model": "teacher"}
    return Kept(**{**completion_fields(f"r{number}", answer), **own, **changes})


def make_run(path: Path, rows: list[Kept]) -> RunDir:
    path.mkdir(parents=True, exist_ok=True)
    run = RunDir(path)
    run.kept.write_bytes(b"".join(encode_line(row) for row in rows))
    return run


def log_of(run: RunDir) -> dict[str, Any]:
    """What a training said of itself."""
    return json.loads((run.student / "training_log.json").read_bytes())


def losses(run: RunDir) -> list[float]:
    """What each step minimised."""
    return [entry["loss"] for entry in log_of(run)["loss"]]


def story_rows(count: int) -> list[Kept]:
    """Answers of growing length to distinct questions."""
    return [kept_row(i, f"Story {i}?", "The cat sat. " * (1 + i % 5) + f"End {i}.") for i in range(count)]


ONE = 1e-9  # a share so small that the part has the one prompt that moves there


def make_recipe(
    student: str, teacher: str = "teacher", *, validation: float = ONE, test: float = ONE, **train: Any
) -> Recipe:
    """A recipe for the tiny student; no filter ran, which is accepted."""
    settings = {"method": "full", "epochs": 1, "learning_rate": 1e-3, "batch_size": 4, "max_length": 512, **train}
    settings.setdefault("accept", ["filters"])
    return Recipe(
        name="tiny",
        teacher={"model": teacher},
        student={"model": student},
        prompts={"template": "Hi", "count": 1, "validation": validation, "test": test},
        train=settings,
    )


def interrupted(*_: Any, **__: Any) -> None:
    """Stands where a training is to be stopped."""
    raise KeyboardInterrupt


def train_unsaved(recipe: Recipe, run: RunDir) -> None:
    """Trains to the end, and is stopped before the student is saved."""
    from train.run import train_run

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("train.prepared.Prepared.save", interrupted)
        train_run(recipe, run)
