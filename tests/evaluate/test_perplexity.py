"""Perplexity against what a hand or another library computes, on tiny models made here."""

import math
from pathlib import Path
from typing import Any

import pytest
import trl

import evaluate.measure.perplexity as scoring
from evaluate.figures.quality import perplexity_figures
from evaluate.figures.statistics import Figure
from evaluate.measure.perplexity import choose_rows, encode_row, score_rows
from evaluate.measure.results import RowScore
from evaluate.models import Subject
from pipeline.errors import DistillError
from pipeline.reasoning import reasoning_form
from pipeline.records import Message
from pipeline.train_config import TrainConfig
from tests.tiny_student import CHATML, END, kept_row, make_recipe, story_rows, tiny_model, tiny_tokenizer
from train.rows import to_examples

TEMPLATES = Path(trl.__file__).parent / "chat_templates"  # as the makers of well-known models publish them
QWEN3 = (TEMPLATES / "qwen3.jinja").read_text()
LLAMA3 = (TEMPLATES / "llama3.jinja").read_text().replace("<|eot_id|>", "<|im_end|>")
THOUGHT = "<think>\nTwo and two.\n</think>\n\n"


def perplexity(scores: list[RowScore]) -> float:
    return perplexity_figures({"model": scores})["model"]["perplexity"].value


def bits_per_character(scores: list[RowScore]) -> float:
    return perplexity_figures({"model": scores})["model"]["bits_per_character"].value


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_model(tmp_path_factory.mktemp("tiny") / "model")
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_uniform_logits_give_the_vocabulary_size(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / "model")).eval()
    torch.nn.init.zeros_(model.lm_head.weight)
    scores = score_rows(model, tiny_tokenizer(), story_rows(5))
    size = len(tiny_tokenizer())
    assert perplexity(scores) == pytest.approx(size, rel=1e-5)
    # One token a byte and one for the end: (13 characters + 1) × log2(vocabulary) bits over 13 characters, and so on.
    characters, tokens = sum(s.characters for s in scores), sum(s.tokens for s in scores)
    assert tokens == characters + 5
    assert bits_per_character(scores) == pytest.approx(math.log2(size) * tokens / characters, rel=1e-5)


def test_one_row_equals_the_loss_that_transformers_computes(tiny: tuple[Any, Any]) -> None:
    import torch

    model, tokenizer = tiny
    row = kept_row(0, "What did the cat do?", "The cat sat on a mat.")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What did the cat do?"}], add_generation_prompt=True, return_dict=False
    )
    completion = [*tokenizer.encode("The cat sat on a mat.", add_special_tokens=False), END]
    ids = torch.tensor([prompt + completion])
    labels = torch.tensor([[-100] * len(prompt) + completion])
    with torch.inference_mode():
        expected = model(input_ids=ids, labels=labels).loss.item()
    (score,) = score_rows(model, tokenizer, [row])
    assert score.tokens == len(completion) == 22
    assert score.nll_nats / score.tokens == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("logits_bytes", [1, 1 << 20, 1 << 30])
def test_batches_and_chunks_change_no_score(
    tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, logits_bytes: int
) -> None:
    model, tokenizer = tiny
    rows = [kept_row(i, "Tell. " * (i % 4 + 1), "a b c. " * (7 * i % 11 + 1)) for i in range(12)]
    alone = [score_rows(model, tokenizer, [row])[0] for row in rows]
    monkeypatch.setattr(scoring, "LOGITS_BYTES", logits_bytes)
    monkeypatch.setattr(scoring, "CHUNK", 7)
    heard: list[int] = []
    together = score_rows(model, tokenizer, rows, progress=heard.append)
    assert sum(heard) == 12
    assert len(heard) == (12 if logits_bytes == 1 else len(heard)) and (logits_bytes < 1 << 30 or len(heard) == 1)
    assert [score.id for score in together] == [row.id for row in rows]
    for one, other in zip(alone, together, strict=True):
        assert one.nll_nats == pytest.approx(other.nll_nats, rel=1e-4)


def test_all_tokens_weigh_the_same() -> None:
    # 2 tokens at 1 nat and 8 tokens at 0.25 nats: (2 + 2) / 10, not the mean of the two rows' perplexities.
    scores = [RowScore("a", "p", 2.0, 2, 4), RowScore("b", "q", 2.0, 8, 16)]
    assert perplexity(scores) == pytest.approx(math.exp(0.4))
    assert bits_per_character(scores) == pytest.approx(4 / math.log(2) / 20)


def test_an_answer_that_was_cut_off_has_no_end() -> None:
    tokenizer = tiny_tokenizer()
    whole = encode_row(tokenizer, kept_row(0, "Hi", "abc"), END)
    cut = encode_row(tokenizer, kept_row(0, "Hi", "abc", finish_reason="length"), END)
    assert whole.completion == [*cut.completion, END]
    assert whole.prompt == cut.prompt and len(cut.completion) == 3


