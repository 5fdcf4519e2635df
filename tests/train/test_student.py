"""The student before training: `prune:<k>` takes evenly spaced layers of the teacher, weights and all."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.adapters import torn_file
from pipeline.errors import RecipeError, UsageError
from pipeline.rundir import RunDir
from pipeline.student_config import BUILT
from pipeline.students import after_training, before_training
from tests.tiny_student import make_recipe, make_run, story_rows, tiny_model
from train.run import train_run
from train.student import initial_student, layers_kept


@pytest.mark.parametrize(
    ("total", "k", "layers"),
    [
        (12, 6, [0, 2, 4, 7, 9, 11]),  # DistilBERT's own choice
        (30, 10, [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]),
        (24, 2, [0, 23]),
        (5, 4, [0, 1, 3, 4]),
        (5, 1, [0]),
    ],
)
def test_layers_are_evenly_spaced_from_first_to_last(total: int, k: int, layers: list[int]) -> None:
    assert layers_kept(total, k) == layers


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_pruned_student_has_the_teachers_layers_and_answers(tmp_path: Path, architecture: str) -> None:
    teacher_folder = tiny_model(tmp_path / "teacher", layers=5, architecture=architecture)
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    folder = initial_student(make_recipe("prune:3", str(teacher_folder)), run)
    assert Path(folder) == run.student_init.resolve()

    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder)
    student = AutoModelForCausalLM.from_pretrained(folder)
    assert student.config.num_hidden_layers == 3
    assert len(student.model.layers) == 3
    assert len(getattr(student.config, "layer_types", None) or [None] * 3) == 3
    for layer, source in zip(student.model.layers, (0, 2, 4), strict=True):
        for name, weight in layer.state_dict().items():
            assert torch.equal(weight, teacher.model.layers[source].state_dict()[name])
    assert torch.equal(student.model.embed_tokens.weight, teacher.model.embed_tokens.weight)
    assert torch.equal(student.lm_head.weight, teacher.lm_head.weight)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(teacher_folder).chat_template
    ids = tokenizer("Hi", return_tensors="pt")
    assert student.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > ids["input_ids"].shape[1]


def test_a_pruned_teacher_without_a_tokenizer_is_one_line(tmp_path: Path) -> None:
    teacher, run = tiny_model(tmp_path / "teacher", layers=4), RunDir(tmp_path / "run")
    for file in teacher.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(RecipeError, match=r"student\.model prune:2 needs .* \(.*tokenizer") as caught:
        initial_student(make_recipe("prune:2", str(teacher)), run)
    assert "\n" not in str(caught.value)


def test_a_pruned_student_is_built_once_and_again_when_asked_for_another(tmp_path: Path) -> None:
    teacher = str(tiny_model(tmp_path / "teacher", layers=4))
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    weights = Path(initial_student(make_recipe("prune:2", teacher), run)) / "model.safetensors"
    first = weights.stat().st_ino
    initial_student(make_recipe("prune:2", teacher), run)
    assert weights.stat().st_ino == first
    (run.student_init / BUILT).write_bytes(b"")  # a power cut
    initial_student(make_recipe("prune:2", teacher), run)
    weights.write_bytes(b"")
    initial_student(make_recipe("prune:2", teacher), run)
    assert torn_file(run.student_init) is None
    initial_student(make_recipe("prune:3", teacher), run)
    assert AutoModelForCausalLM.from_pretrained(run.student_init).config.num_hidden_layers == 3


def test_a_base_that_another_training_has_replaced_is_refused_until_train_has_put_it_back(tmp_path: Path) -> None:
    teacher = str(tiny_model(tmp_path / "teacher", layers=4))
    run = make_run(tmp_path / "run", story_rows(6))
    recipe, other = (make_recipe(f"prune:{k}", teacher, method="lora") for k in (2, 1))
    train_run(recipe, run)
    weights = (before_training(recipe, run) / "model.safetensors").read_bytes()
    initial_student(other, run)  # of a training that a check then refuses
    with pytest.raises(UsageError, match=r"student-init: is no longer the model that .*student was trained from"):
        after_training(recipe, run)
    created = run.student.stat().st_ino
    train_run(recipe, run)
    assert (run.student.stat().st_ino, (run.student_init / "model.safetensors").read_bytes()) == (created, weights)
    assert after_training(recipe, run).is_dir()


def test_a_base_that_was_trained_again_since_is_refused_and_trained_on_anew(tmp_path: Path) -> None:
    base = make_run(tmp_path / "base", story_rows(6))
    train_run(make_recipe(str(tiny_model(tmp_path / "model"))), base)
    run, recipe = make_run(tmp_path / "run", story_rows(6)), make_recipe(str(base.student), method="lora")
    train_run(recipe, run)
    train_run(make_recipe(str(tmp_path / "model"), epochs=2), base)
    with pytest.raises(UsageError, match=r"base/student: is no longer the model that .*run/student was trained from"):
        before_training(recipe, run)
    created = run.student.stat().st_ino
    train_run(recipe, run)
    assert run.student.stat().st_ino != created and before_training(recipe, run) == base.student


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("prune:0", "give a number of layers, at least 1"),
        ("prune:few", "model prune:few: give a number of layers"),
        ("prune:4", "has 4 layers; choose 1 to 3"),
    ],
)
def test_an_impossible_number_of_layers_is_refused(tmp_path: Path, reference: str, reason: str) -> None:
    teacher = str(tiny_model(tmp_path / "teacher", layers=4))
    run = RunDir(tmp_path / "run")
    with pytest.raises((RecipeError, ValidationError), match=reason):
        initial_student(make_recipe(reference, teacher), run)
    assert not run.student_init.exists()


def test_a_student_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="model /no/such/model: the folder is not there"):
        initial_student(make_recipe("/no/such/model"), RunDir(tmp_path))
