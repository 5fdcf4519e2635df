"""On-policy distillation: where it starts, that the answers are the student's own, the loss, and what TRL's do."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig
from trl import DistillationConfig, DistillationTrainer
from trl.trainer.utils import RepeatSampler

from pipeline.errors import DistillError, RecipeError, UsageError
from pipeline.records import encode_line
from pipeline.students import trained_section
from pipeline.teacher_config import TeacherConfig
from pipeline.train_config import TrainConfig
from tests.servers.fake_vllm import scoring
from tests.tiny_student import END, SHAPE, log_of, make_recipe, make_run, saved, story_rows, tiny_model
from train.on_policy import EpochSampler
from train.rows import read_parts, to_examples
from train.run import train_run
from train.setting import Setting
from train.tokens import MASKED
from train.trainer import prepare

SMALL = {"max_new_tokens": 8}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A student that stops often, and a teacher whose outputs are padded to a rounder number."""
    folder = tmp_path_factory.mktemp("models")
    student, teacher = tiny_model(folder / "student"), tiny_model(folder / "teacher", layers=4)
    for path in (student, teacher):
        model = AutoModelForCausalLM.from_pretrained(path)
        with torch.no_grad():
            if path == teacher:
                model.resize_token_embeddings(264, mean_resizing=False)
                model.lm_head.weight.normal_(std=0.3)
            model.lm_head.weight[END] = 0.05 * model.model.norm.weight
        model.save_pretrained(path)
    return str(student), str(teacher)


def trainer_of(models: tuple[str, str], folder: Path, *, url: str = "", **train: Any) -> Any:
    rows = story_rows(6)
    examples = {"train": to_examples(rows[2:]), "validation": to_examples(rows[:2])}
    config = make_recipe(*models, method="on_policy", **train).train
    teacher = TeacherConfig(model=models[1], **({"base_url": url} if url else {}))
    return prepare(models[0], examples, Setting(config, folder, Console(quiet=True), teacher=teacher)).trainer


def by_hand(models: tuple[str, str], inputs: Any, beta: float) -> float:
    """The divergence per token of the samples, in float64."""
    student, teacher = (AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval() for model in models)
    total, tokens = 0.0, 0
    for prompt, mask, answer, told in zip(
        *(inputs[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")), strict=True
    ):
        prompt, answer = prompt[mask.bool()], answer[told.bool()]
        ids = torch.cat([prompt, answer])[None]
        with torch.no_grad():
            q, p = (
                model(input_ids=ids).logits[0, len(prompt) - 1 : -1, :259].log_softmax(-1)
                for model in (student, teacher)
            )
        m = (beta * p.exp() + (1 - beta) * q.exp()).log()
        of_p, of_q = ((log.exp() * (log - m)).sum().item() for log in (p, q))
        whole = {0: (p.exp() * (p - q)).sum().item(), 1: (q.exp() * (q - p)).sum().item()}
        total += whole.get(beta, beta * of_p + (1 - beta) * of_q)
        tokens += len(answer)
    return total / tokens


@pytest.mark.parametrize("beta", [0, 0.5, 1])
def test_the_loss_is_the_divergence_on_the_students_own_answers(
    models: tuple[str, str], tmp_path: Path, beta: float
) -> None:
    trainer = trainer_of(
        models, tmp_path, kd={"weights": "full"}, on_policy={**SMALL, "beta": beta}, micro_batch_size=4
    )
    asked = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    inputs = trainer._prepare_inputs(asked)
    student = AutoTokenizer.from_pretrained(models[0])
    for prompt, mask in zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True):
        assert student.decode(prompt[mask.bool()]).endswith("<|im_start|>assistant\n")
    lengths = inputs["completion_mask"].sum(dim=1)
    assert len(lengths) == 4 and lengths.max() <= 8
    for answer, length in zip(inputs["completion_ids"].tolist(), lengths.tolist(), strict=True):
        assert END not in answer[: length - 1] and (answer[length - 1] == END or length == 8)
    trainer.create_optimizer()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, inputs).item()
    exact = trainer.teacher_model.dtype == torch.float32
    assert loss == pytest.approx(by_hand(models, inputs, beta), rel=1e-3 if exact else 5e-2)


