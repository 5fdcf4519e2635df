"""Which token ends an answer: from the template, tokenizer and generation settings. How much a model reads at once."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import BloomConfig, Gemma3Config, GPT2Config, LlamaConfig

from pipeline.loaded_model import context_of, end_of_turn, stop_tokens
from tests.tiny_student import END, tiny_tokenizer


def model_of(generation: Any, config: Any = None) -> Any:
    return SimpleNamespace(
        generation_config=SimpleNamespace(eos_token_id=generation), config=SimpleNamespace(eos_token_id=config)
    )


def phi_tokenizer() -> Any:
    """Phi-3.5's layout: turns end with <|end|>, special but unnamed; the EOS ends the whole conversation."""
    from tokenizers import AddedToken

    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    )
    return tokenizer


def test_the_end_of_a_turn_comes_from_the_template() -> None:
    tokenizer = tiny_tokenizer()
    assert end_of_turn(tokenizer, {END}) == END
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn_end>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '<turn_end>' }}{% endfor %}"
    assert end_of_turn(tokenizer, {END}) == tokenizer.convert_tokens_to_ids("<turn_end>") != tokenizer.eos_token_id
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}"
    assert end_of_turn(tokenizer, {END}) == tokenizer.eos_token_id


def test_an_unnamed_special_token_ends_a_turn_before_the_end_of_the_conversation() -> None:
    tokenizer = phi_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert end not in tokenizer.all_special_ids
    assert end_of_turn(tokenizer, stop_tokens(tokenizer, model_of([END, end]))) == end
    assert end_of_turn(tokenizer, {END}) == end  # a model that was saved without its generation settings


def test_a_stop_token_that_is_not_special_ends_a_turn() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<done>"])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '<done>' }}{% endfor %}{{ eos_token }}"
    done = tokenizer.convert_tokens_to_ids("<done>")
    assert end_of_turn(tokenizer, stop_tokens(tokenizer, model_of(done))) == done
    assert end_of_turn(tokenizer, {END}) == END


def test_stop_tokens_are_all_that_generation_stops_at() -> None:
    tokenizer = tiny_tokenizer()
    assert stop_tokens(tokenizer, model_of([7, 8], 9)) == {END, 7, 8, 9}
    assert stop_tokens(tokenizer, model_of(None)) == {END}
    text_and_images = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[7]), config=Gemma3Config())
    assert stop_tokens(tokenizer, text_and_images) == {END, 7}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 1e4}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("config", "context"),
    [
        (GPT2Config(n_positions=128), 128),
        (LlamaConfig(max_position_embeddings=512), 512),
        (LlamaConfig(max_position_embeddings=512, rope_parameters=YARN), 2048),
        (LlamaConfig(max_position_embeddings=2048, rope_parameters=LLAMA3), 2048),
        (Gemma3Config(text_config={"max_position_embeddings": 256}), 256),
        (BloomConfig(), sys.maxsize),  # its attention has no positions
    ],
)
def test_what_a_model_reads_at_once_is_in_its_configuration(config: Any, context: int) -> None:
    assert context_of(config) == context