def test_tool_calls_are_scored_in_the_form_of_the_template() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }} {{ c.function.arguments.n }}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "count", "arguments": '{"n": 3}'}}
    row = encode_row(tokenizer, kept_row(0, "Hi", "", tool_calls=[call], finish_reason="tool_calls"), END)
    assert tokenizer.decode(row.completion) == "count 3<|im_end|>"
    assert tokenizer.decode(row.prompt).endswith("Hi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("template", "reasoning", "answer", "before"),
    [
        (QWEN3, "strip", "Four.", "assistant\n<think>\n\n</think>\n\n"),
        (QWEN3, "keep", "Four.", f"assistant\n{THOUGHT}"),
        (CHATML, "keep", "Four.", f"assistant\n{THOUGHT}"),
        (LLAMA3, "strip", "\n\nFour.\n", "\n\n"),  # it trims answers
        (CHATML, "strip", "0a", "assistant\n"),
    ],
    ids=["empty thought", "thought", "thought in the text", "trimmed", "plain"],
)
def test_an_answer_is_scored_as_training_has_it(template: str, reasoning: str, answer: str, before: str) -> None:
    """What the template writes before any answer, and what was thought, is context."""
    tokenizer, row = tiny_tokenizer(), kept_row(0, "Two and two?", answer, reasoning="Two and two.")
    tokenizer.chat_template = template
    form = reasoning_form(make_recipe("x", reasoning=reasoning).train, tokenizer)
    (example,) = to_examples([row], None, form)
    taught = tokenizer.apply_chat_template([*example["prompt"], *example["completion"]], return_dict=False)
    encoded = encode_row(tokenizer, row, END, form)
    assert [*encoded.prompt, *encoded.completion] == taught[: len(encoded)]
    assert tokenizer.decode(encoded.completion) == f"{answer.strip()}<|im_end|>"
    assert tokenizer.decode(encoded.prompt).endswith(before)


def test_the_prompt_ends_where_the_answer_begins_and_keeps_the_system_message() -> None:
    tokenizer = tiny_tokenizer()
    row = kept_row(0, "Hi", "abc", messages=[Message("system", "Be kind."), Message("user", "Hi")])
    text = tokenizer.decode(encode_row(tokenizer, row, END).prompt)
    assert text == "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_the_end_of_a_turn_is_scored_with_the_answer(tiny: tuple[Any, Any]) -> None:
    """A turn that ends with a stop token other than the EOS: that one is scored."""
    import torch

    model, _ = tiny
    tokenizer = tiny_tokenizer()
    end = tokenizer.encode("!", add_special_tokens=False)[0]
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "!")
    row = kept_row(0, "Hi", "abc")
    turns = [{"role": "user", "content": "Hi"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    ids = [*prompt, *tokenizer.encode("abc", add_special_tokens=False), end]
    model.generation_config.eos_token_id = [END, end]
    (score,) = score_rows(model, tokenizer, [row])
    model.generation_config.eos_token_id = END
    labels = torch.tensor([[-100] * len(prompt) + ids[len(prompt) :]])
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([ids]), labels=labels).loss.item()
    assert score.nll_nats / score.tokens == pytest.approx(expected, rel=1e-5)


def test_a_row_beyond_the_context_is_left_out(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    rows = [kept_row(0, "Hi", "a" * 600), kept_row(1, "Hi", "a" * 60)]
    assert [score.id for score in score_rows(model, tokenizer, rows)] == ["r1"]


def test_scaled_positions_widen_the_context(tmp_path: Path) -> None:
    """What was trained on is scored: training counts the scaling, too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tiny_model(tmp_path / "model")
    config = AutoConfig.from_pretrained(folder)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 1e4}
    config.rope_parameters = yarn
    model = AutoModelForCausalLM.from_pretrained(folder, config=config).eval()
    rows = [kept_row(number, "Hi", "a" * length) for number, length in enumerate((60, 600, 2100))]
    assert [score.id for score in score_rows(model, tiny_tokenizer(), rows)] == ["r0", "r1"]


def test_weights_that_are_nan_are_refused(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = tiny_model(tmp_path / "student")
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.nn.init.constant_(model.model.norm.weight, math.nan)
    model.save_pretrained(folder)
    subject = Subject("student_after", "student after", "student", folder)
    with pytest.raises(DistillError, match="student after: the loss of 3 of 3 answers is NaN or infinite") as raised:
        scoring.measure_perplexity(subject, story_rows(3), TrainConfig(), dtype="float32", device="cpu")
    assert "lower train.learning_rate" in str(raised.value)


def test_the_choice_of_rows_is_seeded_and_ignores_the_order() -> None:
    rows = story_rows(30)
    chosen = choose_rows(rows, 10)
    assert len(chosen) == 10 and choose_rows(rows[::-1], 10) == chosen
    assert chosen != sorted(rows, key=lambda row: row.id)[:10]
    assert choose_rows(rows[::-1], 30) == sorted(rows, key=lambda row: row.id)


def test_the_interval_of_one_prompt_is_a_point_and_of_two_their_extremes() -> None:
    # Two answers to one prompt are drawn together, so there is nothing to vary.
    one = [RowScore("a", "p", 1.0, 1, 1), RowScore("b", "p", 3.0, 1, 1)]
    assert ends(perplexity_figures({"a": one})["a"]["perplexity"]) == pytest.approx([math.exp(2)] * 2)
    # Two prompts: {a, a} and {b, b} each come up in a quarter of the resamples, far more than 2.5%.
    two = [RowScore("a", "p", 1.0, 1, 1), RowScore("b", "q", 3.0, 1, 1)]
    assert ends(perplexity_figures({"a": two})["a"]["perplexity"]) == pytest.approx([math.e, math.exp(3)])


def test_differences_are_paired() -> None:
    before = [RowScore(str(i), str(i), 1.0 + i, 2, 4) for i in range(20)]
    after = [RowScore(s.id, s.prompt_id, s.nll_nats - 1.0, s.tokens, s.characters) for s in before]
    figures = perplexity_figures({"after": after, "before": before})
    ours, theirs = (figures[key]["perplexity"] for key in ("after", "before"))
    # Each row improves by half a nat per token, whichever rows are drawn; unpaired, the interval would be wide.
    quotient = ours.over(theirs)
    assert quotient and (quotient.low, quotient.high) == pytest.approx([math.exp(-0.5)] * 2)
    low, high = ends(theirs)
    assert high / low > 2


def ends(figure: Figure) -> tuple[float, float]:
    estimate = figure.estimate()
    return estimate.low, estimate.high