def test_a_mixture_of_experts_draws_its_answers(models: tuple[str, str], tmp_path: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    student = saved(Qwen3MoeConfig(**SHAPE, **experts), tmp_path / "student")
    trainer = trainer_of((str(student), models[1]), tmp_path / "t", kd={"weights": "lora"}, on_policy=SMALL)
    ids, mask = torch.tensor([[END, 5, 6], [5, 6, 7]]), torch.tensor([[0, 1, 1], [1, 1, 1]])  # prompts of two lengths
    drawn = trainer.model.generate(input_ids=ids, attention_mask=mask, generation_config=trainer.generation_config)
    assert drawn.shape[1] > ids.shape[1]


def test_the_warm_up_counts_the_full_steps_alone(models: tuple[str, str], tmp_path: Path) -> None:
    trainer = trainer_of(models, tmp_path, batch_size=3, warmup=0.5, on_policy={**SMALL, "epochs": 4})
    assert trainer.args.warmup_steps == 2  # of 4: an epoch leaves out one of its 4 rows


def test_it_starts_from_a_student_that_learned_from_answers(models: tuple[str, str], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", story_rows(20))
    recipe = make_recipe(
        *models, method="on_policy", on_policy={**SMALL, "learning_rate": 5e-3, "epochs": 2, "beta": 0}
    )
    train_run(recipe, run)  # there is none yet: one learns first
    first, then = trained_section(run.student_sft), trained_section(run.student)
    assert (first["method"], then["method"], then["start"]) == ("lora", "on_policy", first)
    assert (run.student_sft / "adapter_config.json").is_file() and (run.student / "model.safetensors").is_file()
    assert then["steps"] == 8 and then["hyperparameters"]["on_policy"]["max_new_tokens"] == 8
    log = log_of(run)
    assert log["tokens"] > 0
    losses = [entry["loss"] for entry in log["loss"]]
    assert sum(losses[-3:]) < sum(losses[:3])
    card = (run.student / "README.md").read_text()
    assert "max_new_tokens" in card and "| before | lora on" in card

    made = (run.student / "model.safetensors").stat().st_mtime_ns
    train_run(recipe, run)
    assert (run.student / "model.safetensors").stat().st_mtime_ns == made  # up to date
    longer = recipe.train.on_policy.model_copy(update={"epochs": 1})
    train_run(recipe.model_copy(update={"train": recipe.train.model_copy(update={"on_policy": longer})}), run)
    then = trained_section(run.student)
    assert then["steps"] == 4 and then["start"] == first  # not the student of the first on-policy training


def test_the_student_that_it_starts_from_is_of_the_same_rows_and_settings(
    models: tuple[str, str], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", story_rows(20))
    recipe = make_recipe(*models, method="on_policy", on_policy={**SMALL, "beta": 0})
    train_run(recipe, run)
    run.kept.write_bytes(b"".join(map(encode_line, story_rows(30))))
    other = recipe.train.model_copy(update={"learning_rate": 5e-3})
    train_run(changed := recipe.model_copy(update={"train": other}), run)
    then = trained_section(run.student)
    assert then["start"]["rows"] == then["rows"] == len(read_parts(changed, run).train)
    assert then["start"]["hyperparameters"]["learning_rate"] == 5e-3

    by_hand = other.model_copy(update={"method": "full"})  # not kd.weights: it is taken as it is
    train_run(recipe.model_copy(update={"train": by_hand}), run)
    own = trained_section(run.student)
    train_run(changed, run)
    assert trained_section(run.student)["start"] == own


def test_it_does_not_start_from_a_student_that_may_know_the_test_answers(
    models: tuple[str, str], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", story_rows(20))
    recipe = make_recipe(*models, method="full")
    train_run(recipe, run)
    prompts = recipe.prompts.model_copy(update={"seed": 7})
    train = recipe.train.model_copy(update={"method": "on_policy"})
    with pytest.raises(
        UsageError, match=r"student: trained when the prompts were parted otherwise \(.*\), so it may know"
    ):
        train_run(recipe.model_copy(update={"prompts": prompts, "train": train}), run)


def test_a_served_teacher_needs_no_weights_here(models: tuple[str, str], tmp_path: Path) -> None:
    with scoring(models[1]) as server:
        own = {"kd": {"weights": "full", "teacher": "served", "top_k": 20}, "micro_batch_size": 4}
        trainer = trainer_of(models, tmp_path, url=server.url, on_policy={**SMALL, "beta": 0}, **own)
        assert (trainer.teacher_model, trainer.loss_top_k) == (None, 20)
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        with torch.no_grad():
            loss = trainer.compute_loss(trainer.model, inputs).item()
        assert 0 < loss < by_hand(models, inputs, 0)  # what is not told apart cannot differ
        trainer._step = 0
        trainer.train()
    assert trainer.state.global_step == 1 and trainer.state.log_history[0]["loss"] > 0


def test_trls_own_order_is_lost_with_a_process() -> None:
    """Why the sampler is ours: TRL's begins the second epoch after a resume as it began the first."""
    kinds: list[Any] = [RepeatSampler, EpochSampler]
    for kind in kinds:
        whole, resumed = (kind(range(12), 1, batch_size=4, seed=3) for _ in range(2))
        epochs = []
        for epoch in range(2):
            if kind is EpochSampler:
                whole.set_epoch(epoch)
            epochs.append(list(whole))
        if kind is EpochSampler:
            resumed.set_epoch(1)
        assert (list(resumed) == epochs[1]) == (kind is EpochSampler)
        assert epochs[0] != epochs[1]


def test_trls_own_trainer_takes_no_answers_no_other_outputs_and_no_tools(
    models: tuple[str, str], tmp_path: Path
) -> None:
    """Why kd is not its business, and why prompts are tokens and a teacher's outputs are cut."""
    student, teacher = (AutoModelForCausalLM.from_pretrained(model) for model in models)
    args = DistillationConfig(
        str(tmp_path),
        max_completion_length=4,
        per_device_train_batch_size=2,
        bf16=False,
        use_cpu=True,
        report_to="none",
    )
    tool = [{"type": "function", "function": {"name": "count", "parameters": {}}}]
    rows = datasets.Dataset.from_list([{**row, "tools": json.dumps(tool)} for row in to_examples(story_rows(4))])
    given = {"args": args, "train_dataset": rows, "processing_class": AutoTokenizer.from_pretrained(models[0])}
    with pytest.raises(ValueError, match="vocab_size 259 but the teacher model has vocab_size 264"):
        DistillationTrainer(student, teacher, **given)
    teacher.resize_token_embeddings(259)
    theirs = DistillationTrainer(student, teacher, **given)
    theirs.processing_class.chat_template = "{{ tools }}" + theirs.processing_class.chat_template
    inputs = theirs._prepare_inputs(next(iter(theirs.get_train_dataloader())))
    asked = theirs.processing_class.decode(inputs["prompt_ids"][0])
    assert "count" not in asked  # the row's own tools are left out
    assert inputs["completion_ids"].shape[1] <= 4  # drawn, though the rows have answers


def test_what_cannot_be_is_refused(models: tuple[str, str], tmp_path: Path) -> None:
    TrainConfig(method="lora", kd={"teacher": "served", "temperature": 2})  # a method that follows no distribution
    for wrong, word in (
        ({"method": "on_policy", "kd": {"teacher": "stored"}}, "stored is not for method on_policy"),
        ({"method": "on_policy", "kd": {"weights": "qlora"}}, "qlora is not for method on_policy"),
        ({"method": "gold", "kd": {"teacher": "served"}}, "served is not for method gold"),
        ({"method": "kd", "kd": {"teacher": "served", "temperature": 2}}, "temperature must be 1"),
        ({"method": "kd", "kd": {"teacher": "stored"}, "loss_on": "all"}, "loss_on all is not for kd.teacher stored"),
        ({"method": "gold", "loss_on": "all"}, "loss_on all is not for method gold"),
    ):
        with pytest.raises(ValueError, match=word):
            TrainConfig(**wrong)
    run = make_run(tmp_path / "run", story_rows(6))
    with pytest.raises(RecipeError, match="rollouts vllm needs a GPU"):
        train_run(make_recipe(*models, method="on_policy", on_policy={"rollouts": "vllm"}), run)
    other = tiny_model(tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["cat sat"])
    tokenizer.save_pretrained(other)
    for teacher, word in (("gpt-4.1", "needs the teacher's weights"), (str(other), "has another vocabulary")):
        with pytest.raises(RecipeError, match=word):
            train_run(make_recipe(models[0], teacher, method="on_policy"), run, force=True)
    served = make_recipe(*models, method="on_policy", kd={"teacher": "served"})
    nowhere = served.teacher.model_copy(update={"base_url": "http://127.0.0.1:9/v1"})
    with pytest.raises(DistillError, match="cannot be reached"):
        train_run(served.model_copy(update={"teacher": nowhere}), run)
    assert not run.student.exists()
    trainer = trainer_of(models, tmp_path / "one", on_policy=SMALL)
    assert all(
        MASKED in row["labels"] and row["prompt"] == row["input_ids"][: len(row["prompt"])]
        for row in trainer.train_dataset
    )
