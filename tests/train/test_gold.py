"""Distillation between two tokenizers: the loss by hand where both are one, and a student of another tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.experimental.gold.gold_trainer import build_teacher_inputs_from_texts

from pipeline.errors import RecipeError
from pipeline.teacher_config import TeacherConfig
from tests.tiny_student import CHATML, kept_row, log_of, make_recipe, make_run, story_rows, tiny_model
from train.checks.before import check_followed
from train.rows import to_examples
from train.run import train_run
from train.setting import Setting
from train.tokens import MASKED
from train.trainer import prepare


def other_model(folder: Path) -> str:
    """A teacher with tokens of several bytes, other control tokens and another chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("T", "h"), ("Th", "e"), ("c", "a"), ("ca", "t"), ("s", "a"), ("sa", "t"), ("Ġ", "cat"), ("n", "d")]
    tokens = ["<pad>", "</s>", *alphabet, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    template = CHATML.replace("<|im_start|>", "[").replace("<|im_end|>", "</s>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", chat_template=template
    )
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def trainer_of(student: str, teacher: str, folder: Path, template: dict[str, Any] | None = None, **kd: Any) -> Any:
    rows = story_rows(6)
    examples = {"train": [*to_examples(rows[2:])], "validation": to_examples(rows[:2])}
    for example in examples["train"]:
        example["told"] = [{"role": "system", "content": "Be brief."}, *example["prompt"]]
        example["template"] = template or {}
    config = make_recipe(student, teacher, method="gold", kd={"weights": "full", **kd}, micro_batch_size=1).train
    return prepare(
        student, examples, Setting(config, folder, Console(quiet=True), teacher=TeacherConfig(model=teacher))
    ).trainer


def test_with_one_tokenizer_the_loss_is_as_by_hand(tmp_path: Path) -> None:
    """Jensen-Shannon of the two distributions where each token of the answer, EOS included, is predicted; its mean."""
    folders = [str(tiny_model(tmp_path / name, layers=layers)) for name, layers in (("student", 2), ("teacher", 4))]
    trainer = trainer_of(*folders, tmp_path / "t", alpha=0.7, temperature=2.0)
    row = trainer.train_dataset[0]
    batch = trainer.data_collator([row])
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model.eval(), batch).item()
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64) for folder in folders)
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    answer = batch["input_ids"][0][batch["labels"][0] != MASKED]
    assert tokenizer.decode(answer) == row["original_completion_text"] + "<|im_end|>"
    told = tokenizer(row["original_prompt_text"], return_tensors="pt")["input_ids"][0]
    with torch.no_grad():
        q, p = (
            model(input_ids=torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1]
            for model, prompt in ((student, batch["prompts"][0]), (teacher, told))
        )
    hard = -q.log_softmax(-1).gather(1, answer[:, None]).mean().item()
    p, q = ((logits / 2).log_softmax(-1) for logits in (p, q))
    m = (0.5 * p.exp() + 0.5 * q.exp()).log()
    divergence = sum(0.5 * (log.exp() * (log - m)).sum(-1).mean().item() for log in (p, q))
    exact = trainer.teacher_model.dtype == torch.float32
    assert loss == pytest.approx(0.7 * divergence + 0.3 * hard, rel=1e-3 if exact else 2e-2)


def test_the_teacher_reads_its_own_prompt(student: str, tmp_path: Path) -> None:
    teacher = other_model(tmp_path / "teacher")
    trainer = trainer_of(student, teacher, tmp_path / "t", temperature=2.0)
    texts = set(trainer.train_dataset["original_prompt_text"])
    assert "[system\nBe brief.</s>\n[user\nStory 2?</s>\n[assistant\n" in texts
    with torch.no_grad():
        trainer.compute_loss(trainer.model, trainer.data_collator([trainer.train_dataset[0]]))
    found = trainer.uld_loss_fn  # tokens of one spelling are compared one by one, the rest by rank
    assert found.last_matched_loss > 0 and found.last_unmatched_loss > 0
    assert (found.token_merge_strategy, found.skip_student_eos, found.skip_teacher_eos) == ("bayesian", False, False)
    assert (found.student_temperature, found.teacher_temperature) == (2.0, 2.0)


def test_an_empty_thought_that_the_answer_begins_with_too_is_read_once(tmp_path: Path) -> None:
    folders = [str(tiny_model(tmp_path / name)) for name in ("student", "teacher")]
    for folder in folders:
        template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
        (Path(folder) / "chat_template.jinja").write_text(template)
    trainer = trainer_of(*folders, tmp_path / "t", template={"enable_thinking": False})
    row = trainer.train_dataset[0]
    assert row["original_prompt_text"].endswith("<|im_start|>assistant\n")
    assert row["original_completion_text"].startswith("<think>\n\n</think>\n\n")


