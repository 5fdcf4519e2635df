"""Soft distillation on kept answers: the loss by hand, who may teach whom, what hard and soft share."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.gold import GOLDConfig, GOLDTrainer

from pipeline.errors import RecipeError
from pipeline.teacher_config import TeacherConfig
from tests.tiny_student import log_of, losses, make_recipe, make_run, story_rows, tiny_model
from train.prepared import Prepared
from train.progress import TrainProgress
from train.rows import to_examples
from train.run import train_run
from train.setting import Setting
from train.student_trainer import completion_logits
from train.teacher import differing_tokens
from train.tokens import MASKED
from train.trainer import prepare


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A student, and a teacher that surely says something else, whose vocabulary is padded to a rounder number."""
    folder = tmp_path_factory.mktemp("models")
    student, teacher = tiny_model(folder / "student"), tiny_model(folder / "teacher", layers=4)
    model = AutoModelForCausalLM.from_pretrained(teacher)
    model.resize_token_embeddings(264, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.5)
    model.save_pretrained(teacher)
    return str(student), str(teacher)


def prepared(models: tuple[str, str], folder: Path, **train: Any) -> Prepared:
    rows = story_rows(6)
    parts = {"train": to_examples(rows[2:]), "validation": to_examples(rows[:2])}
    examples = {part: [{**row, "told": row["prompt"]} for row in of_part] for part, of_part in parts.items()}
    config = make_recipe(models[0], models[1], **train).train
    return prepare(
        models[0], examples, Setting(config, folder, Console(quiet=True), teacher=TeacherConfig(model=models[1]))
    )


def divergence(teacher: torch.Tensor, student: torch.Tensor) -> float:
    """KL(teacher || student) of log-probabilities, summed."""
    return (teacher.exp() * (teacher - student)).sum().item()


@pytest.mark.parametrize(
    "soft",
    [
        {"alpha": 0.3, "temperature": 2.0, "weights": "full"},
        {"alpha": 1.0, "temperature": 0.5, "weights": "full"},
    ],
)
def test_the_loss_of_a_step_is_that_of_its_completion_tokens(
    models: tuple[str, str], tmp_path: Path, soft: dict[str, Any]
) -> None:
    trainer = prepared(models, tmp_path, method="kd", kd=soft, micro_batch_size=2).trainer
    student, teacher = (AutoModelForCausalLM.from_pretrained(model).eval() for model in models)
    total, tokens = 0.0, 0
    for row in trainer.train_dataset:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            q, p = student(input_ids=ids).logits[0], teacher(input_ids=ids).logits[0]
        for place, label in enumerate(row["labels"]):
            if label == MASKED:
                continue
            tokens += 1
            of_q, of_p = q[place - 1], p[place - 1, :259]  # what is before predicts; 259 tokens are shared
            t = soft["temperature"]
            log_q, log_p = (of_q / t).log_softmax(-1), (of_p / t).log_softmax(-1)
            divergence = (log_p.exp() * (log_p - log_q)).sum()
            hard = -of_q.log_softmax(-1)[label]
            total += (soft["alpha"] * t**2 * divergence + (1 - soft["alpha"]) * hard).item()
    batch = next(iter(trainer.get_train_dataloader()))
    assert len(batch["labels"]) == 4  # all rows: one step
    trainer.create_optimizer()
    loss = trainer.training_step(trainer.model, batch, torch.tensor(tokens))
    assert loss.item() == pytest.approx(total / tokens, rel=1e-3 if trainer.teacher.dtype == torch.float32 else 2e-2)


