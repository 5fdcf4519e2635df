"""A student that knows nothing yet: a Llama-style model with random weights, and a tokenizer trained on texts.

Takes a size, a seed and texts; reads and writes no file. train.student decides where the student is kept.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pipeline.errors import RecipeError

HEAD = 64  # width of an attention head
WIDTHS = (64, 128, 192, 256, *range(384, 2113, 192))  # three query heads share a key head, or all of a narrow model
WIDTH_PER_LAYER = 24  # MobileLLM has 19 to 30
CONTEXT = 2048  # tokens, at least
RAREST = 4  # a pair of tokens is joined if the texts have it so often: rarer tokens would hardly be trained
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + 'END' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """The size of a Llama-style model, but for its vocabulary."""

    width: int
    layers: int

    @property
    def heads(self) -> int:
        return self.width // HEAD

    @property
    def key_heads(self) -> int:
        """How many heads of keys and values the query heads share."""
        return max(1, self.heads // 3)

    @property
    def inner(self) -> int:
        """Width of the gated block: 8/3 of the model's, in multiples of 64."""
        return HEAD * round(self.width / 24)

    @property
    def layer_parameters(self) -> int:
        attention = 2 * self.width**2 + 2 * self.width * self.key_heads * HEAD
        return attention + 3 * self.width * self.inner + 2 * self.width

    def parameters(self, vocabulary: int) -> int:
        """All of them; the embedding, which is also the output head, once."""
        return vocabulary * self.width + self.layers * self.layer_parameters + self.width


def shape_of(parameters: int, vocabulary: int) -> Shape:
    """The shape with about so many parameters whose width is nearest to 24 times its depth.

    Deep and thin, with shared embeddings and grouped queries, as MobileLLM (Liu et al. 2024, arXiv 2402.14905) and
    SmolLM2 are: 576 wide and 30 layers deep at 125 million, 960 and 32 at 350 million, 1280 and 54 at 1 billion.
    Raises RecipeError if the vocabulary leaves no room for a layer.
    """
    shapes = []
    for width in WIDTHS:
        room = (parameters - vocabulary * width) / Shape(width, 1).layer_parameters
        if room >= 0.5:
            shapes.append(Shape(width, max(1, round(room))))
    if not shapes:
        raise RecipeError(
            f"student.model: {parameters:,} parameters are too few for a vocabulary of {vocabulary:,} tokens; make the "
            "student larger, or leave out student.tokenizer"
        )
    return min(shapes, key=lambda shape: abs(math.log(shape.width / shape.layers / WIDTH_PER_LAYER)))


def vocabulary_of(parameters: int) -> int:
    """Tokens of a new tokenizer, at most: 1,024 at 1 million parameters, twice as many at each fourfold size.

    So the embedding grows with the power 0.83 of the model, as is best by Tao et al. 2024 (arXiv 2407.13623).
    """
    return int(1024 * 2 ** max(0, math.ceil(math.log(parameters / 1e6, 4))))


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer: any text can be written, each digit is a token, as SmolLM2's. The same for a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=RAREST,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    named: dict[str, Any] = {"pad_token": PAD, "eos_token": END, "extra_special_tokens": [START]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **named)


def apply_template(tokenizer: Any, template: str) -> None:
    """Gives a tokenizer a chat template. ChatML ends turns with <|im_end|> if the tokenizer has it, else with its EOS.

    Raises RecipeError if it has neither.
    """
    if template == "chatml":
        if {START, END} <= tokenizer.get_vocab().keys():
            tokenizer.eos_token = END
        if tokenizer.eos_token is None:
            raise RecipeError("student.chat_template chatml: the tokenizer has no EOS to end a turn with; give a file")
        template = CHATML.replace("END", tokenizer.eos_token)
    tokenizer.chat_template = template


def random_model(parameters: int, tokenizer: Any, *, seed: int, context: int) -> Any:
    """A Llama-style model for the tokenizer, in bfloat16; the same for the same seed. `context`: tokens, at least.

    Raises RecipeError as `shape_of` does.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = shape_of(parameters, len(tokenizer))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        max_position_embeddings=max(CONTEXT, context),
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).to(torch.bfloat16)