def test_a_first_token_that_template_and_tokenizer_both_put_stands_once(student: str, tmp_path: Path) -> None:
    teacher = other_model(tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(teacher)  # as Llama 3's
    tokenizer.bos_token, tokenizer.chat_template = "<pad>", "{{ bos_token }}" + tokenizer.chat_template
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
    tokenizer.save_pretrained(teacher)
    trainer = trainer_of(student, teacher, tmp_path / "t")
    text = trainer.train_dataset[0]["original_prompt_text"]
    ids = build_teacher_inputs_from_texts(trainer.teacher_tokenizer, [text], ["The end."])[0][0].tolist()
    assert ids[:2] == [0, tokenizer.convert_tokens_to_ids("[")]


def test_a_template_that_ends_an_answer_without_the_end_token_is_refused(tmp_path: Path) -> None:
    student = str(tiny_model(tmp_path / "student"))
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.eos_token = "<unk>"  # the template ends with another
    tokenizer.save_pretrained(student)
    with pytest.raises(
        RecipeError, match=r"method gold: the student's chat template does not end an answer with <unk>"
    ):
        trainer_of(student, other_model(tmp_path / "teacher"), tmp_path / "t")


def test_a_teacher_with_mistrals_own_tokenizer_beside_it_is_read_by_the_other(student: str, tmp_path: Path) -> None:
    teacher = other_model(tmp_path / "teacher")
    config = json.loads((tmp_path / "teacher" / "config.json").read_bytes())
    mistral = config | {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(mistral))
    (tmp_path / "teacher" / "tekken.json").write_text("{}")
    trainer = trainer_of(student, teacher, tmp_path / "t")
    assert trainer.teacher_tokenizer.chat_template.startswith("{% for message in messages %}{{ '['")
    check_followed(make_recipe(student, teacher, method="gold"))


def test_a_pair_that_cannot_be_aligned_is_told_before_anything_is_asked(student: str, tmp_path: Path) -> None:
    other, pieces, mute = (other_model(tmp_path / name) for name in ("other", "pieces", "mute"))
    tokenizer = AutoTokenizer.from_pretrained(pieces)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    tokenizer.save_pretrained(pieces)
    (tmp_path / "mute" / "chat_template.jinja").unlink()
    ended = str(tiny_model(tmp_path / "ended"))
    tokenizer = AutoTokenizer.from_pretrained(ended)
    tokenizer.eos_token = "<unk>"
    tokenizer.save_pretrained(ended)
    for own, teacher, said in (
        (student, pieces, "aligns tokenizers of bytes, and the teacher's is another kind"),
        (pieces, other, "aligns tokenizers of bytes, and the student's is another kind"),
        (student, mute, "needs two chat templates, and the teacher has none"),
        (ended, other, "the student's chat template does not end an answer with <unk>"),
    ):
        with pytest.raises(RecipeError, match=f"^method gold:? {said}"):
            check_followed(make_recipe(own, teacher, method="gold"))
    check_followed(make_recipe("new:30m", other, method="gold", kd={"weights": "full"}))


def test_a_student_learns_from_a_teacher_of_other_tokens(student: str, tmp_path: Path) -> None:
    teacher = other_model(tmp_path / "teacher")
    run = make_run(tmp_path / "run", story_rows(12))
    own = {"learning_rate": 1e-2, "epochs": 3, "accept": ["filters", "licence", "templates", "size_ratio"]}
    train_run(make_recipe(student, teacher, method="gold", kd={"weights": "full"}, **own), run)
    log = log_of(run)
    losses = [entry["loss"] for entry in log["loss"]]
    assert len(losses) >= 6 and losses[-1] < 0.9 * losses[0]
    assert log["eval"][-1]["loss"] < log["eval"][0]["loss"]
    assert json.loads(run.lineage.read_bytes())["train"]["method"] == "gold"


def test_each_row_of_a_full_step_is_counted_once(
    student: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = other_model(tmp_path / "teacher")
    run = make_run(tmp_path / "run", [kept_row(n, f"Story {n}?", f"End {n}.") for n in range(8)])
    accept = ["filters", "licence", "templates", "size_ratio"]
    train_run(
        make_recipe(student, teacher, method="gold", kd={"weights": "full"}, micro_batch_size=1, accept=accept), run
    )
    log = log_of(run)
    row = "<|im_start|>user\nStory 0?<|im_end|>\n<|im_start|>assistant\nEnd 0.<|im_end|>"
    tokens = 4 * len(AutoTokenizer.from_pretrained(student)(row)["input_ids"])
    assert (len(log["loss"]), log["tokens"]) == (1, tokens)
    said = capsys.readouterr()
    assert "training on 4 of 6 rows; 1 validate" in said.err
    assert f"trained on 4 of 6 rows, {tokens} tokens in " in said.out