def test_the_validation_loss_is_one_figure_for_all_methods(models: tuple[str, str], tmp_path: Path) -> None:
    student = AutoModelForCausalLM.from_pretrained(models[0]).eval()
    hard = prepared(models, tmp_path / "hard", method="full").trainer
    total, tokens = 0.0, 0
    for row in hard.eval_dataset:
        with torch.no_grad():
            scores = student(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        found = [-scores[place - 1, label].item() for place, label in enumerate(row["labels"]) if label != MASKED]
        total, tokens = total + sum(found), tokens + len(found)
    expected = total / tokens  # each token weighs the same, however rows are batched
    assert hard.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    for method in ("kd", "gold", "on_policy"):
        own = {"kd": {"weights": "full"}, "micro_batch_size": 1, "on_policy": {"max_new_tokens": 8}}
        soft = prepared(models, tmp_path / method, method=method, **own).trainer
        assert soft.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_soft_student_comes_nearer_to_its_teacher(models: tuple[str, str], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", story_rows(40))
    soft = {"weights": "full", "alpha": 1.0}
    train_run(make_recipe(*models, method="kd", kd=soft, learning_rate=1e-2), run)
    found = losses(run)
    assert found[-1] < 0.8 * found[0]
    log = log_of(run)
    assert (log["method"], log["weights"]) == ("kd", "full")
    before, after, teacher = (
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        for model in (models[0], run.student, models[1])
    )
    row = json.loads(run.test.read_bytes().splitlines()[0])
    chat = [*row["messages"], {"role": "assistant", "content": row["text"]}]
    tokenizer = AutoTokenizer.from_pretrained(run.student)
    ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)["input_ids"]
    with torch.no_grad():
        p, *q = (model(input_ids=ids).logits[0, 30:, :259].log_softmax(-1) for model in (teacher, before, after))
    assert divergence(p, q[1]) < 0.8 * divergence(p, q[0])
    section = json.loads(run.lineage.read_bytes())["train"]
    assert section["hyperparameters"]["kd"]["weights"] == "full"
    assert "alpha" in (run.student / "README.md").read_text()


def test_a_mixture_of_experts_follows_its_teacher(models: tuple[str, str], tmp_path: Path) -> None:
    """The loss is the divergence alone, without the router's, which would hide it."""
    moe = str(tiny_model(tmp_path / "moe", layers=1, architecture="mixtral"))
    soft = {"weights": "full", "alpha": 1.0}
    trainer = prepared((moe, models[1]), tmp_path / "one", method="kd", kd=soft).trainer
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        logits, targets, _ = completion_logits(trainer.model.eval(), batch)
        expected = trainer.divergence(logits, batch).item() / len(targets)
    trainer.create_optimizer()
    loss = trainer.training_step(trainer.model, batch, torch.tensor(len(targets))).item()
    assert loss == pytest.approx(expected, rel=1e-3 if trainer.teacher.dtype == torch.float32 else 2e-2)

    run = make_run(tmp_path / "run", story_rows(40))
    train_run(make_recipe(moe, models[1], method="kd", kd=soft, learning_rate=1e-2), run)
    assert losses(run)[-1] < 0.8 * losses(run)[0]


def test_an_adapter_is_what_soft_distillation_trains_by_default(models: tuple[str, str], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", story_rows(6))
    train_run(make_recipe(*models, method="kd"), run)
    assert (run.student / "adapter_config.json").is_file()
    assert "base_model_relation: adapter" in (run.student / "README.md").read_text()


def test_trls_trainer_for_kept_answers_has_the_same_loss_and_computes_more(
    models: tuple[str, str], tmp_path: Path
) -> None:
    """Why kd is ours: GOLDTrainer, the only one that takes answers, applies the output heads to prompts and padding."""
    ours = prepared(models, tmp_path / "ours", method="kd", kd={"weights": "full", "alpha": 1.0}).trainer
    batch = next(iter(ours.get_train_dataloader()))
    tokens = (batch["labels"] != MASKED).sum()
    heads: list[int] = []

    def loss_of(trainer: Any, inputs: Any) -> float:
        hook = trainer.model.lm_head.register_forward_hook(lambda head, given, out: heads.append(out.shape[1]))
        with torch.no_grad():
            found = trainer.compute_loss(trainer.model.eval(), inputs, num_items_in_batch=tokens).item()
        hook.remove()
        return float(found)

    loss = loss_of(ours, batch)
    args = GOLDConfig(
        str(tmp_path / "theirs"), lmbda=0, beta=0, temperature=1, max_length=512, per_device_train_batch_size=4,
        bf16=False, use_cpu=True, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    rows = datasets.Dataset.from_list(
        [{k: row[k] for k in ("prompt", "completion")} for row in to_examples(story_rows(6)[2:])]
    )
    student, teacher = (AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32) for model in models)
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    theirs = GOLDTrainer(student, teacher, args, train_dataset=rows, processing_class=tokenizer)
    theirs_batch = theirs.data_collator([theirs.train_dataset[index] for index in range(4)])
    assert (theirs_batch["labels"] != MASKED).sum() == tokens
    assert loss_of(theirs, theirs_batch) == pytest.approx(
        loss, rel=1e-3 if ours.teacher.dtype == torch.float32 else 2e-2
    )
    longest = batch["labels"].shape[1]
    prompt = int((batch["labels"] != MASKED).any(dim=0).nonzero()[0])
    assert heads == [longest - prompt, longest]


@pytest.mark.parametrize("method", ["kd", "gold", "on_policy"])
def test_an_interrupted_soft_training_goes_on_with_the_same_losses(
    models: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    own = {"max_new_tokens": 6, "epochs": 3}
    settings = {"epochs": 3, "checkpoint_steps": 2, "lora_dropout": 0.2, "on_policy": own}
    recipe = make_recipe(*models, method=method, **settings)
    whole, broken = (make_run(tmp_path / name, story_rows(14)) for name in ("whole", "broken"))
    if method == "on_policy":
        for run in (whole, broken):
            train_run(make_recipe(*models, method="lora", epochs=1), run)
    train_run(recipe, whole)
    original = TrainProgress.on_log

    def interrupt(self: TrainProgress, args: Any, state: Any, control: Any, **rest: Any) -> None:
        original(self, args, state, control, **rest)
        if state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainProgress, "on_log", interrupt)
        train_run(recipe, broken)
    train_run(recipe, broken)
    assert len(losses(broken)) == 9 and losses(broken)[0] != losses(broken)[4]
    assert losses(broken) == pytest.approx(losses(whole), rel=1e-5)


def test_a_teacher_of_other_tokens_is_refused(models: tuple[str, str], tmp_path: Path) -> None:
    other = tiny_model(tmp_path / "other", layers=4)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(other)
    run = make_run(tmp_path / "run", story_rows(6))
    recipe = make_recipe(models[0], str(other), method="kd", accept=["filters", "licence", "templates"])
    with pytest.raises(
        RecipeError, match=r"one tokenizer, and .*other has another vocabulary .*\(1 token.*lora or full"
    ):
        train_run(recipe, run)
    assert not run.student.exists()


def test_the_same_words_split_otherwise_are_other_tokens() -> None:
    class Splits:
        def __init__(self, size: int) -> None:
            self.size = size

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "aa": 1}

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [self.size - 1] * (len(text) // self.size)}

    assert differing_tokens(Splits(1), Splits(1), ["aaaa"]) == ""
    assert "splits text into other tokens than the student: 'aaaa'" in differing_tokens(Splits(1), Splits(2), ["aaaa"])


def test_an_apis_teacher_is_refused(models: tuple[str, str], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", story_rows(6))
    with pytest.raises(RecipeError, match=r"needs the teacher's weights, and gpt-4\.1 has none here; use train"):
        train_run(make_recipe(models[0], "gpt-4.1", method="kd"), run, force=True)
    assert not run.student.exists()


def test_a_pruned_student_learns_softly_with_all_its_weights(models: tuple[str, str], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", story_rows(6))
    with pytest.raises(ValidationError, match=r"prune:2 has lost layers, .* set train\.kd\.weights: full, got 'lora'"):
        make_recipe("prune:2", models[1], method="kd")
    train_run(make_recipe("prune:2", models[1], method="kd", kd={"weights": "full"}), run)
    assert AutoModelForCausalLM.from_pretrained(run.student).config.num_hidden_layers == 2


def test_adapters_over_four_bits_need_a_gpu(models: tuple[str, str], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.fail("this test is of a machine without a GPU")
    run = make_run(tmp_path / "run", story_rows(6))
    for settings in ({"method": "qlora"}, {"method": "kd", "kd": {"weights": "qlora"}}):
        with pytest.raises(RecipeError, match="qlora needs a GPU and bitsandbytes"):
            train_run(make_recipe(*models, **settings), run)
