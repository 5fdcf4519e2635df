"""Counting prompts with a tokenizer at hand: chat templates as they are found in the wild, and broken files."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from generate.tokens import TEMPLATE_TOKENS, bound, counter
from pipeline.errors import UsageError
from pipeline.models import resolve_model
from pipeline.records import Message, encode_line

PLAIN = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"


def folder(at: Path, template: object, *, separate: bool = False, **settings: Any) -> str:
    """A model folder whose tokenizer makes a token of each byte, with the chat template."""
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.enable_truncation(4)  # as some files of the Hub have it
    tokenizer.enable_padding(length=3)
    tokenizer.save(str(at / "tokenizer.json"))
    if separate:
        (at / "chat_template.jinja").write_text(str(template), encoding="utf-8")
    else:
        settings["chat_template"] = template
    (at / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return str(at)


def count(model: str, *turns: tuple[str, str]) -> int | None:
    counts = counter(model)
    assert counts is not None
    return counts([Message(role=role, content=content) for role, content in turns], [])


@pytest.mark.parametrize(
    ("template", "rendered"),
    [
        (PLAIN, "system:조심\nuser:hi\n"),
        ("{{ bos_token }}{{ messages[1].content }}{% if add_generation_prompt %}>>{% endif %}", "<s>hi>>"),
        ("{{ strftime_now('%Y') }}", "2026"),
        ("a{% generation %}b{{ messages[1].content }}{% endgeneration %}c", "abhic"),
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% endfor %}", "hi"),
        ("{{ messages[1] | tojson }}", '{"role": "user", "content": "hi"}'),
        ("{{ messages[1] | tojson(indent=1) }}", '{\n "role": "user",\n "content": "hi"\n}'),
        ("{{ messages[1] | tojson(separators=(',', ':'), sort_keys=true) }}", '{"content":"hi","role":"user"}'),
        ("{{ messages[0].content | tojson(ensure_ascii=true) }}", r'"\uc870\uc2ec"'),
        ("  {% if true %}\nx\n  {% endif %}", "x\n"),  # blocks are trimmed
    ],
)
@pytest.mark.parametrize("separate", [False, True])
def test_templates_are_rendered_as_servers_do(tmp_path: Path, template: str, rendered: str, separate: bool) -> None:
    model = folder(tmp_path, template, separate=separate, bos_token={"content": "<s>"})
    assert count(model, ("system", "조심"), ("user", "hi")) == len(rendered.encode())


def test_the_default_of_several_templates_counts(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": PLAIN}]
    assert count(folder(tmp_path, several), ("user", "hi")) == len("user:hi\n")


def test_a_prompt_that_the_template_refuses_has_no_count(tmp_path: Path) -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN
    model = folder(tmp_path, refusing)
    assert count(model, ("system", "x"), ("user", "hi")) is None
    assert count(model, ("user", "hi")) == len("user:hi\n")


def test_templates_may_not_reach_out_of_their_sandbox(tmp_path: Path) -> None:
    model = folder(tmp_path, "{{ messages.__class__.__base__.__subclasses__() }}")
    assert count(model, ("user", "hi")) is None


@pytest.mark.parametrize(
    ("name", "content"), [("tokenizer.json", "{"), ("tokenizer_config.json", "{"), ("chat_template.jinja", "{% if %}")]
)
def test_a_broken_file_is_one_clear_error(tmp_path: Path, name: str, content: str) -> None:
    model = folder(tmp_path, PLAIN)
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match="holds no usable tokenizer: ") as caught:
        counter(model)
    assert "\n" not in str(caught.value)


def test_without_tokenizer_or_template_nothing_is_counted(tmp_path: Path) -> None:
    assert counter(str(tmp_path)) is None
    assert counter(folder(tmp_path, None)) is None
    assert counter("gpt-4.1") is None


@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text(max_size=40)), min_size=1))
def test_no_byte_level_tokenizer_passes_the_bound(turns: list[tuple[str, str]]) -> None:
    messages = [Message(role=role, content=content) for role, content in turns]
    chat_ml = sum(len(f"{role}\n{content}\n".encode()) + 2 for role, content in turns) + 3 + TEMPLATE_TOKENS // 2
    body = sum(len(encode_line(message)) for message in messages)  # without model and sampling, which add to it
    assert chat_ml <= bound(body)


@pytest.mark.slow
def test_prompts_are_counted_as_transformers_counts_them() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve_model("embedded:smollm2-135m"))
    count = counter("embedded:smollm2-135m")
    assert count is not None
    for turns in ([("user", "토끼 🐰 and {{ braces }}")], [("system", "Be kind."), ("user", "a\n\n <|im_end|> b")]):
        messages = [Message(role=role, content=content) for role, content in turns]
        asked = [{"role": role, "content": content} for role, content in turns]
        rendered = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        assert count(messages, []) == len(tokenizer(rendered, add_special_tokens=False)["input_ids"])
